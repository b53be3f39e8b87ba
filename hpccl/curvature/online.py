"""Squared per-example gradients from training's own passes, without extra passes; VOGN's curvature is their mean.

Every layer's input and output gradient are available in a step's passes anyway; `layers.squares` computes from them the
exact sum over examples of squared gradients. Where BatchNorm couples a batch, an example's gradient is its share of the
batch's: the contribution of its own rows of the layer. Shares sum to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hpccl.curvature.layers import has_formula, squares
from hpccl.engine.protocols import trainable
from hpccl.errors import CoverageError

__all__ = ["watch_squares"]

Add = Callable[[Mapping[str, Tensor]], None]
Counts = Callable[[], Tensor | None]


def watch_squares(model: nn.Module, add: Add, counts: Counts = lambda: None) -> Callable[[], None]:
    """Call `add` with sums over examples of squared gradients, by parameter, for each layer of every backward pass.

    An example of weight v, whose gradient is v times that of its nats, adds v squares of the latter, as in any other
    curvature, not v^2.

    counts: returns the weights [n] of the images of the present pass; None: 1 each

    Returns a function that removes the hooks. `model` takes images as its first argument; its weights may be in shards,
    since a layer's inputs and output gradients are whole on every rank.

    Raises:
        CoverageError: a parameter is in a layer whose squares are not known; later, if a layer is called twice in a
            pass.
    """
    owners = _owners(model)
    called: set[str] = set()
    images = [0]

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        called.clear()
        images[0] = len(arguments[0])

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin).remove)
        for layer, names in owners.items():
            hook = _listener(layer, names, images, called, add=add, counts=counts)
            stack.callback(model.get_submodule(layer).register_forward_hook(hook).remove)
        return stack.pop_all().close


def _owners(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return by layer the full names of its parameters, by their local names."""
    found: dict[str, dict[str, str]] = {}
    for full in trainable(model):
        layer, _, local = full.rpartition(".")
        module = model.get_submodule(layer)
        if not has_formula(module):
            raise CoverageError(
                f"optim.kind=vogn does not support {type(module).__name__} (parameter '{full}'); allowed: Linear, "
                "Conv2d, BatchNorm, GroupNorm, LayerNorm; or use optim.kind=ivon"
            )
        found.setdefault(layer, {})[local] = full
    return found


def _listener(
    layer: str, names: dict[str, str], images: list[int], called: set[str], *, add: Add, counts: Counts
) -> Callable[..., None]:
    def listen(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        if not out.requires_grad:
            return
        if layer in called:
            raise CoverageError(
                f"optim.kind=vogn: layer '{layer}' is called twice in one pass, which is not supported; "
                "use optim.kind=ivon"
            )
        called.add(layer)
        (x,) = (argument.detach().float() for argument in arguments)
        n = images[0]

        def square(gradient: Tensor) -> None:
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                found = squares(module, (x,), _unsquared(gradient.float(), counts(), n)[:, None], names, n)
            add({names[local]: value for local, value in found.items()})

        out.register_hook(square)

    return listen


def _unsquared(gradient: Tensor, counts: Tensor | None, n: int) -> Tensor:
    """Output gradients [n*f, ...] divided by the root of their image's weight, so that squares are linear in it."""
    if counts is None:
        return gradient
    scale = torch.where(counts > 0, counts, 1.0).rsqrt().repeat_interleave(len(gradient) // n)
    return gradient * scale.view(-1, *[1] * (gradient.dim() - 1))
