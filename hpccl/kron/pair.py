"""B (x) A: the second moments of one layer's output gradients and inputs.

    (B (x) A) vec(D) = vec(B D A) for D [o, d] and vec by rows

Legend: g groups, o outputs, d inputs.
Source: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import final

import torch
from torch import Tensor

from hpccl.kron.factor import Factor, inner, truncated
from hpccl.kron.product import chain, chain_flops

__all__ = ["Pair"]


@final
@dataclass(frozen=True)
class Pair:
    """One Kronecker product a group, B (x) A.

    a: of size d
    b: of size o
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
        left, right = ([matrix.shape for matrix in factor.chain] for factor in (self.b, self.a))
        return chain_flops(*left, (self.a.groups, self.b.size, self.a.size), *right)

    def matvec(self, delta: Tensor) -> Tensor:
        """B delta A for delta [g, o, d], in the cheapest order."""
        return chain(*self.b.chain, delta, *self.a.chain)

    def trace(self) -> float:
        """Over all groups."""
        return float((self.a.trace() * self.b.trace()).sum())

    def norm(self) -> float:
        """Frobenius, over all groups."""
        return float((inner(self.a, self.a) * inner(self.b, self.b)).sum().clamp_min(0).sqrt())

    def times(self, scale: float) -> Pair:
        """Scaled by `scale` >= 0; A stays a mean, B carries the sum."""
        return Pair(self.a, self.b.times(scale))

    def truncated(self, keep: float) -> Pair:
        """With factors of low rank where that is smaller: at least `keep` of the trace of every group stays.

        Raises:
            DivergedError: a factor is not finite.
        """
        share = sqrt(keep)
        return Pair(truncated(self.a.dense(), share), truncated(self.b.dense(), share))

    def to(self, device: torch.device) -> Pair:
        """The same on a device."""
        return Pair(self.a.to(device), self.b.to(device))
