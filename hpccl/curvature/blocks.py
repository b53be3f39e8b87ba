"""One layer's curvature: a sum of Kronecker products over its weight and bias as one matrix, or a part of it.

    D [g, o, d] -> sum_t B_t D A_t

Legend: g groups (1 except in grouped convolutions), o outputs of a group, d inputs of a group, the bias (input 1) last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from hpccl.curvature.protocols import Weights, accumulation_dtype
from hpccl.errors import CheckpointError
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, Factor, LowRank
from hpccl.kron.merge import gram, sum_norm
from hpccl.kron.pair import Pair
from hpccl.kron.product import matmul

__all__ = ["WHOLE", "Block", "Layout", "Part", "Term", "is_channels_last"]

Term: TypeAlias = Pair | Eigen


@final
@dataclass(frozen=True)
class Layout:
    """How a layer's matrix is made up of named weights.

    name: the layer's module name
    weight, bias: full parameter names; bias is None if the layer has no trainable one
    weight_shape: shape of the weight
    groups: groups of a convolution; otherwise 1
    channels_last: the inputs of a convolution are ordered (kh, kw, channel), as its weight lies in memory, instead of
        (channel, kh, kw): then the matrix is a view of the weight
    """

    name: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    groups: int = 1
    channels_last: bool = False

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Layout:
        """The inverse of `state_dict`; TypeError if it is damaged."""
        return cls(**{**state, "weight_shape": tuple(state["weight_shape"])})

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {**vars(self), "weight_shape": list(self.weight_shape)}

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the matrix, (g, o, d)."""
        inputs = math.prod(self.weight_shape[1:]) + (self.bias is not None)
        return self.groups, self.weight_shape[0] // self.groups, inputs

    def as_lies(self, weight: Tensor | None) -> Layout:
        """Return the layout with its inputs in the memory order of a weight; None: as they are."""
        return self if weight is None else replace(self, channels_last=is_channels_last(weight))

    def difference(self, weights: Weights, anchor: Weights) -> Tensor:
        """Return weights - anchor as a matrix [g, o, d], subtracted in fp32."""
        groups, outputs, inputs = self.shape
        weight = self._matrix(weights[self.weight])
        matrix = torch.empty(groups, outputs, inputs, dtype=accumulation_dtype(weight.dtype), device=weight.device)
        last = inputs - (self.bias is not None)
        torch.sub(weight.to(matrix.dtype), self._matrix(anchor[self.weight]), out=matrix[..., :last])
        if self.bias is not None:
            bias = weights[self.bias].to(matrix.dtype) - anchor[self.bias]
            matrix[..., last] = bias.view(groups, outputs)
        return matrix

    def matrix(self, weights: Weights) -> Tensor:
        """Return the named weights as a matrix [g, o, d], fp32."""
        return self.difference(weights, {name: torch.zeros_like(weights[name]) for name in self.names})

    def matrices(self, rows: Weights) -> Tensor:
        """Return m named weights, each [m, *shape of the parameter], as matrices [m, g, o, d] in the weight's dtype."""
        matrices = self._matrix(rows[self.weight])
        if self.bias is None:
            return matrices
        bias = rows[self.bias].reshape(*matrices.shape[:3], 1)
        return torch.cat([matrices, bias.to(matrices)], dim=3)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The weight's part of a matrix [g, o, d], in the weight's shape; a view."""
        inputs = math.prod(self.weight_shape[1:])
        flat = matrix[..., :inputs].flatten(0, 1)
        if not self.channels_last:
            return flat.view(self.weight_shape)
        outputs, channels, *kernel = self.weight_shape
        return flat.view(outputs, *kernel, channels).movedim(-1, 1)

    def matrix_of(self, weight: Tensor) -> Tensor | None:
        """View a tensor of the weight's shape as a matrix [g, o, d without bias]; None if its strides forbid a view."""
        if self.channels_last:
            weight = weight.movedim(1, -1)
        groups, outputs, _ = self.shape
        return weight.view(groups, outputs, -1) if weight.is_contiguous() else None

    def bias_of(self, matrix: Tensor) -> Tensor:
        """The bias's part of a matrix [g, o, d]: [g * o]."""
        return matrix[..., -1].flatten()

    def named(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a matrix [g, o, d] as named weights; the inverse of `matrix`."""
        found = {self.weight: self.weight_of(matrix)}
        return found if self.bias is None else {**found, self.bias: self.bias_of(matrix)}

    def order(self) -> Tensor:
        """The position of each of the matrix's inputs in the order (channel, kh, kw), bias last: [d]."""
        _, _, inputs = self.shape
        positions = torch.arange(inputs)
        if not self.channels_last:
            return positions
        last = inputs - (self.bias is not None)
        moved = positions[:last].view(*self.weight_shape[1:]).movedim(0, -1).flatten()
        return torch.cat([moved, positions[last:]])

    def _matrix(self, weight: Tensor) -> Tensor:
        """Reshape [..., *shape of the weight] to [..., g, o, d without bias]; a view if strides allow it."""
        before = weight.shape[: weight.dim() - len(self.weight_shape)]
        if self.channels_last:
            weight = weight.movedim(-3, -1)
        groups, outputs, _ = self.shape
        return weight.reshape(*before, groups, outputs, -1)


def is_channels_last(weight: Tensor) -> bool:
    """Whether it is the weight of a convolution larger than 1x1, stored in memory as (o, kh, kw, channel)."""
    return weight.dim() == 4 and not weight.is_contiguous()


@final
@dataclass(frozen=True)
class Part:
    """A share of a block's work and memory: columns of its A (`input`), rows of its B (`output`), or all of it."""

    axis: Literal["whole", "input", "output"] = "whole"
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, shape: tuple[int, int, int], number: int, count: int) -> Part:
        """Return part `number` of `count` of a block of `shape`, cut along its longer side."""
        if count == 1:
            return WHOLE
        _, outputs, inputs = shape
        size = max(outputs, inputs)
        axis: Literal["input", "output"] = "input" if inputs >= outputs else "output"
        return cls(axis, number * size // count, (number + 1) * size // count)

    @property
    def range(self) -> slice:
        """The slice of the axis that is cut."""
        return slice(None) if self.axis == "whole" else slice(self.start, self.stop)

    def of_product(self, matrix: Tensor) -> Tensor:
        """View the rows or columns of [g, o, d] that belong to this part."""
        return matrix[:, self.range] if self.axis == "output" else matrix[:, :, self.range]


WHOLE = Part()


@final
@dataclass(frozen=True)
class Block:
    """A layer's curvature, or a part of it.

    terms: summands
    counts: number of examples of each term
    lost: bound on the Frobenius norm of the error of the whole block from truncating and merging
    """

    layout: Layout
    terms: tuple[Term, ...]
    counts: tuple[float, ...]
    lost: float = 0.0
    part: Part = WHOLE

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(term.num_bytes for term in self.terms)

    @property
    def flops(self) -> float:
        """Multiplications and additions of one product with a matrix."""
        return float(sum(term.flops for term in self.terms))

    def trace(self) -> float:
        """Sum of the diagonal elements held here: those of a block's parts add up to its trace."""
        return sum(_trace(term, self.part) for term in self.terms)

    def norm(self) -> float:
        """Frobenius norm of a whole block."""
        if len(self.terms) == 1:
            return float(self.terms[0].norm())
        k_a, k_b = gram([term for term in self.terms if isinstance(term, Pair)])
        return float(sum_norm(k_a, k_b))

    def error(self) -> float:
        """Bound on the relative error of a whole block from truncating and merging, in the Frobenius norm."""
        return self.lost / self.norm() if self.lost > 0 else 0.0

    def add_matvec_(self, target: Tensor, matrix: Tensor, *, scale: float) -> None:
        """Add `scale` times the product with `matrix` [g, o, d] to `target`, a view of this part's rows or columns.

        The target may lack the last column, the bias's. The last matrix product accumulates into the target directly,
        unless the terms' dtype is narrower than the target's.
        """
        matrix = _in_type_of(self.terms[0], matrix)
        for term in self.terms:
            left, right = term.halves(matrix)
            right = right[..., : target.shape[2]]
            if left.dtype != target.dtype:
                target.add_(matmul(left, right), alpha=scale)
            elif len(target) == 1:
                target[0].addmm_(left[0], right[0], alpha=scale)
            else:
                target.baddbmm_(left, right, alpha=scale)

    def bias_column(self, matrix: Tensor) -> Tensor:
        """The last column of the product with [g, o, d], without the rest: [g, o or this part's rows]."""
        total: Tensor | None = None
        delta = _in_type_of(self.terms[0], matrix)
        for term in self.terms:
            if isinstance(term, Eigen):
                left, right = term.halves(delta)
                column = (left @ right[..., -1:])[..., 0]
            else:
                column = _left(term.b, delta @ _last_column(term.a))[..., 0]
            total = column.to(matrix.dtype) if total is None else total + column
        assert total is not None
        return total

    def times(self, scale: float) -> Block:
        """Return it scaled by `scale` >= 0, with the terms' counts, as if each had `scale` times the examples."""
        terms = tuple(term.times(scale) for term in self.terms)
        return replace(self, terms=terms, counts=tuple(count * scale for count in self.counts), lost=self.lost * scale)

    def truncated(self, keep: float) -> Block:
        """Return it with low-rank factors that keep the share `keep` of each term's trace; `lost` grows by the error.

        Raises:
            DivergedError: a factor is not finite.
        """
        if keep == 1:
            return self
        terms = tuple(_truncated(term, keep) for term in self.terms)
        # The part that is dropped is orthogonal to the part that is kept.
        squares = [old.norm() ** 2 - new.norm() ** 2 for old, new in zip(self.terms, terms, strict=True)]
        return replace(self, terms=terms, lost=self.lost + sum(max(square, 0.0) ** 0.5 for square in squares))

    def to(self, other: torch.device | torch.dtype) -> Block:
        """Return it on another device or in another dtype."""
        return replace(self, terms=tuple(term.to(other) for term in self.terms))

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and JSON scalars; the layout is saved separately."""
        return {
            "terms": [_term_state(term) for term in self.terms],
            "counts": list(self.counts),
            "lost": self.lost,
            "part": dict(vars(self.part)),
        }

    @classmethod
    def from_state_dict(cls, layout: Layout, state: Mapping[str, Any]) -> Block:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: the state is damaged.
        """
        try:
            terms = tuple(_term(term) for term in state["terms"])
            return cls(layout, terms, tuple(state["counts"]), float(state["lost"]), Part(**state["part"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the curvature of layer '{layout.name}' is damaged: {error}") from error

    def cut(self, part: Part) -> Block:
        """Return a part of a whole block."""
        assert self.part == WHOLE
        if part == WHOLE:
            return self
        return replace(self, terms=tuple(_cut(term, part) for term in self.terms), part=part)

    def reordered(self, layout: Layout) -> Block:
        """Return a whole block with its inputs in the order of another layout of the same layer."""
        assert self.part == WHOLE
        if layout == self.layout:
            return self
        places = self.layout.order().argsort()[layout.order()]
        return replace(self, layout=layout, terms=tuple(_reordered(term, places) for term in self.terms))

    @classmethod
    def joined(cls, parts: list[Block]) -> Block:
        """Join all parts of a block into the whole."""
        if parts[0].part == WHOLE:
            return parts[0]
        parts = sorted(parts, key=lambda block: block.part.start)
        terms = tuple(_joined([block.terms[t] for block in parts], parts[0].part) for t in range(len(parts[0].terms)))
        return replace(parts[0], terms=terms, part=WHOLE)


def _truncated(term: Term, keep: float) -> Term:
    """Truncate a pair of dense factors; return other terms, which are truncated already, as they are."""
    if isinstance(term, Pair) and isinstance(term.a, Dense) and isinstance(term.b, Dense):
        return term.truncated(keep)
    return term


def _trace(term: Term, part: Part) -> float:
    if part == WHOLE:
        return float(term.trace())
    a, b = _matrices(term)
    cut, other = (a, b) if part.axis == "input" else (b.mT, a)
    diagonal = cut[:, part.range].diagonal(dim1=1, dim2=2).double().sum(1)
    return float((diagonal * other.diagonal(dim1=1, dim2=2).double().sum(1)).sum())


def _in_type_of(term: Term, matrix: Tensor) -> Tensor:
    """Round the matrix to bf16 if the term is in bf16; other dtypes already agree."""
    own = term if isinstance(term, Eigen) else term.a
    held = own.matrix if isinstance(own, Dense) else own.values
    return matrix.to(held.dtype) if held.dtype == torch.bfloat16 else matrix


def _left(factor: Factor, matrix: Tensor) -> Tensor:
    product: Tensor = factor.left(matrix)
    return product


def _last_column(factor: Factor) -> Tensor:
    """The last column [g, d, 1] of a symmetric factor, whole or cut to columns (then those include it)."""
    if isinstance(factor, LowRank):
        return factor.vectors @ (factor.values * factor.vectors[:, -1])[..., None]
    return factor.matrix[..., -1:]


def _cut(term: Term, part: Part) -> Term:
    a, b = _matrices(term)
    # Clones: checkpoint files could not express memory shared between the parts of one rank.
    if part.axis == "input":
        return Pair(Dense(a[:, :, part.range].clone()), Dense(b.clone()))
    return Pair(Dense(a.clone()), Dense(b[:, part.range].clone()))


def _reordered(term: Term, places: Tensor) -> Term:
    """places: [d] current position of each input of the new order."""
    if isinstance(term, Eigen):
        return replace(term, qa=term.qa[:, places])
    match term.a:
        case Dense(matrix):
            return Pair(Dense(matrix[:, places][:, :, places]), term.b)
        case LowRank(vectors, values):
            return Pair(LowRank(vectors[:, places], values), term.b)


def _joined(terms: list[Term], part: Part) -> Term:
    inputs, gradients = zip(*(_matrices(term) for term in terms), strict=True)
    if part.axis == "input":
        return Pair(Dense(torch.cat(inputs, dim=2)), Dense(gradients[0]))
    return Pair(Dense(inputs[0]), Dense(torch.cat(gradients, dim=1)))


def _matrices(term: Term) -> tuple[Tensor, Tensor]:
    """A and B of a term that can be cut; eigenbases and low-rank factors never are."""
    assert isinstance(term, Pair), "only a pair is cut"
    assert isinstance(term.a, Dense), "only a whole A is cut"
    assert isinstance(term.b, Dense), "only a whole B is cut"
    return term.a.matrix, term.b.matrix


def _term_state(term: Term) -> dict[str, Any]:
    if isinstance(term, Eigen):
        return {"kind": "eigen", **vars(term)}
    return {"kind": "pair", "a": dict(vars(term.a)), "b": dict(vars(term.b))}


def _term(state: Mapping[str, Any]) -> Term:
    fields = {key: value for key, value in state.items() if key != "kind"}
    if state["kind"] == "eigen":
        return Eigen(**fields)
    return Pair(_factor(fields["a"]), _factor(fields["b"]))


def _factor(state: Mapping[str, Tensor]) -> Factor:
    return Dense(**state) if "matrix" in state else LowRank(**state)
