"""How predictions would change if an example, or a class, had been left out: pure functions of logits and variances.

Leaving a set M out of the data moves the weights and the logits f of the examples in M by (Nickl et al. 2023)

    dw = S^-1 sum_{j in M} J_j' e_j              first order (eq. 6, with S for the precision without M)
    df = v e                                     eq. 12, v = J_M S^-1 J_M'
    df = v (I - Lambda v)^-1 e                   the same with the precision without M, S - J_M' Lambda J_M

S is the posterior's precision, e = p - y, Lambda = diag(p) - p p' (1 for squares). The second form is exact for a
quadratic loss and one Newton step otherwise; it follows from the first by Woodbury's identity.

    error        1 - p_y = 1/2 sum_c |e_c|
    variance     tr(C v C) / (K - 1)             of the logits, C = I - 11'/K removes their common part
    leverage     tr(Lambda v)                    sums to the number of weights that the data determine
    sensitivity  sum_c |(Lambda v e)_c|          eqs. 13 and 14: how far its own prediction moves
    sensitivity_diagonal                         sum_c |Lambda_cc v_cc e_c|, as in the selector `sensitivity`
    left_out     -log softmax(f + v e)[y]        eqs. 15 and 16; its mean estimates the test NLL, no test data needed
    left_out_newton                              the same with the second form of df; None above 128 classes

Sources: Nickl, Xu, Tailor, Moellenhoff and Khan 2023, "The memory-perturbation equation", NeurIPS; their memory maps
(error against leverage); Cook 1977, "Detection of influential observation in linear regression", Technometrics.

Legend: n examples, K competing classes. All float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from hpccl.memory.score import TopLayer

__all__ = ["Perturbed", "Variance", "best_prior_precision", "perturbed", "top_layer_variance"]

_MOST_CLASSES = 128  # the largest K for which K x K matrices are formed per example
_LARGEST = 0.98  # bound on eigenvalues of Lambda v, which are < 1 if S includes the example; an approximate S may not


@final
@dataclass(frozen=True)
class Variance:
    """The covariance of each example's logits, v = Q diag(s) Q'.

    basis: [K, K] or [n, K, K], Q; spread: [n, K], s >= 0
    """

    basis: Tensor
    spread: Tensor

    @classmethod
    def of(cls, full: Tensor) -> Variance:
        """Decompose v [n, K, K]."""
        values, basis = torch.linalg.eigh(full.double())
        return cls(basis, values.clamp_min(0))

    def times(self, vector: Tensor) -> Tensor:
        """Return the products v x [n, K] for x [n, K]."""
        return _product(self.basis, self.spread * _product(self.basis.mT, vector))

    def marginal(self) -> Tensor:
        """Return the marginal variances v_cc [n, K]."""
        return _product(self.basis.square(), self.spread)

    def apart(self) -> Tensor:
        """[n] mean variance of a logit, without the part common to all logits, to which softmax is invariant."""
        num_classes = self.spread.shape[1]
        common = self.basis.sum(dim=-2).square() / num_classes  # (q_l' 1)^2 / K
        return (self.spread * (1 - common)).sum(dim=1) / max(1, num_classes - 1)

    def leverage(self, p: Tensor) -> Tensor:
        """[n] tr(Lambda v), for probabilities [n, K]."""
        along = _product(self.basis.square().mT, p) - _product(self.basis.mT, p).square()  # q_l' Lambda q_l
        return (along * self.spread).sum(dim=1)


def _product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """[n, K] products of [K, K] or [n, K, K] with [n, K]."""
    return (matrix @ vectors[:, :, None]).squeeze(2) if matrix.dim() == 3 else vectors @ matrix.T


def top_layer_variance(x: Tensor, layer: TopLayer) -> Variance:
    """Return the logits' covariance under the last layer's posterior, for its inputs x [n, d]."""
    return Variance(layer.output_basis, layer.spread(x))


@final
@dataclass(frozen=True)
class Perturbed:
    """The measures of each example, [n] each; see the module docstring."""

    error: Tensor
    nats: Tensor
    variance: Tensor
    leverage: Tensor
    sensitivity: Tensor
    sensitivity_diagonal: Tensor
    left_out: Tensor
    left_out_newton: Tensor | None

    def columns(self) -> dict[str, Tensor]:
        """Return the measures by name, without those that are None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def perturbed(logits: Tensor, labels: Tensor, variance: Variance) -> Perturbed:
    """Compute the measures from logits [n, K] and labels [n], which are positions among the K classes."""
    logits = logits.double()
    p = logits.softmax(dim=1)
    error = p - functional.one_hot(labels, logits.shape[1]).to(p)
    moved = variance.times(error)

    def nats(values: Tensor) -> Tensor:
        return functional.cross_entropy(values, labels, reduction="none")

    newton = None
    if logits.shape[1] <= _MOST_CLASSES:
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        root = variance.basis * variance.spread.sqrt()[:, None, :]
        newton = nats(logits + _newton(root, curvature, error))
    return Perturbed(
        error=1 - p.gather(1, labels[:, None]).squeeze(1),
        nats=nats(logits),
        variance=variance.apart(),
        leverage=variance.leverage(p),
        sensitivity=(p * (moved - (p * moved).sum(dim=1, keepdim=True))).abs().sum(dim=1),
        sensitivity_diagonal=(p * (1 - p) * variance.marginal() * error.abs()).sum(dim=1),
        left_out=nats(logits + moved),
        left_out_newton=newton,
    )


def _newton(root: Tensor, curvature: Tensor, error: Tensor) -> Tensor:
    """Return v (I - Lambda v)^-1 e for v = root root'."""
    inner, turned = torch.linalg.eigh(root.mT @ curvature @ root)
    along = turned.mT @ (root.mT @ error[..., None])
    found: Tensor = root @ (turned @ (along / (1 - inner.clamp(max=_LARGEST))[..., None]))
    return found.squeeze(-1)


def best_prior_precision(values: Tensor, square: float) -> float:
    """Return the delta of largest evidence, where delta square = sum_i values_i / (values_i + delta) (MacKay 1992).

    values: eigenvalues of the curvature; square: |weights|^2. The result is 1 where these are 0.
    """
    values = values.double().flatten().clamp_min(0)
    if square <= 0 or float(values.sum()) == 0:
        return 1.0
    low, high = -60.0, float(torch.tensor(len(values) / square).log())
    for _ in range(100):
        middle = (low + high) / 2
        delta = torch.tensor(middle, dtype=torch.float64).exp()
        if float((values / (values + delta)).sum() - delta * square) > 0:
            low = middle
        else:
            high = middle
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())
