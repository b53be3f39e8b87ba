"""Held (frozen) weights: where they are among this rank's elements, and the values they must have after a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from hpccl.dist.spread import Span

__all__ = ["Held"]


@final
class Held:
    """Masks and values of the weights that do not learn.

    Masks stay small (broadcast against their parameters), except those of this rank's elements of spread parameters.

    Attributes:
        masks: by parameter, on the device of passes.
        whole: the parameters of which no element learns.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.whole: frozenset[str] = frozenset()
        self._own: dict[str, tuple[Tensor, Tensor]] = {}  # mask and values of this rank's elements
        self._norms: list[nn.Module] = []

    def take(
        self, held: Mapping[str, Tensor], own: Mapping[str, Tensor], spans: Mapping[str, Span], device: torch.device
    ) -> None:
        """Hold masked elements at their values in `own`, this rank's elements by parameter; release all others."""
        self.masks = {name: mask.to(device) for name, mask in held.items()}
        self.whole = frozenset(name for name, mask in held.items() if bool(mask.all()))
        self._own = {name: (_part(mask, own[name], spans.get(name)), own[name].clone()) for name, mask in held.items()}

    def take_norms(self, model: nn.Module, names: frozenset[str]) -> None:
        """Freeze the running statistics of these modules."""
        self._norms = [module for name, module in model.named_modules() if name in names]

    def still(self) -> None:
        """Put the modules with frozen statistics into evaluation mode; called after `model.train()`."""
        for norm in self._norms:
            norm.eval()

    def restored(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's elements with held values restored, for parameters with held elements."""
        return {name: kept.where(mask, own[name]) for name, (mask, kept) in self._own.items()}

    def clear(self, name: str, gradient: Tensor) -> Tensor:
        """Return a parameter's whole gradient with 0 for held elements."""
        mask = self.masks.get(name)
        return gradient if mask is None else gradient.masked_fill(mask, 0.0)


def _part(mask: Tensor, own: Tensor, span: Span | None) -> Tensor:
    """The part of a parameter's mask that belongs to this rank's elements."""
    if span is None:
        return mask.to(own.device)
    if mask.numel() == 1:
        return mask.to(own.device).reshape(1)
    return mask.expand(span.shape).reshape(-1)[span.start : span.stop].to(own.device).view_as(own)
