"""Interfaces of curvature: a Precision, which the prior uses, and an Estimator, which measures one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm

__all__ = [
    "Estimator",
    "Examples",
    "Piece",
    "Precision",
    "Shards",
    "Totals",
    "Weights",
    "accumulation_dtype",
    "strided_like",
]

Weights = Mapping[str, Tensor]  # full (unsharded) tensors by parameter name


@dataclass(frozen=True)
class Examples:
    """A batch of examples of one task, as curvature estimators take it.

    pixels: [n, channels, h, w] float
    labels: [n] int64, class number in the stream
    head:   [C] bool, class mask of the task's own head
    sample: [n] int64, position in the stream; seeds an example's random draws
    weight: [n] float >= 0, how often an example counts; 0 excludes it (padding, undecodable image)
    """

    pixels: Tensor
    labels: Tensor
    head: Tensor
    sample: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """Return the examples on a device, with pixels in `dtype`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return Examples(**{**moved, "pixels": moved["pixels"].to(dtype)})

    def select(self, rows: Tensor | slice) -> Examples:
        """Return the examples at `rows`."""
        return Examples(self.pixels[rows], self.labels[rows], self.head, self.sample[rows], self.weight[rows])


@dataclass(frozen=True)
class Piece:
    """The share of a product P (w - a) that one rank adds to one parameter's gradient.

    name: the parameter's name
    needs: names of the parameters whose weights enter the product
    add: (target, weights, anchor, scale, damping) -> target + scale (P (w - a) + damping (w - a)), in fp32, as a new
        tensor of the parameter's shape; weights and anchor are by name. The pieces of all ranks sum to the whole
        product.
    """

    name: str
    needs: tuple[str, ...]
    add: Callable[[Tensor, Weights, Weights, float, float], Tensor]


@dataclass(frozen=True)
class Totals:
    """Trace, size and error of a Precision over all ranks.

    trace: nats per squared weight, summed over weights
    num_bytes: bytes held by all ranks together; what is replicated on all of them counts once
    rank_bytes: bytes held by the rank that holds most
    terms: number of terms in the layer that has most
    error: largest relative error of a layer from truncating and merging, in the Frobenius norm (an upper bound)
    """

    trace: float
    num_bytes: int
    rank_bytes: int
    terms: int = 1
    error: float = 0.0


# Predicate on layer names -> by layer name, the states that all ranks' `Precision.shard_dict` had for those layers.
Shards = Callable[[Callable[[str], bool]], Mapping[str, Sequence[Mapping[str, Any]]]]


class Precision(Protocol):
    """A positive semi-definite matrix over named weights, in nats per squared weight, summed over examples.

    Immutable: every operation returns a new one. It may be spread over ranks, each holding the part that it multiplies.
    """

    @property
    def num_examples(self) -> float:
        """Sum of the weights of the examples over which it was summed."""

    def pieces(self, comm: Comm, like: Weights) -> list[Piece]:
        """Return this rank's pieces of the product; their tensors take the memory layout of the weights `like`.

        Collective where a diagonal is spread over ranks.

        Raises:
            CoverageError: a name of `like` has no curvature.
        """

    def plus(self, other: Precision, comm: Comm) -> Precision:
        """Return the sum of two precisions over the same weights; collective."""

    def times(self, scale: float) -> Precision:
        """Return the precision scaled by `scale` >= 0."""

    def rounded(self) -> Precision:
        """Return it with its factors in bf16, for faster products; kinds without factors return themselves."""

    def totals(self, comm: Comm) -> Totals:
        """Return size and trace over all ranks; collective."""

    def to(self, device: torch.device) -> Precision:
        """Return the precision on a device."""

    def state_dict(self) -> dict[str, Any]:
        """The state that all ranks hold, with its 'kind': tensors and JSON scalars, for `precision_from_state`."""

    def shard_dict(self) -> dict[str, Any]:
        """The rest of the state, held by this rank alone: by layer name."""


class Estimator(Protocol):
    """Measures the Precision of examples at the model's current weights."""

    def check(self, model: nn.Module) -> None:
        """Refuse now what `estimate` would refuse after training, as far as this is known without data.

        Raises:
            CoverageError: the model cannot be measured with these settings.
        """

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Precision:
        """Measure the Precision of all ranks' batches together; collective.

        Ranks may have different numbers of batches, or none. `batches` may be iterated more than once. The model's mode
        and gradients are left unchanged.

        Raises:
            CoverageError: a trainable parameter is not covered.
            DivergedError: an activation or a gradient is not finite.
        """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of `dtype` are subtracted and added: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strided_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` with the strides of `like`: products of mixed layouts (channels_last) cost several times as much.

    Returns `value` itself if it already has these strides.
    """
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
