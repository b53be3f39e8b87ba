"""How well memories of other selectors and sizes would have reconstructed the gradient of the past.

After task t of a run, each selector chooses anew from the data of tasks 0..t, using the network at the end of task t,
which also gives the soft labels. Then, at points on the path to the weights after task t + 1, the gradient of

    total:  soft + replay (that memory, as the run's configuration weighs it) + quadratic

is compared with the true gradient of the past (`hpccl.prior.reconstruct`), and its change since the end of task t with
that of the true gradient. Points are checkpoints within task t + 1 where these were kept, and otherwise on a straight
line. The quadratic is the run's, or measured anew without each memory's examples. (Daxberger et al. 2023.)
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError
from torch import Tensor

from hpccl.checkpoint.store import Mark, load, marks
from hpccl.config.memory import NAMED_SELECTORS, SELECTORS
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Task
from hpccl.dist.spread import placed_whole, wholes
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.prior.reconstruct import compare_gradients
from hpccl.report.reconstruction import Reconstruction
from hpccl.tools.evaluate_run import find_checkpoint, reopened
from hpccl.train.consolidate import select
from hpccl.train.measure import measure
from hpccl.train.reconstruction import prior_gradients, true_gradient
from hpccl.train.soft_labels import relabel
from hpccl.train.state import RunState, World

__all__ = ["reconstruct_memory"]

Gradient: TypeAlias = dict[str, Tensor]
Weights: TypeAlias = Mapping[str, Tensor]

OWN = "run"  # the memory that the run trained with


@dataclass(frozen=True)
class _Point:
    """Weights on the path to the next task's: after `step` of its steps, or at fraction `share` of a straight line."""

    weights: Weights
    share: float
    step: int | None


@dataclass(frozen=True)
class _Candidate:
    """A prior, and the run's surroundings with its memory's settings in the configuration."""

    selector: str
    size: int
    prior: Prior
    world: World


def reconstruct_memory(
    path: Path,
    *,
    sizes: Sequence[int] = (50, 100, 200),
    selectors: Sequence[str] = SELECTORS,
    task: int | None = None,
    points: int = 5,
    past: float | None = None,
    fraction: float = 0.0,
) -> Reconstruction:
    """Return the errors of every selector and size along the path from task `task` to the next; writes nothing.

    Args:
        path: the run's folder.
        sizes: examples kept of each task.
        selectors: kinds of memory.selector, or variants (`config.memory.NAMED_SELECTORS`).
        task: t, counted from 0; None: the last that has a next one.
        points: number of points on the path, the last of which is the newest checkpoint of task t + 1.
        past: share of past examples for the true gradient; None: log.reconstruction, or all.
        fraction: share of the examples that are not in memory on which curvature is measured anew; 0: the run's.

    Raises:
        FolderError: the folder is no run, or lacks a checkpoint.
        ConfigError: an argument is out of range, or the run cannot have such a memory.
    """
    _check(sizes, selectors, points=points, past=past, fraction=fraction)
    start, end = _ends(RunFolder(path), task)
    with reopened(path, task=start.task) as (state, there), tempfile.TemporaryDirectory(prefix="hpccl-") as scratch:
        world = replace(there, folder=RunFolder(Path(scratch)))  # choosing memory writes pictures
        following = world.stream.tasks[start.task + 1]
        anchor = wholes(state.engine.gather())
        asked = _asked(path, sizes, selectors, fraction, state=state, world=world)
        candidates = list(_candidates(asked, fraction, state, world))
        track = _path(RunFolder(path), end, anchor, points)
        share = past if past is not None else world.config.log.reconstruction or 1.0
        return Reconstruction(
            run=str(path),
            task=start.task,
            past=share,
            curvature="none"
            if world.config.prior.quadratic.weight == 0
            else "of the run"
            if fraction == 0
            else f"measured anew, fraction {fraction:g}",
            straight=all(point.step is None for point in track),
            rows=list(_Comparison(following, share, state, world).rows(candidates, anchor, track)),
        )


def _check(sizes: Sequence[int], selectors: Sequence[str], *, points: int, past: float | None, fraction: float) -> None:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--sizes {' '.join(map(str, sizes))}; allowed: one or more numbers, each at least 1")
    unknown = [each for each in selectors if each not in NAMED_SELECTORS]
    if unknown or not selectors:
        raise ConfigError(
            f"--selectors {','.join(map(repr, unknown))}: give names separated by commas; allowed: "
            f"{', '.join(NAMED_SELECTORS)} (for a reservoir take `uniform`; `greedy` depends on labels alone)"
        )
    if points < 1:
        raise ConfigError(f"--points {points}; allowed: at least 1")
    if past is not None and not 0 < past <= 1:
        raise ConfigError(f"--past {past:g}; allowed: above 0 and at most 1")
    if not 0 <= fraction <= 1:
        raise ConfigError(f"--fraction {fraction:g}; allowed: 0 (the run's curvature) to 1")


def _ends(folder: RunFolder, task: int | None) -> tuple[Mark, Mark]:
    """Return the checkpoint at the end of task t, and the newest of task t + 1, which may be unfinished."""
    find_checkpoint(folder, None)
    newest = {mark.task: mark for mark in marks(folder.checkpoints)}
    ended = {mark.task: mark for mark in marks(folder.checkpoints) if mark.phase == "done"}
    able = sorted(number for number in ended if number + 1 in newest)
    chosen = task if task is not None else able[-1] if able else None
    if chosen is None or chosen not in able:
        wanted = (
            "no task with a next one" if task is None else f"no checkpoint both at the end of task {task} and later"
        )
        raise FolderError(
            f"'{folder.path}' has {wanted}; --task may be {', '.join(map(str, able)) or 'none yet'} (counted from 0)"
        )
    return ended[chosen], newest[chosen + 1]


def _path(folder: RunFolder, end: Mark, anchor: Weights, points: int) -> list[_Point]:
    """Return at most `points` points, the end included: evenly thinned checkpoints of the task, or a straight line."""
    last = _weights(folder, end)
    within = [mark for mark in marks(folder.checkpoints) if mark.task == end.task and mark.step < end.step]
    if within:
        few = within[:: -(-len(within) // (points - 1))] if points > 1 else []
        found = [_Point(_weights(folder, mark), mark.step / end.step, mark.step) for mark in few]
        return [*found, _Point(last, 1.0, end.step)]
    return [_Point(_between(anchor, last, (k + 1) / points), (k + 1) / points, None) for k in range(points)]


def _weights(folder: RunFolder, mark: Mark) -> dict[str, Tensor]:
    return placed_whole(load(folder.checkpoints, mark, only="engine", lazy=True)["engine"]["weights"])


def _between(start: Weights, end: Weights, share: float) -> dict[str, Tensor]:
    """Interpolate linearly between weights; integers, such as counters of steps, are those of the end."""
    if share == 1:
        return dict(end)
    return {
        name: start[name].to(value).lerp(value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }


# ---------------------------------------------------------------- priors


def _asked(
    path: Path, sizes: Sequence[int], selectors: Sequence[str], fraction: float, *, state: RunState, world: World
) -> dict[tuple[str, int], RunConfig]:
    """Return the configuration of every selector and size.

    Raises:
        ConfigError: the run, or its data, does not allow one of them.
    """
    fromp = state.prior.fromp
    if fromp is not None:
        raise ConfigError(
            f"'{path}' was trained with prior.fromp.weight={fromp.weight:g}, which this command does not support; "
            "allowed: runs with soft labels, replay or a quadratic prior"
        )
    if world.config.memory.labels == "kept" and len(state.prior.memory) and state.mark.task > 0:
        raise ConfigError(
            f"'{path}' was trained with memory.labels=kept: soft labels of other examples need the networks of "
            "earlier tasks, which were not kept; set --task 0, or choose a run with memory.labels=renewed"
        )
    smallest = min(len(task.samples("train")) for task in world.stream.tasks[: state.mark.task + 1])
    if max(sizes) > smallest:
        raise ConfigError(f"--sizes {max(sizes)}: the smallest task has {smallest} examples; give at most as many")
    return {
        (selector, number): _configured(path, world.config, selector, number, fraction)
        for selector, number in itertools.product(selectors, sizes)
    }


def _candidates(
    asked: Mapping[tuple[str, int], RunConfig], fraction: float, state: RunState, world: World
) -> Iterator[_Candidate]:
    """Yield the run's own prior, then that of every selector and size."""
    own = state.prior
    learned = world.stream.tasks[: state.mark.task + 1]
    if len(own.memory) or own.quadratic is not None:
        yield _Candidate(OWN, max(own.memory.per_task(len(learned))), own, world)
    for (selector, number), config in asked.items():
        here = replace(world, config=config)
        yield _Candidate(selector, number, _chosen(learned, own, fraction, state, here), here)
    state.prior = own


def _configured(path: Path, config: RunConfig, selector: str, number: int, fraction: float) -> RunConfig:
    """Return the run's configuration with another memory.

    Raises:
        ConfigError: the two contradict each other.
    """
    tree = config.model_dump()
    kept = _selector(tree["memory"]["selector"], NAMED_SELECTORS[selector])
    tree["memory"] |= {"size": number, "total": 0, "fraction": 0.0, "selector": kept}
    if fraction:
        tree["curvature"]["fraction"] = fraction
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        wrong = "; ".join(str(each.get("ctx", {}).get("error", each["msg"])) for each in error.errors())
        raise ConfigError(
            f"--selectors {selector} --sizes {number} is not possible with the settings of '{path}' ({wrong}); omit it "
            "or choose another run"
        ) from error


def _selector(own: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a named selector; if the run's is of the same kind, its other settings are kept."""
    if own["kind"] != named["kind"]:
        return dict(named)
    left = {"sampled", "weights"} | (set() if named.get("weights") == "fitted" else {"ridge"})
    return {key: value for key, value in own.items() if key not in left} | dict(named)


def _chosen(learned: Sequence[Task], own: Prior, fraction: float, state: RunState, world: World) -> Prior:
    """Choose a memory of all tasks at the present weights, and measure the curvature of the rest if `fraction` > 0."""
    memory, quadratic = Memory.empty(), own.quadratic if fraction == 0 else None
    anchor = state.engine.gather()
    for task in learned:
        before, memory = memory, select(task, memory, state, world)
        if fraction:
            state.prior = Prior(memory, quadratic)
            quadratic = measure(task, memory, anchor, state, world, before=before)
    return Prior(relabel(learned[-1], memory, state, world), quadratic, anchor)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class _Comparison:
    """Compares priors with the true gradient of the tasks before `task`, from a `share` of their examples."""

    task: Task
    share: float
    state: RunState
    world: World

    def rows(
        self, candidates: Sequence[_Candidate], anchor: Weights, track: Sequence[_Point]
    ) -> Iterator[dict[str, Any]]:
        """Yield one row for each point and candidate."""
        before, totals = self._gradients(candidates, anchor)
        for number, point in enumerate(track):
            true, there = self._gradients(candidates, point.weights)
            for each, total, at_anchor in zip(candidates, there, totals, strict=True):
                errors, true_norm = compare_gradients(true, {"": total}, self.world.comm)
                change, _ = compare_gradients(_less(true, before), {"": _less(total, at_anchor)}, self.world.comm)
                figures = {
                    **errors[""],
                    "change_cosine": change[""]["cosine"],
                    "change_error": change[""]["relative_error"],
                    "true_norm": true_norm,
                }
                yield {
                    "selector": each.selector,
                    "size": each.size,
                    "point": number + 1,
                    "share": point.share,
                    "step": point.step,
                    **{name: value if math.isfinite(value) else None for name, value in figures.items()},
                }

    def _gradients(self, candidates: Sequence[_Candidate], weights: Weights) -> tuple[Gradient, list[Gradient]]:
        """Return the true gradient and every candidate's at `weights`."""
        self.state.engine.put(weights)
        totals = [prior_gradients(self.task, each.prior, self.state, each.world)["total"] for each in candidates]
        return true_gradient(self.task, self.share, self.state, self.world), totals


def _less(one: Gradient, other: Gradient) -> Gradient:
    return {name: value - other[name] for name, value in one.items()}
