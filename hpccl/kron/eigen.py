"""Eigenvectors of symmetric positive semi-definite matrices, and B (x) A in a product of two eigenbases.

    (Qb (x) Qa) diag(values) (Qb (x) Qa)' applied to D [o, d]:  Qb (values o (Qb' D Qa)) Qa'

Legend: g groups, o outputs, d inputs; `o` between matrices is the element-wise product.
Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from hpccl.errors import DivergedError
from hpccl.kron.product import chain, chain_flops, halves, matmul

if TYPE_CHECKING:
    from hpccl.kron.pair import Pair

__all__ = ["Eigen", "symmetric_eigh"]


@final
@dataclass(frozen=True)
class Eigen:
    """A positive semi-definite matrix per group that is diagonal in a product of two orthonormal bases.

    qa: [g, d, d] eigenvectors in columns
    qb: [g, o, o] eigenvectors in columns
    values: [g, o, d] >= 0
    a: [g, d] eigenvalues of the factor that qa comes from; the next merge determines its basis from them
    b: [g, o] likewise for qb
    """

    qa: Tensor
    qb: Tensor
    values: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, pair: Pair) -> Eigen:
        """Decompose a pair; the matrix is the same.

        Raises:
            DivergedError: see `symmetric_eigh`.
        """
        a, qa = symmetric_eigh(pair.a.dense())
        b, qb = symmetric_eigh(pair.b.dense())
        return cls(qa, qb, b[:, :, None] * a[:, None, :], a, b)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.qa, self.qb, self.values, self.a, self.b))

    @property
    def flops(self) -> int:
        """Multiplications and additions of one `matvec`, in matrix products."""
        return 2 * chain_flops(self.qb.shape, self.values.shape, self.qa.shape)

    def matvec(self, delta: Tensor) -> Tensor:
        """Return Qb (values o (Qb' delta Qa)) Qa' for delta [g, o, d]."""
        return matmul(*self.halves(delta))

    def halves(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return two matrices whose product is `matvec(delta)`, leaving out its last matrix product."""
        rotated = chain(self.qb.mT, delta, self.qa).mul_(self.values)
        return halves(self.qb, rotated, self.qa.mT)

    def trace(self) -> float:
        """Return the trace over all groups."""
        return float(self.values.double().sum())

    def norm(self) -> float:
        """Return the Frobenius norm over all groups."""
        return float(self.values.double().square().sum().sqrt())

    def times(self, scale: float) -> Eigen:
        """Return it scaled by `scale` >= 0."""
        assert scale >= 0, "a precision stays positive semi-definite"
        return Eigen(self.qa, self.qb, self.values * scale, self.a, self.b * scale)

    def to(self, other: torch.device | torch.dtype) -> Eigen:
        """Return it on another device or in another dtype."""
        return Eigen(*(tensor.to(other) for tensor in (self.qa, self.qb, self.values, self.a, self.b)))


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [g, k], >= 0 and ascending, and eigenvectors [g, k, k] in columns, in the dtype of `matrix`.

    Args:
        matrix: [g, k, k], positive semi-definite up to rounding; of any scale and rank.

    Raises:
        DivergedError: an element is not finite, or no solver converges.
    """
    if not bool(matrix.isfinite().all()):
        raise DivergedError(
            f"a curvature factor of size {matrix.shape[-1]} is not finite; "
            "its inputs or gradients overflow: the model has diverged; lower optim.lr, or set train.clip_norm, "
            "in another folder=..."
        )
    # Solvers fail on large factors with many rows of exact zeros, which result from channels that never fire.
    alive, group_pattern = torch.unique((matrix != 0).any(-1), dim=0, return_inverse=True)
    values = matrix.new_zeros(matrix.shape[:2])
    vectors = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    for pattern, kept in enumerate(alive):
        groups = (group_pattern == pattern).nonzero()[:, 0]
        live, dead = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        vectors[groups[:, None], dead, torch.arange(len(dead), device=dead.device)] = 1
        if len(live) > 0:
            columns = torch.arange(len(dead), len(kept), device=live.device)
            part = matrix[groups[:, None, None], live[:, None], live]
            values[groups[:, None], columns], vectors[groups[:, None, None], live[:, None], columns] = _eigh(part)
    return values, vectors


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose matrices without zero rows, by the first solver that converges."""
    # For a positive semi-definite matrix the largest element is between trace / k and the trace; it cannot overflow.
    scale = matrix.abs().amax((1, 2), keepdim=True)
    scaled = matrix / scale
    scaled = (scaled + scaled.mT) / 2
    failure: RuntimeError | None = None
    for attempt in _attempts(scaled):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except RuntimeError as error:
            failure = error
            continue
        # Some GPU solvers do not report that they failed.
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            values = values.clamp_min(0).to(matrix) * scale[:, :, 0]
            return values, vectors.to(matrix)
    raise DivergedError(
        f"no eigenvalue solver converged on a curvature factor of size {matrix.shape[-1]} with largest element "
        f"{float(scale.max()):.3g}; give the layers of that size a diagonal (curvature.diagonal)"
    ) from failure


def _attempts(scaled: Tensor) -> Iterator[Tensor]:
    yield scaled.clone()  # a failed solver may overwrite its input
    yield scaled.double()
    if scaled.device.type != "cpu":
        yield scaled.double().cpu()
