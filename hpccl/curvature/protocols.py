"""What the prior asks of curvature, and what a kind of curvature asks of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm

__all__ = ["Estimator", "Examples", "Piece", "Precision", "Shards", "Totals", "Weights", "strided_like"]

Weights = Mapping[str, Tensor]  # full (unsharded) tensors by parameter name


@dataclass(frozen=True)
class Examples:
    """Examples of one task, as the curvature sees them.

    pixels: [n, channels, h, w] float
    labels: [n] int64, class number in the stream
    head:   [C] bool, the classes that compete: the task's own head
    sample: [n] int64, position in the stream; seeds what is drawn for an example
    weight: [n] float >= 0, how often an example counts; 0 is as good as absent (padding, undecodable image)
    """

    pixels: Tensor
    labels: Tensor
    head: Tensor
    sample: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """The same examples on a device, pixels in `dtype`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return Examples(**{**moved, "pixels": moved["pixels"].to(dtype)})

    def select(self, rows: Tensor | slice) -> Examples:
        """The examples at `rows`."""
        return Examples(self.pixels[rows], self.labels[rows], self.head, self.sample[rows], self.weight[rows])


@dataclass(frozen=True)
class Piece:
    """The share of a product P (w - a) that one rank adds to one parameter's gradient.

    name: of the parameter
    needs: names of the parameters whose weights enter
    add: (target, weights, anchor, scale, damping) -> target + scale (P (w - a) + damping (w - a)), in fp32, as a new
        tensor; all of the parameter's shape or by its name. Pieces of all ranks together are the whole product, once.
    """

    name: str
    needs: tuple[str, ...]
    add: Callable[[Tensor, Weights, Weights, float, float], Tensor]


@dataclass(frozen=True)
class Totals:
    """A Precision over all ranks.

    trace: nats per squared weight, summed over weights
    num_bytes: held by all ranks together, what is equal on all of them counted once
    rank_bytes: held by the rank that holds most
    terms: summed in the layer that has most
    error: largest relative error of a layer that truncating and merging made, Frobenius norm (a bound)
    """

    trace: float
    num_bytes: int
    rank_bytes: int
    terms: int = 1
    error: float = 0.0


# Layer names that are wanted -> the states, by layer name, that all ranks' `Precision.shard_dict` had for them.
Shards = Callable[[Callable[[str], bool]], Mapping[str, Sequence[Mapping[str, Any]]]]


class Precision(Protocol):
    """A positive semi-definite matrix over named weights, in nats per squared weight, summed over examples.

    Immutable: every operation returns a new one. It may be spread over ranks, each holding what it multiplies.
    """

    @property
    def num_examples(self) -> float:
        """Sum of the weights of the examples it was summed over."""

    def pieces(self, comm: Comm, like: Weights) -> list[Piece]:
        """What this rank multiplies; tensors take the memory layout of the weights `like`. Not collective.

        Raises:
            CoverageError: a name of `like` has no curvature.
        """

    def plus(self, other: Precision, comm: Comm) -> Precision:
        """The sum of two precisions over the same weights; collective."""

    def times(self, scale: float) -> Precision:
        """The precision scaled by `scale` >= 0."""

    def rounded(self) -> Precision:
        """With matrices in bf16, for faster products with them; itself where there are none."""

    def totals(self, comm: Comm) -> Totals:
        """Size and trace over all ranks; collective."""

    def to(self, device: torch.device) -> Precision:
        """The same precision on a device."""

    def state_dict(self) -> dict[str, Any]:
        """What all ranks hold, with 'kind': tensors and JSON scalars; `build.precision_from_state` reads it."""

    def shard_dict(self) -> dict[str, Any]:
        """The rest of its state, which this rank alone holds: by layer name."""


class Estimator(Protocol):
    """Measures the Precision of some examples at the model's present weights."""

    def check(self, model: nn.Module) -> None:
        """Refuse at once what `estimate` would refuse after training, as far as can be told without data.

        Raises:
            CoverageError: the model cannot be measured with these settings.
        """

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Precision:
        """The Precision of all ranks' batches together; collective.

        Ranks may have different numbers of batches, or none. `batches` may be gone through more than once. The model is
        left as it was: its mode, its gradients.

        Raises:
            CoverageError: a trainable parameter is not covered.
            DivergedError: an activation or a gradient is not finite.
        """


def strided_like(value: Tensor, like: Tensor) -> Tensor:
    """The same numbers with the strides of `like`: mixed layouts (channels_last) cost several times as much.

    `value` itself where it has them already.
    """
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
