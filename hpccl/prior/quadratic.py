"""The quadratic part of the prior (EWC).

    R(w) = weight / 2 * (w - a)' (F + damping I) (w - a)        nats in total
    dR/dw = weight * (F + damping I) (w - a)

F is a Precision summed over the examples that are not in memory, a the weights after the last task. The gradient
enters the parameters' gradient hooks in fp32, outside autocast and loss scaling: each parameter's owner rank adds
world size times its force, and the averaging of gradients that happens anyway delivers it to all ranks. No collective
of its own, no dependence on the number of micro-batches. (EWC with a moving centre, Daxberger et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpccl.curvature.build import precision_from_state
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.protocols import Precision
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.engine.protocols import Engine, GradientHook, Weights, trainable

__all__ = ["Quadratic"]


@dataclass(frozen=True)
class Quadratic:
    """A quadratic around an anchor."""

    precision: Precision
    anchor: dict[str, Tensor]
    weight: float
    damping: float

    def force(self, weights: Weights) -> dict[str, Tensor]:
        """dR/dw of the named weights, in fp32."""
        delta = {name: value.float() - self.anchor[name] for name, value in weights.items()}
        pulled = self.precision.matvec(delta)
        return {name: self.weight * (pulled[name] + self.damping * delta[name]) for name in delta}

    def value(self, weights: Weights) -> float:
        """R(w) in nats, over the named weights."""
        force = self.force(weights)
        return sum(0.5 * float(((weights[name].float() - self.anchor[name]) * force[name]).sum()) for name in force)

    def attach(self, engine: Engine, comm: Comm, *, num_train: int) -> Callable[[], None]:
        """Add dR/dw / num_train to every step's gradient until the returned function is called."""
        parameters = {name: value.detach() for name, value in trainable(engine.module).items()}
        owner = owners({name: float(self.anchor[name].numel()) for name in parameters}, comm.size)
        mine = {name: value for name, value in parameters.items() if owner[name] == comm.rank}
        laid_out = self._laid_out_as(mine)
        scale = comm.size / num_train
        return engine.on_gradient({name: laid_out._hook(name, scale) for name in mine})

    def _laid_out_as(self, weights: Weights) -> Quadratic:
        """The part over `weights`, in their memory layout: mixed layouts (channels_last) cost several times as much."""
        anchor = {name: _strided(self.anchor[name], weight) for name, weight in weights.items()}
        precision = self.precision
        if isinstance(precision, Diagonal):  # others are not element by element
            values = {name: _strided(precision.values[name], weight) for name, weight in weights.items()}
            precision = Diagonal(values, precision.num_examples)
        return replace(self, precision=precision, anchor=anchor)

    def _hook(self, name: str, scale: float) -> GradientHook:
        strength = scale * self.weight

        # The same as adding scale * force, with fewer passes over memory.
        def add(gradient: Tensor, weight: Tensor) -> Tensor:
            delta = weight.float() - self.anchor[name]
            pulled = self.precision.matvec({name: delta})[name]
            # Into the gradient's own layout, which is that of the buckets in which gradients are averaged.
            total = torch.add(gradient, pulled, alpha=strength, out=torch.empty_like(gradient))
            return total.add_(delta, alpha=strength * self.damping)

        return add

    def plus(self, precision: Precision, anchor: dict[str, Tensor]) -> Quadratic:
        """The quadratic after one more task: curvatures add up, the anchor moves to the newest weights."""
        return Quadratic(self.precision.plus(precision), anchor, self.weight, self.damping)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the anchor is saved by the prior."""
        return {"precision": self.precision.state_dict(), "weight": self.weight, "damping": self.damping}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], anchor: dict[str, Tensor]) -> Quadratic:
        """The inverse."""
        return cls(precision_from_state(state["precision"]), anchor, state["weight"], state["damping"])


def _strided(value: Tensor, like: Tensor) -> Tensor:
    """The same numbers with the strides of `like`; `value` itself where it has them already."""
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
