"""B (x) A: the second moments of one layer's output gradients and inputs.

    (B (x) A) vec(D) = vec(B D A) for D [o, d] and vec by rows

Legend: g groups, o outputs, d inputs.
Source: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from hpccl.kron.factor import Dense, Factor, LowRank, Spectrum, inner
from hpccl.kron.product import chain, chain_flops, halves, matmul

__all__ = ["Pair"]

Rank: TypeAlias = int | None  # rank of a factor; None: its whole matrix


@final
@dataclass(frozen=True)
class Pair:
    """One Kronecker product per group, B (x) A.

    a: factor of size d
    b: factor of size o
    """

    a: Factor
    b: Factor

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.a.num_bytes + self.b.num_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of one `matvec`, in matrix products."""
        left, right = _left(self.b).shape, _right(self.a).shape
        low = isinstance(self.b, LowRank), isinstance(self.a, LowRank)
        return _flops(self.a.groups, (self.b.size, self.a.size), (left[1], right[2]), low)

    def matvec(self, delta: Tensor) -> Tensor:
        """Return B delta A for delta [g, o, d], in the cheapest order."""
        return matmul(*self.halves(delta))

    def halves(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return two matrices whose product is B delta A for delta [g, o, d]: `matvec` without its last product."""
        left, right = _left(self.b), _right(self.a)
        if isinstance(self.b, Dense) and isinstance(self.a, Dense):
            return halves(left, delta, right)
        core = chain(left, delta, right)
        if isinstance(self.b, LowRank):
            core *= self.b.values[:, :, None]
        if isinstance(self.a, LowRank):
            core *= self.a.values[:, None, :]
        if isinstance(self.b, Dense):
            return core, right.mT
        if isinstance(self.a, Dense):
            return left.mT, core
        return halves(left.mT, core, right.mT)

    def trace(self) -> float:
        """Return the trace over all groups."""
        return float((self.a.trace() * self.b.trace()).sum())

    def norm(self) -> float:
        """Return the Frobenius norm over all groups."""
        return float((inner(self.a, self.a) * inner(self.b, self.b)).sum().clamp_min(0).sqrt())

    def times(self, scale: float) -> Pair:
        """Return it scaled by `scale` >= 0; A stays a mean, B carries the sum."""
        return Pair(self.a, self.b.times(scale))

    def truncated(self, keep: float) -> Pair:
        """Truncate one factor, both or none, at the least cost that keeps the share `keep` of every group's trace.

        Least cost: the fewest `flops`, then the fewest bytes. The loss allowed is divided between the factors to that
        end, and a rank may exceed half of the size: rows that B drops are rows that A need not be applied to.

        Raises:
            DivergedError: a factor is not finite.
        """
        assert 0 < keep <= 1, "a share of the trace"
        a, b = Spectrum.of(self.a.dense()), Spectrum.of(self.b.dense())
        sizes = b.matrix.shape[-1], a.matrix.shape[-1]

        def cost(ranks: tuple[Rank, Rank]) -> tuple[int, int]:
            of_b, of_a = ranks
            low = of_b is not None, of_a is not None
            flops = _flops(len(a.matrix), sizes, (of_b or sizes[0], of_a or sizes[1]), low)
            held = sum(size * (rank or size) + (rank or 0) for size, rank in zip(sizes, ranks, strict=True))
            return flops, held

        of_b, of_a = min(_sufficient(b.shares, a.shares, keep), key=cost)
        return Pair(a.leading(of_a), b.leading(of_b))

    def to(self, other: torch.device | torch.dtype) -> Pair:
        """Return it on another device or in another dtype."""
        return Pair(self.a.to(other), self.b.to(other))


def _left(factor: Factor) -> Tensor:
    """The first matrix to multiply from the left: eigenvectors [g, r, k], or the matrix (or rows of it)."""
    return factor.vectors.mT if isinstance(factor, LowRank) else factor.matrix


def _right(factor: Factor) -> Tensor:
    """The first matrix to multiply from the right: eigenvectors [g, k, r], or the matrix (or columns of it)."""
    return factor.vectors if isinstance(factor, LowRank) else factor.matrix


def _sufficient(b: Tensor, a: Tensor, keep: float) -> Iterator[tuple[Rank, Rank]]:
    """Yield ranks of B and A that keep the share `keep` of every group's trace: to each of B the least of A, and all.

    b, a: [g, o] and [g, d], see `Spectrum.shares`
    """
    yield None, None
    needed = keep / torch.cat([b, torch.ones_like(b[:, :1])], 1)
    least = 1 + torch.searchsorted(a, needed).amax(0)
    ranks: list[Rank] = [*range(1, b.shape[1] + 1), None]
    for of_b, of_a in zip(ranks, least.tolist(), strict=True):
        if of_a <= a.shape[1]:
            yield of_b, of_a
            yield of_b, None


def _flops(groups: int, sizes: tuple[int, int], ranks: tuple[int, int], low: tuple[bool, bool]) -> int:
    """Flops of B delta A for delta of `sizes`, through a core matrix of `ranks`; low: which of B and A are low-rank."""
    (outputs, inputs), (rows, columns) = sizes, ranks
    there = chain_flops((groups, rows, outputs), (groups, outputs, inputs), (groups, inputs, columns))
    left = [(groups, outputs, rows)] if low[0] else []
    right = [(groups, columns, inputs)] if low[1] else []
    return there + chain_flops(*left, (groups, rows, columns), *right)
