"""The memory map of a run: every training example's error, variance and sensitivity, and tables derived from them.

All figures are of one checkpoint's network and a Laplace posterior at its weights; the formulas are in
`hpccl.memory.perturbation`. The competing classes are those of an example's task, or all seen ones (`train.head`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from hpccl.data.order import subset
from hpccl.data.protocols import training_samples
from hpccl.errors import ConfigError
from hpccl.report.memory_map import MemoryMap, worth_showing
from hpccl.tools.evaluate_run import reopened
from hpccl.tools.memory_map.all_weights import Whole, by_all_weights
from hpccl.tools.memory_map.found import Group
from hpccl.tools.memory_map.last_layer import by_last_layer
from hpccl.tools.memory_map.tables import classes_of, memory_over_tasks, pictures, table_of, tasks_of
from hpccl.train.state import RunState, World

__all__ = ["Kind", "map_memory"]

Ints = npt.NDArray[np.int64]
Kind: TypeAlias = Literal["last_layer"] | Whole

_FEW = 2000  # default number of examples where each needs the Jacobian of the whole network
_SUBSAMPLE, _CURVATURE = 121, 122


def map_memory(
    path: Path,
    *,
    task: int | None = None,
    posterior: Kind = "last_layer",
    examples: int | None = None,
    fraction: float | None = None,
    prior_precision: float | None = None,
) -> MemoryMap:
    """Compute the map of the newest checkpoint, or of the newest of `task`; writes nothing.

    Args:
        path: the run's folder.
        task: counted from 0.
        posterior: `last_layer`; or that of all weights, with a kind of curvature that is measured for the map, or with
            that in the checkpoint (`checkpoint`), which an optimiser may have learned.
        examples: number of examples in the map, drawn uniformly; None: all for `last_layer`, 2000 otherwise.
        fraction: share of the training examples on which the curvature of all weights is measured; None: all.
        prior_precision: delta; None: the one with the largest evidence.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint, or no curvature in it.
        ConfigError: an argument is out of range, or the network does not suit the posterior.
    """
    if fraction is not None and posterior in ("last_layer", "checkpoint"):
        raise ConfigError(
            f"--fraction {fraction:g}: --posterior {posterior} measures no curvature of all weights; omit it, or "
            "use --posterior kronecker, ekfac, diagonal or dense"
        )
    fraction = 1.0 if fraction is None else fraction
    _check(examples=examples, fraction=fraction, prior_precision=prior_precision)
    with reopened(path, task=task) as (state, world):
        groups = _groups(state, world, examples=examples, fraction=fraction, posterior=posterior)
        match posterior:
            case "last_layer":
                found, delta = by_last_layer(groups, state, world, prior_precision)
            case "kronecker" | "ekfac" | "diagonal" | "dense" | "checkpoint":
                found, delta = by_all_weights(posterior, groups, state, world, prior_precision)
            case _:
                assert_never(posterior)
        table = table_of(found, state, world)
        shown = worth_showing(table)
        return MemoryMap(
            run=str(path),
            checkpoint=state.mark.name,
            task=state.mark.task,
            posterior=posterior,
            prior_precision=delta,
            num_seen=sum(group.total for group in groups),
            class_names=world.stream.class_names,
            names=world.stream.sample_names("train", table["sample"]),
            table=table,
            tasks=tasks_of(table, state, world),
            classes=classes_of(table, found, world),
            memory=memory_over_tasks(table, state, world),
            pictures=pictures(table["sample"][shown], world),
        )


def _check(*, examples: int | None, fraction: float, prior_precision: float | None) -> None:
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}; allowed: at least 1")
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction:g}; allowed: above 0 and at most 1")
    if prior_precision is not None and not (0 < prior_precision < float("inf")):
        raise ConfigError(f"--prior-precision {prior_precision:g}; allowed: a finite number above 0")


def _groups(state: RunState, world: World, *, examples: int | None, fraction: float, posterior: Kind) -> list[Group]:
    last = world.stream.tasks[state.mark.task]
    learned = [last] if world.config.own_networks else list(world.stream.tasks[: last.index + 1])
    spans = [training_samples(each) for each in learned]
    seen = np.concatenate(spans)
    most = examples if examples is not None else len(seen) if posterior == "last_layer" else _FEW
    mapped = subset(seen, most, world.config.seed, _SUBSAMPLE)
    measured = subset(seen, max(1, round(fraction * len(seen))), world.config.seed, _CURVATURE)
    if world.config.train.head == "seen" or len({each.classes for each in learned}) == 1:
        return [Group(last, mapped, measured, len(seen))]
    return [
        Group(each, np.intersect1d(span, mapped), np.intersect1d(span, measured), len(span))
        for each, span in zip(learned, spans, strict=True)
    ]
