"""Networks whose weights are sharded and gathered block by block during a pass (FSDP2).

The fsdp2 engine trains such a network. Other engines that spread weights use one for passes outside training, and their
frozen teachers are sharded too. Every pass is collective: all ranks run the same number of passes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hpccl.config.engine import shards_of
from hpccl.dist.comm import Comm
from hpccl.dist.mesh import meet_alone
from hpccl.dist.spread import Leaf, Leaves, Slab, Span, Stored, elements, streamed, whole
from hpccl.engine.moments import local
from hpccl.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

__all__ = [
    "Mesh",
    "computes_on",
    "entered",
    "free_gathered",
    "is_spread",
    "load_spread",
    "own_parameters",
    "parameters_of",
    "place_of",
    "shard",
    "skeleton",
    "spans_of",
    "spread_copy",
    "units",
    "whole_copy",
    "whole_layer",
    "whole_parameters",
]

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_SMALLEST = 1 << 14  # least elements of a unit; smaller modules belong to the unit around them


def is_spread(module: nn.Module) -> bool:
    """Whether the weights of `module` are in shards, so that its passes are collective."""
    # Not imported here: that takes half as long as importing torch, and processes without shards do not need it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@final
@dataclass(frozen=True)
class Mesh:
    """How ranks share copies of the weights.

    devices: torch's mesh; two-dimensional (copies, shards) if there are several copies
    rank: this rank's index among the ranks that share its copy
    size: number of ranks that share a copy
    copy: index of this rank's copy
    """

    devices: DeviceMesh
    rank: int
    size: int
    copy: int

    @classmethod
    def of(cls, comm: Comm, shard_size: int | None) -> Mesh:
        """Divide the ranks into groups of `shard_size` neighbours that share a copy; None: all ranks share one.

        Raises:
            ConfigError: `shard_size` does not divide the number of ranks.
        """
        size = shards_of(shard_size, comm.size)
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        meet_alone(comm)
        if size == comm.size:
            devices = init_device_mesh(comm.device.type, (size,), mesh_dim_names=("shard",))
            return cls(devices, comm.rank, size, 0)
        ranks = torch.arange(comm.size).view(-1, size)
        groups = [_group_of(comm, rows) for rows in (ranks.T, ranks)]
        devices = DeviceMesh.from_group(groups, comm.device.type, mesh=ranks, mesh_dim_names=("copy", "shard"))
        return cls(devices, comm.rank % size, size, comm.rank // size)

    def span(self, shape: tuple[int, ...]) -> Span:
        """This rank's rows of a parameter."""
        return Span.of_rows(shape, self.rank, self.size, copy=self.copy)


def _group_of(comm: Comm, rows: Tensor) -> dist.ProcessGroup:
    """Create a process group of each row and return that of this rank's row; collective."""
    made: list[tuple[list[int], dist.ProcessGroup]]
    made = [(row, dist.new_group(row, timeout=comm.timeout)) for row in rows.tolist()]
    return next(group for row, group in made if comm.rank in row)


def units(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose weights are gathered and freed together, innermost first, `model` itself last.

    The members of every Sequential and ModuleList, but not modules inside them: a residual block, a transformer layer.
    Small members belong to the unit around them.
    """
    yield from _members(model)
    yield model


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, _CONTAINERS) and not _is_stage(child):
            if numel(child) >= _SMALLEST:
                yield child
        else:
            yield from _members(child)


def _is_stage(module: nn.Module) -> bool:
    """Whether units are inside: a stage contains several modules that have submodules themselves, a block does not."""
    inner = [child for child in module.modules() if isinstance(child, _CONTAINERS)]
    return any(sum(any(True for _ in member.children()) for member in container.children()) > 1 for container in inner)


def shard(model: nn.Module, mesh: Mesh, *, reshard: bool = True, offload: bool = False) -> None:
    """Shard the weights of `model` in place; each rank keeps its own rows.

    Raises:
        ConfigError: a parameter is a scalar, which has no rows.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(f"parameter '{name}' is a single number and cannot be sharded; use engine.kind=ddp")
    policy = CPUOffloadPolicy(pin_memory=mesh.devices.device_type == "cuda") if offload else OffloadPolicy()
    for unit in units(model):
        fully_shard(unit, mesh=mesh.devices, reshard_after_forward=reshard, offload_policy=policy)


def spans_of(model: nn.Module, mesh: Mesh) -> dict[str, Span]:
    """Return this rank's span of each parameter, by name."""
    return {name: mesh.span(tuple(value.shape)) for name, value in model.named_parameters()}


def computes_on(parameter: Tensor) -> torch.device:
    """The device on which passes use a parameter; between passes its shards may be in host memory."""
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device if mesh is None else torch.empty(0, device=mesh.device_type).device


def free_gathered(model: nn.Module) -> None:
    """Leave a network with its shards only; between passes.

    Without resharding after the forward pass, weights that no backward pass followed are still gathered, and the
    network's parameters are the gathered ones: other objects, without mesh and gradients.
    """
    for unit in model.modules():
        if is_spread(unit):
            cast("FSDPModule", unit).reshard()


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's elements [n] by parameter, sharing memory; between passes only."""
    free_gathered(model)
    return {name: local(value.detach()).view(-1) for name, value in model.named_parameters()}


def parameters_of(model: nn.Module) -> tuple[dict[str, Leaf], int]:
    """Return the trainable parameters, whole or this rank's rows, and the number of copies; between passes only."""
    free_gathered(model)
    named = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not is_spread(model):
        return dict(named), 1
    mesh = _mesh_of(next(iter(named.values())))
    found: dict[str, Leaf] = {
        name: Slab(local(value).reshape(-1), mesh.span(tuple(value.shape))) for name, value in named.items()
    }
    return found, mesh.devices.size() // mesh.size


def _mesh_of(parameter: Any) -> Mesh:
    devices: DeviceMesh = parameter.device_mesh
    two = devices.ndim == 2
    return Mesh(
        devices,
        devices.get_local_rank(devices.ndim - 1),
        devices.size(devices.ndim - 1),
        devices.get_local_rank(0) if two else 0,
    )


@torch.no_grad()
def load_spread(
    model: nn.Module, spans: Mapping[str, Span], weights: Iterable[tuple[str, Tensor | Slab | Stored]]
) -> None:
    """Replace parameters and buffers of a sharded network, by name."""
    own, buffers = own_parameters(model), dict(model.named_buffers())
    for name, value in weights:
        if name in own:
            own[name].copy_(elements(value, spans[name].start, spans[name].stop))
        elif name in buffers:
            assert not isinstance(value, Slab), "buffers are whole"
            buffers[name].copy_(whole(value))


@contextmanager
def whole_parameters(model: nn.Module, substitutes: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that passes within the context fill with a sharded network's whole parameters, by name.

    substitutes: tensors to compute with instead of the named parameters
    """
    places = {name: place_of(model, name) for name, _ in model.named_parameters()}
    found: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}

    def arrive(unit: nn.Module, arguments: Any) -> None:
        for name, (module, key) in places.items():
            value = module._parameters[key]
            if value is not None and not hasattr(value, "to_local") and name not in kept:
                found[name] = value
                if name in (substitutes or {}):
                    kept[name] = value
                    module._parameters[key] = (substitutes or {})[name]  # type: ignore[assignment]

    def leave(unit: nn.Module, arguments: Any, out: Any) -> None:
        for name, (module, key) in places.items():
            if name in kept and any(part is module for part in unit.modules()):
                module._parameters[key] = kept.pop(name)

    with ExitStack() as stack:
        for unit in model.modules():
            if is_spread(unit):  # FSDP2's hooks must run first when a unit begins, last when it ends
                stack.callback(unit.register_forward_pre_hook(arrive).remove)
                stack.callback(unit.register_forward_hook(leave, prepend=True).remove)
        yield found


def entered(edge: GradientEdge) -> GradientEdge:
    """Return the edge before the identity nodes that FSDP2 inserts at the inputs of sharded units."""
    node, number = edge.node, edge.output_nr
    while node.name().startswith("RegisterPostBackward"):
        before, number = node.next_functions[number]
        assert before is not None, "inputs that need no gradient get no such node"
        node = before
    return GradientEdge(node, number)


@contextmanager
def whole_layer(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield a layer with whole weights, for use outside passes; collective where the network is sharded."""
    around = [model.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 2)]
    unit = next((module for module in reversed(around) if is_spread(module)), None)
    if unit is None:
        yield around[-1]
        return
    cast("FSDPModule", unit).unshard()
    try:
        yield around[-1]
    finally:
        cast("FSDPModule", unit).reshard()


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the parameter's name there."""
    module, _, key = name.rpartition(".")
    return model.get_submodule(module), key


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of the network with its buffers, but with parameters on the meta device."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
        for value in model.parameters()
    }
    return copy.deepcopy(model, memo)


def spread_copy(bare: nn.Module, mesh: Mesh, device: torch.device) -> nn.Module:
    """Build a sharded network from a skeleton; its weights are yet to be loaded."""
    made = skeleton(bare)
    shard(made, mesh)
    made._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))
    return made


def whole_copy(bare: nn.Module, weights: Leaves, comm: Comm) -> nn.Module:
    """Build the network with all its weights on every rank, from a skeleton; collective, for small networks only."""
    made = skeleton(bare)
    made._apply(lambda value: torch.empty_like(value, device=comm.device) if value.is_meta else value.to(comm.device))
    own = made.state_dict()
    with torch.no_grad():
        for name, value in streamed(weights, comm):
            own[name].copy_(value)
    return made


def numel(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(math.prod(value.shape) for value in model.parameters())
