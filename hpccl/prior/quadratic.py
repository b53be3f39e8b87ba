"""The quadratic part of the prior (EWC, MAS, SI).

    R(w) = weight * [ 1/2 (w - a)' (F + damping I) (w - a) + c' (w - a) ]        nats in total
    dR/dw = weight * [ (F + damping I) (w - a) + c ]

F is a Precision summed over the examples that are not in memory; a are the weights after the last task. With the newest
anchor for all tasks (Daxberger et al. 2023), c = 0. With each task's own anchor (Kirkpatrick et al. 2017),
sum_t F_t (w - a_t) = F (w - a) + c with the constant c = sum_t F_t (a - a_t): no old weights are kept.

Gradient hooks add dR/dw to the parameters' gradients in fp32 (products with factors may be in bf16), outside autocast
and loss scaling: the rank that holds a layer's curvature adds world size times dR/dw, and the averaging of gradients
that happens anyway distributes it to all ranks. A step has no collective of its own, and the result does not depend on
the number of micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hpccl.curvature.build import precision_from_state
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.protocols import Piece, Precision, Shards, strided_like
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.dist.spread import Leaf, Leaves, Place, Slab, elements, fetch, mapped, own
from hpccl.engine.protocols import Engine, GradientHook, Weights

__all__ = ["Products", "Quadratic"]

Products: TypeAlias = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Quadratic:
    """A quadratic around an anchor.

    precision: F
    anchor: a, by name of parameter (and buffer), whole on every rank or spread
    weight: lambda
    damping: delta
    pull: c by name of parameter; None if it is zero
    products: dtype of a step's products with the curvature's matrices: fp32, or bf16 with relative errors of about 2^-8
    """

    precision: Precision
    anchor: Leaves
    weight: float
    damping: float
    pull: Leaves | None = None
    products: Products = "fp32"

    def force(self, weights: Leaves, comm: Comm) -> Leaves:
        """Return dR/dw of the named parameters, in fp32, whole or spread as `weights` are; collective."""
        pieces = self._pieces(_bare(weights), comm)
        own, anchor = self._needed(pieces, weights, comm)
        force: dict[str, Leaf] = {}
        for name, leaf in weights.items():
            whole = torch.zeros(tuple(leaf.shape), dtype=torch.float32, device=comm.device)
            for piece in pieces:
                if piece.name == name:
                    whole = piece.add(whole, own, anchor, self.weight, self.damping)
            force[name] = whole
            if isinstance(leaf, Slab):
                comm.sum_([whole])
                part = elements(whole, leaf.span.start, leaf.span.stop)
                force[name] = Slab(part.to(leaf.local.device, copy=True), leaf.span)
        comm.sum_([value for value in force.values() if isinstance(value, Tensor)])
        return force

    def value(self, weights: Leaves, comm: Comm) -> float:
        """Return this rank's share of R(w) in nats, over the named parameters; the ranks' sum is R(w). Collective."""
        pieces = self.precision.pieces(comm, _bare(weights))
        pulls = self._owned_pull(weights, comm)
        own, anchor = self._needed(pieces, weights, comm, more=pulls)
        total = 0.0
        for piece in pieces:
            delta = own[piece.name].float() - anchor[piece.name]
            product = piece.add(torch.zeros_like(delta), own, anchor, self.weight, self.damping)
            total += 0.5 * float((product.double() * delta).sum())
        for name, pull in pulls.items():
            total += self.weight * float((pull.double() * (own[name] - anchor[name])).sum())
        return total

    def _needed(
        self, pieces: Sequence[Piece], weights: Leaves, comm: Comm, *, more: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return, whole, the weights and anchors that this rank's pieces need."""
        names = {name for piece in pieces for name in (piece.name, *piece.needs)} | set(more)
        return fetch(weights, names, comm), fetch(self.anchor, names, comm)

    def attach(self, engine: Engine, comm: Comm, *, num_train: int) -> Callable[[], None]:
        """Add dR/dw / num_train to every step's gradient until the returned function is called; collective."""
        like = engine.like
        used = replace(self, precision=self.precision.rounded()) if self.products == "bf16" else self
        pieces = used._pieces(like, comm)
        needed = {name for piece in pieces for name in piece.needs}
        anchor = {name: strided_like(value, like[name]) for name, value in fetch(self.anchor, needed, comm).items()}
        scale = comm.size * self.weight / num_train
        return engine.on_gradient([_hook(piece, anchor, scale, self.damping) for piece in pieces])

    def pull_on(self, num_train: int) -> Callable[[str, Tensor], Tensor]:
        """Return (name, elements) -> dR/dw / num_train at a rank's own elements of a parameter, as `attach` adds it.

        For a diagonal that is spread as the weights are; needs no communication.
        """
        assert isinstance(self.precision, Diagonal), "other precisions mix elements that ranks do not have"
        leaves, scale = self.precision.leaves, self.weight / num_train

        def part(leaf: Leaf, like: Tensor) -> Tensor:
            return own(leaf).to(like.device).view_as(like)

        def force(name: str, weights: Tensor) -> Tensor:
            distance = weights - part(self.anchor[name], weights)
            total = distance * (part(leaves[name], weights) + self.damping)
            if self.pull is not None:
                total += part(self.pull[name], weights)
            return total * scale

        return force

    def plus(
        self,
        precision: Precision,
        anchor: Leaves,
        comm: Comm,
        *,
        own_anchors: Collection[str] = (),
        decay: float = 1.0,
    ) -> Quadratic:
        """Return the quadratic after one more task; collective. Curvatures add up, the anchor is the newest weights.

        own_anchors: names of the parameters if every task keeps its own anchor; otherwise none.
        decay: gamma, the factor of earlier tasks: F <- gamma F + F_t (Schwarz et al. 2018, eq. 9).
        """
        past = (
            self if decay == 1 else replace(self, precision=self.precision.times(decay), pull=_scaled(self.pull, decay))
        )
        pull: Leaves | None = None
        if own_anchors:
            moved = {name: anchor[name] for name in own_anchors}
            pull = replace(past, weight=1.0, damping=0.0).force(moved, comm)
        return replace(past, precision=past.precision.plus(precision, comm), anchor=anchor, pull=pull)

    def to(self, device: torch.device, anchor: Leaves) -> Quadratic:
        """Return it with its tensors on a device, where `anchor` is already."""
        pull = None if self.pull is None else {name: leaf.to(device) for name, leaf in self.pull.items()}
        return replace(self, precision=self.precision.to(device), anchor=anchor, pull=pull)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; the prior saves the anchor, `precision.shard_dict` each rank's own state."""
        return {
            "precision": self.precision.state_dict(),
            "weight": self.weight,
            "damping": self.damping,
            "pull": self.pull,
            "products": self.products,
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], anchor: Leaves, shards: Shards, comm: Comm, *, place: Place, like: Weights
    ) -> Quadratic:
        """The inverse of `state_dict`; `shards` reads the state of any number of ranks; see Prior.from_state_dict."""
        precision = precision_from_state(state["precision"], shards, comm, place, like)
        pull = state.get("pull")
        placed = None if pull is None else place(pull)
        return cls(precision, anchor, state["weight"], state["damping"], placed, state.get("products", "fp32"))

    def _pieces(self, weights: Weights, comm: Comm) -> list[Piece]:
        """Return this rank's pieces; collective if a diagonal or the pull is spread. weights: for shape and strides."""
        pull = self._owned_pull(weights, comm)
        return [
            *self.precision.pieces(comm, weights),
            *(_constant(name, strided_like(value, weights[name])) for name, value in pull.items()),
        ]

    def _owned_pull(self, weights: Leaves, comm: Comm) -> dict[str, Tensor]:
        if self.pull is None:
            return {}
        owner = owners({name: float(math.prod(leaf.shape)) for name, leaf in self.pull.items()}, comm.size)
        return fetch(self.pull, [name for name in self.pull if name in weights and owner[name] == comm.rank], comm)


def _scaled(leaves: Leaves | None, scale: float) -> Leaves | None:
    if leaves is None:
        return None
    return {name: mapped(leaf, lambda value: value * scale) for name, leaf in leaves.items()}


def _bare(leaves: Leaves) -> dict[str, Tensor]:
    """Replace leaves that are spread by empty tensors of their shape."""
    return {
        name: torch.empty(leaf.shape, device="meta") if isinstance(leaf, Slab) else leaf
        for name, leaf in leaves.items()
    }


def _hook(piece: Piece, anchor: Weights, scale: float, damping: float) -> tuple[str, GradientHook]:
    def call(gradient: Tensor, weights: Weights) -> Tensor:
        return piece.add(gradient, weights, anchor, scale, damping)

    return piece.name, GradientHook(piece.needs, call)


def _constant(name: str, value: Tensor) -> Piece:
    def add(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        return torch.add(target, value, alpha=scale, out=torch.empty_like(target))

    return Piece(name, (), add)
