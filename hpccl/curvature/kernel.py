"""The kernel of a network's predictions under a Laplace posterior of its weights, class by class.

    K_c = J_c P^-1 J_c',    J_c [n, W] = d p_c / d w at the posterior's mean,  p = softmax of the competing classes

in nats^-1. Row i of J_c is row c of Lambda_i J_i, with Lambda_i = diag(p_i) - p_i p_i' and J_i the Jacobian of the
logits. Classes are taken as independent of each other.

Source: Pan et al. 2020, "Continual deep learning by functional regularisation of memorable past", NeurIPS, section 3.2.

Legend: n images, K competing classes, W weights. Each rank differentiates by the weights whose curvature it holds, for
all images; the sum over ranks is the kernel, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hpccl.curvature.capture import measuring, working_bytes
from hpccl.curvature.jacobians import logit_jacobians, maps
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Weights
from hpccl.curvature.spectrum import Spectrum
from hpccl.dist.grouping import filled
from hpccl.errors import DivergedError

__all__ = ["probability_kernel"]


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

    Exact for the posterior's spectra. It takes as many layers at a time as fit, at least one with the Jacobian of all n
    images and one class, and computes K Jacobians per image each time: keep n small.

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
    every = [f"model.{name}" for spectrum in posterior.spectra for name in spectrum.names]
    row = len(pixels) * pixels.element_size()  # bytes of one class and weight
    budget = working_bytes(pixels.device)
    with measuring(model, pixels.device):
        mapped = bool(every) and maps(_Probabilities(model, head, [0]), weights, every, pixels)
        for group in filled(posterior.spectra, lambda each: len(head) * row * each.values.numel(), budget):
            size = row * sum(spectrum.values.numel() for spectrum in group)
            together = max(1, budget // max(1, size))
            for chosen in torch.arange(len(head)).split(together):
                some = _Probabilities(model, head, chosen.tolist())
                for half in _halves(posterior, group, some, weights, pixels, mapped=mapped):
                    total[chosen.to(total.device)] += (half @ half.mT).double()
    posterior.comm.sum_([total])
    if not bool(total.isfinite().all()):
        raise DivergedError(
            "the derivative of a probability of a kept example is not finite, so there is no kernel of predictions; "
            "the network has diverged: lower optim.lr, or set train.clip_norm"
        )
    return total


def _halves(
    posterior: Posterior,
    group: Sequence[Spectrum],
    model: _Probabilities,
    weights: Weights,
    pixels: Tensor,
    *,
    mapped: bool,
) -> Iterator[Tensor]:
    """Yield [classes, n, values] of each spectrum: rows of J Q (s values + delta)^-1/2.

    mapped: see `logit_jacobians`
    """
    names = [f"model.{name}" for spectrum in group for name in spectrum.names]
    classes, numel = len(model.chosen), sum(spectrum.values.numel() for spectrum in group)
    size = max(1, working_bytes(pixels.device) // (4 * classes * numel * pixels.element_size()))
    found: list[list[Tensor]] = [[] for _ in group]
    for images in pixels.split(size):
        rows = logit_jacobians(model, weights, names, images, mapped=mapped)
        for spectrum, parts in zip(group, found, strict=True):
            own = {name: rows.pop(f"model.{name}").flatten(0, 1) for name in spectrum.names}
            coefficients = (
                spectrum.coefficients(own) * (posterior.scale * spectrum.values + posterior.prior_precision).rsqrt()
            )
            parts.append(coefficients.flatten(1).unflatten(0, (len(images), classes)).transpose(0, 1))
    while found:
        yield torch.cat(found.pop(0), dim=1)
