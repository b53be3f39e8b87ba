"""What the trainer asks of an engine: where the weights live and how they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpccl.dist.spread import Leaves, Slab, Stored

__all__ = ["Engine", "GradientHook", "Weights", "trainable"]

Weights = Mapping[str, Tensor]  # full (unsharded) tensors by parameter name


@dataclass(frozen=True)
class GradientHook:
    """What happens to one parameter's gradient before ranks are averaged.

    needs: names of the parameters whose weights it reads, whole and in fp32: of one layer
    call: (gradient, weights by name) -> gradient, as a new tensor
    """

    needs: tuple[str, ...]
    call: Callable[[Tensor, Weights], Tensor]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are learned, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


class Engine(Protocol):
    """A model, its optimiser, and the ranks that share them."""

    @property
    def device(self) -> torch.device:
        """Where images and targets must be."""

    @property
    def module(self) -> nn.Module:
        """The network for passes outside training, at the present weights.

        Where weights are spread, each of its passes is collective: see `hpccl.engine.sharded.is_spread`.
        """

    @property
    def training_module(self) -> nn.Module:
        """The network that passes of training go through: for hooks on its layers, not for passes of one's own."""

    @property
    def like(self) -> dict[str, Tensor]:
        """Trainable parameters as a gradient hook meets them: shape, dtype, memory layout; perhaps without numbers."""

    def start(self, *, num_steps: int, task: int, num_train: int = 1) -> None:
        """A new optimiser for a task of `num_steps` steps, whose loss is a mean over `num_train` examples."""

    def reset(self) -> None:
        """Back to the initial weights."""

    def forward(self, pixels: Tensor, noise: Tensor, *, last: bool = True, training: bool = True) -> Tensor:
        """[n, c, h, w], [n] int64 -> logits [n, C] in fp32 with a gradient.

        last: micro-batch of a step or not; training: in training mode, or in evaluation mode.
        """

    def forward_features(
        self, pixels: Tensor, noise: Tensor, layer: str, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and what entered a layer in it [n, d], fp32, with gradients; `layer` is a module's name."""

    @property
    def passes(self) -> int:
        """How often a step goes through its micro-batches: once, but for optimisers that need several gradients."""

    def perturbed(self, number: int, *, num_rows: int) -> AbstractContextManager[None]:
        """Where pass `number` of a step computes: at the optimiser's trial weights, and back at the weights afterwards.

        Every step has all of its passes, in order, and `step` after them. num_rows: of the step over all ranks.
        """

    def weigh(self, counts: Tensor) -> None:
        """Weights [n] in the loss of the images of the next forward and backward pass, which VOGN's squares need."""

    @property
    def image_weights(self) -> Tensor | None:
        """[n] as `weigh` told them; None: 1 each."""

    def add_squares(self, squares: Weights) -> None:
        """Sums over this rank's examples of squared gradients of a layer's parameters, of the present pass, for VOGN.

        Of gradients as `backward` makes them, which calls this: collective where weights are spread, as it is.
        """

    def moments(self, names: Mapping[str, str]) -> dict[str, Leaves]:
        """State of the optimiser, by its name there and by parameter, as `gather` has weights; collective.

        names: of the state to those in the answer
        """

    def predict(self, pixels: Tensor) -> Tensor:
        """[n, c, h, w] -> logits [n, C] in fp32, evaluation mode, no gradient. Collective where weights are spread."""

    def whole_module(self) -> nn.Module:
        """The network with whole weights on every rank; collective, and for small networks only."""

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """A frozen copy of the network with other weights: pixels [n, c, h, w] -> logits [n, C], evaluation mode."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; after the last one it is averaged over ranks."""

    def on_gradient(self, hooks: Sequence[tuple[str, GradientHook]]) -> Callable[[], None]:
        """Call each hook once a step on a parameter's gradient, before ranks average it. Returns what removes them."""

    def hold(self, held: Mapping[str, Tensor], norms: frozenset[str]) -> None:
        """Keep some weights as they are now, in every step until it is called again.

        They get no gradient, no weight decay and no part in the gradient's norm, and end bit for bit as they were.

        held: by parameter, a mask (bool, broadcast against the whole parameter) of what is held
        norms: modules whose running statistics are used, not changed
        """

    def follow(self, pull: Callable[[str, Tensor], Tensor]) -> Callable[[], None]:
        """Say what the prior adds to the gradient, so that a path leaves it out (curvature.kind=si).

        pull: (name, this rank's elements of the parameter) -> what `on_gradient` added to their gradient, in the end

        Returns what ends it.
        """

    def path(self) -> tuple[Leaves, Leaves]:
        """Of the newest task: what each weight did for the loss (omega), and the weights it began with. Collective.

        Of trainable parameters, divided over ranks as the weights are; kept with curvature.kind=si only.
        """

    def step(self) -> Tensor:
        """Clip, update, clear. Returns the gradient's norm before clipping (scalar on the CPU, equal on all ranks)."""

    @property
    def lr(self) -> float:
        """The coming step's learning rate."""

    @property
    def steps_taken(self) -> int:
        """By this optimiser, since `start`."""

    @property
    def num_train(self) -> int:
        """The training examples, memory's included, that the task's loss is a mean over."""

    def finish(self) -> None:
        """End a task: averaged weights (if asked for) become the weights; buffers agree on all ranks."""

    def gather(self) -> Leaves:
        """A copy of all parameters and buffers by name; of those that are spread, this rank's part. Not collective."""

    def place(self, values: Mapping[str, Tensor | Slab | Stored]) -> Leaves:
        """Weights by name as `gather` has them, from tensors that are whole or in files."""

    def put(self, weights: Mapping[str, Tensor | Slab | Stored]) -> None:
        """Replace parameters and buffers."""

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, averages: a nest of dicts and lists, tensors and JSON values as leaves. Collective."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse, of any engine's on any number of ranks."""
