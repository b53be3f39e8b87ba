"""What optimisers with trial weights are told of their tensors: noise by place and step, and what is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpccl.optim.noise import Run, normal
from hpccl.optim.perturbing import Draw

__all__ = ["drawing", "held_within"]


def drawing(runs: Mapping[Tensor, Sequence[Run]], words: tuple[int, ...]) -> Draw:
    """Draws for tensors of which `runs` says what is in them, as functions of `words` and of a draw's number."""

    def draw(tensor: Tensor, number: int) -> Tensor:
        flat = normal(tensor.numel(), runs[tensor], (*words, number), tensor.device)
        if tensor.is_contiguous():
            return flat.view(tensor.shape)
        return torch.empty_like(tensor).copy_(flat.view(tensor.shape))  # in its memory layout, for what follows

    return draw


def held_within(
    tensor: Tensor, runs: Sequence[Run], held: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> Tensor:
    """Where a tensor of the optimiser's has elements that are held, bool, in its shape.

    Args:
        tensor: of the optimiser's.
        runs: what is where in it.
        held: masks by parameter, broadcast against the whole.
        shapes: of whole parameters.
    """
    found = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    for run in runs:
        if (mask := held.get(run.name)) is not None:
            flat = mask.expand(shapes[run.name]).reshape(-1)
            found[run.first : run.first + run.numel] = flat[run.start : run.start + run.numel].to(tensor.device)
    return found.view(tensor.shape)
