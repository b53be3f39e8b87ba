"""A sparse Gaussian process in dual form: sums over examples, in the coordinates of a few inducing inputs.

    lambda1 = sum_i alpha_i k_zi        Lambda2 = sum_i beta_i k_zi k_zi'         one of each per latent function
    mean(x)     = k_xz (K + Lambda2)^-1 lambda1
    variance(x) = k_xx - k_xz K^-1 k_zx + k_xz (K + Lambda2)^-1 k_zx
    q(u)        = N(K (K + Lambda2)^-1 lambda1, K (K + Lambda2)^-1 K)             u the functions' values at Z

Duals add up over examples: ranks sum theirs, and a task's are added to those of the tasks before it. New inducing
inputs n replace old ones o by P = K_oo^-1 K_on, lambda1 <- P' lambda1, Lambda2 <- P' Lambda2 P.

Legend: n examples, m inducing inputs Z [m, d], K = k(Z, Z) + jitter, C latent functions.
Source: Chang et al. 2023, "Memory-based dual Gaussian processes for sequential learning", ICML, sec. 3; Adam et al.
2021, "Dual parameterization of sparse variational Gaussian processes", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpccl.dist.comm import Comm
from hpccl.errors import DivergedError
from hpccl.gp.kernel import Kernel
from hpccl.gp.likelihood import Sites

__all__ = ["DualPosterior", "Duals", "contribution", "own_contribution"]

_ROWS = 4096  # most examples at a time
_TOGETHER = 1 << 25  # most numbers [C, m, rows] at a time


@final
@dataclass(frozen=True)
class Duals:
    """lambda1 [C, m] and Lambda2 [C, m, m] of some examples."""

    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, num_latent: int, size: int, device: torch.device | str = "cpu") -> Duals:
        """Return the duals of no examples."""
        first = torch.zeros(num_latent, size, dtype=torch.float64, device=device)
        return cls(first, first.new_zeros(num_latent, size, size))

    def plus(self, other: Duals, scale: float = 1.0) -> Duals:
        """Return self + scale * other."""
        return Duals(self.first + scale * other.first, self.second + scale * other.second)

    def times(self, scale: float) -> Duals:
        """Return the duals times `scale`."""
        return Duals(self.first * scale, self.second * scale)

    def widened(self, more: int) -> Duals:
        """Append `more` latent functions, with duals of 0."""
        return Duals(functional.pad(self.first, (0, 0, 0, more)), functional.pad(self.second, (0, 0, 0, 0, 0, more)))

    def turned(self, projection: Tensor) -> Duals:
        """Return the duals in the coordinates of other inducing inputs, by P [m, m new]."""
        # P may be large where new inputs lie far from old ones, while P'k is not: with a square root nothing cancels,
        # and Lambda2 stays positive semi-definite.
        values, vectors = torch.linalg.eigh((self.second + self.second.mT) / 2)
        root = projection.T @ (vectors * values.clamp_min(0).sqrt()[:, None, :])
        return Duals(self.first @ projection, root @ root.mT)


@final
@dataclass(frozen=True)
class DualPosterior:
    """A sparse Gaussian process; equal on all ranks.

    inducing: Z [m, d]
    jitter: on the diagonal of K, relative to its mean
    """

    kernel: Kernel
    inducing: Tensor
    duals: Duals
    jitter: float = 1e-9

    def gram(self) -> Tensor:
        """Return K [m, m]."""
        return gram(self.kernel, self.inducing, self.jitter)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance [n, C] of the latent functions at rows x [n, d]; differentiable by the kernel.

        Raises:
            DivergedError: a matrix has no Cholesky factor.
        """
        prior, _ = _cholesky(self.gram()[None], "K")
        both, _ = _cholesky(self.gram() + self.duals.second, "K + Lambda2")
        solved = torch.cholesky_solve(self.duals.first[..., None], both)

        def marginals(rows: Tensor) -> tuple[Tensor, Tensor]:
            cross = self.kernel(self.inducing, rows)  # [m, n]
            known = torch.linalg.solve_triangular(prior[0], cross, upper=False).square().sum(0)
            left = torch.linalg.solve_triangular(both, cross.expand(len(both), -1, -1), upper=False).square().sum(1)
            return (cross.T @ solved)[..., 0].T, (self.kernel.diagonal(rows) - known + left).T.clamp_min(0)

        means, variances = [], []
        for part in _parts(len(x), len(both), len(self.inducing)):
            # Recomputed in the backward pass: a graph of all rows would hold C m numbers of each, several times.
            mean, variance = checkpoint(marginals, x[part], use_reentrant=False, preserve_rng_state=False)
            means.append(mean)
            variances.append(variance)
        empty = self.inducing.new_zeros(0, len(self.duals.first), dtype=torch.float64)
        return torch.cat([empty, *means]), torch.cat([empty, *variances])

    def divergence(self, before: Duals | None = None) -> Tensor:
        """Return KL(q(u) || p(u)) in nats, summed over latent functions; p: the prior, or has the duals `before`.

        With B = K + Lambda2 of each:  1/2 [tr(B_p B_q^-1) + d' B_p d - m + log|B_q| - log|B_p|],
        d = B_q^-1 lambda1_q - B_p^-1 lambda1_p.
        """
        prior = self.gram()
        against = prior[None] if before is None else prior + before.second
        root, log_before = _cholesky(against, "K" if before is None else "K + Lambda2")
        both, log_both = _cholesky(prior + self.duals.second, "K + Lambda2")
        solved = torch.cholesky_solve(self.duals.first[..., None], both)
        if before is not None:
            solved = solved - torch.cholesky_solve(before.first[..., None], root)
        traces = torch.linalg.solve_triangular(both, root.expand_as(both), upper=False).square().sum((1, 2))
        squares = (root.mT @ solved).square().sum((1, 2))
        found: Tensor = 0.5 * (traces + squares - len(prior) + log_both - log_before).sum()
        return found

    def moved(self, inducing: Tensor) -> tuple[DualPosterior, Tensor]:
        """Return the process with other inducing inputs, and P."""
        factor, _ = _cholesky(self.gram()[None], "K")
        projection = torch.cholesky_solve(self.kernel(self.inducing, inducing), factor[0])
        return replace(self, inducing=inducing, duals=self.duals.turned(projection)), projection


def contribution(kernel: Kernel, inducing: Tensor, x: Tensor, sites: Sites, comm: Comm) -> Duals:
    """Return the duals of all ranks' examples; x [n, d] and sites [n, C]: this rank's, possibly none. Collective."""
    total = own_contribution(kernel, inducing, x, sites)
    comm.sum_([total.first, total.second])
    return total


def own_contribution(kernel: Kernel, inducing: Tensor, x: Tensor, sites: Sites) -> Duals:
    """Return the duals of this rank's examples alone; differentiable by the kernel and the sites."""
    alpha, beta = sites
    total = Duals.zeros(alpha.shape[1], len(inducing), inducing.device)

    def sums(rows: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        cross = kernel(inducing, rows)  # [m, n]
        return (cross @ alpha).T, torch.stack([cross * weight @ cross.T for weight in beta.T])

    for part in _parts(len(x), alpha.shape[1], len(inducing)):
        # Recomputed in the backward pass, as in `predict`.
        some = checkpoint(sums, x[part], alpha[part], beta[part], use_reentrant=False, preserve_rng_state=False)
        total = total.plus(Duals(*some))
    return total


def _parts(number: int, num_latent: int, size: int) -> Iterator[slice]:
    """Yield slices of the examples for which numbers [C, m, rows] fit into memory several times."""
    rows = min(_ROWS, max(64, _TOGETHER // max(1, num_latent * size)))
    return (slice(start, start + rows) for start in range(0, number, rows))


def gram(kernel: Kernel, inducing: Tensor, jitter: float) -> Tensor:
    """Return K [m, m], with jitter."""
    found = kernel(inducing, inducing)
    found = (found + found.T) / 2
    scale = found.diagonal().mean() if len(found) else found.new_ones(())
    return found + jitter * scale * torch.eye(len(found), dtype=found.dtype, device=found.device)


def _cholesky(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return lower Cholesky factors [C, m, m] and log determinants [C].

    Raises:
        DivergedError: a matrix has none.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        finite = bool(matrix.isfinite().all())
        smallest = float(torch.linalg.eigvalsh(matrix.detach()).min()) if finite else float("nan")
        raise DivergedError(
            f"{name} of the Gaussian process is not positive definite (smallest eigenvalue {smallest:.3g} of "
            f"{matrix.shape[-1]}): inducing inputs are nearly the same or not finite; take fewer of them or a "
            "shorter length scale (--inducing and --lengthscale of `hpccl gp fit`)"
        )
    return factor, 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
