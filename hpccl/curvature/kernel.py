"""The kernel of a network's predictions under a Laplace posterior of its weights, class by class.

    K_c = J_c P^-1 J_c',    J_c [n, W] = d p_c / d w at the posterior's mean,  p = softmax of the competing classes

in nats^-1. Row i of J_c is row c of Lambda_i J_i, with Lambda_i = diag(p_i) - p_i p_i' and J_i the Jacobian of the
logits. Classes are taken as independent of each other.

Source: Pan et al. 2020, "Continual deep learning by functional regularisation of memorable past", NeurIPS, section 3.2.

Legend: n images, K competing classes, W weights. Each rank differentiates by the weights whose curvature it holds, for
all images; the sum over ranks is the kernel, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpccl.curvature.capture import measuring
from hpccl.curvature.jacobians import logit_jacobians, maps
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Weights
from hpccl.curvature.spectrum import Spectrum
from hpccl.errors import DivergedError

__all__ = ["probability_kernel"]

_BUDGET = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes of Jacobians at a time


class _Probabilities(nn.Module):
    """A model that returns the probabilities of some of the competing classes."""

    def __init__(self, model: nn.Module, head: Sequence[int], chosen: Sequence[int]) -> None:
        super().__init__()
        self.model, self.head, self.chosen = model, list(head), list(chosen)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the probabilities [n, len(chosen)]."""
        found: Tensor = self.model(pixels)[:, self.head].softmax(dim=1)[:, self.chosen]
        return found


def probability_kernel(posterior: Posterior, model: nn.Module, pixels: Tensor, head: Sequence[int]) -> Tensor:
    """Return the kernel [K, n, n] in float64, on the images' device; collective.

    Exact for the posterior's spectra. It holds the Jacobian of one layer for all n images and one class, and computes K
    Jacobians per image: keep n small.

    Args:
        posterior: of the weights; the model is linearised at its mean, which has all tensors that the model needs.
        model: gives the forward pass, in evaluation mode.
        pixels: [n, channels, h, w], the same on all ranks.
        head: numbers of the K classes that compete.

    Raises:
        DivergedError: a derivative is not finite.
    """
    weights = {f"model.{name}": value.to(pixels.device) for name, value in posterior.mean.items()}
    total = torch.zeros(len(head), len(pixels), len(pixels), dtype=torch.float64, device=pixels.device)
    with measuring(model, pixels.device):
        for spectrum in posterior.spectra:
            size = spectrum.values.numel() * pixels.element_size()
            together = max(1, _BUDGET[pixels.device.type] // max(1, size * len(pixels)))
            for chosen in torch.arange(len(head)).split(together):
                some = _Probabilities(model, head, chosen.tolist())
                half = _half(posterior, spectrum, some, weights, pixels)
                total[chosen.to(total.device)] += (half @ half.mT).double()
    posterior.comm.sum_([total])
    if not bool(total.isfinite().all()):
        raise DivergedError(
            "the derivative of a probability of a kept example is not finite, so there is no kernel of predictions; "
            "the network has diverged: lower optim.lr, or set train.clip_norm"
        )
    return total


def _half(posterior: Posterior, spectrum: Spectrum, model: _Probabilities, weights: Weights, pixels: Tensor) -> Tensor:
    """Return [classes, n, values]: rows of J Q (s values + delta)^-1/2."""
    names = [f"model.{name}" for name in spectrum.names]
    scale = (posterior.scale * spectrum.values + posterior.prior_precision).rsqrt()
    mapped = maps(model, weights, names, pixels)
    classes = len(model.chosen)
    size = max(1, _BUDGET[pixels.device.type] // (4 * classes * scale.numel() * pixels.element_size()))
    found = []
    for images in pixels.split(size):
        rows = logit_jacobians(model, weights, names, images, mapped=mapped)
        own = {name.removeprefix("model."): value.flatten(0, 1) for name, value in rows.items()}
        coefficients = spectrum.coefficients(own) * scale
        found.append(coefficients.flatten(1).unflatten(0, (len(images), classes)).transpose(0, 1))
    return torch.cat(found, dim=1)
