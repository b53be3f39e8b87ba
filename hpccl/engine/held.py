"""The weights that do not learn: where they are in this rank's elements, and what they must be after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from hpccl.dist.spread import Span

__all__ = ["Held"]


@final
class Held:
    """Masks stay small (broadcast against their parameters), but for this rank's elements of what is spread.

    Attributes:
        masks: by parameter, where passes compute with it.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self._own: dict[str, tuple[Tensor, Tensor]] = {}  # mask and values of this rank's elements
        self._norms: list[nn.Module] = []

    def take(
        self, held: Mapping[str, Tensor], own: Mapping[str, Tensor], spans: Mapping[str, Span], device: torch.device
    ) -> None:
        """Hold what `own`, this rank's elements by parameter, are now; and nothing else any more."""
        self.masks = {name: mask.to(device) for name, mask in held.items()}
        self._own = {name: (_part(mask, own[name], spans.get(name)), own[name].clone()) for name, mask in held.items()}

    def take_norms(self, model: nn.Module, names: frozenset[str]) -> None:
        """Of these modules the running statistics are used, not changed."""
        self._norms = [module for name, module in model.named_modules() if name in names]

    def still(self) -> None:
        """Before a pass in training mode."""
        for norm in self._norms:
            norm.eval()

    def restored(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank's elements are with everything held back in place; of parameters with something held."""
        return {name: kept.where(mask, own[name]) for name, (mask, kept) in self._own.items()}

    def clear(self, name: str, gradient: Tensor) -> Tensor:
        """A parameter's whole gradient, without what is held."""
        mask = self.masks.get(name)
        return gradient if mask is None else gradient.masked_fill(mask, 0.0)


def _part(mask: Tensor, own: Tensor, span: Span | None) -> Tensor:
    """A mask of a parameter for this rank's elements of it."""
    if span is None:
        return mask.to(own.device)
    if mask.numel() == 1:
        return mask.to(own.device).reshape(1)
    return mask.expand(span.shape).reshape(-1)[span.start : span.stop].to(own.device).view_as(own)
