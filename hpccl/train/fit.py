"""Training on one task, from the step at which the state is."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from hpccl.checkpoint.store import Mark
from hpccl.config.curvature import SiCurvature
from hpccl.config.optim import VognOptim
from hpccl.curvature.online import watch_squares
from hpccl.data.order import BatchPlan, mix
from hpccl.data.protocols import Task
from hpccl.data.rows import Request, Rows
from hpccl.train.compose import Composer, MicroBatch, split
from hpccl.train.distill import Distilled, record
from hpccl.train.diverged import Failure, diagnose
from hpccl.train.functional import Recalled, recalled, rows_memory
from hpccl.train.hold import hold, last_name
from hpccl.train.meter import Meter
from hpccl.train.normal import normal_prior
from hpccl.train.plan import head_steps, plan_task
from hpccl.train.state import RunState, World
from hpccl.train.step import train_step
from hpccl.train.topology import ASKED_BY, Topology

__all__ = ["fit"]

# Steps between agreements of all ranks on stopping: few enough for any grace period, many enough to cost nothing.
_POLL = 5

Batches: TypeAlias = Generator[tuple[list[MicroBatch], list[Rows]], None, None]


def fit(task: Task, state: RunState, world: World) -> bool:
    """Train on a task, with checkpoints in between; return False if stopped (and saved) before the end."""
    config, engine = world.config, state.engine
    memory = rows_memory(config, state.prior.memory)
    plan = plan_task(config, world.stream, task, memory)
    first, alone = state.mark.step, head_steps(config, plan)
    if first == 0:
        if config.train.restart:
            engine.reset()
        engine.start(num_steps=alone or plan.num_steps, task=task.index, num_train=plan.num_train)
    hold(task, state, world, head_only=first < alone)
    distilled = Distilled.of(config, world.stream, task)
    teacher = _teacher(state, world, distilled)
    composer = Composer.build(
        config,
        world.stream,
        task,
        memory,
        teacher=teacher,
        device=engine.device,
        distilled=distilled,
        topology=_topology(state, world),
    )
    if distilled is not None and distilled.config.view == "recorded":
        composer = _recorded(task, composer, distilled, state, world)
    detach = _attach(task, state, world, plan)
    world.progress.begin(task.name, "fit", plan.num_steps, first)
    try:
        with world.phase(task, "fit", part=first) as phase:

            def save(done: int) -> None:
                phase.images = plan.num_rows(first, done)
                phase.spent(done)
                world.save(state, Mark.at(task.index, "fit", done))

            last = _steps(task, state, world, plan, composer, save=save)
            phase.images = plan.num_rows(first, last)
    finally:
        detach()
    if last < plan.num_steps:
        return False
    engine.finish()
    engine.hold({}, frozenset())
    world.save(state, Mark.at(task.index, "fitted", plan.num_steps))
    return True


def _steps(
    task: Task, state: RunState, world: World, plan: BatchPlan, composer: Composer, *, save: Callable[[int], None]
) -> int:
    """Run steps until the end or a stop request (then save); return the number of steps done."""
    with (
        contextlib.closing(_batches(plan, composer, world, state.mark.step)) as batches,
        contextlib.closing(_recalled(task, plan, state, world)) as past,
    ):
        return _run_steps(task, state, world, plan, batches=batches, past=past, save=save)


def _run_steps(
    task: Task,
    state: RunState,
    world: World,
    plan: BatchPlan,
    *,
    batches: Batches,
    past: Iterator[Recalled | None],
    save: Callable[[int], None],
) -> int:
    first = state.mark.step
    every = world.config.checkpoint.every
    meter = Meter(task, world, plan, state)
    alone = head_steps(world.config, plan)
    for step in range(first, plan.num_steps):
        if step == alone > 0:
            _learn_all(task, state, world, plan)
        parts, rows = next(batches)
        torch.manual_seed(int(mix(plan.seed, plan.task, step, world.comm.rank)) >> 1)
        num_rows = len(parts[0].batch)
        stats = train_step(state.engine, rows, num_rows=num_rows, recalled=next(past))
        if not bool(torch.isfinite(stats.gradient_norm)):
            raise diagnose(Failure(task, step, parts, rows, stats.terms), state, world)
        done = step + 1
        meter.update(done, len(parts[0].batch), stats)
        if done == plan.num_steps:
            break
        if done % _POLL == 0:
            world.settle(state, wait=False)
        stopping = done % _POLL == 0 and world.stop.requested(world.comm)
        if stopping or (every and done % every == 0):
            save(done)
        if stopping:
            return done
    return plan.num_steps


def _batches(plan: BatchPlan, composer: Composer, world: World, first: int) -> Batches:
    """Yield this rank's parts of each step and their rows; images are prefetched."""
    accumulate = world.config.train.accumulate
    asked: deque[list[MicroBatch]] = deque()  # in another thread, some steps ahead

    def requests() -> Iterator[Request]:
        for step in range(first, plan.num_steps):
            parts = split(plan.batch(step), world.comm, accumulate=accumulate, anchors=composer.num_anchors)
            asked.append(parts)
            for part in parts:
                yield composer.request(part)

    with contextlib.closing(world.stream.load(requests(), device=world.comm.device)) as images:
        for _ in range(first, plan.num_steps):
            following = next(images)  # only then its step is known to be asked for
            parts = asked.popleft()
            rows = [composer.rows(parts[0], following)]
            yield parts, rows + [composer.rows(part, next(images)) for part in parts[1:]]


def _recalled(task: Task, plan: BatchPlan, state: RunState, world: World) -> Generator[Recalled | None, None, None]:
    """Yield what each step recalls for the functional prior; None where there is no such prior."""
    fromp, memory = state.prior.fromp, state.prior.memory
    if fromp is None:
        yield from itertools.repeat(None)
        return
    first, stop, num = state.mark.step, plan.num_steps, plan.num_train
    yield from recalled(fromp, memory, world, task=task.index, num_train=num, first=first, stop=stop)


def _learn_all(task: Task, state: RunState, world: World, plan: BatchPlan) -> None:
    """End the phase in which only the last layer learns: all weights learn, with a new optimiser and schedule."""
    num_steps = plan.num_steps - head_steps(world.config, plan)
    state.engine.start(num_steps=num_steps, task=task.index, num_train=plan.num_train)
    hold(task, state, world, head_only=False)


def _topology(state: RunState, world: World) -> Topology | None:
    """Return the losses that the net of nodes (TOPIC) adds in this task; None without a net."""
    if state.prior.gas is None:
        return None
    return Topology.of(state.prior.gas, world.config.prior.topology, last_name(state, world, ASKED_BY))


def _teacher(state: RunState, world: World, distilled: Distilled | None) -> Callable[[Tensor], Tensor] | None:
    """Return the frozen old model if soft labels or distillation need its logits of the student's views; else None."""
    prior = state.prior
    soft = world.config.prior.view == "teacher" and not bool(prior.memory.replay.all())
    same = distilled is not None and distilled.config.view == "same"
    return _old_network(state) if prior.anchor is not None and (soft or same) else None


def _old_network(state: RunState) -> Callable[[Tensor], Tensor]:
    """Return the network as it was when the last task ended, with its logits corrected if there is a correction."""
    prior = state.prior
    assert prior.anchor is not None, "a task has ended"
    network, correction = state.engine.frozen(prior.anchor), prior.correction
    return network if correction is None else lambda pixels: correction(network(pixels))


def _recorded(task: Task, composer: Composer, distilled: Distilled, state: RunState, world: World) -> Composer:
    """Record the old network's logits of evaluation views: of the task's data, and of memory if that is distilled."""
    samples = composer.samples
    if distilled.config.images == "all":
        samples = np.concatenate([samples, composer.memory.sample.numpy()])
    with world.phase(task, "record") as phase:
        phase.images = len(samples)
        found = record(samples, distilled.heads, _old_network(state), world)
    return replace(composer, distilled=replace(distilled, recorded=found))


def _attach(task: Task, state: RunState, world: World, plan: BatchPlan) -> Callable[[], None]:
    """Attach the priors on weights and what else hooks into the engine; the returned function detaches them."""
    engine, quadratic = state.engine, state.prior.quadratic
    normal = normal_prior(task, state.prior, world)
    with contextlib.ExitStack() as stack:
        for part in (normal, quadratic):
            if part is not None:
                stack.callback(part.attach(engine, world.comm, num_train=plan.num_train))
        curvature = world.config.curvature
        of_task = isinstance(curvature, SiCurvature) and curvature.gradient == "task"
        if quadratic is not None and world.config.records_path and of_task:
            stack.callback(engine.follow(quadratic.pull_on(plan.num_train)))
        if isinstance(world.config.optim, VognOptim):
            stack.callback(watch_squares(engine.training_module, engine.add_squares, lambda: engine.image_weights))
        return stack.pop_all().close
