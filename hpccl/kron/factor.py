"""One symmetric positive semi-definite factor per group, whole or of low rank.

    Dense    A
    LowRank  A = V diag(values) V'

Legend: g groups, k size, r rank. A Dense factor may also hold some columns [g, k, j] or rows [g, j, k] of a matrix that
is split over processes: with rows, `left` returns A[I, :] D; `inner` returns this part's share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from hpccl.kron.eigen import symmetric_eigh
from hpccl.kron.product import chain, matmul

__all__ = ["Dense", "Factor", "LowRank", "Spectrum", "inner"]

_ROWS = 256  # rows converted to float64 at a time


@final
@dataclass(frozen=True)
class Dense:
    """A factor that holds its matrix [g, k, k]."""

    matrix: Tensor

    @property
    def size(self) -> int:
        """Rows of the whole matrix, k."""
        return max(self.matrix.shape[1:])

    @property
    def groups(self) -> int:
        """Number of matrices, g."""
        return len(self.matrix)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.matrix.nbytes

    @property
    def chain(self) -> tuple[Tensor, ...]:
        """Matrices whose product is the factor."""
        return (self.matrix,)

    def trace(self) -> Tensor:
        """Return the trace of each group, [g] in float64."""
        return self.matrix.diagonal(dim1=1, dim2=2).double().sum(1)

    def dense(self) -> Tensor:
        """Return the matrix [g, k, k]; not a copy."""
        return self.matrix

    def left(self, delta: Tensor) -> Tensor:
        """Return A delta for delta [g, k, m]."""
        return matmul(self.matrix, delta)

    def times(self, scale: float) -> Dense:
        """Return it scaled by `scale` >= 0."""
        assert scale >= 0, "a factor stays positive semi-definite"
        return Dense(self.matrix * scale)

    def to(self, other: torch.device | torch.dtype) -> Dense:
        """Return it on another device or in another dtype."""
        return Dense(self.matrix.to(other))


@final
@dataclass(frozen=True)
class LowRank:
    """A factor V diag(values) V' of low rank.

    vectors: [g, k, r]
    values: [g, r] >= 0
    """

    vectors: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """Rows of the whole matrix, k."""
        return self.vectors.shape[1]

    @property
    def groups(self) -> int:
        """Number of matrices, g."""
        return len(self.vectors)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.vectors.nbytes + self.values.nbytes

    @property
    def chain(self) -> tuple[Tensor, ...]:
        """Matrices whose product is the factor."""
        return (self.vectors * self.values[:, None, :], self.vectors.mT)

    def trace(self) -> Tensor:
        """Return the trace of each group, [g] in float64."""
        return (self.vectors.double().square().sum(1) * self.values.double()).sum(1)

    def dense(self) -> Tensor:
        """Return the matrix [g, k, k]."""
        return chain(*self.chain)

    def left(self, delta: Tensor) -> Tensor:
        """Return A delta for delta [g, k, m]."""
        return matmul(self.vectors, matmul(self.vectors.mT, delta) * self.values[:, :, None])

    def times(self, scale: float) -> LowRank:
        """Return it scaled by `scale` >= 0."""
        assert scale >= 0, "a factor stays positive semi-definite"
        return LowRank(self.vectors, self.values * scale)

    def to(self, other: torch.device | torch.dtype) -> LowRank:
        """Return it on another device or in another dtype."""
        return LowRank(self.vectors.to(other), self.values.to(other))


Factor: TypeAlias = Dense | LowRank


@final
@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix per group with all its eigenvectors, of which `leading` keeps some.

    matrix: [g, k, k]
    values: [g, k] >= 0, ascending
    vectors: [g, k, k] in columns
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """Decompose a matrix.

        Raises:
            DivergedError: see `symmetric_eigh`.
        """
        return cls(matrix, *symmetric_eigh(matrix))

    @property
    def shares(self) -> Tensor:
        """Shares [g, k] of the trace in the 1, 2, ... k leading eigenvectors, float64; 1 where the trace is 0."""
        kept = self.values.double().flip(1).cumsum(1)
        return torch.where(kept[:, -1:] > 0, kept / kept[:, -1:], 1.0)

    def leading(self, rank: int | None) -> Factor:
        """Return the factor of the `rank` leading eigenvectors of every group; None: the whole matrix."""
        if rank is None:
            return Dense(self.matrix)
        return LowRank(self.vectors[:, :, -rank:].contiguous(), self.values[:, -rank:].contiguous())


def inner(first: Factor, second: Factor) -> Tensor:
    """Return the Frobenius inner product, [g], computed in float64 so that float32 factors lose no precision."""
    if isinstance(first, Dense):
        return _with_dense(first.matrix, second)
    if isinstance(second, Dense):
        return _with_dense(second.matrix, first)
    overlap = matmul(first.vectors.double().mT, second.vectors.double()).square()
    return (first.values.double()[:, :, None] * overlap * second.values.double()[:, None, :]).sum((1, 2))


def _with_dense(matrix: Tensor, other: Factor) -> Tensor:
    total = matrix.new_zeros(len(matrix), dtype=torch.float64)
    match other:
        case Dense(second):
            for rows, others in zip(matrix.split(_ROWS, 1), second.split(_ROWS, 1), strict=True):
                total += (rows.double() * others.double()).sum((1, 2))
        case LowRank(vectors, values):
            # sum over r of values_r v_r' A v_r
            right = vectors.double()
            scaled = right * values.double()[:, None, :]
            for rows, left in zip(matrix.split(_ROWS, 1), scaled.split(_ROWS, 1), strict=True):
                total += (left * matmul(rows.double(), right)).sum((1, 2))
    return total
