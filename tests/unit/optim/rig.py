"""A loop around an optimiser with trial weights, as an engine has it, on a function of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpccl.optim.noise import Run, normal
from hpccl.optim.perturbing import Draw, Perturbing

__all__ = ["constant", "drawing", "take"]

Loss = Callable[[Tensor], Tensor]


def constant(value: float) -> Draw:
    """The same number for every element of every draw."""
    return lambda tensor, number: torch.full_like(tensor, value)


def drawing(step: int, seed: int = 0) -> Draw:
    """Independent numbers."""

    def draw(tensor: Tensor, number: int) -> Tensor:
        flat = normal(tensor.numel(), [Run("w", 0, tensor.numel())], (seed, step, number), tensor.device)
        return flat.to(tensor.dtype).view(tensor.shape)

    return draw


def take(optimizer: Perturbing, weights: Tensor, loss: Loss, draw: Draw) -> list[tuple[Tensor, Tensor]]:
    """One step; returns the weights and the gradient of each pass."""
    seen = []
    for number in range(optimizer.passes):
        trial = optimizer.trial(number, [weights], draw)
        point = (weights if trial is None else trial[0]).detach().clone().requires_grad_()
        weights.grad = torch.autograd.grad(loss(point).sum(), point)[0]
        seen.append((point.detach(), weights.grad.clone()))
        optimizer.note(number, [weights], lambda gradients: torch.stack([g.norm() for g in gradients]).norm())
    optimizer.step()
    optimizer.forget()
    weights.grad = None
    return seen
