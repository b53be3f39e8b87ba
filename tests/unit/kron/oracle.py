"""Whole Kronecker products in float64, and factors to make them of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, Factor, LowRank
from hpccl.kron.pair import Pair

OUT, IN = 4, 5


def psd(size: int, *, seed: int, rank: int | None = None, groups: int = 1) -> Tensor:
    """[groups, size, size] in float64, of this rank."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, size, rank or size, generator=generator, dtype=torch.float64)
    return root @ root.mT


def low_rank(size: int, rank: int, *, seed: int, groups: int = 1) -> LowRank:
    """Vectors that are not orthonormal, which nothing promises."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(groups, size, rank, generator=generator, dtype=torch.float64)
    return LowRank(vectors, torch.rand(groups, rank, generator=generator, dtype=torch.float64) + 0.1)


def factor(kind: str, size: int, *, seed: int, groups: int = 1) -> Factor:
    if kind == "low":
        return low_rank(size, 2, seed=seed, groups=groups)
    return Dense(psd(size, seed=seed, groups=groups))


def pair(kinds: str = "dense-dense", *, seed: int, groups: int = 1) -> Pair:
    """Of size OUT x IN; `kinds` is that of a, then that of b."""
    a, b = kinds.split("-")
    return Pair(factor(a, IN, seed=2 * seed, groups=groups), factor(b, OUT, seed=2 * seed + 1, groups=groups))


def pairs(count: int, *, groups: int = 1, seed: int = 0) -> list[Pair]:
    return [pair(seed=100 * seed + term, groups=groups) for term in range(count)]


def whole(term: Pair | Eigen) -> Tensor:
    """B (x) A of every group, [g, o d, o d]."""
    if isinstance(term, Pair):
        return kron(dense(term.b), dense(term.a))
    basis = kron(term.qb.double(), term.qa.double())
    return basis @ torch.diag_embed(term.values.double().flatten(1)) @ basis.mT


def dense(one: Factor) -> Tensor:
    """Without the factor's own `dense`."""
    if isinstance(one, Dense):
        return one.matrix.double()
    return torch.einsum("gir,gr,gjr->gij", one.vectors.double(), one.values.double(), one.vectors.double())


def kron(b: Tensor, a: Tensor) -> Tensor:
    return torch.stack([torch.kron(mine, other) for mine, other in zip(b, a, strict=True)])


def whole_sum(terms: Sequence[Pair | Eigen]) -> Tensor:
    return torch.stack([whole(term) for term in terms]).sum(0)


def applied(matrix: Tensor, delta: Tensor) -> Tensor:
    """Matrix [g, o d, o d] times vec(delta) by rows, [g, o, d]."""
    return (matrix @ delta.double().flatten(1)[:, :, None]).view(delta.shape)


def rearranged(matrix: Tensor) -> Tensor:
    """[o o, d d] of one group's [o d, o d], so that B (x) A becomes vec(B) vec(A)' (Van Loan)."""
    return matrix.view(OUT, IN, OUT, IN).permute(0, 2, 1, 3).reshape(OUT * OUT, IN * IN)
