"""Kernels of Gaussian processes over rows, in float64.

    rbf         s exp(-r^2 / 2)                          r = |x - z| / l
    matern52    s (1 + sqrt5 r + 5/3 r^2) exp(-sqrt5 r)
    linear      s x'z / l^2

Source: Rasmussen and Williams 2006, "Gaussian processes for machine learning", ch. 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from hpccl.errors import ConfigError

__all__ = ["Kernel", "Kind"]

Kind: TypeAlias = Literal["rbf", "matern52", "linear"]


@final
@dataclass(frozen=True)
class Kernel:
    """A kernel with one length scale for all columns.

    lengthscale: l > 0, variance: s > 0; scalars in float64, which may require gradients
    """

    kind: Kind
    lengthscale: Tensor
    variance: Tensor

    @classmethod
    def of(cls, kind: Kind, *, lengthscale: float = 1.0, variance: float = 1.0) -> Kernel:
        """Make a kernel from numbers.

        Raises:
            ConfigError: one is not above 0.
        """
        for name, value in (("lengthscale", lengthscale), ("variance", variance)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"kernel: {name}={value}; allowed: a finite number above 0")
        return cls(kind, *(torch.tensor(value, dtype=torch.float64) for value in (lengthscale, variance)))

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the kernel matrix [n, m] of rows x [n, d] and z [m, d]."""
        x, z = x.double() / self.lengthscale, z.double() / self.lengthscale
        if self.kind == "linear":
            return self.variance * (x @ z.T)
        square = _square_distances(x, z)
        if self.kind == "rbf":
            return self.variance * torch.exp(-square / 2)
        # The root has no derivative at 0, where the kernel has one.
        scaled = (5 * square + 1e-30).sqrt()
        return self.variance * (1 + scaled + 5 / 3 * square) * torch.exp(-scaled)

    def diagonal(self, x: Tensor) -> Tensor:
        """Return k(x, x) of each row, [n]."""
        if self.kind == "linear":
            return self.variance * (x.double() / self.lengthscale).square().sum(1)
        return self.variance.expand(len(x))

    def to(self, device: torch.device) -> Kernel:
        """Return the kernel on a device."""
        return Kernel(self.kind, self.lengthscale.to(device), self.variance.to(device))


def _square_distances(x: Tensor, z: Tensor) -> Tensor:
    """Return [n, m] by matrix products, around a common centre, so that large coordinates cancel before squaring."""
    if len(z):
        centre = z.mean(0)
        x, z = x - centre, z - centre
    square = x.square().sum(1)[:, None] + z.square().sum(1)[None] - 2 * (x @ z.T)
    return square.clamp_min(0)
