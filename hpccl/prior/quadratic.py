"""The quadratic part of the prior (EWC).

    R(w) = weight * [ 1/2 (w - a)' (F + damping I) (w - a) + c' (w - a) ]        nats in total
    dR/dw = weight * [ (F + damping I) (w - a) + c ]

F is a Precision summed over the examples that are not in memory, a the weights after the last task. With the newest
anchor for all tasks (Daxberger et al. 2023), c = 0. With each task's own anchor (Kirkpatrick et al. 2017),
sum_t F_t (w - a_t) = F (w - a) + c with the constant c = sum_t F_t (a - a_t): no old weights are kept.

The gradient enters the parameters' gradient hooks in fp32, outside autocast and loss scaling: the rank that holds a
layer's curvature adds world size times the force, and the averaging of gradients that happens anyway delivers it to all
ranks. No collective of its own, no dependence on the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpccl.curvature.build import precision_from_state
from hpccl.curvature.protocols import Piece, Precision, Shards, strided_like
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.engine.protocols import Engine, GradientHook, Weights, trainable

__all__ = ["Quadratic"]


@dataclass(frozen=True)
class Quadratic:
    """A quadratic around an anchor.

    precision: F
    anchor: a, by name of parameter (and buffer)
    weight: lambda
    damping: delta
    pull: c by name of parameter; None where it is zero
    """

    precision: Precision
    anchor: dict[str, Tensor]
    weight: float
    damping: float
    pull: dict[str, Tensor] | None = None

    def force(self, weights: Weights, comm: Comm) -> dict[str, Tensor]:
        """dR/dw of the named parameters, in fp32; collective, and equal on all ranks."""
        force = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
        for piece in self._pieces(weights, comm):
            force[piece.name] = piece.add(force[piece.name], weights, self.anchor, self.weight, self.damping)
        comm.sum_(list(force.values()))
        return force

    def value(self, weights: Weights, comm: Comm) -> float:
        """This rank's share of R(w) in nats, over the named parameters; R(w) is the sum over ranks. Not collective."""
        total = 0.0
        for piece in self.precision.pieces(comm, weights):
            delta = weights[piece.name].float() - self.anchor[piece.name]
            product = piece.add(torch.zeros_like(delta), weights, self.anchor, self.weight, self.damping)
            total += 0.5 * float((product.double() * delta).sum())
        for name, pull in self._owned_pull(weights, comm).items():
            total += self.weight * float((pull.double() * (weights[name] - self.anchor[name])).sum())
        return total

    def attach(self, engine: Engine, comm: Comm, *, num_train: int) -> Callable[[], None]:
        """Add dR/dw / num_train to every step's gradient until the returned function is called."""
        parameters = {name: value.detach() for name, value in trainable(engine.module).items()}
        pieces = self._pieces(parameters, comm)
        needed = {name for piece in pieces for name in piece.needs}
        anchor = {name: strided_like(self.anchor[name], parameters[name]) for name in needed}
        scale = comm.size * self.weight / num_train
        return engine.on_gradient([_hook(piece, anchor, scale, self.damping) for piece in pieces])

    def plus(
        self, precision: Precision, anchor: dict[str, Tensor], comm: Comm, *, own_anchors: Collection[str] = ()
    ) -> Quadratic:
        """The quadratic after one more task; collective. Curvatures add up, the anchor moves to the newest weights.

        own_anchors: names of the parameters if every task goes on pulling to its own weights; otherwise none.
        """
        pull = None
        if own_anchors:
            moved = {name: anchor[name] for name in own_anchors}
            pull = replace(self, weight=1.0, damping=0.0).force(moved, comm)
        return Quadratic(self.precision.plus(precision, comm), anchor, self.weight, self.damping, pull)

    def to(self, device: torch.device, anchor: dict[str, Tensor]) -> Quadratic:
        """The same with its tensors on a device, where `anchor` is already."""
        pull = None if self.pull is None else {name: value.to(device) for name, value in self.pull.items()}
        return Quadratic(self.precision.to(device), anchor, self.weight, self.damping, pull)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the anchor is saved by the prior, what ranks hold alone by `precision.shard_dict`."""
        return {
            "precision": self.precision.state_dict(),
            "weight": self.weight,
            "damping": self.damping,
            "pull": self.pull,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], anchor: dict[str, Tensor], shards: Shards, comm: Comm) -> Quadratic:
        """The inverse; `shards` reads what ranks held alone, on any number of ranks."""
        precision = precision_from_state(state["precision"], shards, comm)
        return cls(precision, anchor, state["weight"], state["damping"], state.get("pull"))

    def _pieces(self, weights: Weights, comm: Comm) -> list[Piece]:
        pull = self._owned_pull(weights, comm)
        return [
            *self.precision.pieces(comm, weights),
            *(_constant(name, strided_like(value, weights[name])) for name, value in pull.items()),
        ]

    def _owned_pull(self, weights: Weights, comm: Comm) -> dict[str, Tensor]:
        if self.pull is None:
            return {}
        owner = owners({name: float(value.numel()) for name, value in self.pull.items()}, comm.size)
        return {name: value for name, value in self.pull.items() if name in weights and owner[name] == comm.rank}


def _hook(piece: Piece, anchor: Weights, scale: float, damping: float) -> tuple[str, GradientHook]:
    def call(gradient: Tensor, weights: Weights) -> Tensor:
        return piece.add(gradient, weights, anchor, scale, damping)

    return piece.name, GradientHook(piece.needs, call)


def _constant(name: str, value: Tensor) -> Piece:
    def add(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        return torch.add(target, value, alpha=scale, out=torch.empty_like(target))

    return Piece(name, (), add)
