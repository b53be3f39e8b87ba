"""Noise for optimisers with trial weights, by the place of every element and by the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpccl.optim.noise import Run, normal
from hpccl.optim.perturbing import Draw

__all__ = ["drawing"]


def drawing(runs: Mapping[Tensor, Sequence[Run]], words: tuple[int, ...]) -> Draw:
    """Draws for tensors of which `runs` says what is in them, as functions of `words` and of a draw's number."""

    def draw(tensor: Tensor, number: int) -> Tensor:
        flat = normal(tensor.numel(), runs[tensor], (*words, number), tensor.device)
        if tensor.is_contiguous():
            return flat.view(tensor.shape)
        return torch.empty_like(tensor).copy_(flat.view(tensor.shape))  # in its memory layout, for what follows

    return draw
