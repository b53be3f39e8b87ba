"""Class probabilities under uncertain weights, from the logits of the network linearised at the mean.

With logits f ~ N(m, V) of an example and competing classes H:

    probit         p_c = softmax_{c in H} (m_c / sqrt(1 + pi/8 V_cc))
    Monte Carlo    p_c = mean_s softmax_{c in H} (m + L e_s)_c,    L L' = V, e_s ~ N(0, I)

Probit is never exact, but close where one class is compared with a fixed one; Monte Carlo converges to the integral.

Sources: MacKay 1992, "The evidence framework applied to classification networks", sec. 5; Gibbs 1997, thesis, for more
than two classes; Daxberger et al. 2021, "Laplace redux", NeurIPS, eq. 10; Immer et al. 2021, "Improving predictions of
Bayesian neural nets via local linearization", AISTATS.

Legend: n examples, C classes, S draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["drawn_logits", "merits", "monte_carlo", "probabilities", "probit"]

MERITS = ("right", "nats", "confidence", "brier", "entropy")


def probabilities(logits: Tensor, head: Tensor) -> Tensor:
    """Return the softmax [..., n, C] in float64 over the classes of the mask `head` [n, C]; others have 0."""
    return logits.double().masked_fill(~head, -torch.inf).softmax(dim=-1)


def probit(mean: Tensor, variance: Tensor, head: Tensor) -> Tensor:
    """Return the probit approximation of the probabilities, [n, C].

    Args:
        mean: [n, C] logits.
        variance: [n, C, C] of the logits.
        head: [n, C] bool, the classes that compete.
    """
    spread = variance.diagonal(dim1=1, dim2=2).double().clamp_min(0)
    return probabilities(mean.double() / (1 + math.pi / 8 * spread).sqrt(), head)


def drawn_logits(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    """Draw logits [S, n, C] in float64 from noise [S, n, C], with the symmetric square root, which is unique."""
    values, vectors = torch.linalg.eigh(variance.double())
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    return mean.double() + torch.einsum("ncd,snd->snc", root, noise.double())


def monte_carlo(mean: Tensor, variance: Tensor, head: Tensor, noise: Tensor) -> Tensor:
    """Return the Monte Carlo estimate of the probabilities, [n, C]; see `probit` and `drawn_logits`."""
    return probabilities(drawn_logits(mean, variance, noise), head).mean(0)


def merits(p: Tensor, labels: Tensor) -> Tensor:
    """Return [n, 5] by example: right, nats, confidence, squared error over classes (Brier 1950), entropy in nats.

    Args:
        p: [n, C] probabilities in float64; classes that do not compete have 0.
        labels: [n]; a label of probability 0 has infinite nats.
    """
    confidence, guess = p.max(dim=1)
    own = p.gather(1, labels[:, None])[:, 0]
    target = torch.nn.functional.one_hot(labels, p.shape[1]).to(p)
    entropy = -torch.special.xlogy(p, p).sum(1)
    columns = [(guess == labels).to(p), -own.log(), confidence, (p - target).square().sum(1), entropy]
    return torch.stack(columns, dim=1)
