"""Every rank holds the whole model and gradients are averaged; one process is the same code without the averaging."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpccl.config.run import RunConfig
from hpccl.config.sections import DdpEngine as DdpConfig
from hpccl.config.sections import OptimConfig, TrainConfig
from hpccl.dist.comm import Comm
from hpccl.engine.optim import build_optimizer, learning_rate
from hpccl.engine.protocols import GradientHook, Weights
from hpccl.models.dropout import set_noise

__all__ = ["DdpEngine"]


class DdpEngine:
    """The Engine protocol on replicated weights."""

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        self._comm = comm
        self._config: DdpConfig = config.engine
        self._train: TrainConfig = config.train
        self._optim: OptimConfig = config.optim
        self._format = torch.channels_last if self._config.channels_last else torch.contiguous_format
        self._model: nn.Module = model.to(device=comm.device).to(memory_format=self._format)  # type: ignore[call-overload]
        comm.broadcast_(list(self._model.state_dict().values()))
        self._initial = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        self._forward: nn.Module = torch.compile(self._model) if self._config.compile else self._model  # type: ignore[assignment]
        self._wrapped = self._wrap(self._forward)
        self._optimizer: torch.optim.Optimizer | None = None
        self._average: dict[str, Tensor] | None = None
        self._task = self._step = self._num_steps = 0
        self._last = True
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
    def device(self) -> torch.device:
        """Where images and targets must be."""
        return self._comm.device

    @property
    def module(self) -> nn.Module:
        """The network, unwrapped."""
        return self._model

    def start(self, *, num_steps: int, task: int) -> None:
        """A new optimiser for a task of `num_steps` steps."""
        self._optimizer = build_optimizer(self._optim, self._model)
        self._task, self._step, self._num_steps = task, 0, num_steps
        self._average = None
        if self._train.ema is not None:
            self._average = {name: value.detach().clone() for name, value in self._model.named_parameters()}

    def reset(self) -> None:
        """Back to the initial weights."""
        self.put(self._initial)

    def forward(self, pixels: Tensor, noise: Tensor, *, last: bool = True) -> Tensor:
        """Logits in training mode, fp32; autocast ends here, before any loss or prior."""
        self._wrapped.train()
        set_noise(self._model, noise)
        if isinstance(self._wrapped, DistributedDataParallel) and not self._warm:
            self._warm_up(pixels)
        self._last = last
        with self._autocast(), self._averaging(last):
            logits: Tensor = self._wrapped(pixels.to(memory_format=self._format))
        return logits.float()

    def _warm_up(self, pixels: Tensor) -> None:
        """Take a step for nothing, once a process.

        DDP groups gradients anew after its first backward pass, and the order of summation over three or more ranks
        depends on the groups: without this, a resumed run would add in another order than an undisturbed one.
        """
        self._warm, self._last = True, False  # the gradient hooks stay silent
        buffers = {name: value.detach().clone() for name, value in self._model.named_buffers()}
        with self._autocast():
            logits: Tensor = self._wrapped(pixels.to(memory_format=self._format))
        (logits.float().sum() * 0).backward()
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        self.put(buffers)

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP decides in the forward pass whether the backward pass will average over ranks."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        unreduced: contextlib.AbstractContextManager[None] = self._wrapped.no_sync()
        return unreduced

    def predict(self, pixels: Tensor) -> Tensor:
        """Logits in evaluation mode, fp32."""
        self._model.eval()
        return self._infer(self._forward, pixels)

    def frozen(self, weights: Weights) -> Callable[[Tensor], Tensor]:
        """A copy of the network that no training touches: a teacher in training mode would answer with noise."""
        copied = copy.deepcopy(self._model).eval().requires_grad_(False)
        copied.load_state_dict(dict(weights))
        return functools.partial(self._infer, copied)

    @torch.no_grad()
    def _infer(self, model: nn.Module, pixels: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = model(pixels.to(memory_format=self._format))
        return logits.float()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient.

        DDP averages over ranks; the caller's losses are this rank's share of a sum, so the world size is put back.
        """
        loss = loss * self._comm.size
        loss.backward()

    def on_gradient(self, hooks: Sequence[tuple[str, GradientHook]]) -> Callable[[], None]:
        """Tensor hooks: they see the gradient as autograd made it, before DDP reduces it, on the last micro-batch."""
        parameters = dict(self._model.named_parameters())

        def register(name: str, hook: GradientHook) -> Any:
            weights = {needed: parameters[needed].detach() for needed in hook.needs}

            def call(gradient: Tensor) -> Tensor:
                return hook.call(gradient, weights) if self._last else gradient

            return parameters[name].register_hook(call)

        handles = [register(name, hook) for name, hook in hooks]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def step(self) -> Tensor:
        """Clip, update, clear."""
        assert self._optimizer is not None, "start() comes first"
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        limit = self._train.clip_norm if self._train.clip_norm is not None else float("inf")
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(norm)):
            if limit < float("inf"):
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            rate = learning_rate(self._optim, task=self._task, step=self._step, num_steps=self._num_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            self._optimizer.step()
            self._update_average()
        self._optimizer.zero_grad(set_to_none=False)
        self._step += 1
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None or self._train.ema is None:
            return
        current = [value.detach() for value in self._model.parameters()]
        torch._foreach_lerp_(list(self._average.values()), current, 1 - self._train.ema)

    @property
    def lr(self) -> float:
        """The coming step's learning rate."""
        return learning_rate(self._optim, task=self._task, step=self._step, num_steps=self._num_steps)

    def finish(self) -> None:
        """Averaged weights become the weights; buffers (BatchNorm statistics) are rank 0's everywhere."""
        if self._average is not None:
            self.put(self._average)
            self._average = None
        self._comm.broadcast_([buffer for _, buffer in self._model.named_buffers()])

    def gather(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers."""
        return {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def put(self, weights: Weights) -> None:
        """Replace parameters and buffers by name."""
        own = self._model.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser state by parameter name, averages and the position in the schedule."""
        return {
            "weights": self.gather(),
            "optimizer": None if self._optimizer is None else self._optimizer_state(),
            "average": self._average,
            "position": {"task": self._task, "step": self._step, "num_steps": self._num_steps},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict."""
        position = state["position"]
        if state["optimizer"] is not None:
            self.start(num_steps=position["num_steps"], task=position["task"])
            self._step = position["step"]
            self._load_optimizer_state(state["optimizer"])
        self.put(state["weights"])
        average = state["average"]
        self._average = None
        if average is not None:
            own = dict(self._model.named_parameters())
            self._average = {name: torch.empty_like(own[name]).copy_(value) for name, value in average.items()}

    def _named(self) -> list[str]:
        """Parameter names in the optimiser's order."""
        assert self._optimizer is not None
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        return [names[id(parameter)] for group in self._optimizer.param_groups for parameter in group["params"]]

    def _optimizer_state(self) -> dict[str, Any]:
        assert self._optimizer is not None
        saved = self._optimizer.state_dict()
        # Some optimisers count their steps in the group. Lists and tuples there are settings, which come from the run.
        groups = [
            {
                key: value
                for key, value in group.items()
                if value is None or isinstance(value, (bool, int, float, Tensor))
            }
            for group in saved["param_groups"]
        ]
        moments = {name: saved["state"][index] for index, name in enumerate(self._named()) if index in saved["state"]}
        return {"moments": moments, "groups": groups}

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        assert self._optimizer is not None
        moments = state["moments"]
        indexed = {index: moments[name] for index, name in enumerate(self._named()) if name in moments}
        fresh = self._optimizer.state_dict()["param_groups"]
        groups = [{**group, **saved} for group, saved in zip(fresh, state["groups"], strict=True)]
        self._optimizer.load_state_dict({"state": indexed, "param_groups": groups})
        # Files hold contiguous tensors; fused kernels pair a moment with its weight by place in memory, not by index.
        for parameter, kept in self._optimizer.state.items():
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._config.precision == "bf16")
