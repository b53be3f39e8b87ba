"""What all engines share: the schedule, autocast, averaged weights, gradient hooks, and state by name of parameter.

An engine says where its tensors are (`_locals`, `_spans`); everything that reads or writes weights and moments is
here, so that it is the same on all of them.
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

from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, Leaves, Slab, Span, Stored, elements, streamed, whole
from hpccl.engine.held import Held
from hpccl.engine.hooks import Hooks
from hpccl.engine.modes import recomputing, refuse_recompute, without_statistics
from hpccl.engine.moments import local
from hpccl.engine.optim import averaging, learning_rate
from hpccl.engine.protocols import GradientHook, Weights
from hpccl.engine.squares import Squares
from hpccl.engine.trial import drawing, held_within
from hpccl.errors import WorldError
from hpccl.models.dropout import set_noise
from hpccl.optim.noise import Run
from hpccl.optim.perturbing import Perturbing
from hpccl.optim.vogn import Vogn

__all__ = ["BaseEngine", "Moments"]

# By parameter, by key: this rank's elements (or a number that is not a parameter's), and where they belong.
Moments = Mapping[str, Mapping[str, Any]]


class BaseEngine(ABC):
    """The Engine protocol, but for where the weights live."""

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        self._comm, self._model = comm, model
        self._config, self._train, self._optim = config.engine, config.train, config.optim
        self._seed, self._num_train = config.seed, 1
        self._squares = Squares(comm)
        self._image_weights: Tensor | None = None
        self._format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        self._hooks = Hooks()
        self._average: dict[str, Tensor] | None = None
        self._follows = config.follows
        self._credit: dict[str, Tensor] = {}
        self._begun: dict[str, Tensor] = {}
        self._pull: Callable[[str, Tensor], Tensor] | None = None
        self._task = self._step = self._num_steps = 0
        self._last = False
        self._held = Held()
        self._optimizer: torch.optim.Optimizer | None = None  # before any task
        refuse_recompute(model, config)

    # ---------------------------------------------------------------- where things are

    @abstractmethod
    def _locals(self) -> dict[str, Tensor]:
        """This rank's live elements of every parameter, by name: in its shape if it is whole, [n] if it is spread."""

    @property
    @abstractmethod
    def _spans(self) -> Mapping[str, Span]:
        """Of the parameters that are spread."""

    @property
    @abstractmethod
    def like(self) -> dict[str, Tensor]:
        """Trainable parameters as a gradient hook meets them: shape, dtype, memory layout; perhaps without numbers."""

    @property
    def device(self) -> torch.device:
        """Where images and targets must be."""
        return self._comm.device

    @property
    def module(self) -> nn.Module:
        """The network for passes outside training, at the present weights."""
        return self._model

    @property
    def training_module(self) -> nn.Module:
        """See the protocol."""
        return self._model

    def _buffers(self) -> dict[str, Tensor]:
        """Those that are saved."""
        kept = self._model.state_dict().keys()
        return {name: value for name, value in self._model.named_buffers() if name in kept}

    # ---------------------------------------------------------------- training

    @abstractmethod
    def _restart(self) -> None:
        """A new optimiser state."""

    @abstractmethod
    def _run(self, pixels: Tensor) -> Tensor:
        """Logits by the engine's own road, in training mode."""

    @abstractmethod
    def _update(self, rate: float) -> Tensor:
        """Clip, update and clear; returns the norm before, on the CPU. Nothing changes if it is not finite."""

    def start(self, *, num_steps: int, task: int, num_train: int = 1) -> None:
        """See the protocol."""
        self._restart()
        self._task, self._step, self._num_steps, self._num_train = task, 0, num_steps, num_train
        if (perturbing := self._perturbing) is not None:
            perturbing.begin(num_train=num_train, task=task)
        self._average = None
        if self._train.ema is not None:
            self._average = {name: value.detach().clone() for name, value in self._locals().items()}
        if self._follows:
            self._begun = self._learned()
            self._credit = {name: torch.zeros_like(value) for name, value in self._begun.items()}

    def reset(self) -> None:
        """Back to the initial weights."""
        self.put(self._initial)

    def _keep_initial(self) -> None:
        """Remember the weights at this moment, if anything ever goes back to them."""
        self._initial = self.gather() if self._train.restart else {}

    def forward(self, pixels: Tensor, noise: Tensor, *, last: bool = True, training: bool = True) -> Tensor:
        """Logits with a gradient, fp32; autocast ends here, before any loss or prior."""
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
        """BatchNorm's running statistics are rank 0's everywhere; within a task, ranks have seen other images."""
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        found = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        if found:
            self._comm.broadcast_(found)

    def forward_features(
        self, pixels: Tensor, noise: Tensor, layer: str, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits, and what entered a layer of the network on the way, fp32."""
        caught: list[Tensor] = []
        handle = self._model.get_submodule(layer).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        try:
            logits = self.forward(pixels, noise, last=last)
        finally:
            handle.remove()
        return logits, caught[-1].float()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient.

        Engines average over ranks; the caller's losses are this rank's share of a sum, so the world size is put back.
        """
        # Activations that are computed again pass BatchNorm twice; it must count them once. Without its statistics it
        # would save other tensors the second time, which checkpointing refuses; so they are put back.
        with without_statistics(self._model, self._config.recompute):
            self._pull_back(loss * self._comm.size)
        self._image_weights = None

    def _pull_back(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        """Clip, update, clear."""
        self._refuse_silent_hooks()
        norm = self._followed() if self._follows else self._moved()
        if (perturbing := self._perturbing) is not None:
            perturbing.forget()
        if self._average is not None and self._train.ema is not None and bool(torch.isfinite(norm)):
            with torch.no_grad():
                kept = averaging(self._train.ema, self._step)
                torch._foreach_lerp_(list(self._average.values()), list(self._locals().values()), 1 - kept)
        self._step += 1
        return norm

    def _moved(self) -> Tensor:
        """An update of what is not held; returns the gradient's norm before."""
        norm = self._update(self.lr)
        if self._held.masks:
            # An optimiser moves also what has no gradient: by weight decay, or by the sign of nothing.
            self._put_locals(self._held.restored(self._locals()))
        return norm

    @property
    def lr(self) -> float:
        """The coming step's learning rate."""
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
        """Averaged weights become the weights; buffers (BatchNorm statistics) are rank 0's everywhere."""
        if self._average is not None:
            self._put_locals(self._average)
            self._average = None
        self._comm.broadcast_([buffer for _, buffer in self._model.named_buffers()])

    # ---------------------------------------------------------------- what does not learn

    def hold(self, held: Mapping[str, Tensor], norms: frozenset[str]) -> None:
        """See the protocol."""
        self._held.take(held, self._locals(), self._spans, self.device)
        self._held.take_norms(self._model, norms)

    # ---------------------------------------------------------------- the path

    @torch.no_grad()
    def _followed(self) -> Tensor:
        """An update, and what each weight did in it: -g (after - before), g without the prior and before clipping.

        What is held did nothing: it is where it was.
        """
        before = self._learned()
        gradients = {name: gradient.clone() for name, gradient in self._gradients().items()}
        norm = self._moved()
        if bool(torch.isfinite(norm)):
            now = self._locals()
            for name, gradient in gradients.items():
                old = self._graded(name, before[name])
                own = gradient.to(old.device).view_as(old)  # shards of weights may rest in host memory
                if self._pull is not None:
                    own = own - self._graded(name, self._pull(name, before[name]))
                moved = self._graded(name, now[name]) - old
                self._graded(name, self._credit[name]).addcmul_(own, moved, value=-1)
        return norm

    def _graded(self, name: str, value: Tensor) -> Tensor:
        """Of this rank's elements of a parameter, those whose gradient `_gradients` has here; a view."""
        return value

    def _credited(self) -> dict[str, Tensor]:
        """A copy of what each of this rank's weights did; collective where gradients are in smaller parts."""
        return {name: value.clone() for name, value in self._credit.items()}

    def _learned(self) -> dict[str, Tensor]:
        """A copy of this rank's elements of what is learned."""
        learned = self.like.keys()
        return {name: value.detach().clone() for name, value in self._locals().items() if name in learned}

    def _gradients(self) -> dict[str, Tensor]:
        """The step's averaged gradient, as far as it is here: see `_graded`."""
        named = self._model.named_parameters()
        return {name: local(value.grad) for name, value in named if value.grad is not None}

    def follow(self, pull: Callable[[str, Tensor], Tensor]) -> Callable[[], None]:
        """See the protocol."""
        self._pull = pull

        def end() -> None:
            self._pull = None

        return end

    def path(self) -> tuple[Leaves, Leaves]:
        """See the protocol."""
        assert self._follows, "no path was asked for"
        credit = {name: self._leaf(name, value) for name, value in self._credited().items()}
        return credit, {name: self._leaf(name, value.clone()) for name, value in self._begun.items()}

    # ---------------------------------------------------------------- trial weights

    @abstractmethod
    def _runs(self) -> dict[Tensor, list[Run]]:
        """The tensors that the optimiser updates, and which elements are where in them."""

    @abstractmethod
    def _show_gradients(self) -> None:
        """Put averaged gradients where the optimiser looks for them."""

    def _take_gradients(self) -> None:
        """Put them back where `_update` looks: the optimiser may have made the last pass's a mean over passes."""
        return  # they are the same tensors on most engines

    @abstractmethod
    def _clear_gradients(self) -> None:
        """Before another pass."""

    @abstractmethod
    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Of the whole gradient, of which these are this rank's parts; collective where they are parts."""

    def _norm_of_parts(self, gradients: Sequence[Tensor], *, count: bool = True) -> Tensor:
        """Of the whole gradient, of which ranks have parts; count: or else copies of what another rank counts."""
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
        """See the protocol. BatchNorm's statistics are those of the first pass: a batch counts once.

        What is held is neither drawn nor perturbed.
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
        """Passes compute with `trial`; afterwards with the weights as they were, to the last bit."""
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
        """Into the optimiser's tensors, which passes compute with."""
        if tensors:
            torch._foreach_copy_(tensors, values)

    def weigh(self, counts: Tensor) -> None:
        """See the protocol."""
        self._image_weights = counts

    @property
    def image_weights(self) -> Tensor | None:
        """See the protocol."""
        return self._image_weights

    def add_squares(self, squares: Mapping[str, Tensor]) -> None:
        """See the protocol; of what is spread, only this rank's elements are kept."""
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
            if found is None:  # no row of it is here
                empty = Span(tuple(like.shape), 0, 0)
                found = Slab(torch.zeros(0, device=self.device), self._spans.get(name, empty))
            held[name] = found
        return self.place({name: value.clone() for name, value in streamed(held, self._comm)})

    # ---------------------------------------------------------------- gradient hooks

    def on_gradient(self, hooks: Sequence[tuple[str, GradientHook]]) -> Callable[[], None]:
        """See the protocol."""
        return self._hooks.add(hooks, self._comm, spread=bool(self._spans))

    def _fetch_far(self) -> None:
        """Of passes whose gradients are hooked."""
        if self._last:
            self._hooks.fetch(self.gather, self._comm)

    def _relay(self, name: str) -> Callable[[Tensor], Tensor]:
        """A tensor hook for one parameter, for good: calls what `on_gradient` has for it, on the last micro-batch.

        What is held has no gradient, whatever the loss or a prior says.
        """

        def call(gradient: Tensor) -> Tensor:
            if self._last:
                gradient = self._hooks.call(name, gradient, self._whole_now)
            return self._held.clear(name, gradient)

        return call

    @abstractmethod
    def _whole_now(self, name: str) -> Tensor:
        """A parameter's weights while its layer's gradient is made."""

    def _refuse_silent_hooks(self) -> None:
        """A prior that never reaches the gradient must not go unnoticed."""
        silent = self._hooks.silent()
        self._last = False
        if silent:
            raise WorldError(
                f"the prior did not reach the gradient of '{min(silent)}' ({len(silent)} parameters in all): the layer "
                f"was not called as a module under engine.kind={self._config.kind}; use engine.kind=ddp, or give the "
                "layer no part in the prior"
            )

    # ---------------------------------------------------------------- passes outside training

    def predict(self, pixels: Tensor) -> Tensor:
        """Logits in evaluation mode, fp32."""
        return self._infer(self.module, pixels)

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """A copy of the network that no training touches: a teacher in training mode would answer with noise."""
        copied = copy.deepcopy(self._model).requires_grad_(False)
        copied.load_state_dict({name: whole(_as_whole(value)) for name, value in weights.items()})
        return functools.partial(self._infer, copied)

    @torch.no_grad()
    def _infer(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """No image at all is a pass too, as far as other ranks are concerned."""
        model.eval()
        some = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
        with self._autocast():
            logits: Tensor = model(some.to(memory_format=self._format))
        return logits[: len(pixels)].float()

    def whole_module(self) -> nn.Module:
        """The network with whole weights on every rank; collective, and for small networks only."""
        return self._model

    # ---------------------------------------------------------------- state

    def gather(self) -> Leaves:
        """A copy of all parameters and buffers; of spread parameters, this rank's part."""
        return {name: self._leaf(name, value.detach().clone()) for name, value in self._tensors().items()}

    def place(self, values: Mapping[str, Tensor | Slab | Stored]) -> Leaves:
        """Weights by name as `gather` has them, from tensors that are whole or in files."""
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
        """Replace parameters and buffers by name."""
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

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser state by parameter, averages, the path, the position in the schedule; collective."""
        average, credit, begun = self._average, self._credited(), self._begun
        return {
            "weights": self.gather(),
            "optimizer": self._optimizer_state(),
            "average": None if average is None else {name: self._leaf(name, value) for name, value in average.items()},
            "credit": {name: self._leaf(name, value) for name, value in credit.items()},
            "begun": {name: self._leaf(name, value) for name, value in begun.items()},
            "position": {
                "task": self._task,
                "step": self._step,
                "num_steps": self._num_steps,
                "num_train": self._num_train,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict, of any engine's."""
        position, average = state["position"], state["average"]
        self.put(state["weights"])
        if state["optimizer"] is not None:
            num_train = position.get("num_train", 1)  # only optimisers that are younger than this key read it
            self.start(num_steps=position["num_steps"], task=position["task"], num_train=num_train)
            self._step = position["step"]
            self._load_optimizer_state(state["optimizer"])
        self._average = None if average is None else self._own_parts(average)
        self._credit = self._own_parts(state.get("credit", {}))
        self._begun = self._own_parts(state.get("begun", {}))

    def _own_parts(self, values: Mapping[str, Tensor | Slab | Stored]) -> dict[str, Tensor]:
        """This rank's elements of values in the shape of parameters, as new tensors."""
        own = self._locals()
        return {
            name: torch.empty_like(own[name]).copy_(self._part(name, value, own[name]))
            for name, value in values.items()
        }

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Any] | None:
        """{moments: by parameter, by key, groups: numbers of each parameter group}; None before any task."""

    @abstractmethod
    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """The inverse."""

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers in the model's order."""
        found = {**self._locals(), **self._buffers()}
        return {name: found[name] for name in self._model.state_dict() if name in found}

    def _leaf(self, name: str, value: Tensor) -> Leaf:
        span = self._spans.get(name)
        return value if span is None else Slab(value, span)

    def _part(self, name: str, value: Tensor | Slab | Stored, like: Tensor) -> Tensor:
        """This rank's elements of a parameter-shaped value, in the shape of `like`."""
        span = self._spans.get(name)
        if span is None:
            return whole(_as_whole(value))
        return elements(value, span.start, span.stop).view_as(like)

    # ---------------------------------------------------------------- contexts

    def _autocast(self) -> torch.autocast:
        """It would keep a lowered copy of every weight to its end: of weights that are spread, a whole network's."""
        lower = self._config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower, cache_enabled=not self._spans)


def _as_whole(value: Tensor | Slab | Stored) -> Tensor | Stored:
    assert not isinstance(value, Slab), "a part is not the whole"
    return value
