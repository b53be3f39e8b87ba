"""Inputs of optimisers with trial weights: noise as a function of element and step, and masks of held elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpccl.optim.noise import Run, normal
from hpccl.optim.perturbing import Draw

__all__ = ["drawing", "held_within"]


def drawing(runs: Mapping[Tensor, Sequence[Run]], words: tuple[int, ...]) -> Draw:
    """Return the draws for tensors with contents `runs`, as a function of `words` and of the draw's number."""

    def draw(tensor: Tensor, number: int) -> Tensor:
        flat = normal(tensor.numel(), runs[tensor], (*words, number), tensor.device)
        if tensor.is_contiguous():
            return flat.view(tensor.shape)
        return torch.empty_like(tensor).copy_(flat.view(tensor.shape))  # in the tensor's memory layout

    return draw


def held_within(
    tensor: Tensor, runs: Sequence[Run], held: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> Tensor:
    """Return the mask (bool) of held elements in one of the optimiser's tensors, in its shape.

    Args:
        tensor: one of the optimiser's tensors.
        runs: which elements of which parameters are in it.
        held: masks by parameter, broadcast against the whole parameter.
        shapes: shapes of the whole parameters.
    """
    found = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    for run in runs:
        if (mask := held.get(run.name)) is not None:
            flat = mask.expand(shapes[run.name]).reshape(-1)
            found[run.first : run.first + run.numel] = flat[run.start : run.start + run.numel].to(tensor.device)
    return found.view(tensor.shape)
