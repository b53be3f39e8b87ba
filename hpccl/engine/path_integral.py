"""The path integral of Synaptic Intelligence: what each weight's movement during a task has saved in loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

__all__ = ["PathIntegral"]


@final
class PathIntegral:
    """The integral of -gradient over each weight's path (omega of Zenke et al. 2017, without what a prior pulls).

    Attributes:
        credit: this rank's integral so far, by parameter: as many elements as the rank has of the weights
        begun: this rank's weights at the start of the task
        pull: (name, this rank's weights) -> a prior's share of their gradient, which gets no credit; None without one
    """

    def __init__(self, graded: Callable[[str, Tensor], Tensor]) -> None:
        """graded: (name, this rank's elements) -> a view of those of which this rank has gradients."""
        self.credit: dict[str, Tensor] = {}
        self.begun: dict[str, Tensor] = {}
        self.pull: Callable[[str, Tensor], Tensor] | None = None
        self._graded = graded

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Start a task's integral at these weights, which are kept."""
        self.begun = weights
        self.credit = {name: torch.zeros_like(value) for name, value in weights.items()}

    def add(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Add a step's -gradient * (after - before). The gradients are those of `graded` elements, before clipping."""
        for name, gradient in gradients.items():
            old = self._graded(name, before[name])
            own = gradient.to(old.device).view_as(old)  # weights may be offloaded to host memory
            if self.pull is not None:
                own = own - self._graded(name, self.pull(name, before[name]))
            moved = self._graded(name, after[name]) - old
            self._graded(name, self.credit[name]).addcmul_(own, moved, value=-1)

    def restart(self, credit: dict[str, Tensor], begun: dict[str, Tensor]) -> None:
        """Continue a task's integral, of which each rank keeps the elements that it has gradients of, 0 elsewhere.

        Ranks that hold the same weights may have different gradients, and their integrals are summed (`Engine.path`).
        """
        self.begun, self.credit = begun, {name: torch.zeros_like(value) for name, value in credit.items()}
        for name, value in credit.items():
            self._graded(name, self.credit[name]).copy_(self._graded(name, value))
