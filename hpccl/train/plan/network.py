"""What a network takes: shapes of its weights, and activations by a pass over tensors without memory (torch's meta)."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hpccl.config.run import RunConfig
from hpccl.config.sections import LayerMeasured
from hpccl.curvature.blocks import Layout
from hpccl.curvature.factors import refuse_large
from hpccl.curvature.layers import acts_as_known, has_formula
from hpccl.engine.optim import build_optimizer
from hpccl.engine.protocols import trainable
from hpccl.models.build import skeleton
from hpccl.models.dropout import set_noise

__all__ = ["Network", "look", "moments"]

_SIDE = 256  # of the matrix whose optimiser state is counted


@dataclass(frozen=True)
class Network:
    """Numbers of a network and of one micro-batch.

    shapes: of the parameters
    buffer_bytes: of the buffers
    largest_block: elements of the largest block of layers
    layouts: layers whose curvature is a Kronecker product; none where no such curvature is asked for
    rest: trainable weights outside of them
    activations: bytes kept for the backward pass of a micro-batch; None where that could not be told
    graph: the same of one example in evaluation mode, fp32
    problem: why activations could not be told, or empty
    """

    shapes: tuple[tuple[int, ...], ...]
    buffer_bytes: int
    largest_block: int
    layouts: tuple[Layout, ...]
    rest: int
    activations: int | None
    graph: int | None
    problem: str = ""

    @property
    def num_weights(self) -> int:
        """Elements of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def look(config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int, rows: int) -> Network:
    """The network of `config` with a micro-batch of `rows` images.

    Raises:
        ConfigError: the model is unknown or does not fit the images.
        CoverageError: a factor of the curvature would be larger than allowed.
    """
    model = skeleton(config.model, image_shape=image_shape, num_classes=num_classes)
    half = config.engine.precision == "bf16"
    problem, calls = "", Counter[str]()
    activations: int | None = None
    graph: int | None = None
    try:
        activations = _kept(model.train(), image_shape, rows, half=half)
        with _counting(model, calls):
            graph = _kept(model.eval(), image_shape, 3) - _kept(model, image_shape, 2)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
    layouts = tuple(_layouts(model, config.curvature, calls)) if isinstance(config.curvature, LayerMeasured) else ()
    factored = {name for layout in layouts for name in layout.names}
    return Network(
        shapes=tuple(tuple(value.shape) for value in model.parameters()),
        buffer_bytes=sum(value.nbytes for value in model.buffers()),
        largest_block=_largest_block(model),
        layouts=layouts,
        rest=sum(value.numel() for name, value in trainable(model).items() if name not in factored),
        activations=activations,
        graph=graph,
        problem=problem,
    )


def moments(config: RunConfig) -> float:
    """Numbers that the optimiser keeps of each weight, counted on a matrix after a step.

    Raises:
        ConfigError: the optimiser is unknown or refuses an option.
    """
    layer = nn.Linear(_SIDE, _SIDE, bias=False)
    optimizer = build_optimizer(config.optim, layer)
    layer.weight.grad = torch.full_like(layer.weight, 1e-3)
    optimizer.step()
    kept = optimizer.state[layer.weight].values()
    return sum(value.numel() for value in kept if isinstance(value, Tensor) and value.numel() > 1) / _SIDE**2


# ---------------------------------------------------------------- activations


def _kept(model: nn.Module, image_shape: tuple[int, int, int], rows: int, *, half: bool = False) -> int:
    """Bytes that a forward pass of `rows` images keeps for the backward pass, weights apart.

    half: all in bfloat16, with a copy of the weights in it, which is close to what autocast keeps.
    """
    model = copy.deepcopy(model).to(torch.bfloat16) if half else model
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # storages, which stay alive so that no two have one address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor.detach()

    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor):
        set_noise(model, torch.empty(rows, dtype=torch.int64))
        model(torch.empty(rows, *image_shape, dtype=torch.bfloat16 if half else torch.float32))
    copies = sum(value.nbytes for value in model.parameters()) if half else 0
    return copies + sum(int(storage.nbytes()) for storage in kept.values())


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
    """Layers that a run would factor: those whose weight is theirs alone and is used once a pass.

    Raises:
        CoverageError: a factor is larger than allowed.
    """
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
        layout = Layout(name, f"{name}.weight", bias, tuple(module.weight.shape), groups)
        refuse_large({name: layout.shape}, config.max_factor)
        yield layout


def _is_known(module: nn.Module) -> bool:
    """acts_as_known, which looks at numbers unless the class says it all."""
    if has_formula(module):
        return True
    real = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for value in (*real.parameters(), *real.buffers()):
            value.fill_(1) if value.dim() == 0 else value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
    return acts_as_known(real)


def _largest_block(model: nn.Module) -> int:
    """Elements of the largest block (or of all that is in no block): what engines make whole at a time."""
    sizes = [_numel(block) for block in _blocks(model)]
    return max([_numel(model) - sum(sizes), *sizes])


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of a Sequential or a ModuleList that hold no blocks themselves."""
    for child in module.children():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and not any(map(_holds_blocks, child.modules())):
            yield child
        else:
            yield from _blocks(child)


def _holds_blocks(module: nn.Module) -> bool:
    inner = [child for child in module.children() if any(True for _ in child.children())]
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and len(inner) > 1


def _numel(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
