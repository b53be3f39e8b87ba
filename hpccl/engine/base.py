"""What all engines share: the schedule, autocast, averaged weights, gradient hooks, and state by parameter name.

An engine defines where its tensors are (`_locals`, `_spans`); everything that reads or writes weights and optimiser
state is here, so that it is the same for all engines.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpccl.config.base import per_task
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, Leaves, Slab, Span, Stored, elements, streamed, whole
from hpccl.engine.held import Held
from hpccl.engine.hooks import Hooks
from hpccl.engine.modes import recomputing, refuse_recompute, without_statistics
from hpccl.engine.moments import local
from hpccl.engine.optim import averaging, learning_rate, tell_peak
from hpccl.engine.path_integral import PathIntegral
from hpccl.engine.protocols import GradientHook, Weights
from hpccl.engine.squares import Squares
from hpccl.engine.trial import drawing, held_within
from hpccl.errors import ConfigError
from hpccl.models.dropout import set_noise
from hpccl.optim.noise import Run
from hpccl.optim.perturbing import Perturbing
from hpccl.optim.vogn import Vogn

__all__ = ["BaseEngine", "Moments"]

# Optimiser state by parameter and key: this rank's elements with their span, or numbers such as a step count.
Moments = Mapping[str, Mapping[str, Any]]


class BaseEngine(ABC):
    """The Engine protocol, except for where the weights live."""

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        self._comm, self._model = comm, model
        self._config, self._train, self._optim = config.engine, config.train, config.optim
        self._seed, self._num_train = config.seed, 1
        self._squares = Squares(comm)
        self._image_weights: Callable[[], Tensor] | None = None
        self._format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        self._hooks = Hooks()
        self._average: dict[str, Tensor] | None = None
        self._path = PathIntegral(self._graded) if config.records_path else None
        self._task = self._step = self._num_steps = 0
        self._last = False
        self._held = Held()
        self._optimizer: torch.optim.Optimizer | None = None  # before any task
        refuse_recompute(model, config)

    # ---------------------------------------------------------------- where things are

    @abstractmethod
    def _locals(self) -> dict[str, Tensor]:
        """This rank's elements of every parameter, sharing memory: in its shape if whole, [n] if spread."""

    @property
    @abstractmethod
    def _spans(self) -> Mapping[str, Span]:
        """The spans of the parameters that are spread over ranks, by name."""

    @property
    @abstractmethod
    def like(self) -> dict[str, Tensor]:
        """See the protocol."""

    @property
    def device(self) -> torch.device:
        """See the protocol."""
        return self._comm.device

    @property
    def module(self) -> nn.Module:
        """See the protocol."""
        return self._model

    @property
    def training_module(self) -> nn.Module:
        """See the protocol."""
        return self._model

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that are saved (persistent ones)."""
        kept = self._model.state_dict().keys()
        return {name: value for name, value in self._model.named_buffers() if name in kept}

    # ---------------------------------------------------------------- training

    @abstractmethod
    def _restart(self) -> None:
        """Start with a new optimiser state."""

    @abstractmethod
    def _run(self, pixels: Tensor) -> Tensor:
        """Return the logits of a training pass, as the engine makes it."""

    @abstractmethod
    def _update(self, rate: float) -> Tensor:
        """Clip, update, clear gradients; return the norm before clipping, on the CPU. No update if it is not finite."""

    def start(self, *, num_steps: int, task: int, num_train: int = 1) -> None:
        """See the protocol."""
        self._restart()
        assert self._optimizer is not None
        tell_peak(self._optimizer, per_task(self._optim.lr, task))
        self._task, self._step, self._num_steps, self._num_train = task, 0, num_steps, num_train
        if (perturbing := self._perturbing) is not None:
            perturbing.begin(num_train=num_train, task=task)
        self._average = None
        if self._train.ema is not None:
            self._average = {name: value.detach().clone() for name, value in self._locals().items()}
        if self._path is not None:
            self._path.begin(self._learned())

    def reset(self) -> None:
        """See the protocol."""
        self.put(self._initial)

    def _keep_initial(self) -> None:
        """Keep a copy of the current weights if `reset` will be called (train.restart)."""
        self._initial = self.gather() if self._train.restart else {}

    def forward(self, pixels: Tensor, noise: Tensor, *, last: bool = True, training: bool = True) -> Tensor:
        """See the protocol; autocast ends here, before any loss or prior."""
        self._model.train(training)
        if not training:
            self._share_statistics()
        self._held.still()
        set_noise(self._model, noise)
        self._last = last
        with recomputing(self._model, self._config.recompute), self._autocast():
            logits = self._run(pixels.to(memory_format=self._format))
        return logits.float()

    def _share_statistics(self) -> None:
        """Broadcast rank 0's BatchNorm statistics: within a task, each rank's come from its own images."""
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        found = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        if found:
            self._comm.broadcast_(found)

    def forward_features(
        self, pixels: Tensor, noise: Tensor, layer: str, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """See the protocol."""
        caught: list[Tensor] = []
        handle = self._model.get_submodule(layer).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        try:
            logits = self.forward(pixels, noise, last=last)
        finally:
            handle.remove()
        return logits, caught[-1].float()

    def backward(self, loss: Tensor) -> None:
        """Accumulate a micro-batch's gradient.

        Engines average over ranks, but the caller's loss is this rank's share of a sum: multiply by the world size.
        """
        # Recomputed activations pass BatchNorm a second time, which must not update its statistics again. Switching
        # tracking off would change which tensors the second pass saves, which checkpointing refuses; hence this.
        with without_statistics(self._model, self._config.recompute):
            self._pull_back(loss * self._comm.size)
        self._image_weights = None

    def _pull_back(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        """See the protocol."""
        self._refuse_silent_hooks()
        norm = self._moved() if self._path is None else self._followed(self._path)
        if (perturbing := self._perturbing) is not None:
            perturbing.forget()
        if self._average is not None and self._train.ema is not None and bool(torch.isfinite(norm)):
            with torch.no_grad():
                kept = averaging(self._train.ema, self._step)
                torch._foreach_lerp_(list(self._average.values()), list(self._locals().values()), 1 - kept)
        self._step += 1
        return norm

    def _moved(self) -> Tensor:
        """Update the weights that are not held; return the gradient's norm before clipping."""
        norm = self._update(self.lr)
        if self._held.masks:
            # Optimisers also move weights whose gradient is zero, by weight decay for example.
            self._put_locals(self._held.restored(self._locals()))
        return norm

    @property
    def lr(self) -> float:
        """See the protocol."""
        return learning_rate(self._optim, task=self._task, step=self._step, num_steps=self._num_steps)

    @property
    def steps_taken(self) -> int:
        """See the protocol."""
        return self._step

    @property
    def num_train(self) -> int:
        """See the protocol."""
        return self._num_train

    def finish(self) -> None:
        """See the protocol; buffers (BatchNorm statistics) become rank 0's."""
        if self._average is not None:
            self._put_locals(self._average)
            self._average = None
        self._comm.broadcast_([buffer for _, buffer in self._model.named_buffers()])

    # ---------------------------------------------------------------- frozen weights

    def hold(self, held: Mapping[str, Tensor], norms: frozenset[str]) -> None:
        """See the protocol."""
        self._held.take(held, self._locals(), self._spans, self.device)
        self._held.take_norms(self._model, norms)

    # ---------------------------------------------------------------- the path integral (SI)

    @torch.no_grad()
    def _followed(self, path: PathIntegral) -> Tensor:
        """Update, and add the step to the path integral. Held weights do not move and get no credit."""
        before = self._learned()
        gradients = {name: gradient.clone() for name, gradient in self._gradients().items()}
        norm = self._moved()
        if bool(torch.isfinite(norm)):
            path.add(before, gradients, self._locals())
        return norm

    def _graded(self, name: str, value: Tensor) -> Tensor:
        """A view of those of this rank's elements of a parameter whose gradient `_gradients` returns here."""
        return value

    def _credited(self) -> dict[str, Tensor]:
        """Return a copy of this rank's path integral; collective where gradients are sharded but weights are not."""
        return {} if self._path is None else {name: value.clone() for name, value in self._path.credit.items()}

    def _learned(self) -> dict[str, Tensor]:
        """Return a copy of this rank's elements of the trainable parameters."""
        learned = self.like.keys()
        return {name: value.detach().clone() for name, value in self._locals().items() if name in learned}

    def _gradients(self) -> dict[str, Tensor]:
        """Return this rank's part of the step's averaged gradient: see `_graded`."""
        named = self._model.named_parameters()
        return {name: local(value.grad) for name, value in named if value.grad is not None}

    def follow(self, pull: Callable[[str, Tensor], Tensor]) -> Callable[[], None]:
        """See the protocol."""
        path = self._recorded
        path.pull = pull

        def end() -> None:
            path.pull = None

        return end

    def path(self) -> tuple[Leaves, Leaves]:
        """See the protocol."""
        begun = {name: value.clone() for name, value in self._recorded.begun.items()}
        return self._leaves(self._credited()), self._leaves(begun)

    @property
    def _recorded(self) -> PathIntegral:
        assert self._path is not None, "no path was asked for"
        return self._path

    # ---------------------------------------------------------------- trial weights

    @abstractmethod
    def _runs(self) -> dict[Tensor, list[Run]]:
        """The tensors that the optimiser updates, each with the parameters' elements that it holds."""

    @abstractmethod
    def _show_gradients(self) -> None:
        """Put the averaged gradients into `.grad` of the optimiser's tensors."""

    def _take_gradients(self) -> None:
        """Put them back where `_update` reads them: the optimiser may have replaced the last by a mean over passes."""
        return  # they are the same tensors on most engines

    @abstractmethod
    def _clear_gradients(self) -> None:
        """Clear the gradients before another pass."""

    @abstractmethod
    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient; these are this rank's parts. Collective where weights are spread."""

    def _norm_of_parts(self, gradients: Sequence[Tensor], *, count: bool = True) -> Tensor:
        """Return the norm of the whole gradient from ranks' parts; count False: another rank counts the same parts."""
        squares = torch.zeros(1, dtype=torch.float64, device=self.device)
        norms = torch._foreach_norm(list(gradients)) if gradients and count else ()
        for norm in norms:
            squares += norm.double().square().to(self.device)
        self._comm.sum_([squares])
        return squares[0].sqrt().float()

    @property
    def _perturbing(self) -> Perturbing | None:
        return self._optimizer if isinstance(self._optimizer, Perturbing) else None

    @property
    def passes(self) -> int:
        """See the protocol."""
        return 1 if self._perturbing is None else self._perturbing.passes

    @contextlib.contextmanager
    def perturbed(self, number: int, *, num_rows: int) -> Iterator[None]:
        """See the protocol. Only the first pass updates BatchNorm's statistics: a batch counts once.

        Held weights are neither sampled nor perturbed.
        """
        optimiser = self._perturbing
        if optimiser is None:
            yield
            return
        runs = self._runs()
        tensors = list(runs)
        trial = optimiser.trial(number, tensors, drawing(runs, (self._seed, self._task, self._step)))
        if trial is not None and self._held.masks:
            shapes = {name: value.shape for name, value in self.like.items()}
            held = [held_within(tensor, runs[tensor], self._held.masks, shapes) for tensor in tensors]
            trial = [own.where(mask, values) for own, mask, values in zip(tensors, held, trial, strict=True)]
        with without_statistics(self._model, number > 0), self._shown(tensors, trial):
            yield
        if isinstance(optimiser, Vogn):
            self._squares.give(optimiser, runs, self._spans, num_rows=num_rows)
        self._show_gradients()
        optimiser.note(number, tensors, self._total_norm)
        self._take_gradients()
        if number < optimiser.passes - 1:
            self._clear_gradients()

    @contextlib.contextmanager
    def _shown(self, tensors: list[Tensor], trial: list[Tensor] | None) -> Iterator[None]:
        """Put `trial` where passes compute; restore the weights bit for bit afterwards."""
        if trial is None:
            yield
            return
        held = [tensor.detach().clone() for tensor in tensors]
        self._write(tensors, trial)
        trial.clear()
        try:
            yield
        finally:
            self._write(tensors, held)

    @torch.no_grad()
    def _write(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        """Write into the optimiser's tensors, which passes compute with."""
        if tensors:
            torch._foreach_copy_(tensors, values)

    def weigh(self, weights: Callable[[], Tensor]) -> None:
        """See the protocol."""
        self._image_weights = weights  # computed only if asked for, in every layer of VOGN

    @property
    def image_weights(self) -> Tensor | None:
        """See the protocol."""
        return None if self._image_weights is None else self._image_weights()

    def add_squares(self, squares: Mapping[str, Tensor]) -> None:
        """See the protocol; of spread parameters, only this rank's elements are kept."""
        self._squares.add(squares, self._spans)

    def moments(self, names: Mapping[str, str]) -> dict[str, Leaves]:
        """See the protocol."""
        state = self._optimizer_state()
        assert state is not None, "start() comes first"
        return {answer: self._moment(state["moments"], key) for key, answer in names.items()}

    def _moment(self, moments: Moments, key: str) -> Leaves:
        held: dict[str, Leaf] = {}
        for name, like in self.like.items():
            found = moments.get(name, {}).get(key)
            if found is None:  # this rank has none of its elements, or they never had a gradient
                span = self._spans.get(name, Span(tuple(like.shape), 0, 0))
                found = Slab(torch.zeros(span.numel, device=self.device), span)
            held[name] = found
        return self.place({name: value.clone() for name, value in streamed(held, self._comm)})

    # ---------------------------------------------------------------- gradient hooks

    def on_gradient(self, hooks: Sequence[tuple[str, GradientHook]]) -> Callable[[], None]:
        """See the protocol."""
        return self._hooks.add(hooks, self._comm, spread=bool(self._spans))

    def _fetch_far(self) -> None:
        """Fetch other layers' weights for the hooks; on the last micro-batch, whose gradients are hooked."""
        if self._last:
            self._hooks.fetch(self.gather, self._comm)

    def _relay(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return a permanent tensor hook for one parameter: it calls the `on_gradient` hooks on the last micro-batch.

        Held elements get no gradient, from neither loss nor prior.
        """

        def call(gradient: Tensor) -> Tensor:
            if self._last:
                # A pull costs products with the layer's curvature, which would be cleared at once.
                gradient = self._hooks.call(name, gradient, self._whole_now, idle=name in self._held.whole)
            return self._held.clear(name, gradient)

        return call

    @abstractmethod
    def _whole_now(self, name: str) -> Tensor:
        """A parameter's whole weights while its layer's gradient is computed."""

    def _refuse_silent_hooks(self) -> None:
        """Raise ConfigError if a hook was not called in this step: a prior must not be left out unnoticed."""
        silent = self._hooks.silent()
        self._last = False
        if silent:
            raise ConfigError(
                f"the prior did not reach the gradient of '{min(silent)}' ({len(silent)} parameters in all): the layer "
                f"was not called as a module under engine.kind={self._config.kind}; use engine.kind=ddp, or exclude "
                "the layer from the prior"
            )

    # ---------------------------------------------------------------- passes outside training

    def predict(self, pixels: Tensor) -> Tensor:
        """See the protocol."""
        return self._infer(self.module, pixels)

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """See the protocol; evaluation mode, since a teacher's logits would be noisy in training mode."""
        copied = copy.deepcopy(self._model).requires_grad_(False)
        copied.load_state_dict({name: whole(_as_whole(value)) for name, value in weights.items()})
        return functools.partial(self._infer, copied)

    @torch.no_grad()
    def _infer(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return logits in evaluation mode, fp32. An empty batch runs a pass too, since it may be collective."""
        model.eval()
        some = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
        with self._autocast():
            logits: Tensor = model(some.to(memory_format=self._format))
        return logits[: len(pixels)].float()

    def whole_module(self) -> nn.Module:
        """See the protocol."""
        return self._model

    # ---------------------------------------------------------------- state

    def gather(self) -> Leaves:
        """See the protocol."""
        return self._leaves({name: value.detach().clone() for name, value in self._tensors().items()})

    def place(self, values: Mapping[str, Tensor | Slab | Stored]) -> Leaves:
        """See the protocol."""
        found: dict[str, Leaf] = {}
        for name, value in values.items():
            span = self._spans.get(name)
            if span is None:
                found[name] = whole(_as_whole(value)).to(self.device)
            else:
                local = elements(value, span.start, span.stop)
                found[name] = Slab(local.to(self.device, copy=isinstance(value, Tensor)), span)
        return found

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor | Slab | Stored]) -> None:
        """See the protocol."""
        buffers = self._buffers()
        for name, value in weights.items():
            if name in buffers:
                buffers[name].copy_(whole(_as_whole(value)))
        own = self._locals()
        self._put_locals({name: self._part(name, value, own[name]) for name, value in weights.items() if name in own})

    @torch.no_grad()
    def _put_locals(self, values: Weights) -> None:
        own = self._locals()
        for name, value in values.items():
            own[name].copy_(value)

    def state_dict(self, *, ended: bool = False) -> dict[str, Any]:
        """See the protocol; also the path integral and the position in the schedule."""
        average, path = self._average, None if ended else self._path
        return {
            "weights": self.gather(),
            "optimizer": None if ended else self._optimizer_state(),
            "average": None if average is None else self._leaves(average),
            "credit": {} if path is None else self._leaves(self._credited()),
            "begun": {} if path is None else self._leaves(path.begun),
            "position": {
                "task": self._task,
                "step": self._step,
                "num_steps": self._num_steps,
                "num_train": self._num_train,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state_dict of any engine."""
        position, average = state["position"], state["average"]
        self.put(state["weights"])
        if state["optimizer"] is not None:
            num_train = position.get("num_train", 1)  # absent in old checkpoints, whose optimisers do not read it
            self.start(num_steps=position["num_steps"], task=position["task"], num_train=num_train)
            self._step = position["step"]
            self._load_optimizer_state(state["optimizer"])
        self._average = None if average is None else self._own_parts(average)
        if self._path is not None:
            self._path.restart(self._own_parts(state.get("credit", {})), self._own_parts(state.get("begun", {})))

    def _own_parts(self, values: Mapping[str, Tensor | Slab | Stored]) -> dict[str, Tensor]:
        """Return this rank's elements of parameter-shaped values, as new tensors."""
        own = self._locals()
        return {
            name: torch.empty_like(own[name]).copy_(self._part(name, value, own[name]))
            for name, value in values.items()
        }

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Any] | None:
        """Return {moments: by parameter and key, groups: numbers of each parameter group}; None before any task."""

    @abstractmethod
    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `_optimizer_state` returned."""

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers, in the model's order."""
        found = {**self._locals(), **self._buffers()}
        return {name: found[name] for name in self._model.state_dict() if name in found}

    def _leaf(self, name: str, value: Tensor) -> Leaf:
        span = self._spans.get(name)
        return value if span is None else Slab(value, span)

    def _leaves(self, values: Weights) -> Leaves:
        return {name: self._leaf(name, value) for name, value in values.items()}

    def _part(self, name: str, value: Tensor | Slab | Stored, like: Tensor) -> Tensor:
        """Return this rank's elements of a parameter-shaped value, in the shape of `like`."""
        span = self._spans.get(name)
        if span is None:
            return whole(_as_whole(value))
        return elements(value, span.start, span.stop).view_as(like)

    # ---------------------------------------------------------------- contexts

    def _autocast(self) -> torch.autocast:
        """Autocast; its cache is off where weights are spread, as it would hold a bf16 copy of the whole network."""
        lower = self._config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower, cache_enabled=not self._spans)


def _as_whole(value: Tensor | Slab | Stored) -> Tensor | Stored:
    assert not isinstance(value, Slab), "a part is not the whole"
    return value
