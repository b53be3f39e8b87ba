"""The size of a network: shapes of its weights, and bytes of activations from a pass on torch's meta device."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hpccl.config.curvature import LayerMeasured
from hpccl.config.run import RunConfig
from hpccl.curvature.blocks import Layout
from hpccl.curvature.factors import refuse_large
from hpccl.curvature.layers import acts_as_known, has_formula
from hpccl.engine.modes import refuse_recompute
from hpccl.engine.optim import build_optimizer
from hpccl.engine.protocols import trainable
from hpccl.engine.sharded import units
from hpccl.models.build import skeleton
from hpccl.models.dropout import set_noise

__all__ = ["Network", "forward_flops", "look", "moments"]

_SIDE = 256  # side of the matrix whose optimiser state is counted


@dataclass(frozen=True)
class Network:
    """The size of a network and of one micro-batch.

    shapes: of the parameters
    buffer_bytes: of the buffers
    largest_unit: elements of the largest module whose sharded weights are gathered and freed together
    layouts: layers whose curvature is a Kronecker product; empty for other kinds of curvature
    rest: shapes of the trainable weights outside of these layers, by name
    activations: bytes kept for the backward pass of a micro-batch; None where unknown
    graph: the same for one example in evaluation mode, fp32
    problem: why activations are unknown, or empty
    """

    shapes: tuple[tuple[int, ...], ...]
    buffer_bytes: int
    largest_unit: int
    layouts: tuple[Layout, ...]
    rest: Mapping[str, tuple[int, ...]]
    activations: int | None
    graph: int | None
    problem: str = ""

    @property
    def num_weights(self) -> int:
        """Number of elements of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def forward_flops(
    config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int, sides: Iterable[int]
) -> dict[int, int]:
    """Count additions and multiplications of one image's forward pass, by the side of its view.

    Linear maps, convolutions and attention are counted; empty where the network does not run on the meta device.
    """
    model = skeleton(config.model, image_shape=image_shape, num_classes=num_classes).eval()
    found = {}
    try:
        for side in sides:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, image_shape[0], side, side, device="meta"))
            found[side] = counter.get_total_flops()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):  # `look` reports these
        return {}
    return found


def look(config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int, rows: int) -> Network:
    """Determine the size of the network of `config` with a micro-batch of `rows` images.

    Raises:
        ConfigError: the model is unknown, does not fit the images or cannot recompute its activations.
        CoverageError: a factor of the curvature would be larger than allowed.
    """
    model = skeleton(config.model, image_shape=image_shape, num_classes=num_classes)
    refuse_recompute(model, config)
    half = config.engine.precision == "bf16"
    problem, calls = "", Counter[str]()
    activations: int | None = None
    graph: int | None = None
    try:
        activations = _activations(model.train(), image_shape, rows, half=half, recompute=config.engine.recompute)
        with _counting(model, calls):
            graph = _kept(model.eval(), image_shape, 3)[""] - _kept(model, image_shape, 2)[""]
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
    curvature = config.curvature
    layouts = tuple(_layouts(model, curvature, calls)) if isinstance(curvature, LayerMeasured) else ()
    if isinstance(curvature, LayerMeasured) and config.measures_curvature:
        refuse_large({layout.name: layout.shape for layout in layouts}, curvature.max_factor)
    factored = {name for layout in layouts for name in layout.names}
    return Network(
        shapes=tuple(tuple(value.shape) for value in model.parameters()),
        buffer_bytes=sum(value.nbytes for value in model.buffers()),
        largest_unit=_largest_unit(model),
        layouts=layouts,
        rest={name: tuple(value.shape) for name, value in trainable(model).items() if name not in factored},
        activations=activations,
        graph=graph,
        problem=problem,
    )


def moments(config: RunConfig) -> float:
    """Return how many numbers the optimiser keeps of each weight, counted on a matrix after its first steps.

    Raises:
        ConfigError: the optimiser is unknown or refuses an option.
    """
    layer = nn.Linear(_SIDE, _SIDE, bias=False)
    optimizer = build_optimizer(config.optim, layer)
    layer.weight.grad = torch.full_like(layer.weight, 1e-3)
    for _ in range(optimizer.param_groups[0].get("lookahead_k", 1)):  # with the last of which slow weights begin
        optimizer.step()
    kept = optimizer.state[layer.weight].values()
    return sum(value.numel() for value in kept if isinstance(value, Tensor) and value.numel() > 1) / _SIDE**2


# ---------------------------------------------------------------- activations


def _activations(model: nn.Module, image_shape: tuple[int, int, int], rows: int, *, half: bool, recompute: bool) -> int:
    """Return the peak bytes of activations in training.

    half: all in bfloat16, with a bfloat16 copy of the weights, which is close to what autocast keeps
    recompute: a pass keeps the inputs of the blocks, and the backward pass recomputes one block at a time
    """
    model = copy.deepcopy(model).to(torch.bfloat16) if half else model
    copies = sum(value.nbytes for value in model.parameters()) if half else 0
    everything = _kept(model, image_shape, rows)
    if not recompute:
        return copies + everything[""]
    switch: Any = model.set_grad_checkpointing
    switch(True)
    inputs = _kept(model, image_shape, rows)
    switch(False)
    blocks = [everything[name] for name, kept in inputs.items() if kept == 0]
    return copies + inputs[""] + max(blocks, default=0)


def _kept(model: nn.Module, image_shape: tuple[int, int, int], rows: int) -> Counter[str]:
    """Return the bytes that a forward pass keeps for the backward pass, without weights, by module; "" has all."""
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    dtype = next(model.parameters()).dtype
    alive: dict[int, Any] = {}  # keeps storages alive, so that no address is reused
    kept, running = Counter[str](), list[str]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in alive:
            alive[storage._cdata] = storage
            kept.update(dict.fromkeys(running, int(storage.nbytes())))
        return tensor.detach()

    def begin(name: str) -> Callable[..., None]:
        def call(*_: Any) -> None:
            running.append(name)
            kept[name] += 0  # an entry even for modules that keep nothing

        return call

    def end(*_: Any) -> None:
        running.pop()

    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor), contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(begin(name)).remove)
            stack.callback(module.register_forward_hook(end).remove)
        set_noise(model, torch.empty(rows, dtype=torch.int64))
        model(torch.empty(rows, *image_shape, dtype=dtype))
    return kept


@contextlib.contextmanager
def _counting(model: nn.Module, calls: Counter[str]) -> Iterator[None]:
    """Count how often each module is called."""

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- layers


def _layouts(model: nn.Module, config: LayerMeasured, calls: Counter[str]) -> Iterator[Layout]:
    """Yield the layers that a run would factor: those whose weight is not shared and is used once a pass."""
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    once_each = min(calls.values(), default=0)  # of two passes, so 2
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not module.weight.requires_grad:
            continue
        once = owners[id(module.weight)] == 1 and (not calls or calls[name] == once_each)
        if not once or any(fnmatchcase(name, pattern) for pattern in config.diagonal) or not _is_known(module):
            continue
        bias = f"{name}.bias" if module.bias is not None and module.bias.requires_grad else None
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        yield Layout(name, f"{name}.weight", bias, tuple(module.weight.shape), groups)


def _is_known(module: nn.Module) -> bool:
    """Call acts_as_known; unless the class decides, it needs numbers, which a meta module does not have."""
    if has_formula(module):
        return True
    real = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for value in (*real.parameters(), *real.buffers()):
            value.fill_(1) if value.dim() == 0 else value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
    return acts_as_known(real)


def _largest_unit(model: nn.Module) -> int:
    """Return the number of elements of the largest unit, whose sharded weights are gathered and freed together."""
    taken: set[int] = set()
    most = 0
    for unit in units(model):
        own = {id(value): value.numel() for value in unit.parameters() if id(value) not in taken}
        taken |= own.keys()
        most = max(most, sum(own.values()))
    return most
