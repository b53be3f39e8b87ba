"""What the prior asks of curvature, and what a kind of curvature asks of the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm

__all__ = ["Estimator", "Examples", "Precision", "Weights"]

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


class Precision(Protocol):
    """A positive semi-definite matrix over named weights, in nats per squared weight, summed over examples.

    Immutable: every operation returns a new one.
    """

    @property
    def num_examples(self) -> float:
        """Sum of the weights of the examples it was summed over."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""

    def matvec(self, delta: Weights) -> Weights:
        """Precision times `delta`, for the names in `delta`; in fp32.

        Raises:
            CoverageError: a name of `delta` has no curvature.
        """

    def plus(self, other: Precision) -> Precision:
        """The sum of two precisions over the same weights."""

    def times(self, scale: float) -> Precision:
        """The precision scaled by `scale` >= 0."""

    def trace(self) -> float:
        """Sum of the diagonal."""

    def to(self, device: torch.device) -> Precision:
        """The same precision on a device."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and JSON scalars, with 'kind'; `build.precision_from_state` reads it."""


class Estimator(Protocol):
    """Measures the Precision of some examples at the model's present weights."""

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Precision:
        """The Precision of all ranks' batches together; collective, and equal on every rank.

        Ranks may have different numbers of batches, or none. The model is left as it was: its mode, its gradients.

        Raises:
            CoverageError: a trainable parameter is not covered.
            DivergedError: an activation or a gradient is not finite.
        """
