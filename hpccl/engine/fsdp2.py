"""Weights, gradients and optimiser state in shards, by torch's fully_shard (FSDP2)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from hpccl.config.engine import Fsdp2Engine as Fsdp2Config
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, Span
from hpccl.engine.base import BaseEngine
from hpccl.engine.moments import load_state, local, state_of
from hpccl.engine.optim import build_optimizer
from hpccl.engine.protocols import trainable
from hpccl.engine.sharded import (
    Mesh,
    is_spread,
    load_spread,
    own_parameters,
    place_of,
    shard,
    skeleton,
    spans_of,
    spread_copy,
    units,
    whole_copy,
)
from hpccl.optim.noise import Run

__all__ = ["Fsdp2Engine"]


@final
class Fsdp2Engine(BaseEngine):
    """The Engine protocol on sharded weights.

    Weights stay fp32, also while they are gathered: autocast lowers the operands of products, not the stored weights,
    so that w - a (a: the prior's anchor) keeps its digits.
    """

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        super().__init__(model, config, comm)
        assert isinstance(config.engine, Fsdp2Config)
        self._mesh = Mesh.of(comm, config.engine.shard_size)
        comm.broadcast_(list(model.state_dict().values()))
        self._bare = skeleton(model)
        self._model = model.to(comm.device)
        names = trainable(model)
        self._compiled = _compiled_blocks(model) if config.engine.compile else {}
        shard(model, self._mesh, reshard=config.engine.reshard, offload=config.engine.offload)
        self._own_spans = spans_of(model, self._mesh)
        self._like: dict[str, Tensor] = {name: value for name, value in self._bare.named_parameters() if name in names}
        self._spread = {name: parameter for name, parameter in model.named_parameters() if name in names}
        self._names: dict[Tensor, str] = {}
        self._whole: dict[str, nn.Parameter] = {}
        for unit in model.modules():
            if is_spread(unit):
                unit.register_forward_pre_hook(self._listen)
        self._places = {name: place_of(model, name) for name in names}
        self._keep_initial()

    @property
    def _spans(self) -> Mapping[str, Span]:
        return self._own_spans

    def _locals(self) -> dict[str, Tensor]:
        return own_parameters(self._model)

    @property
    def like(self) -> dict[str, Tensor]:
        """See BaseEngine."""
        return self._like

    def _listen(self, unit: nn.Module, arguments: Any) -> None:
        """Hook the gathered weights of a unit, once: FSDP2 keeps the same parameter objects for all passes."""
        for name in self._places.keys() - self._whole.keys():
            module, key = self._places[name]
            parameter = module._parameters[key]
            if isinstance(parameter, nn.Parameter) and not hasattr(parameter, "to_local"):
                self._whole[name] = parameter
                parameter.register_hook(self._relay(name))

    def _whole_now(self, name: str) -> Tensor:
        far = self._hooks.far.get(name)
        return self._whole[name].detach() if far is None else far

    def _restart(self) -> None:
        """Build the optimiser on this rank's elements as plain tensors, which all element-wise kernels accept."""
        rows = {name: nn.Parameter(local(value.detach())) for name, value in self._spread.items()}
        held = {name: value for name, value in rows.items() if value.numel()}
        self._names = {value: name for name, value in held.items()}
        self._optimizer = build_optimizer(self._optim, self._bare)
        named = {value: name for name, value in self._bare.named_parameters()}
        for group in self._optimizer.param_groups:
            group["params"] = [held[named[value]] for value in group["params"] if named[value] in held]

    def _run(self, pixels: Tensor) -> Tensor:
        self._fetch_far()
        with self._compiling():
            logits: Tensor = self._model(pixels)
        return logits

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Use the compiled blocks, for training passes only: other passes hook layers, which compiled code bypasses."""
        for block, call in self._compiled.items():
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in self._compiled:
                block._compiled_call_impl = None

    def _update(self, rate: float) -> Tensor:
        assert self._optimizer is not None, "start() comes first"
        self._show_gradients()
        gradients = [rows.grad for rows in self._names if rows.grad is not None]
        norm = self._total_norm(gradients)
        known = norm.cpu()  # the step's only synchronisation: before the optimiser runs, so that nothing waits for it
        if bool(torch.isfinite(known)):
            if self._train.clip_norm is not None and gradients:  # a small network leaves some ranks without rows
                scale = (self._train.clip_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device)
                torch._foreach_mul_(gradients, scale)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            self._optimizer.step()
        self._clear_gradients()
        return known

    def _runs(self) -> dict[Tensor, list[Run]]:
        return {
            rows: [Run(name, self._own_spans[name].start, self._own_spans[name].numel)]
            for rows, name in self._names.items()
        }

    def _show_gradients(self) -> None:
        for rows, name in self._names.items():
            gradient = self._spread[name].grad
            rows.grad = None if gradient is None else local(gradient)

    def _clear_gradients(self) -> None:
        for parameter in (*self._spread.values(), *self._names):
            parameter.grad = None

    def _write(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        own_parameters(self._model)  # reshard: blocks that are still gathered would keep computing with the old weights
        super()._write(tensors, values)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        return self._norm_of_parts(gradients, count=self._mesh.copy == 0)

    def whole_module(self) -> nn.Module:
        """See the protocol."""
        return whole_copy(self._bare, self.gather(), self._comm)

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """See the protocol; the copy is sharded too."""
        copied = spread_copy(self._bare, self._mesh, self.device).requires_grad_(False)
        load_spread(copied, self._own_spans, weights.items())
        return functools.partial(self._infer, copied)

    def _optimizer_state(self) -> dict[str, Any] | None:
        return None if self._optimizer is None else state_of(self._optimizer, self._names, self._own_spans)

    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        assert self._optimizer is not None
        load_state(self._optimizer, self._names, self._own_spans, state)


def _compiled_blocks(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """Return, by block, the compiled call that `nn.Module.compile` would install."""
    return {unit: torch.compile(unit._call_impl) for unit in units(model) if unit is not model}
