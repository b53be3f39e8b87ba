"""The state of a torch optimiser by parameter name, whole or spread as the parameters are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpccl.dist.spread import Slab, Span, Stored, elements, whole

__all__ = ["device_of", "group_numbers", "load_state", "local", "state_of"]

# Numbers of torch's and timm's optimisers that they keep in host memory, unless they are fused or capturable.
_IN_HOST_MEMORY = {"step", "mu_product", "exp_avg_lr_1", "exp_avg_lr_2"}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def group_numbers(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the numbers in parameter groups (step counts, say); lists and tuples are settings, which the run has."""
    plain = (bool, int, float, Tensor)
    return [
        {key: value for key, value in group.items() if value is None or isinstance(value, plain)} for group in groups
    ]


def state_of(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], spans: Mapping[str, Span]
) -> dict[str, Any]:
    """Return {moments: by parameter and key; groups}, sharing memory: write or copy it before the next step."""
    moments: dict[str, dict[str, Any]] = {}
    for parameter, kept in optimizer.state.items():
        name = names[parameter]
        moments[name] = {key: _saved(value, parameter, spans.get(name)) for key, value in kept.items()}
    return {"moments": moments, "groups": group_numbers(optimizer.param_groups)}


def _saved(value: Any, parameter: Tensor, span: Span | None) -> Any:
    if span is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return Slab(value.reshape(-1), span)


def load_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    spans: Mapping[str, Span],
    state: Mapping[str, Any],
) -> None:
    """Restore what `state_of` returned, from whole or stored tensors."""
    for group, numbers in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(numbers)
        for key, value in numbers.items():
            if isinstance(value, Tensor):
                group[key] = value.to(device_of(key, group, group["params"][0]))
        for parameter in group["params"]:
            name = names[parameter]
            if name in state["moments"]:
                optimizer.state[parameter] = {
                    key: _loaded(value, parameter, spans.get(name), device_of(key, group, parameter))
                    for key, value in state["moments"][name].items()
                }


def device_of(key: str, group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Return where an optimiser expects an entry of its state that is not shaped like its parameter."""
    hosted = key in _IN_HOST_MEMORY and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if hosted else parameter.device


def _loaded(value: Any, parameter: Tensor, span: Span | None, device: torch.device) -> Any:
    """Return one entry; device: where it belongs if it is not shaped like its parameter."""
    if not isinstance(value, (Tensor, Slab, Stored)):
        return value
    if tuple(value.shape) != (parameter.shape if span is None else span.shape):
        assert not isinstance(value, Slab), "only what is shaped like a parameter is spread"
        return whole(value).to(device, copy=True)
    part = whole(value) if span is None else elements(value, span.start, span.stop)  # type: ignore[arg-type]
    # In the parameter's memory layout: fused kernels pair a moment with its weight by address, not by index.
    return torch.empty_like(parameter, dtype=part.dtype, requires_grad=False).copy_(part.view(parameter.shape))
