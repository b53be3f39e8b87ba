"""Scores of how much an example is worth: pure functions of logits, features and labels.

    gini          1 - sum_c p_c^2 = tr(Lambda)                         Lambda = diag(p) - p p', p = softmax(z)
    error         -log p_y                                             nats
    residual      |e|^2                                                e = p - y
    leverage      tr(Lambda v)                                         v = J P^-1 J', variance of the logits
    sensitivity   sum_c |Lambda_cc v_cc e_c|                           how far leaving it out would move its prediction
    gradients     (p - y) (x) x, at several last layers, projected     the vectors of `greedy.matching`

v is the variance under the last layer's Laplace posterior, whose curvature is one Kronecker product: over n examples
with inputs x (a 1 appended for the bias),

    F = A (x) G,  A = 1/n sum x x',  G = sum Lambda,     P = F + delta I     (delta: precision of the prior)
    v = Qb diag_l( sum_k (qa_k' x)^2 / (a_k g_l + delta) ) Qb',     A = Qa diag(a) Qa', G = Qb diag(g) Qb'

exact for that block, damping included; the layers below are taken as fixed. `whole_leverage` and `whole_sensitivity`
take any v, such as that of the whole network (`hpccl.curvature.posterior`). All logits are those of the competing
classes. Sources: Pan et al. 2020, "Continual deep learning by functional regularisation of memorable past",
NeurIPS (gini); Khan and Swaroop 2021, "Knowledge-adaptation priors", NeurIPS (residual); Nickl et al. 2023, "The
memory-perturbation equation", NeurIPS, eqs. 12 to 14 (sensitivity; leverage as in its memory maps); Ritter, Botev and
Barber 2018, "A scalable Laplace approximation for neural networks", ICLR; Pham and Pagh 2013, "Fast and scalable
polynomial kernels via explicit feature maps", KDD (projections of products of vectors).

Legend: n examples, K competing classes, d inputs of the last layer including the 1, r versions of the last layer, D
numbers of a projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpccl.data.order import mix

__all__ = [
    "Projection",
    "Residuals",
    "TopLayer",
    "error",
    "gini",
    "leverage",
    "output_curvature",
    "residual",
    "sensitivity",
    "signs",
    "step_size",
    "whole_leverage",
    "whole_sensitivity",
]


def gini(logits: Tensor) -> Tensor:
    """[n] Gini impurity in [0, 1), float64, from logits [n, K]: 0 where the network is certain."""
    p = logits.double().softmax(dim=1)
    return (p * (1 - p)).sum(dim=1)


def error(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] cross-entropy in nats, float64; labels [n] are positions among the K classes."""
    return functional.cross_entropy(logits.double(), labels, reduction="none")


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] squared norm of p - y, in [0, 2], float64."""
    return _residuals(logits, labels).square().sum(dim=1)


def output_curvature(logits: Tensor) -> Tensor:
    """[K, K] sum of Lambda over the examples, float64."""
    p = logits.double().softmax(dim=1)
    return torch.diag(p.sum(dim=0)) - p.T @ p


@final
@dataclass(frozen=True)
class TopLayer:
    """The last layer's Laplace posterior.

    inputs: [d] eigenvalues of A; input_basis: [d, d] eigenvectors in columns; outputs, output_basis: of G; float64
    prior_precision: delta > 0
    """

    inputs: Tensor
    input_basis: Tensor
    outputs: Tensor
    output_basis: Tensor
    prior_precision: float

    @classmethod
    def of(cls, moment: Tensor, curvature: Tensor, *, prior_precision: float) -> TopLayer:
        """Decompose A [d, d], a mean over examples, and G [K, K], a sum over them."""
        inputs, input_basis = torch.linalg.eigh(moment.double())
        outputs, output_basis = torch.linalg.eigh(curvature.double())
        return cls(inputs.clamp_min(0), input_basis, outputs.clamp_min(0), output_basis, prior_precision)

    def to(self, device: torch.device) -> TopLayer:
        """Copy to a device."""
        inputs, outputs = self.inputs.to(device), self.outputs.to(device)
        bases = self.input_basis.to(device), self.output_basis.to(device)
        return TopLayer(inputs, bases[0], outputs, bases[1], self.prior_precision)

    def spread(self, x: Tensor) -> Tensor:
        """[n, K] eigenvalues of v, in the basis of G, for inputs [n, d]."""
        squares = (x.double() @ self.input_basis).square()
        weights = 1 / (self.inputs[:, None] * self.outputs[None, :] + self.prior_precision)
        return squares @ weights

    def solve(self, gradient: Tensor) -> Tensor:
        """Apply P^-1 to a gradient [K, d] with respect to the layer's weights."""
        inside = self.output_basis.T @ gradient.double() @ self.input_basis
        inside = inside / (self.outputs[:, None] * self.inputs[None, :] + self.prior_precision)
        return self.output_basis @ inside @ self.input_basis.T


def leverage(logits: Tensor, x: Tensor, layer: TopLayer) -> Tensor:
    """[n] leverage, float64; its sum over all examples is roughly the number of weights that they determine."""
    p = logits.double().softmax(dim=1)
    along = p @ layer.output_basis.square() - (p @ layer.output_basis).square()  # q_l' Lambda q_l
    return (along * layer.spread(x)).sum(dim=1)


def sensitivity(logits: Tensor, x: Tensor, labels: Tensor, layer: TopLayer) -> Tensor:
    """[n] sensitivity, float64."""
    p = logits.double().softmax(dim=1)
    variance = layer.spread(x) @ layer.output_basis.square().T
    return (p * (1 - p) * variance * _residuals(logits, labels).abs()).sum(dim=1)


def whole_leverage(logits: Tensor, variance: Tensor) -> Tensor:
    """[n] float64 leverage from any variance [n, K, K] of the logits."""
    p, variance = logits.double().softmax(dim=1), variance.double()
    own = (p * variance.diagonal(dim1=1, dim2=2)).sum(dim=1)
    return own - torch.einsum("nk,nkl,nl->n", p, variance, p)


def whole_sensitivity(logits: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    """[n] float64 sensitivity from any variance [n, K, K] of the logits."""
    p = logits.double().softmax(dim=1)
    own = variance.double().diagonal(dim1=1, dim2=2)
    return (p * (1 - p) * own * _residuals(logits, labels).abs()).sum(dim=1)


@final
@dataclass(frozen=True)
class Residuals:
    """The residuals p - y of each example at the current last layer and at some perturbed ones around it.

    steps: [r - 1, K, d] from the current last layer to the others
    true_share: share of the true label in y; the rest is the current prediction, as in a soft label
    """

    steps: Tensor
    true_share: float

    @classmethod
    def around(
        cls,
        *,
        num_classes: int,
        inputs: int,
        probes: int,
        size: float,
        words: tuple[int, ...],
        true_share: float,
    ) -> Residuals:
        """Draw `probes` steps in which every weight moves by +-size, independently."""
        steps = signs(probes * num_classes * inputs, *words).view(probes, num_classes, inputs) * size
        return cls(steps, true_share)

    def __call__(self, logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Return p - y at all r layers, [n, r K] float32, for logits [n, K] and inputs x [n, d] at the current one."""
        p = logits.double().softmax(dim=1)
        reference = p.lerp(functional.one_hot(labels, logits.shape[1]).to(p), self.true_share)
        found = [p - reference]
        found += [(logits.double() + moved).softmax(dim=1) - reference for moved in self._moves(x)]
        return torch.cat(found, dim=1).float()

    def first_order(self, logits: Tensor, x: Tensor) -> Tensor:
        """Return the change of p that each example's own curvature predicts, Lambda (z' - z), [n, r K] float32."""
        p = logits.double().softmax(dim=1)
        found = [torch.zeros_like(p)]
        found += [p * (moved - (p * moved).sum(dim=1, keepdim=True)) for moved in self._moves(x)]
        return torch.cat(found, dim=1).float()

    def _moves(self, x: Tensor) -> list[Tensor]:
        """[n, K] changes of the logits by each step."""
        return [x.double() @ step.double().T for step in self.steps.to(x.device)]


@final
@dataclass(frozen=True)
class Projection:
    """Maps an example's gradients e_r (x) x to one vector, preserving inner products exactly or in expectation.

    left: [r K, D] of +-1 / sqrt(D), right: [d, D] of +-1; None: the products are few enough to be used themselves
    """

    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, *, outputs: int, inputs: int, size: int, words: tuple[int, ...]) -> Projection:
        """Draw a projection to at most `size` numbers; outputs: r K, inputs: d."""
        if outputs * inputs <= size:
            return cls(None, None)
        left = signs(outputs * size, *words, 0).view(outputs, size)
        return cls(left / size**0.5, signs(inputs * size, *words, 1).view(inputs, size))

    def __call__(self, residuals: Tensor, x: Tensor) -> Tensor:
        """Project to [n, D] float32, from residuals [n, r K] and inputs [n, d]."""
        if self.left is None or self.right is None:
            return (residuals[:, :, None] * x[:, None, :]).flatten(1).float()
        return (residuals.float() @ self.left.to(x.device)) * (x.float() @ self.right.to(x.device))


def signs(count: int, *words: int) -> Tensor:
    """[count] random signs +-1, float32, a pure function of `words`."""
    bits = mix(*words, np.arange(-(-count // 64)))
    flat = np.unpackbits(bits.view(np.uint8))[:count]
    return torch.from_numpy(flat.astype(np.float32) * 2 - 1)


def step_size(mean_square: float, radius: float) -> float:
    """Return the step per weight that changes a logit by about `radius` (std), for inputs of this mean |x|^2.

    The mean is rounded to a power of two, so that the order in which ranks sum it does not matter.
    """
    return radius / math.sqrt(2.0 ** round(math.log2(max(mean_square, 1e-30))))


def _residuals(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.double().softmax(dim=1)
    return p - functional.one_hot(labels, logits.shape[1]).to(p)
