"""Likelihoods of examples given latent functions: sites of a normal approximation, and predictions.

With the marginal N(m, v) of a latent function at an example, E = E_{f ~ N(m, v)} log p(y | f), a site has the natural
parameters (Khan and Nielsen 2018; Adam et al. 2021; Chang et al. 2023, eq. 9)

    beta = -2 dE/dv = -E[d2 log p / df2]        alpha = dE/dm + beta m = E[d log p / df] + beta m

    gaussian     beta = 1/s^2, alpha = y/s^2: exact for any m and v
    bernoulli    E by Gauss-Hermite quadrature
    softmax      C latent functions, independent under the approximation, beta_c = E[p_c (1 - p_c)]; E over a fixed
                 Sobol sequence, mapped to normal numbers: the same for every example, process and step

Legend: n examples, C latent functions, S points.
Sources: Khan and Nielsen 2018, "Fast yet simple natural-gradient descent for variational inference in complex models";
Adam, Chang, Khan and Solin 2021, "Dual parameterization of sparse variational Gaussian processes", NeurIPS; Chang,
Verma, John, Solin and Khan 2023, "Memory-based dual Gaussian processes for sequential learning", ICML.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpccl.errors import ConfigError, DataError

__all__ = ["Bernoulli", "Gaussian", "Likelihood", "Sites", "Softmax", "likelihood_of"]

_HERMITE = 32
_SOBOL = 256
_TOGETHER = 1 << 20  # values of latent functions at a time
_LEAST = 1e-9  # smallest beta

Sites: TypeAlias = tuple[Tensor, Tensor]  # alpha and beta, each [n, C]


class Likelihood(Protocol):
    """p(y | f) of independent examples."""

    @property
    def num_latent(self) -> int:
        """Number of latent functions, C."""

    def check(self, y: Tensor) -> None:
        """Refuse labels that have no likelihood.

        Raises:
            DataError: there is such a label.
        """

    def sites(self, y: Tensor, mean: Tensor, variance: Tensor) -> Sites:
        """Return the sites of labels y [n] or targets [n, C], at marginals [n, C]."""

    def expected_log(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return E log p(y | f) [n], in nats; differentiable by mean and variance."""

    def predict(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the mean of y [n, C], or probabilities [n, C] (of the label 1 for Bernoulli)."""


@final
@dataclass(frozen=True)
class Gaussian:
    """y = f + noise of variance s^2, for C outputs with one noise; y is [n, C]."""

    noise: Tensor
    num_latent: int = 1

    @classmethod
    def of(cls, noise: float, num_latent: int = 1) -> Gaussian:
        """Make one from a number.

        Raises:
            ConfigError: it is not above 0.
        """
        if not (math.isfinite(noise) and noise > 0):
            raise ConfigError(f"noise variance: noise={noise}; allowed: a finite number above 0")
        return cls(torch.tensor(noise, dtype=torch.float64), num_latent)

    def check(self, y: Tensor) -> None:
        """See Likelihood."""
        if y.dim() != 2 or y.shape[1] != self.num_latent or not bool(y.isfinite().all()):
            raise DataError(f"targets of shape {tuple(y.shape)}; allowed: finite numbers [n, {self.num_latent}]")

    def sites(self, y: Tensor, mean: Tensor, variance: Tensor) -> Sites:
        """See Likelihood."""
        beta = (1 / self.noise).expand(mean.shape)
        return y.double() * beta, beta

    def expected_log(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        square = (y.double() - mean).square() + variance
        return -0.5 * (square / self.noise + torch.log(2 * math.pi * self.noise)).sum(1)

    def predict(self, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        return mean


@final
@dataclass(frozen=True)
class Bernoulli:
    """p(y = 1 | f) = sigmoid(f); y is [n], 0 or 1."""

    num_latent: int = 1

    def check(self, y: Tensor) -> None:
        """See Likelihood."""
        _refuse_labels(y, 2)

    def sites(self, y: Tensor, mean: Tensor, variance: Tensor) -> Sites:
        """See Likelihood."""
        points, weights = _hermite(mean.device)
        p = torch.sigmoid(mean[..., None] + variance.clamp_min(0).sqrt()[..., None] * points)
        beta = (p * (1 - p) @ weights).clamp_min(_LEAST)
        return y.double()[:, None] - p @ weights + beta * mean, beta

    def expected_log(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        points, weights = _hermite(mean.device)
        f = mean[..., None] + variance.clamp_min(1e-30).sqrt()[..., None] * points
        sign = (2 * y.double() - 1)[:, None, None]
        found: Tensor = (functional.logsigmoid(sign * f) @ weights)[:, 0]
        return found

    def predict(self, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        points, weights = _hermite(mean.device)
        found: Tensor = torch.sigmoid(mean[..., None] + variance.clamp_min(0).sqrt()[..., None] * points) @ weights
        return found


@final
@dataclass(frozen=True)
class Softmax:
    """p(y = c | f) = softmax(f)_c over C classes; y is [n], 0 to C - 1."""

    num_latent: int

    def check(self, y: Tensor) -> None:
        """See Likelihood."""
        _refuse_labels(y, self.num_latent)

    def sites(self, y: Tensor, mean: Tensor, variance: Tensor) -> Sites:
        """See Likelihood."""
        total, square = torch.zeros_like(mean), torch.zeros_like(mean)
        for f in self._points(mean, variance):
            p = f.softmax(2)
            total += p.sum(0) / _SOBOL
            square += (p * (1 - p)).sum(0) / _SOBOL
        beta = square.clamp_min(_LEAST)
        target = functional.one_hot(y.long(), self.num_latent).to(mean)
        return target - total + beta * mean, beta

    def expected_log(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        total = torch.zeros(len(mean), dtype=mean.dtype, device=mean.device)
        root = variance.clamp_min(1e-30).sqrt()
        for points in self._groups(mean):
            # Recomputed in the backward pass: a graph of all points would hold S times n x C numbers, and more.
            part = checkpoint(_summed_log, y, mean, root, points, use_reentrant=False, preserve_rng_state=False)
            total = total + part / _SOBOL
        return total

    def predict(self, mean: Tensor, variance: Tensor) -> Tensor:
        """See Likelihood."""
        total = torch.zeros_like(mean)
        for f in self._points(mean, variance):
            total += f.softmax(2).sum(0) / _SOBOL
        return total

    def _points(self, mean: Tensor, variance: Tensor) -> Iterator[Tensor]:
        """Yield values [s, n, C] of the latent functions, a few of the S points at a time."""
        root = variance.clamp_min(1e-30).sqrt()
        for points in self._groups(mean):
            yield mean + root * points[:, None]

    def _groups(self, mean: Tensor) -> tuple[Tensor, ...]:
        """Split the S points into groups [s, C] that are evaluated together."""
        together = max(1, _TOGETHER // max(1, mean.numel()))
        return tuple(_normal(self.num_latent, mean.device).split(together))


def _summed_log(y: Tensor, mean: Tensor, root: Tensor, points: Tensor) -> Tensor:
    """Sum log softmax(mean + root point)_y over points: [n]."""
    f = mean + root * points[:, None]
    own = y.long().expand(len(f), len(y))[..., None]
    found: Tensor = f.log_softmax(2).gather(2, own)[..., 0].sum(0)
    return found


def likelihood_of(kind: str, num_latent: int, noise: Tensor | None = None) -> Likelihood:
    """Make a likelihood by its name: gaussian, bernoulli or softmax.

    Raises:
        ValueError: the name is unknown, or the noise is missing.
    """
    match kind:
        case "gaussian" if noise is not None:
            return Gaussian(noise, num_latent)
        case "bernoulli":
            return Bernoulli()
        case "softmax":
            return Softmax(num_latent)
        case _:
            raise ValueError(f"likelihood {kind!r}")


def _refuse_labels(y: Tensor, count: int) -> None:
    if y.dim() != 1 or (len(y) and not (int(y.min()) >= 0 and int(y.max()) < count)):
        raise DataError(f"labels of shape {tuple(y.shape)} from {y.min()} to {y.max()}; allowed: [n], 0 to {count - 1}")


def _hermite(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return points and weights of an expectation under N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(_HERMITE)
    return torch.from_numpy(points).to(device), torch.from_numpy(weights / weights.sum()).to(device)


@lru_cache(maxsize=8)
def _sobol(columns: int) -> Tensor:
    """Return quasi-random normal numbers [S, columns], with their negatives, so that odd moments are exact."""
    uniform = torch.quasirandom.SobolEngine(columns, scramble=True, seed=0).draw(_SOBOL // 2, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    both = torch.cat([normal, -normal])
    return both / both.square().mean(0).sqrt()


def _normal(columns: int, device: torch.device) -> Tensor:
    return _sobol(columns).to(device)
