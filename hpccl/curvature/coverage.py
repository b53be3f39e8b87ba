"""Which method measures each trainable parameter, found by trial and checked numerically.

A layer that is called once per forward pass, with tensors and one row block per example, is measured by hooks. Every
other trainable parameter (held outside a layer, shared, used without calling its layer, called twice) is measured
through the whole model. Hooks are then compared with plain autograd on a few examples, one by one; a layer that
disagrees (its weight is also used elsewhere, its batch dim is not the first) is measured through the whole model too.
Parameters that cannot be mapped over examples (vmap) are measured one example at a time, slowly. One that plain
autograd does not reach at all is an error, lest it be believed to be protected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from hpccl.curvature.capture import Call, captured, measuring
from hpccl.curvature.layers import acts_as_known
from hpccl.curvature.pullback import layer_squares, looped_squares, mapped_squares
from hpccl.engine.sharded import computes_on
from hpccl.errors import CoverageError

__all__ = ["Coverage", "footprint", "plan", "plan_ahead", "refuse_unfit", "widen"]

_AGREE = 1e-2  # relative difference of squared gradients that still counts as rounding
# How often a layer must disagree to be rejected: an activation that is zero up to rounding may be on in a batch of two
# images and off in a batch of one, and its gradient with it, but hardly again for other images.
_PROBES = 3
_JITTER = 0.1  # noise that is added to get other images, relative to the images' standard deviation
_NOISE = 1e-13  # relative to the largest squared gradient: smaller ones are rounding (exact zeros by symmetry)


@dataclass(frozen=True)
class Coverage:
    """How the model's trainable parameters are measured.

    layers: by module, the local and full names of its parameters that hooks measure
    mapped: full names of the parameters that are measured through the whole model, mapped over examples
    looped: the same, where torch cannot map them: one example at a time
    widened: those of `mapped` that may have one row per example, so that their gradients are per-example gradients
    factored: modules that compute what nn.Linear or nn.Conv2d do; set only by `plan_ahead`
    graph_bytes: bytes held per example between forward and backward
    output_bytes: bytes of the hooked layers' outputs, per example
    """

    layers: Mapping[str, Mapping[str, str]]
    mapped: tuple[str, ...]
    looped: tuple[str, ...]
    graph_bytes: int
    output_bytes: int
    widened: tuple[str, ...] = ()
    factored: tuple[str, ...] = ()


def refuse_unfit(model: nn.Module) -> None:
    """Refuse models whose per-example gradients would be meaningless or imprecise.

    Raises:
        CoverageError: a norm layer couples examples, or a trainable parameter has half precision.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise CoverageError(
                f"layer '{name}' ({type(module).__name__}) has no running statistics, so that examples of a batch "
                "influence each other; per-example curvature needs track_running_stats=True, or a group or layer norm"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise CoverageError(
                f"parameter '{name}' is {parameter.dtype}; curvature is measured in fp32: "
                "keep fp32 weights and use autocast"
            )


def plan(model: nn.Module, pixels: Tensor) -> Coverage:
    """Choose how to measure each parameter, checked with a few examples, `pixels` [m, channels, h, w].

    Raises:
        CoverageError: a trainable parameter does not influence the logits of any of them.
    """
    if len(pixels) == 1:  # one image would fit any order of rows
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels)
        pixels = torch.cat([pixels, pixels.mean() + pixels.std().clamp(min=1e-3) * noise])
    coverage = _by_structure(model, pixels)
    probe, agreed = _measured(model, coverage.layers, pixels)
    _refuse_unreached(probe.truth.keys() - probe.reached)
    for number in range(1, _PROBES):
        doubtful = {name: names for name, names in coverage.layers.items() if name not in agreed}
        if doubtful:
            agreed |= _measured(model, doubtful, _others(pixels, number))[1]
    layers = {name: names for name, names in coverage.layers.items() if name in agreed}
    covered = {full for names in layers.values() for full in names.values()}
    rest = tuple(name for name in probe.truth if name not in covered)
    mapped = probe.agreeing(_mapped(model, rest, pixels, probe.columns), rest)
    return replace(
        coverage,
        layers=layers,
        mapped=mapped,
        looped=tuple(name for name in rest if name not in mapped),
        widened=probe.agreeing(_widened(model, mapped, pixels, probe.columns), mapped),
    )


@dataclass(frozen=True)
class _Probe:
    """True squared gradients of a few examples, measured one by one.

    truth: squares by parameter name
    reached: parameters that the logits depend on
    columns: [1, m, C] vectors over the logits
    """

    truth: Mapping[str, Tensor]
    reached: Collection[str]
    columns: Tensor

    def agreeing(self, squares: Mapping[str, Tensor], names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names` whose squares agree with the true ones."""
        largest = [float(value.max()) for value in self.truth.values() if value.numel()]
        noise = _NOISE * max((value for value in largest if isfinite(value)), default=0.0)
        return tuple(name for name in names if name in squares and _agrees(squares[name], self.truth[name], noise))


def _measured(model: nn.Module, layers: Mapping[str, Mapping[str, str]], pixels: Tensor) -> tuple[_Probe, set[str]]:
    """Measure the true squares, and find the layers whose hooks agree with them."""
    with captured(model, layers) as calls:
        logits = model(pixels)
    columns = _random_columns(logits)
    probe = _Probe(*looped_squares(model, None, pixels, columns), columns)
    found = layer_squares(model, layers, calls, logits, columns, group=1)
    return probe, {name for name, own in layers.items() if len(probe.agreeing(found, own.values())) == len(own)}


def _others(pixels: Tensor, number: int) -> Tensor:
    """Return slightly perturbed images, the same ones every time."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(number)).to(pixels)
    return pixels + _JITTER * pixels.std().clamp(min=1e-3) * noise


def plan_ahead(model: nn.Module, image_shape: Sequence[int]) -> Coverage:
    """Plan the coverage of a network whose weights will be spread, while they are still whole.

    Spread weights are not mapped over examples: parameters that cannot have one row per example are measured one
    example at a time.

    Raises:
        CoverageError: a trainable parameter does not influence the logits.
    """
    noise = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    pixels = torch.randn(2, *image_shape, generator=noise).to(device)
    zeros = [value for value in model.parameters() if value.requires_grad and not bool(value.any())]
    try:
        with torch.no_grad():  # parameters that a zero multiplies would seem to have no gradient
            for value in zeros:
                value.copy_(0.1 * torch.randn(value.shape, generator=noise))
        with measuring(model, device):
            found = plan(model, pixels)
    finally:
        with torch.no_grad():
            for value in zeros:
                value.zero_()
    return replace(
        found,
        mapped=found.widened,
        looped=(*found.looped, *(name for name in found.mapped if name not in found.widened)),
        factored=tuple(name for name, module in model.named_modules() if acts_as_known(module)),
    )


def footprint(model: nn.Module, pixels: Tensor) -> int:
    """Return the bytes per example that a forward pass holds for the backward pass."""
    held = [_graph_bytes(model, pixels[torch.arange(size, device=pixels.device) % len(pixels)]) for size in (2, 3)]
    return max(0, held[1] - held[0])


def _by_structure(model: nn.Module, pixels: Tensor) -> Coverage:
    """Find the layers that hooks may measure, judging by their calls in batches of two sizes."""
    full_names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = _single_layers(model, full_names)
    calls: list[dict[str, list[Call]]] = []
    held: list[int] = []
    for size in (2, 3):
        rows = torch.arange(size, device=pixels.device) % len(pixels)
        with captured(model, layers) as seen:
            held.append(_graph_bytes(model, pixels[rows]))
        calls.append(seen)
    kept = {name: names for name, names in layers.items() if _once_per_example(calls[0][name], calls[1][name])}
    covered = {full for names in kept.values() for full in names.values()}
    whole = tuple(name for name in full_names.values() if name not in covered)
    return Coverage(kept, whole, (), max(0, held[1] - held[0]), sum(calls[0][name][0].num_bytes for name in kept) // 2)


def _single_layers(model: nn.Module, full_names: Mapping[nn.Parameter, str]) -> dict[str, dict[str, str]]:
    """Find modules that share their trainable parameters with no other, and whose submodules have no parameters."""
    owners = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    layers: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        if any(True for child in module.children() for _ in child.parameters()):
            continue
        own = module.named_parameters(recurse=False)
        mine = {local: full_names[value] for local, value in own if value in full_names and owners[value] == 1}
        if mine:
            layers[name] = mine
    return layers


def _once_per_example(two: list[Call], three: list[Call]) -> bool:
    """Whether a layer is called once, with equally many rows per example, in a batch of two and in one of three."""
    if len(two) != 1 or len(three) != 1:
        return False
    usable = all(call.inputs and call.edge is not None and call.rows > 0 for call in (*two, *three))
    return usable and two[0].rows % 2 == 0 and 3 * two[0].rows == 2 * three[0].rows


def _graph_bytes(model: nn.Module, pixels: Tensor) -> int:
    """Bytes that a forward pass holds for the backward pass, weights included."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a saved output that is not detached would keep its own graph alive for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(pixels)
    return sum(held.values())


def _random_columns(logits: Tensor) -> Tensor:
    """Draw [1, m, C] directions that favour no class."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *logits.shape, generator=generator).to(logits)


def _refuse_unreached(names: Collection[str]) -> None:
    if names:
        raise CoverageError(
            f"{len(names)} trainable parameter(s) do not influence the logits and would be left unprotected: "
            f"{', '.join(repr(name) for name in sorted(names)[:8])}; freeze what is not used (requires_grad=False)"
        )


def widen(model: nn.Module, names: Iterable[str], n: int) -> dict[str, Tensor]:
    """Expand parameters [1, ...] to leaves [n, ...] of equal rows, one per example."""
    wide = {name: _whole(model.get_parameter(name).detach()) for name in names}
    return {name: value.expand(n, *value.shape[1:]).requires_grad_() for name, value in wide.items()}


def _whole(value: Tensor) -> Tensor:
    moved: Any = value.to(computes_on(value))
    full: Tensor = moved.full_tensor() if hasattr(moved, "full_tensor") else moved
    return full


def _mapped(model: nn.Module, names: tuple[str, ...], pixels: Tensor, columns: Tensor) -> Mapping[str, Tensor]:
    """Return squares through the whole model mapped over examples; none if torch cannot map it.

    It cannot if the forward pass branches on values, and some of its batching rules are wrong (nn.PReLU in torch 2.13).
    """
    try:
        return mapped_squares(model, names, pixels, columns, graph_bytes=0)
    except RuntimeError:
        return {}


def _widened(model: nn.Module, names: tuple[str, ...], pixels: Tensor, columns: Tensor) -> Mapping[str, Tensor]:
    """Return squares of the parameters [1, ...] that the model joins to every example, with one row per example."""
    rows = widen(model, (name for name in names if model.get_parameter(name).shape[:1] == (1,)), len(pixels))
    if not rows:
        return {}
    try:
        logits = torch.func.functional_call(model, rows, (pixels,))
        grads = torch.autograd.grad(logits, list(rows.values()), columns[0], allow_unused=True)
    except RuntimeError:
        return {}
    found: Iterable[tuple[str, Tensor | None]] = zip(rows, grads, strict=True)
    return {name: grad.square().sum(0, keepdim=True) for name, grad in found if grad is not None}


def _agrees(found: Tensor, truth: Tensor, noise: float) -> bool:
    """Whether a parameter's squares agree with the true ones; `noise` is the rounding error allowed in each."""
    if not bool(truth.sum().isfinite()):
        return True  # the pass itself reports which layer and which image
    return bool((found - truth).norm() <= _AGREE * truth.norm() + noise * truth.numel() ** 0.5)
