"""Approximate a sum of Kronecker products, sum_t B_t (x) A_t, by a single one, and measure the error.

With <X, Y> = sum_ij X_ij Y_ij, and Gram matrices K_A[s, t] = <A_s, A_t>, K_B[s, t] = <B_s, B_t>:

    |sum_t B_t (x) A_t|^2                  = sum_st K_A[s, t] K_B[s, t]
    singular values of its rearrangement   = sqrt(eigenvalues of K_A K_B)
    the nearest B (x) A                    : A = sum_t alpha_t A_t, alpha the leading eigenvector of K_B K_A,
                                             B = sum_t beta_t B_t,  beta = K_A alpha / (alpha' K_A alpha)
    the nearest in the basis Qb (x) Qa     : values = sum_t diag(Qb' B_t Qb) diag(Qa' A_t Qa)'

alpha, beta >= 0, since K_A and K_B have no negative elements where the terms are positive semi-definite; so A and B are
positive semi-definite too. A second singular pair would not be, and is never used.

Legend: g groups (each has its own Gram matrices), T terms, o outputs, d inputs.
Source: Van Loan & Pitsianis 1993, "Approximation with Kronecker products"; George et al. 2018, "Fast approximate
natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from typing import TypeAlias

import torch
from torch import Tensor

from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, Factor, LowRank, inner
from hpccl.kron.pair import Pair
from hpccl.kron.product import chain, matmul

__all__ = [
    "closest",
    "combination_error",
    "combine",
    "distance",
    "eigen_of",
    "gram",
    "merge_error",
    "nearest",
    "nearest_weights",
    "pooled_weights",
    "refit",
    "sum_norm",
]

Term: TypeAlias = Pair | Eigen

_TIE = 1e-10  # squared singular values this close, relative to the largest, count as equal
_ELEMENTS = 1 << 22  # elements converted to float64 at a time


def gram(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return K_A and K_B, each [g, T, T] in float64; for factors split over processes, this part's share of the sum."""
    return _gram([pair.a for pair in pairs]), _gram([pair.b for pair in pairs])


def nearest_weights(K_A: Tensor, K_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, beta), each [g, T] and >= 0, from which `combine` makes the nearest to sum_t B_t (x) A_t.

    alpha sums to 1 in every group: A is a mean of the A_t, and B carries the sum. Terms that are zero have no weight.
    """
    K_A, K_B = K_A.double(), K_B.double()
    size_a, size_b = (K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() for K in (K_A, K_B))
    counts = (size_a > 0) & (size_b > 0)
    # Moving each term's scale into B balances terms like 1e20 A (x) 1e-20 B; the weights undo it below.
    size_a = torch.where(counts, size_a, 1.0)
    both = counts[:, :, None] & counts[:, None, :]
    unit_a = torch.where(both, K_A / size_a[:, :, None] / size_a[:, None, :], 0.0)
    sized_b = torch.where(both, K_B * size_a[:, :, None] * size_a[:, None, :], 0.0)
    alpha = torch.where(counts, _leading(unit_a, sized_b) / size_a, 0.0)
    total = alpha.sum(1, keepdim=True)
    alpha = torch.where(total > 0, alpha / total, 1 / alpha.shape[1])
    overlap = (K_A * alpha[:, None, :]).sum(2)
    square = (alpha * overlap).sum(1, keepdim=True)
    beta = torch.where(square > 0, overlap / square, 0.0)
    return alpha, torch.where(counts, beta, 0.0).clamp_min(0)


def combine(pairs: Sequence[Pair], alpha: Tensor, beta: Tensor) -> Pair:
    """Return (sum_t beta_t B_t) (x) (sum_t alpha_t A_t) for alpha, beta [g, T]; dense."""
    return Pair(_weighted([pair.a for pair in pairs], alpha), _weighted([pair.b for pair in pairs], beta))


def nearest(pairs: Sequence[Pair]) -> Pair:
    """Return the B (x) A nearest to the sum of the pairs in the Frobenius norm; for factors that are not split."""
    return combine(pairs, *nearest_weights(*gram(pairs)))


def pooled_weights(pairs: Sequence[Pair], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (alpha, beta), each [g, T], from which `combine` sums B and averages A, as if measured on all examples.

    counts: numbers of examples
    """
    first = pairs[0].a
    total = sum(counts)
    shares = [count / total if total > 0 else 1 / len(counts) for count in counts]
    alpha = torch.tensor(shares, dtype=torch.float64, device=_device(first)).expand(first.groups, -1)
    return alpha, torch.ones_like(alpha)


def sum_norm(K_A: Tensor, K_B: Tensor) -> float:
    """Return the Frobenius norm of the sum of all terms, over all groups."""
    return float((K_A.double() * K_B.double()).sum().clamp_min(0).sqrt())


def merge_error(K_A: Tensor, K_B: Tensor, subset: Sequence[int]) -> float:
    """Return the Frobenius error, over all groups, of the nearest B (x) A to the sum of the terms in `subset`.

    Accurate to 1e-8 of the norm of that sum.
    """
    chosen = torch.tensor(subset, device=K_A.device)
    k_a, k_b = (K[:, chosen[:, None], chosen] for K in (K_A, K_B))
    return combination_error(k_a, k_b, *nearest_weights(k_a, k_b))


def combination_error(K_A: Tensor, K_B: Tensor, alpha: Tensor, beta: Tensor) -> float:
    """Return the Frobenius error, over all groups, of `combine` with alpha, beta [g, T] to the sum of all terms."""
    return float(_squared_error(K_A, K_B, alpha, beta).sum().sqrt())


def distance(terms: Sequence[Term], whole: Term) -> float:
    """Return the Frobenius norm of the sum of the terms minus `whole`, over all groups; for factors that are not split.

    Accurate to 1e-8 of the norm of that sum.
    """
    own = sum(_overlap(one, other) for one in terms for other in terms)
    square = own - 2 * sum(_overlap(term, whole) for term in terms) + _overlap(whole, whole)
    return sqrt(max(square, 0.0))


def closest(K_A: Tensor, K_B: Tensor) -> tuple[int, int, float]:
    """Return (i, j, error) of the two terms, i < j, that one B (x) A replaces with the least Frobenius error.

    Needs two terms or more.
    """
    groups, num_terms = K_A.shape[:2]
    assert num_terms > 1, "closest compares two terms"
    chosen = torch.tensor(list(combinations(range(num_terms), 2)), device=K_A.device)
    picked = (K[:, chosen[:, :, None], chosen[:, None, :]].flatten(0, 1) for K in (K_A, K_B))
    k_a, k_b = picked
    errors = _squared_error(k_a, k_b, *nearest_weights(k_a, k_b)).view(groups, -1).sum(0).sqrt()
    best = int(errors.argmin())
    i, j = chosen[best].tolist()
    return i, j, float(errors[best])


def refit(terms: Sequence[Term]) -> Eigen:
    """Return the diagonal of the sum of the terms in the eigenbasis of the nearest B (x) A of their factors.

    The diagonal is exact, and thus the best one in that basis. The sum is exact if the terms share their eigenvectors
    and no eigenvalue of the nearest B (x) A is repeated.

    Raises:
        DivergedError: a factor is not finite.
    """
    basis = Eigen.of(nearest([_factors(term) for term in terms]))
    values = torch.zeros_like(basis.values)
    for term in terms:
        values += _diagonal(term, basis.qa, basis.qb)
    return Eigen(basis.qa, basis.qb, values.clamp_min(0), basis.a, basis.b)


def eigen_of(terms: Sequence[Term]) -> Eigen:
    """Return the sum of the terms in an eigenbasis: exact for one term, several are replaced by their `refit`.

    Raises:
        DivergedError: a factor is not finite.
    """
    (first, *others) = terms
    if others:
        return refit(terms)
    return first if isinstance(first, Eigen) else Eigen.of(first)


def _gram(factors: Sequence[Factor]) -> Tensor:
    matrices = [factor.matrix for factor in factors if isinstance(factor, Dense)]
    if len(matrices) < len(factors):
        return _pairwise(factors)
    groups, _, columns = matrices[0].shape
    num_terms = len(matrices)
    total = matrices[0].new_zeros(groups, num_terms, num_terms, dtype=torch.float64)
    num_rows = max(1, _ELEMENTS // max(1, groups * num_terms * columns))
    for parts in zip(*(matrix.split(num_rows, 1) for matrix in matrices), strict=True):
        flat = torch.stack([part.double().flatten(1) for part in parts], 1)
        total += matmul(flat, flat.mT)
    return total


def _pairwise(factors: Sequence[Factor]) -> Tensor:
    places = range(len(factors))
    found = {(s, t): inner(factors[s], factors[t]) for s in places for t in places if s <= t}
    return torch.stack([torch.stack([found[min(s, t), max(s, t)] for t in places], 1) for s in places], 1)


def _leading(K_A: Tensor, K_B: Tensor) -> Tensor:
    """Return the leading eigenvector [g, T] of K_B K_A, >= 0; in a tie, the power method's limit from sum_t A_t."""
    values, vectors = torch.linalg.eigh((K_B + K_B.mT) / 2)
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    symmetric = root @ K_A @ root
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    leads = values >= values[:, -1:] * (1 - _TIE)
    # The limit of the power method from a vector of ones, which stays >= 0 even if several are leading.
    amounts = torch.where(leads, (vectors * root.sum(2)[:, :, None]).sum(1), 0.0)
    leading: Tensor = (root @ (vectors @ amounts[:, :, None]))[:, :, 0]
    return leading.clamp_min(0)


def _squared_error(K_A: Tensor, K_B: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """|sum_t B_t (x) A_t - B (x) A|^2 by group, for A = sum_t alpha_t A_t and B = sum_t beta_t B_t."""
    alpha, beta = alpha.double(), beta.double()
    K_A, K_B = K_A.double(), K_B.double()
    overlap = (K_A * alpha[:, None, :]).sum(2)
    square = (alpha * overlap).sum(1)
    # |S - B (x) A|^2 = |S|^2 - 2 <S, B (x) A> + |A|^2 |B|^2
    both = (overlap[:, :, None] * K_B * beta[:, None, :]).sum((1, 2))
    own = square * (beta[:, :, None] * K_B * beta[:, None, :]).sum((1, 2))
    return ((K_A * K_B).sum((1, 2)) - 2 * both + own).clamp_min(0)


def _weighted(factors: Sequence[Factor], weights: Tensor) -> Dense:
    total: Tensor | None = None
    for position, factor in enumerate(factors):
        matrix = factor.dense()
        weight = weights[:, position, None, None].to(matrix)
        total = matrix * weight if total is None else total.addcmul_(matrix, weight)
    assert total is not None, "a sum of no terms has no size"
    return Dense(total)


def _factors(term: Term) -> Pair:
    match term:
        case Pair():
            return term
        case Eigen(qa, qb, _, a, b):
            return Pair(Dense(LowRank(qa, a).dense()), Dense(LowRank(qb, b).dense()))


def _overlap(one: Term, other: Term) -> float:
    """Return the Frobenius inner product over all groups."""
    if isinstance(one, Eigen):
        return float((one.values.double() * _diagonal(other, one.qa, one.qb).double()).sum())
    if isinstance(other, Eigen):
        return _overlap(other, one)
    return float((inner(one.a, other.a) * inner(one.b, other.b)).sum())


def _diagonal(term: Term, qa: Tensor, qb: Tensor) -> Tensor:
    """Return the diagonal [g, o, d] of the term in the basis qb (x) qa."""
    match term:
        case Pair(a, b):
            return _rotated(b, qb)[:, :, None] * _rotated(a, qa)[:, None, :]
        case Eigen():
            return chain(matmul(qb.mT, term.qb).square(), term.values, matmul(term.qa.mT, qa).square())


def _rotated(factor: Factor, basis: Tensor) -> Tensor:
    """Return the diagonal [g, k] of Q' A Q."""
    match factor:
        case Dense(matrix):
            return (basis * matmul(matrix, basis)).sum(1)
        case LowRank(vectors, values):
            return (matmul(vectors.mT, basis).square() * values[:, :, None]).sum(1)


def _device(factor: Factor) -> torch.device:
    return factor.chain[0].device
