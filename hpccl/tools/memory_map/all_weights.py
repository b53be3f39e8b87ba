"""The memory map by the posterior of all weights, with a curvature measured for it or that of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.curvature import (
    DenseCurvature,
    DiagonalCurvature,
    EkfacCurvature,
    KroneckerCurvature,
    LayerMeasured,
    PassCurvature,
)
from hpccl.curvature.build import build_estimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples, Precision
from hpccl.dist.spread import wholes
from hpccl.errors import CoverageError, DataError, FolderError
from hpccl.memory.perturbation import Variance, perturbed
from hpccl.tools.memory_map.found import Found, Group, joined
from hpccl.tools.uncertainty import measured_past
from hpccl.train.passes import shared_images
from hpccl.train.score import competing
from hpccl.train.state import RunState, World
from hpccl.train.task_pass import TaskPass
from hpccl.train.variance import only_classes, refuse_large_jacobians

__all__ = ["Whole", "by_all_weights"]

Ints = npt.NDArray[np.int64]
Measured: TypeAlias = Literal["kronecker", "ekfac", "diagonal", "dense"]
ByLayer = TypeVar("ByLayer", KroneckerCurvature, EkfacCurvature)
Whole: TypeAlias = Measured | Literal["checkpoint"]


def by_all_weights(
    kind: Whole, groups: Sequence[Group], state: RunState, world: World, prior_precision: float | None
) -> tuple[list[Found], float]:
    """Return the figures of every group, and delta, from a pass for the curvature (if measured) and one for Jacobians.

    prior_precision: delta; None: the one with the largest evidence
    """
    module = state.engine.module
    largest = max(len(competing(group.task, world)) for group in groups)
    refuse_large_jacobians(module, largest, wanted_by=f"--posterior {kind}", instead="use --posterior last_layer")
    precision = _kept(state, world) if kind == "checkpoint" else _measured(kind, groups, state, world)
    posterior = Posterior.of(precision, wholes(state.engine.gather()), prior_precision=prior_precision or 1.0)
    if prior_precision is None:
        posterior = posterior.with_prior_precision(posterior.best_prior_precision())
    mapped = [group for group in groups if len(group.samples)]
    return [_by_jacobians(group, posterior, state, world) for group in mapped], posterior.prior_precision


def _measured(kind: Measured, groups: Sequence[Group], state: RunState, world: World) -> Precision:
    """Measure the curvature on the groups' examples, scaled to all examples that they represent."""
    estimator = build_estimator(_curvature(kind, world), world.config.seed)
    try:
        estimator.check(state.engine.module)
    except CoverageError as error:  # its advice is about the configuration of a new run
        raise CoverageError(f"--posterior {kind}: {error}; or use --posterior diagonal or last_layer") from error
    precision = estimator.estimate(state.engine.module, _Passes(groups, world), world.comm)
    share = sum(group.total for group in groups) / max(1, sum(len(group.measured) for group in groups))
    return precision.times(share)


def _curvature(kind: Measured, world: World) -> PassCurvature:
    """Return the settings of a kind of curvature, those of the run where it has the same; exact over labels."""
    match kind:
        case "diagonal":
            return DiagonalCurvature()
        case "dense":
            return DenseCurvature()
        case "kronecker":
            return _of_layers(KroneckerCurvature, world)
        case "ekfac":
            return _of_layers(EkfacCurvature, world)
        case _:
            assert_never(kind)


def _of_layers(kind: type[ByLayer], world: World) -> ByLayer:
    config = world.config.curvature
    if isinstance(config, kind):
        return config.model_copy(update={"fisher": "ggn"})
    same = LayerMeasured.model_fields if isinstance(config, LayerMeasured) else ()
    return kind(**{**{name: getattr(config, name) for name in same}, "fisher": "ggn"})


def _kept(state: RunState, world: World) -> Precision:
    """Return the curvature in the checkpoint.

    Raises:
        FolderError: there is none, or it is of earlier tasks only.
        ConfigError: it is an importance or of another network, which gives no posterior.
    """
    if state.mark.phase != "done":
        raise FolderError(
            f"--posterior checkpoint: '{world.folder.path}' has not finished task {state.mark.task}, whose curvature "
            "is not measured yet; choose an earlier task with --task, or use --posterior kronecker"
        )
    return measured_past(state, world).precision


@dataclass(frozen=True)
class _Passes:
    """All groups' examples for the curvature, one group after the other; may be iterated repeatedly."""

    groups: Sequence[Group]
    world: World

    def __iter__(self) -> Iterator[Examples]:
        for group in self.groups:
            if len(group.measured):
                yield from TaskPass(group.task, group.measured, self.world)


def _by_jacobians(group: Group, posterior: Posterior, state: RunState, world: World) -> Found:
    classes = competing(group.task, world)
    columns: list[dict[str, Tensor]] = []
    kept: list[Ints] = []
    for seen in shared_images(group.samples, world, size=min(world.stream_batch, 64)):
        good = seen.valid.numpy()
        pixels = seen.pixels[torch.from_numpy(good).to(seen.pixels.device)]
        if not len(pixels):
            continue
        sample = seen.sample[good]
        labels = torch.from_numpy(np.searchsorted(classes, world.stream.labels("train")[sample]))
        with only_classes(state.engine.module, classes):
            logits = state.engine.predict(pixels).cpu()
            full = posterior.logit_variance(state.engine.module, pixels).cpu()
        columns.append(perturbed(logits, labels, Variance.of(full)).columns())
        kept.append(sample)
    if not kept:
        raise DataError(f"none of the images of task {group.task.index} selected for the map can be decoded")
    return Found(np.concatenate(kept), joined(columns), {})
