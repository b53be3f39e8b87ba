"""A map from the posterior of all weights, with Kronecker-factored or diagonal curvature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpccl.config.sections import DiagonalCurvature, EkfacCurvature, KroneckerCurvature, PassCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.errors import ConfigError, DataError
from hpccl.memory.perturbation import Variance, perturbed
from hpccl.report.text import size
from hpccl.train.memory_map.found import Found, Group, joined
from hpccl.train.passes import shared_images
from hpccl.train.score import competing
from hpccl.train.state import RunState, World
from hpccl.train.task_pass import TaskPass
from hpccl.train.variance import only_classes

__all__ = ["by_all_weights"]

Ints = npt.NDArray[np.int64]

_LARGEST = 4 << 30  # bytes of one image's Jacobian by one layer, with the copies that are made of it


def by_all_weights(
    kind: Literal["kronecker", "diagonal"],
    groups: Sequence[Group],
    state: RunState,
    world: World,
    prior_precision: float | None,
) -> tuple[list[Found], float]:
    """A pass for the curvature, and one for Jacobians."""
    module = state.engine.module
    _refuse_large(module, kind, max(len(competing(group.task, world)) for group in groups))
    estimator = build_estimator(_curvature(kind, world), world.config.seed)
    precision = estimator.estimate(module, _Passes(groups, world), world.comm)
    precision = precision.times(
        sum(group.total for group in groups) / max(1, sum(len(group.measured) for group in groups))
    )
    posterior = Posterior.of(precision, wholes(state.engine.gather()), prior_precision=prior_precision or 1.0)
    if prior_precision is None:
        posterior = posterior.with_prior_precision(posterior.best_prior_precision())
    return [_by_jacobians(group, posterior, state, world) for group in groups], posterior.prior_precision


def _curvature(kind: Literal["kronecker", "diagonal"], world: World) -> PassCurvature:
    """As the run measures it where it is of this kind; exact over labels."""
    config = world.config.curvature
    if kind == "diagonal":
        return DiagonalCurvature(fisher="ggn")
    if isinstance(config, KroneckerCurvature | EkfacCurvature):
        return config.model_copy(update={"fisher": "ggn"})
    return KroneckerCurvature(fisher="ggn")


@dataclass(frozen=True)
class _Passes:
    """All groups' examples for the curvature, one group after the other; may be repeated."""

    groups: Sequence[Group]
    world: World

    def __iter__(self) -> Iterator[Examples]:
        for group in self.groups:
            if len(group.measured):
                yield from TaskPass(group.task, group.measured, self.world)


def _refuse_large(module: nn.Module, kind: str, num_classes: int) -> None:
    largest = max(trainable(module).items(), key=lambda item: item[1].numel())
    needed = 4 * 4 * num_classes * largest[1].numel()
    if needed > _LARGEST:
        raise ConfigError(
            f"the network is too large for --posterior {kind}: the Jacobian of one image by '{largest[0]}' takes "
            f"{size(needed)} with its copies; allowed: {size(_LARGEST)}; use --posterior last_layer"
        )


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
        raise DataError(f"no image of task {group.task.index} that was to be in the map can be decoded")
    return Found(np.concatenate(kept), joined(columns), {})
