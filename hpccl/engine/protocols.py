"""The interface between trainer and engine: where the weights live and how they are updated."""

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
    """A change to one parameter's gradient before it is averaged over ranks.

    needs: names of the parameters whose weights it reads, whole, in fp32; of other layers only with a dense curvature
    call: (gradient, weights by name) -> gradient, as a new tensor
    """

    needs: tuple[str, ...]
    call: Callable[[Tensor, Weights], Tensor]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


class Engine(Protocol):
    """A model and its optimiser, on all the ranks that share them."""

    @property
    def device(self) -> torch.device:
        """The device that images and targets must be on."""

    @property
    def module(self) -> nn.Module:
        """The network with its current weights, for passes outside training.

        Where weights are spread over ranks, each of its passes is collective: see `hpccl.engine.sharded.is_spread`.
        """

    @property
    def training_module(self) -> nn.Module:
        """The network that training passes go through: for hooks on its layers, not for other passes."""

    @property
    def like(self) -> dict[str, Tensor]:
        """Trainable parameters as gradient hooks see them: shape, dtype, memory layout; possibly on the meta device."""

    def start(self, *, num_steps: int, task: int, num_train: int = 1) -> None:
        """Start a task of `num_steps` steps with a new optimiser; its loss is a mean over `num_train` examples."""

    def reset(self) -> None:
        """Restore the initial weights."""

    def forward(self, pixels: Tensor, noise: Tensor, *, last: bool = True, training: bool = True) -> Tensor:
        """Return the logits [n, C] of pixels [n, c, h, w] in fp32, with a gradient.

        noise: [n] int64, each example's key for dropout
        last: whether this is the last micro-batch of a step
        training: training mode, else evaluation mode
        """

    def forward_features(
        self, pixels: Tensor, noise: Tensor, layer: str, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and return also the input [n, d] of module `layer`; both in fp32 with a gradient."""

    @property
    def passes(self) -> int:
        """Passes of a step over its micro-batches: 1, or more for optimisers that need several gradients."""

    def perturbed(self, number: int, *, num_rows: int) -> AbstractContextManager[None]:
        """Compute pass `number` of a step at the optimiser's trial weights; the weights are restored afterwards.

        Every step makes all of its passes, in order, and then calls `step`.

        num_rows: examples of the step over all ranks
        """

    def weigh(self, weights: Callable[[], Tensor]) -> None:
        """Set the weights [n] in the loss of the images of the next forward and backward pass, for VOGN's squares.

        weights: called only where squares are wanted
        """

    @property
    def image_weights(self) -> Tensor | None:
        """The weights [n] that `weigh` set; None: 1 each."""

    def add_squares(self, squares: Weights) -> None:
        """Add the sums, over this rank's examples, of squared gradients of a layer's parameters, for VOGN.

        Called by hooks during `backward`, on gradients scaled as there; collective where weights are spread.
        """

    def moments(self, names: Mapping[str, str]) -> dict[str, Leaves]:
        """Return entries of the optimiser's state, by parameter, divided over ranks as in `gather`; collective.

        names: from keys of the optimiser's state to keys of the result
        """

    def predict(self, pixels: Tensor) -> Tensor:
        """[n, c, h, w] -> logits [n, C] in fp32, evaluation mode, no gradient. Collective where weights are spread."""

    def whole_module(self) -> nn.Module:
        """Return the network with all its weights on every rank; collective, and for small networks only."""

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """Return a frozen copy of the network with `weights`: pixels [n, c, h, w] -> logits [n, C], evaluation mode."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate a micro-batch's gradient; after the last one the gradient is averaged over ranks."""

    def on_gradient(self, hooks: Sequence[tuple[str, GradientHook]]) -> Callable[[], None]:
        """Call each hook once a step on its parameter's gradient, before averaging; return what removes them."""

    def hold(self, held: Mapping[str, Tensor], norms: frozenset[str]) -> None:
        """Freeze some weights at their current values, until the next call.

        They get no gradient and no weight decay, do not count in the gradient's norm, and stay the same bit for bit.

        held: by parameter, a mask of its frozen elements (bool, broadcast against the whole parameter)
        norms: names of modules whose running statistics are frozen
        """

    def follow(self, pull: Callable[[str, Tensor], Tensor]) -> Callable[[], None]:
        """Leave the prior's gradient out of the path integral of `path` (curvature.kind=si).

        pull: (name, this rank's elements of the parameter) -> what `on_gradient` hooks added to their averaged gradient

        Returns a function that ends it.
        """

    def path(self) -> tuple[Leaves, Leaves]:
        """Return the newest task's path integral of each weight (omega), and the weights at its start. Collective.

        By trainable parameter, divided over ranks as the weights are; recorded with curvature.kind=si only.
        """

    def step(self) -> Tensor:
        """Clip, update, clear gradients. Returns the norm before clipping (scalar on the CPU, equal on all ranks)."""

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""

    @property
    def steps_taken(self) -> int:
        """Steps since `start`."""

    @property
    def num_train(self) -> int:
        """The training examples, memory's included, that the task's loss is a mean over."""

    def finish(self) -> None:
        """End a task: averaged weights (if configured) become the weights; buffers become the same on all ranks."""

    def gather(self) -> Leaves:
        """Return a copy of all parameters and buffers by name; of spread ones, this rank's part. Not collective."""

    def place(self, values: Mapping[str, Tensor | Slab | Stored]) -> Leaves:
        """Divide whole or stored tensors over ranks as in `gather`; by name."""

    def put(self, weights: Mapping[str, Tensor | Slab | Stored]) -> None:
        """Replace parameters and buffers by name."""

    def state_dict(self, *, ended: bool = False) -> dict[str, Any]:
        """Return weights, optimiser, averages: nested dicts and lists of tensors and JSON values. Collective.

        ended: the task is done; without what the next one begins anew, such as the optimiser's state
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, under any engine and on any number of ranks."""
