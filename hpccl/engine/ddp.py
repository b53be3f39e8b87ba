"""Data parallelism: every rank holds the whole model, gradients are averaged. One process skips the averaging."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpccl.config.engine import DdpEngine as DdpConfig
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Span
from hpccl.engine.base import BaseEngine
from hpccl.engine.moments import load_state, state_of
from hpccl.engine.optim import build_optimizer
from hpccl.engine.protocols import trainable
from hpccl.optim.noise import Run

__all__ = ["DdpEngine"]


@final
class DdpEngine(BaseEngine):
    """The Engine protocol on replicated weights."""

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        super().__init__(model, config, comm)
        assert isinstance(config.engine, DdpConfig)
        self._model = model.to(device=comm.device).to(memory_format=self._format)  # type: ignore[call-overload]  # not in torch's stubs
        comm.broadcast_(list(self._model.state_dict().values()))
        self._parameters = dict(self._model.named_parameters())
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        self._keep_initial()
        compiled = torch.compile(self._model) if config.engine.compile else self._model
        self._wrapped = self._wrap(compiled)  # type: ignore[arg-type]  # compile of a module is typed as a function
        for name, parameter in trainable(self._model).items():
            parameter.register_hook(self._relay(name))
        self._warm = False

    def _wrap(self, model: nn.Module) -> nn.Module | DistributedDataParallel:
        if self._comm.size == 1:
            return model
        devices = [self._comm.device] if self._comm.device.type == "cuda" else None
        parallel: DistributedDataParallel = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True
        )
        return parallel

    @property
    def _spans(self) -> Mapping[str, Span]:
        return {}

    def _locals(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._parameters.items()}

    @property
    def like(self) -> dict[str, Tensor]:
        """See BaseEngine."""
        return {name: value.detach() for name, value in self._parameters.items() if value.requires_grad}

    def _whole_now(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def _restart(self) -> None:
        self._optimizer = build_optimizer(self._optim, self._model)

    def _run(self, pixels: Tensor) -> Tensor:
        if isinstance(self._wrapped, DistributedDataParallel) and not self._warm:
            self._warm_up(pixels)
        with self._averaging():
            logits: Tensor = self._wrapped(pixels)
        return logits

    def _warm_up(self, pixels: Tensor) -> None:
        """Run a pass and discard its gradients, once per process.

        DDP rebuilds its gradient buckets after the first backward pass, and the order of summation over three or more
        ranks depends on the buckets: without this, a resumed run would sum in another order than an uninterrupted one.
        """
        last, self._warm, self._last = self._last, True, False  # no gradient hooks
        buffers = {name: value.detach().clone() for name, value in self._model.named_buffers()}
        devices = [self._comm.device] if self._comm.device.type == "cuda" else []
        # Random numbers that dropout draws here must not change those of the step.
        with torch.random.fork_rng(devices):
            logits: Tensor = self._wrapped(pixels)
            (logits.float().sum() * 0).backward()
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.no_grad():
            for name, value in self._model.named_buffers():
                value.copy_(buffers[name])
        self._squares.clear()
        self._last = last

    def _averaging(self) -> contextlib.AbstractContextManager[None]:
        """Switch averaging off except on the last micro-batch; DDP reads this in the forward pass."""
        if self._last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        unreduced: contextlib.AbstractContextManager[None] = self._wrapped.no_sync()
        return unreduced

    def _update(self, rate: float) -> Tensor:
        assert self._optimizer is not None, "start() comes first"
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        known = norm.cpu()  # the step's only synchronisation: before the optimiser runs, so that nothing waits for it
        if bool(torch.isfinite(known)):
            if self._train.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._train.clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            self._optimizer.step()
        self._clear_gradients()
        return known

    def _runs(self) -> dict[Tensor, list[Run]]:
        return {value: [Run(name, 0, value.numel())] for name, value in trainable(self._model).items()}

    def _show_gradients(self) -> None:
        """Do nothing: they are there."""

    def _clear_gradients(self) -> None:
        assert self._optimizer is not None, "start() comes first"
        # DDP's gradients are views of its buckets and must stay. Without DDP they are freed, which saves writing zeros.
        self._optimizer.zero_grad(set_to_none=self._comm.size == 1)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def _optimizer_state(self) -> dict[str, Any] | None:
        return None if self._optimizer is None else state_of(self._optimizer, self._names, {})

    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        assert self._optimizer is not None
        load_state(self._optimizer, self._names, {}, state)
