"""Record a forward pass through a model: each layer's inputs, and the graph edge where its output gradient arrives.

The pass leaves no traces: hooks are removed and modes restored however it ends. Output gradients are requested at the
edges of the graph as they were when the layer returned, so that later in-place operations do not matter; and since only
edges are requested, autograd computes no weight gradient and touches no `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["Call", "captured", "first_not_finite", "measuring", "working_bytes"]


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    inputs: its arguments, detached, if all of them are positional tensors; otherwise empty
    edge: where its output gradient arrives; None unless it returned a single tensor that requires a gradient
    rows: size of the first dim of the inputs and the output, if all agree; otherwise 0
    num_bytes: size of the output
    """

    inputs: tuple[Tensor, ...]
    edge: GradientEdge | None
    rows: int
    num_bytes: int


@contextmanager
def captured(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of the named modules, in order, while the context is open."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name, record in calls.items():
            hook = model.get_submodule(name).register_forward_hook(_recorder(record), with_kwargs=True)
            stack.callback(hook.remove)
        yield calls


@contextmanager
def measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Use evaluation mode, gradients and full fp32 products while the context is open; restore everything on exit."""
    modes = [(module, module.training) for module in model.modules()]
    products = torch.get_float32_matmul_precision()
    cudnn, attention = torch.backends.cudnn.allow_tf32, torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel has no per-example derivative
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode  # not .train(): some models override it to freeze parts
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.mha.set_fastpath_enabled(attention)


def working_bytes(device: torch.device) -> int:
    """Return how many bytes of activations, gradients or Jacobians a pass should hold at a time."""
    return 1 << 28 if device.type == "cpu" else 1 << 32


def first_not_finite(model: nn.Module, pixels: Tensor) -> tuple[str, Tensor] | None:
    """Return the name of the first layer whose output is not finite, and [n] bool for which images; None if all are."""
    found: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, out: Any) -> None:
            if found or not isinstance(out, Tensor) or bool(out.isfinite().all()):
                return
            bad = ~out.isfinite().flatten(1).all(1)
            whose = bad.unflatten(0, (len(pixels), -1)).any(1) if len(bad) % len(pixels) == 0 else bad.any()
            label = f"layer '{name}' ({type(module).__name__})" if name else "the model's output"
            found.append((label, whose.expand(len(pixels))))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        model(pixels)
    return found[0] if found else None


def _recorder(record: list[Call]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        tensors = tuple(value.detach() for value in arguments if isinstance(value, Tensor) and value.dim() > 0)
        inputs = tensors if len(tensors) == len(arguments) and not keywords else ()
        if not isinstance(out, Tensor) or not out.requires_grad or out.dim() == 0:
            record.append(Call(inputs, None, rows=0, num_bytes=0))
            return
        sizes = {value.shape[0] for value in (*inputs, out)}
        rows = sizes.pop() if len(sizes) == 1 else 0
        record.append(Call(inputs, get_gradient_edge(out), rows, out.nbytes))

    return hook
