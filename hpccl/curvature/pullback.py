"""Sums of squared per-example gradients: by hooked layers, and through the whole model.

All return sum_i sum_j (J_i' v_ij)^2 by parameter name, for columns v [c, n, C] over the logits; |J_i' v_ij| with
power 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpccl.curvature.capture import Call
from hpccl.curvature.layers import Power, pieces, raised, squares
from hpccl.engine.sharded import computes_on, is_spread, whole_parameters

__all__ = ["Layers", "layer_gradients", "layer_squares", "looped_squares", "mapped_squares", "stream_gradients"]

_MAPPED = 1 << 31  # bytes of the passes through the whole model that a GPU makes at a time

Layers = Mapping[str, Mapping[str, str]]  # module -> local name -> full name


def layer_squares(
    model: nn.Module,
    layers: Layers,
    calls: Mapping[str, list[Call]],
    logits: Tensor,
    columns: Tensor,
    *,
    rows: Mapping[str, Tensor] = MappingProxyType({}),
    group: int,
    power: Power = 2,
) -> dict[str, Tensor]:
    """Return squares by full name, for the parameters of hooked layers and those of `rows`.

    Args:
        model: the model.
        layers: what to measure.
        calls: calls of the forward pass that made `logits`.
        columns: [c, n, C].
        logits: [n, C], with their graph.
        rows: parameters with one row per example, see `coverage.widen`.
        group: columns pulled back at a time; bounds memory.
        power: 2 for squares, 1 for absolute values.
    """
    total: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        total[name] = total[name] + value if name in total else value

    for some in columns.split(group):
        for name, grad in layer_gradients(layers, calls, logits, some, rows):
            if name in rows:
                add(name, raised(grad, power).sum((0, 1))[None])
                continue
            call, names = calls[name][0], layers[name]
            found = squares(model.get_submodule(name), call.inputs, grad, names, len(logits), power=power)
            for local, value in found.items():
                add(names[local], value)
    return total


def layer_gradients(
    layers: Layers,
    calls: Mapping[str, list[Call]],
    logits: Tensor,
    columns: Tensor,
    rows: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer's output gradients [n*f, c, ...], from the last layer to the first, freeing them on the way.

    Those of `rows` [n, ...], which are [n, c, ...], come first.
    """
    edges = {name: edge for name in layers if (edge := calls[name][0].edge) is not None}
    edges |= {name: get_gradient_edge(value) for name, value in rows.items()}
    by_column = [_pulled(logits, list(edges.values()), column) for column in columns]
    for position in reversed(range(len(edges))):
        name = list(edges)[position]
        parts = [grads.pop() for grads in by_column]
        if parts and parts[0] is not None:
            yield name, torch.stack([part for part in parts if part is not None], dim=1)


def stream_gradients(
    edges: Mapping[str, GradientEdge], logits: Tensor, columns: Tensor, visit: Callable[[str, Tensor], None]
) -> None:
    """Visit the gradient of each layer's output for one column after another, as soon as autograd has computed it.

    Nothing is held but what autograd itself still needs. Only edges from which no other edge can be reached, going
    backward, are requested; hooks visit the others on the way. Requested gradients arrive when the column is done.

    Args:
        edges: by layer, where its output gradient arrives.
        logits: [n, C], with their graph, which is freed.
        columns: [c, n, C].
        visit: takes the layer's name and its gradient, which it must not change.
    """
    last = _without_edge_behind(edges)
    asked = {name: edge for name, edge in edges.items() if edge in last}

    def passing(name: str, position: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[position]
            if grad is not None:
                visit(name, grad)

        return hook

    with ExitStack() as stack:
        for name, edge in edges.items():
            if name not in asked:
                stack.callback(edge.node.register_prehook(passing(name, edge.output_nr)).remove)
        for number, column in enumerate(columns, start=1):
            inputs, more = list(asked.values()), number < len(columns)
            grads = torch.autograd.grad(logits, inputs, column, retain_graph=more, allow_unused=True) if inputs else ()
            for name, grad in zip(asked, grads, strict=True):
                if grad is not None:
                    visit(name, grad)


def mapped_squares(
    model: nn.Module, names: Sequence[str], pixels: Tensor, columns: Tensor, *, graph_bytes: int, power: Power = 2
) -> dict[str, Tensor]:
    """Return squares by full name, for parameters that must be measured through the whole model's forward pass.

    Args:
        model: the model.
        names: names of the parameters.
        pixels: [n, channels, h, w].
        columns: [c, n, C].
        graph_bytes: bytes held per example between forward and backward.
        power: 2 for squares, 1 for absolute values.
    """
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    own = {name: fixed.pop(name) for name in names}
    total = {name: torch.zeros_like(value) for name, value in own.items()}
    if not names or not len(columns):
        return total

    def one(image: Tensor, directions: Tensor) -> Mapping[str, Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            logits: Tensor = torch.func.functional_call(model, {**fixed, **parameters}, (image[None],))
            return logits[0]

        pull = torch.func.vjp(forward, own)[1]
        pulled: Mapping[str, Tensor] = torch.vmap(pull)(directions)[0]
        return pulled

    size = sum(value.numel() for value in own.values()) + graph_bytes // pixels.element_size()
    by_example = columns.transpose(0, 1)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be mapped
        for some, group in pieces(len(pixels), len(columns), size, pixels, gpu_bytes=_MAPPED):
            for name, value in torch.vmap(one)(pixels[some], by_example[some, group]).items():
                total[name] += raised(value, power).sum((0, 1))
    return total


def looped_squares(
    model: nn.Module, names: Collection[str] | None, pixels: Tensor, columns: Tensor, *, power: Power = 2
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the same as `mapped_squares`, one example and column at a time by plain autograd, as in training.

    `names` None means every trainable parameter. Also returns the names of those that the logits depend on.
    """
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    named = {name: value for name, value in named.items() if names is None or name in names}
    total = {
        name: torch.zeros(value.shape, dtype=value.dtype, device=computes_on(value)) for name, value in named.items()
    }
    reached: set[str] = set()
    if not named:
        return total, reached
    for number, image in enumerate(pixels.split(1)):
        with whole_parameters(model) if is_spread(model) else nullcontext(named) as used:
            logits = model(image)
        own = [used[name] for name in named]
        for column in columns[:, number : number + 1]:
            grads = torch.autograd.grad(logits, own, column, retain_graph=True, allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    total[name] += raised(grad, power)
                    reached.add(name)
    return total, reached


def _without_edge_behind(edges: Mapping[str, GradientEdge]) -> set[GradientEdge]:
    """The edges from whose node no other edge's node can be reached, going backward."""
    targets = {edge.node for edge in edges.values()}
    behind: dict[Node, bool] = {}  # whether a target can be reached from a node, itself left out
    for start in targets:
        stack: list[tuple[Node, bool]] = [(start, False)]
        while stack:
            node, ready = stack.pop()
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            if ready:
                behind[node] = any(parent in targets or behind[parent] for parent in parents)
            elif node not in behind:
                stack.append((node, True))
                stack.extend((parent, False) for parent in parents if parent not in behind)
    return {edge for edge in edges.values() if not behind[edge.node]}


def _pulled(logits: Tensor, edges: Sequence[GradientEdge], column: Tensor) -> list[Tensor | None]:
    if not edges:
        return []
    return list(torch.autograd.grad(logits, edges, column, retain_graph=True, allow_unused=True))
