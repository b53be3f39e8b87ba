"""Measuring, at the end of a task, the curvature of past examples that are not in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpccl.config.base import per_task
from hpccl.config.curvature import (
    DenseCurvature,
    DiagonalCurvature,
    MasCurvature,
    OptimizerCurvature,
    PassCurvature,
    SiCurvature,
)
from hpccl.curvature.build import build_estimator
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.learned import learned_diagonal
from hpccl.curvature.protocols import Examples, Precision, Totals
from hpccl.curvature.si import synaptic
from hpccl.data.order import subset
from hpccl.data.protocols import Task, training_samples
from hpccl.dist.spread import Leaves
from hpccl.memory.store import Memory
from hpccl.prior.fromp import Fromp
from hpccl.prior.quadratic import Quadratic
from hpccl.train.functional import functional_prior
from hpccl.train.state import RunState, World
from hpccl.train.task_pass import TaskPass

__all__ = ["functional", "measure"]

Ints = npt.NDArray[np.int64]

_SUBSAMPLE = 103  # purpose of a hash


def measure(
    task: Task, memory: Memory, anchor: Leaves, state: RunState, world: World, *, before: Memory | None = None
) -> Quadratic | None:
    """Return the quadratic with the curvature of the task's examples that are not in memory; None if weight is 0.

    Examples that were in the memory `before` and have left it (memory.total) are measured as well, so that every past
    example is either in memory or in the quadratic.
    """
    config = world.config.prior.quadratic
    if config.weight == 0:
        return None
    with world.phase(task, "curvature") as phase:
        rest = _rest(task, memory, before or Memory.empty(), world)
        precision, count = _precision(task, rest, anchor, state, world)
        phase.images = count if isinstance(world.config.curvature, PassCurvature) else 0
        new = precision.totals(world.comm)
        if state.prior.quadratic is None:
            quadratic = Quadratic(precision, anchor, config.weight, config.damping, products=config.products)
        else:
            own = state.engine.like if config.anchor == "each" else ()
            quadratic = state.prior.quadratic.plus(precision, anchor, world.comm, own_anchors=own, decay=config.decay)
    _write_curvature(task, new, quadratic.precision, world, num_examples=count, state=state)
    return quadratic


def functional(task: Task, memory: Memory, state: RunState, world: World) -> Fromp | None:
    """Return the functional prior, with the curvature of all examples of all past tasks; None if its weight is 0."""
    precision = None
    if world.config.prior.fromp.weight > 0 and world.config.measures_curvature:
        with world.phase(task, "curvature") as phase:
            every = _rest(task, Memory.empty(), Memory.empty(), world)
            precision = _measured(task, every, state, world)
            phase.images = len(every.samples)
            new = precision.totals(world.comm)
            before = state.prior.precision
            precision = precision if before is None else before.plus(precision, world.comm)
        _write_curvature(task, new, precision, world, num_examples=len(every.samples), state=state)
    return functional_prior(task, memory, precision, state, world)


@dataclass(frozen=True)
class _Rest:
    """Examples of the past that are not in memory, or a random share of them.

    samples: [n] positions, ascending; times: number of examples that each one represents
    """

    samples: Ints
    times: float


def _rest(task: Task, memory: Memory, before: Memory, world: World) -> _Rest:
    """Return the examples of the task and of the memory `before` that are not in `memory`, or a random share."""
    every = np.union1d(training_samples(task), before.sample.numpy())
    rest = np.setdiff1d(every, memory.sample.numpy())
    fraction = per_task(world.config.curvature.fraction, task.index)
    if fraction == 1 or len(rest) == 0:
        return _Rest(rest, 1.0)
    count = max(1, round(fraction * len(rest)))
    return _Rest(subset(rest, count, world.config.seed, _SUBSAMPLE, task.index), len(rest) / count)


@dataclass(frozen=True)
class _Passes:
    """This rank's share of examples of several tasks, with the head of rows of the past; may be iterated repeatedly."""

    task: Task
    samples: Ints
    world: World
    group: int

    def __iter__(self) -> Iterator[Examples]:
        for task, samples in self._by_head():
            yield from TaskPass(task, samples, self.world, self.group)

    def _by_head(self) -> Iterator[tuple[Task, Ints]]:
        """Yield (task, samples) with a common head: all samples at once where all seen classes compete."""
        if self.world.config.train.head == "seen":
            yield self.task, self.samples
            return
        for task in self.world.stream.tasks[: self.task.index + 1]:
            own = self.samples[np.isin(self.samples, training_samples(task))]
            if len(own) or task.index == self.task.index:
                yield task, own


def _measured(task: Task, rest: _Rest, state: RunState, world: World) -> Precision:
    """Measure the curvature on `rest`, scaled to all examples that it represents."""
    config = world.config.curvature
    assert isinstance(config, PassCurvature), "others need no pass"
    estimator = build_estimator(config, world.config.seed, state.coverage)
    network = state.engine.whole_module() if isinstance(config, DenseCurvature) else state.engine.module
    group = config.group if isinstance(config, (DiagonalCurvature, MasCurvature)) else 1
    passes = _Passes(task, rest.samples, world, group)
    return estimator.estimate(network, passes, world.comm).times(rest.times)


def _write_curvature(
    task: Task, new: Totals, precision: Precision, world: World, *, num_examples: int, state: RunState
) -> None:
    total = precision.totals(world.comm)
    world.log.write(
        "curvature",
        task=task.index,
        kind=world.config.curvature.kind,
        trace=new.trace,
        total_trace=total.trace,
        num_examples=num_examples,
        bytes=total.num_bytes,
        rank_bytes=total.rank_bytes,
        terms=total.terms,
        error=total.error,
        parameters=sum(parameter.numel() for parameter in state.engine.module.parameters()),
    )


def _precision(task: Task, rest: _Rest, anchor: Leaves, state: RunState, world: World) -> tuple[Precision, int]:
    """Return the curvature, summed over all examples that `rest` represents, and how many were used; collective."""
    config = world.config.curvature
    if isinstance(config, SiCurvature):
        (credit, start), count = state.engine.path(), state.engine.num_train  # omega is that of a mean over these
        return synaptic(credit, start, anchor, xi=config.xi, num_examples=count, limit=config.limit), count
    if isinstance(config, OptimizerCurvature):
        return _learned(rest.samples, state, world), len(rest.samples)
    return _measured(task, rest, state, world), len(rest.samples)


def _learned(samples: Ints, state: RunState, world: World) -> Precision:
    """Return the curvature that the optimiser has learned from the samples it trained on."""
    config, quadratic = world.config.prior.quadratic, state.prior.quadratic
    past = None if quadratic is None else quadratic.precision
    assert past is None or isinstance(past, Diagonal), "all tasks' curvatures are of one kind"
    return learned_diagonal(
        state.engine,
        world.config.optim,
        world.comm,
        num_train=len(samples),
        past=past,
        weight=config.weight,
        damping=config.damping,
    )
