"""Per-example Jacobians of the logits by the weights: d logits / d weights, [n, C, *shape of the parameter]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpccl.curvature.protocols import Weights

__all__ = ["logit_jacobians", "logits_at", "maps"]

_AGREE = 1e-3  # relative difference that still counts as rounding


def logits_at(model: nn.Module, weights: Weights, pixels: Tensor) -> Tensor:
    """Return the logits [n, C] of the model with `weights` in place of its own."""
    logits: Tensor = torch.func.functional_call(model, dict(weights), (pixels,))
    return logits


def logit_jacobians(
    model: nn.Module, weights: Weights, names: Sequence[str], pixels: Tensor, *, mapped: bool
) -> dict[str, Tensor]:
    """Return the Jacobians [n, C, *shape] by name; call it within `measuring`.

    Args:
        model: the model.
        weights: used instead of its own; the point of linearisation.
        names: names of the parameters to differentiate by.
        pixels: [n, channels, h, w].
        mapped: all examples at once; otherwise one example and logit at a time, which works with every model.
    """
    fixed = {name: value.detach() for name, value in weights.items()}
    own = {name: fixed.pop(name) for name in names}
    return _mapped(model, fixed, own, pixels) if mapped else _looped(model, fixed, own, pixels)


def maps(model: nn.Module, weights: Weights, names: Sequence[str], pixels: Tensor) -> bool:
    """Whether torch can map the model over examples, and does so correctly: some of its batching rules are wrong."""
    some = pixels[:2]
    try:
        found = logit_jacobians(model, weights, names, some, mapped=True)
    except RuntimeError:
        return False
    truth = logit_jacobians(model, weights, names, some, mapped=False)
    largest = max((float(value.abs().max()) for value in truth.values() if value.numel()), default=0.0)
    return all(
        bool((found[name] - value).norm() <= _AGREE * (value.norm() + 1e-3 * largest)) for name, value in truth.items()
    )


def _mapped(model: nn.Module, fixed: Weights, own: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    def one(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return logits_at(model, {**fixed, **parameters}, image[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be mapped
        found: dict[str, Tensor] = torch.vmap(torch.func.jacrev(one), in_dims=(None, 0))(own, pixels)
    return found


def _looped(model: nn.Module, fixed: Weights, own: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    rows = []
    for image in pixels.split(1):
        for logit in logits_at(model, {**fixed, **leaves}, image)[0]:
            grads = torch.autograd.grad(logit, list(leaves.values()), retain_graph=True, materialize_grads=True)
            rows.append(grads)
    return {
        name: torch.stack([row[position] for row in rows]).unflatten(0, (len(pixels), -1))
        for position, name in enumerate(own)
    }
