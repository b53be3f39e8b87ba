"""Building the plan of a run from its configuration and the number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hpccl.config.curvature import PassCurvature, SiCurvature
from hpccl.config.optim import TimmOptim, VognOptim, passes_of, trials_of
from hpccl.config.run import RunConfig
from hpccl.curvature.capture import working_bytes
from hpccl.data.build import outline
from hpccl.data.outline import Outline
from hpccl.dist.mesh import pick_device
from hpccl.models.build import refuse_sizes
from hpccl.report.text import size
from hpccl.tools.plan.curvature import CurvaturePlan, plan_curvature
from hpccl.tools.plan.measure import Rates, measure
from hpccl.tools.plan.network import Network, forward_flops, look, moments
from hpccl.tools.plan.sharding import FLOAT, Sharding, all_reduce, elements, held, rows, sent
from hpccl.train.checks import check_memory
from hpccl.train.kept import kept_of_tasks, num_learned
from hpccl.train.plan import num_new, plan_run

__all__ = ["Held", "Plan", "Sent", "Spent", "Views", "make_plan"]

_LABEL = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of a soft label's logit
_EXAMPLE = 45  # bytes of a kept example without its soft label

When = Literal["always", "training", "measuring"]


@dataclass(frozen=True)
class Held:
    """Bytes held by the rank that holds most, when it holds them, and whether in host memory."""

    name: str
    num_bytes: float
    when: When = "always"
    host: bool = False


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends, in every step or at the end of every task."""

    name: str
    num_bytes: float
    when: Literal["step", "task"] = "step"


@dataclass(frozen=True)
class Spent:
    """Seconds of a step with the largest views; views: whether it is less with smaller ones."""

    name: str
    seconds: float
    views: bool = False


@dataclass(frozen=True)
class Views:
    """Steps of the whole run whose training views have a side of `side` pixels.

    cost: of a pass, as a fraction of one with the largest views
    """

    side: int
    steps: int
    cost: float


@dataclass(frozen=True)
class Plan:
    """The cost of a run at its last task, which is the largest, with the largest views.

    moments: numbers that the optimiser keeps of each weight
    rows: images of a micro-batch on a rank
    steps: of the whole run
    terms, most_terms: of a layer's curvature, and the most if no merge is within its tolerance; 0 without a quadratic
    spent: if nothing overlaps; empty if nothing was measured
    views: steps by size of the views, where these grow; else empty
    """

    run: str
    engine: dict[str, Any]
    method: str
    nodes: int
    nproc: int
    num_weights: int
    moments: float
    num_classes: int
    tasks: int
    rows: int
    batch_size: int
    steps: int
    terms: int
    most_terms: int
    held: tuple[Held, ...]
    sent: tuple[Sent, ...]
    spent: tuple[Spent, ...]
    rates: Rates | None
    notes: tuple[str, ...]
    views: tuple[Views, ...] = ()

    @property
    def ranks(self) -> int:
        """Number of processes on all nodes."""
        return self.nodes * self.nproc

    def peak(self, when: When) -> float:
        """Bytes on the device while training or measuring."""
        return sum(each.num_bytes for each in self.held if not each.host and each.when in ("always", when))

    @property
    def host(self) -> float:
        """Bytes that a rank holds in host memory, in addition to those on the device."""
        return sum(each.num_bytes for each in self.held if each.host)

    def wire(self, when: Literal["step", "task"]) -> float:
        """Bytes that a rank sends in every step, or at the end of every task."""
        return sum(each.num_bytes for each in self.sent if each.when == when)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step with the largest views; None if nothing was measured."""
        return sum(each.seconds for each in self.spent) if self.spent else None

    @property
    def run_seconds(self) -> float | None:
        """Seconds of all steps, each with views of its size; None if nothing was measured."""
        if self.step_seconds is None:
            return None
        saved = sum(each.steps * (1 - each.cost) for each in self.views)
        return self.steps * self.step_seconds - saved * sum(each.seconds for each in self.spent if each.views)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and their sums as JSON values."""
        sums = {
            "ranks": self.ranks,
            "training_bytes": self.peak("training"),
            "measuring_bytes": self.peak("measuring"),
            "host_bytes": self.host,
            "step_wire_bytes": self.wire("step"),
            "task_wire_bytes": self.wire("task"),
            "step_seconds": self.step_seconds,
            "run_seconds": self.run_seconds,
        }
        return {**asdict(self), "sums": sums}


def make_plan(
    config: RunConfig, *, nodes: int, nproc: int, measured: bool = True, gigabytes_per_second: float | None = None
) -> Plan:
    """Plan the cost of `config` on `nodes` machines with `nproc` processes each; nothing is trained.

    Args:
        config: of the run; only the indices of its data are read.
        nodes: number of machines.
        nproc: processes on each.
        measured: whether to time a micro-batch on this machine.
        gigabytes_per_second: bandwidth at which a process sends to others; None: communication time is left out.

    Raises:
        ConfigError: the model is unknown, or does not fit the images or the ranks; or memory does not fit the tasks.
        CoverageError: a factor of the curvature would be larger than allowed.
        DataError: the data is not there.
    """
    ranks = nodes * nproc
    sharding = Sharding.of(config.engine, ranks)
    stream = outline(config.stream, config.data)
    num_classes, num_tasks = len(stream.class_names), len(stream.tasks)
    check_memory(config, stream)
    refuse_sizes(config.model, image_shape=stream.image_shape, num_classes=num_classes, sides=config.data.sides())
    rows = math.ceil(math.ceil(config.train.batch_size / ranks) / config.train.accumulate)
    network = look(config, image_shape=stream.image_shape, num_classes=num_classes, rows=max(rows, 2))
    curvature = None
    if config.measures_curvature:
        curvature = plan_curvature(config.curvature, network.layouts, network.rest, sharding, tasks=num_tasks)
    case = _Case(config, stream, sharding, network, curvature)
    kept, rates = moments(config), None
    if measured:
        rates = measure(config, image_shape=stream.image_shape, num_classes=num_classes, rows=rows)
    return Plan(
        run=config.name,
        engine=config.engine.model_dump(mode="json"),
        method=config.method,
        nodes=nodes,
        nproc=nproc,
        num_weights=network.num_weights,
        moments=kept,
        num_classes=num_classes,
        tasks=num_tasks,
        rows=rows,
        batch_size=config.train.batch_size,
        steps=sum(plan.num_steps for plan in plan_run(config, stream)),
        terms=0 if curvature is None else curvature.terms,
        most_terms=0 if curvature is None else curvature.most_terms,
        held=tuple(case.held(kept)),
        sent=tuple(case.sent()),
        spent=() if rates is None else tuple(case.spent(rates, gigabytes_per_second)),
        rates=rates,
        notes=(*_notes(case, rates, gigabytes_per_second), *_shown_beside(config)),
        views=tuple(case.views()),
    )


@dataclass(frozen=True)
class _Case:
    """The quantities from which the entries of a plan are computed."""

    config: RunConfig
    stream: Outline
    sharding: Sharding
    network: Network
    curvature: CurvaturePlan | None

    def held(self, kept: float) -> Iterator[Held]:
        """Yield what the rank that holds most holds; kept: numbers that the optimiser keeps of each weight."""
        config, network, sharding = self.config, self.network, self.sharding
        for name, num_bytes in held(network.shapes, network.largest_unit, kept, sharding).items():
            yield Held(name, num_bytes, *_when(name, sharding))
        yield Held("buffers", network.buffer_bytes)
        if sharding.has_second_network:
            second = FLOAT * rows(network.shapes, sharding) + network.buffer_bytes
            yield Held("network for passes outside training", second)
            yield Held("whole blocks", 4 * FLOAT * network.largest_unit, "measuring")
        yield from self._held_trial()
        weights = FLOAT * elements(network.shapes, sharding, what="weights")
        if config.train.ema is not None:
            yield Held("averaged weights", weights, "training")
        if len(self.stream.tasks) > 1 and (config.train.frozen or config.train.head_epochs):
            yield Held("weights that do not learn", weights, "training")
        if config.train.restart:
            yield Held("first weights", weights + network.buffer_bytes)
        elif len(self.stream.tasks) > 1:
            yield Held("old weights", weights + network.buffer_bytes)
            yield Held("the next old weights", weights + network.buffer_bytes, "measuring")
        if self._has_teacher:
            blocks = 2 * FLOAT * network.largest_unit if sharding.spreads_weights else 0
            yield Held("teacher", weights + network.buffer_bytes + blocks, "training")
        if network.activations is not None:
            yield Held("activations", network.activations, "training")
        yield from self._held_curvature()
        if config.memory.kept:
            yield Held("memory", self._memory_bytes(), host=True)
        if config.prior.distill.weight > 0 and config.prior.distill.view == "recorded":
            yield Held("recorded logits", self._recorded_bytes(), host=True)

    def _held_trial(self) -> Iterator[Held]:
        """Yield what optimisers with gradients at trial weights hold: displacements, means over passes, the weights."""
        if isinstance(self.config.optim, TimmOptim):
            return
        own = FLOAT * elements(self.network.shapes, self.sharding, what="moments")
        yield Held("trial weights", own * (2 if passes_of(self.config.optim) > 1 else 1), "training")
        if self.sharding.stage and not self.sharding.state_on_host:  # copies: DeepSpeed keeps its own elsewhere
            yield Held("gradients for the optimiser", own, "training")
        if not self.sharding.has_second_network:  # ZeRO-3 restores its optimiser's copy
            whole = FLOAT * elements(self.network.shapes, self.sharding, what="weights")
            yield Held("weights as they were", whole, "training")
        if isinstance(self.config.optim, VognOptim):
            squares = FLOAT * elements(self.network.shapes, self.sharding, what="weights")
            yield Held("squares of examples' gradients", squares, "training")

    def _held_curvature(self) -> Iterator[Held]:
        if self.curvature is None:
            return
        yield Held("curvature", max(self.curvature.held))
        if isinstance(self.config.curvature, SiCurvature):
            path = 2 * FLOAT * elements(self.network.shapes, self.sharding, what="weights")
            yield Held("path", path)  # each weight's path integral, and its start
            yield Held("a step of the path", path, "training")
        if self.config.prior.quadratic.products == "bf16" and self.config.curvature.kind in ("kronecker", "ekfac"):
            yield Held("curvature in bf16", max(self.curvature.held) // 2, "training")
        yield Held("sums of the next curvature", self.curvature.measuring, "measuring")
        if self.config.prior.quadratic.anchor == "each":
            pulled = elements(self.network.shapes, self.sharding, what="weights")
            yield Held("pull to each task's weights", FLOAT * pulled)
        if any(self.curvature.fetched):
            yield Held("old weights of a process's layers", max(self.curvature.fetched), "training")
        if self.network.graph is not None and isinstance(self.config.curvature, PassCurvature):
            graph = max(self.network.graph, 1)
            room = working_bytes(pick_device(self.config.engine.device))
            room //= 1 if self.config.curvature.kind in ("kronecker", "ekfac") else 2  # of `diagonal` and `mas`
            fitting = max(1, room // graph)
            yield Held("activations", min(self.config.curvature.batch_size, fitting) * graph, "measuring")

    def _memory_bytes(self) -> int:
        """Bytes of the memory at the end of the run, without soft labels and images."""
        return sum(self._kept(len(self.stream.tasks))) * _EXAMPLE

    @property
    def soft_bytes(self) -> int:
        """Bytes of the soft labels of all kept examples, in a file that processes of a machine share."""
        tasks, names = self.stream.tasks, self.stream.class_names
        width = max(len(task.classes) for task in tasks) if self.config.train.head == "own" else len(names)
        return sum(self._kept(len(tasks))) * _LABEL[self.config.memory.dtype] * width

    def _recorded_bytes(self) -> int:
        """Bytes of the old network's logits of the last task's images, and of the memory's if these are distilled."""
        *before, last = self.stream.tasks
        memory = sum(self._kept(last.index)) if self.config.prior.distill.images == "all" else 0
        old = len({label for task in before for label in task.classes})
        return (num_new(self.config, self.stream, last) + memory) * old * _LABEL[self.config.memory.dtype]

    def _kept(self, tasks: int) -> list[int]:
        """Return how many examples memory keeps of each of the first `tasks` tasks, once all of these are learned."""
        return kept_of_tasks(self.config, self.stream, tasks)

    def sent(self) -> Iterator[Sent]:
        """Yield what a rank sends."""
        network, accumulate = self.network, self.config.train.accumulate
        parts = sent(network.num_weights, network.buffer_bytes, self.sharding, accumulate=accumulate)
        passes, partly = passes_of(self.config.optim), self.sharding.stage in (1, 2)
        for name, num_bytes in parts.items():
            if num_bytes:  # ZeRO 1 and 2 gather once a step, not in every pass
                yield Sent(name, num_bytes * (1 if partly and name == "gather weights" else passes))
        yield from self._sent_trial()
        if self._has_teacher and self.sharding.spreads_weights:
            share = (self.sharding.shards - 1) / self.sharding.shards
            yield Sent("gather the teacher's weights", accumulate * share * FLOAT * network.num_weights)
        if self.curvature is not None and self.sharding.ranks > 1:
            yield Sent("curvature", max(self.curvature.sent), "task")

    def _sent_trial(self) -> Iterator[Sent]:
        """Yield what a rank sends for optimisers with gradients at trial weights."""
        optim, sharding, whole = self.config.optim, self.sharding, FLOAT * self.network.num_weights
        if sharding.ranks == 1:
            return
        if (trials := trials_of(optim)) and sharding.stage in (1, 2):
            yield Sent("gather trial weights", trials * (sharding.ranks - 1) / sharding.ranks * whole)
        if isinstance(optim, VognOptim):  # with sharded weights in every micro-batch, else in every pass
            times = passes_of(optim) * (self.config.train.accumulate if sharding.spreads_weights else 1)
            yield Sent("squares of examples' gradients", times * all_reduce(whole, sharding.ranks))

    def spent(self, rates: Rates, gigabytes_per_second: float | None) -> Iterator[Spent]:
        """Yield the seconds of the parts of a step of the last task."""
        rows = self.config.train.batch_size / self.sharding.ranks
        seconds = passes_of(self.config.optim) * rows * rates.row_seconds
        yield Spent("forward and backward pass", seconds, views=True)
        if self._has_teacher:
            yield Spent("teacher", rows * self._soft_share() * rates.predict_seconds, views=True)
        updated = elements(self.network.shapes, self.sharding, what="moments") / self.network.num_weights
        yield Spent("optimizer", rates.optimizer_seconds * updated)
        if self.curvature is not None:
            yield Spent("pull of the curvature", max(self.curvature.flops) / rates.flops)
        if gigabytes_per_second is not None:
            total = sum(each.num_bytes for each in self.sent() if each.when == "step")
            yield Spent("wire", total / (gigabytes_per_second * 1e9))

    def views(self) -> Iterator[Views]:
        """Yield the sizes of views, ascending; cost is by FLOPs of a pass, or by pixels where these are unknown."""
        grows, last = self.config.data.progressive, self.config.data.image_size
        if grows is None or last is None:
            return
        steps: Counter[int] = Counter()
        for plan in plan_run(self.config, self.stream):
            for epoch in range(plan.epochs):
                steps[grows.side(epoch, plan.epochs, last)] += plan.steps_per_epoch
        num_classes = len(self.stream.class_names)
        shape = self.stream.image_shape
        flops = forward_flops(self.config, image_shape=shape, num_classes=num_classes, sides=[*steps, last])
        for side in sorted(steps):
            yield Views(side, steps[side], flops[side] / flops[last] if flops else (side / last) ** 2)

    def _soft_share(self) -> float:
        """Return the share of a step's images on which a teacher runs, in the last task."""
        *_, last = plan_run(self.config, self.stream)
        mixed = last.memory_rows / last.batch_size if last.memory_rows else last.num_memory / last.num_train
        distill = self.config.prior.distill
        soft = mixed * self._softly() if self.config.prior.view == "teacher" else 0.0
        if distill.weight == 0 or distill.view == "recorded":
            return soft
        return 1.0 if distill.images == "all" else 1 - mixed + soft

    def _softly(self) -> float:
        """Return the share of memory with soft labels, in the last task."""
        config, tasks = self.config, self.stream.tasks[:-1]
        kept, own = self._kept(len(tasks)), [num_learned(config, self.stream, task) for task in tasks]
        replayed = [config.prior.num_replayed(*each) for each in zip(kept, own, strict=True)]
        return 1 - sum(replayed) / max(sum(kept), 1)

    @property
    def _has_teacher(self) -> bool:
        config = self.config
        soft = config.memory.kept and config.prior.view == "teacher" and config.prior.some_soft
        return soft or (config.prior.distill.weight > 0 and config.prior.distill.view == "same")


def _when(name: str, sharding: Sharding) -> tuple[When, bool]:
    """Return when an entry of the engine (`sharding.held`) is held, and whether in host memory."""
    match name:
        case "weights":
            return "always", sharding.weights_on_host
        case "gradients":
            with_state = sharding.kind == "deepspeed" and sharding.stage > 1 and sharding.state_on_host
            return "always", sharding.weights_on_host or with_state
        case "optimizer":
            return "always", sharding.state_on_host
        case "whole blocks":
            return "training" if sharding.has_second_network else "always", False
        case "bucket of gradients":
            return "always" if sharding.stage == 3 else "training", False
        case "gradients on their way":
            return "training", False
        case _:
            return "always", False


def _shown_beside(config: RunConfig) -> Iterator[str]:
    """Yield notes on images of a step that are not in its batch."""
    topology = config.prior.topology
    if topology.nodes and topology.anchor:
        yield f"not counted: images of nodes (at least {topology.nodes} in all) that a step of a later task uses"
    if config.prior.fromp.weight > 0:
        yield "not counted: kept examples that a step of a later task uses besides its batch, and their kernels"


def _notes(case: _Case, rates: Rates | None, gigabytes_per_second: float | None) -> Iterator[str]:
    network, curvature = case.network, case.curvature
    yield "not counted: Python and its libraries, decoded images, checkpoints while they are written"
    if case.config.memory.kept:
        yield f"soft labels: a file of {size(case.soft_bytes)}, mapped once by all processes of a machine"
    if network.problem:
        yield f"activations could not be determined ({network.problem})"
    if curvature is not None and curvature.terms < curvature.most_terms:
        yield (
            f"curvature: {curvature.terms} terms a layer fit curvature.tasks; where no merge is within its tolerance, "
            f"up to {curvature.most_terms}"
        )
    if case.config.data.progressive is not None:
        yield "of all steps, passes over smaller views are counted by their linear maps, convolutions and attention"
    if rates is not None and gigabytes_per_second is None:
        yield "not counted: time of communication; give --bandwidth to include it"
    if rates is not None:
        yield f"times are of {rates.rows} images on {rates.device}, {rates.threads} threads, if nothing overlaps"
