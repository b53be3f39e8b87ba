"""What optimisers share that take gradients elsewhere than at the weights they hold.

A step has one or more passes over its batch. Before each, the engine asks for trial weights and puts them where the
network computes; after it, the weights are what they were and the gradient is noted. Then `step` updates:

    for number in range(optimizer.passes):
        the network's weights <- optimizer.trial(number, tensors, draw)
        forward and backward passes of the micro-batches, sums over ranks
        the network's weights <- those that the optimiser holds, bit for bit
        optimizer.note(number, tensors)
    clip; optimizer.step()

Everything is element-wise (SAM's norm is given): a shard is updated as the whole would be. Tensors may be parameters,
rows of them, or flat buffers of pieces of many; what belongs to a tensor between `trial` and `step` is not state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Draw", "Norm", "Perturbing", "Sampling", "in_cache"]

# (tensor, number of the draw) -> as many numbers of N(0, 1), in its shape and memory layout
Draw: TypeAlias = Callable[[Tensor, int], Tensor]
# Gradients of this rank -> [] the norm of the whole gradient, over all ranks
Norm: TypeAlias = Callable[[list[Tensor]], Tensor]

_TOGETHER = 1 << 24  # elements of temporaries that an update makes at a time
_CACHED = 1 << 16  # on a CPU: what several operations in a row read and write stays in its cache


class Perturbing(torch.optim.Optimizer):
    """An optimiser with trial weights.

    passes: forward and backward passes of a step
    num_train: N, examples that the mean loss is a mean of; task: its number. The engine says both when a task begins
    rewrites: whether `note` puts another gradient in the place of the last pass's
    """

    passes = 1
    num_train = 1
    task = 0
    rewrites = False

    def begin(self, *, num_train: int, task: int = 0) -> None:
        """A new task."""
        self.num_train, self.task = num_train, task
        self.forget()

    @abstractmethod
    def trial(self, number: int, tensors: Sequence[Tensor], draw: Draw) -> list[Tensor] | None:
        """Weights for pass `number`, of each tensor, which stay as they are; None: the weights themselves."""

    @abstractmethod
    def note(self, number: int, tensors: Sequence[Tensor], norm: Norm) -> None:
        """The gradient of pass `number` is in `.grad`; after the last pass it is what `step` takes, once clipped."""

    @abstractmethod
    def forget(self) -> None:
        """What was noted for the coming step; also after a step that was not taken."""

    @abstractmethod
    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """One step of some tensors of one group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # passes are the engine's
        """Update every tensor that has a gradient; without trial weights before, no curvature is learned."""
        assert closure is None, "the passes of a step are the engine's"
        for settings in self.param_groups:
            held = [tensor for tensor in settings["params"] if tensor.grad is not None]
            for tensors in _together(held):
                self.update(tensors, [tensor.grad for tensor in tensors if tensor.grad is not None], settings)

    def kept(self, tensors: Sequence[Tensor], name: str, first: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The state `name` of each tensor, made by `first` where there is none yet."""
        for tensor in tensors:
            if name not in self.state[tensor]:
                self.state[tensor][name] = first(tensor)
        return [self.state[tensor][name] for tensor in tensors]


class Sampling(Perturbing):
    """Gradients at weights drawn around those that it holds, a mean over `passes` draws, all of the whole batch.

    The draw is the same on all ranks: gradients are averaged, and only with one draw is displacement times the averaged
    gradient an estimate of the Hessian's diagonal (with one a rank it would be too small by the number of ranks).
    """

    def __init__(self, parameters: Any, settings: dict[str, Any], *, passes: int) -> None:
        super().__init__(parameters, settings)
        self.passes, self.rewrites = passes, passes > 1
        self._displacements: dict[Tensor, tuple[Tensor, ...]] = {}
        self._products: dict[Tensor, tuple[Tensor, ...]] = {}
        self._gradients: dict[Tensor, Tensor] = {}

    @abstractmethod
    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """What is added to `centre`; several where their products with the gradient are needed apart."""

    def centre(self, tensor: Tensor) -> Tensor:
        """What draws are around."""
        return tensor

    @torch.no_grad()
    def trial(self, number: int, tensors: Sequence[Tensor], draw: Draw) -> list[Tensor] | None:
        """See Perturbing."""
        found = []
        for tensor in tensors:
            parts = self._displacements[tensor] = self.displace(tensor, draw, number)
            found.append(sum(parts, self.centre(tensor)))
        return found

    @torch.no_grad()
    def note(self, number: int, tensors: Sequence[Tensor], norm: Norm) -> None:
        """See Perturbing; means over passes."""
        for tensor in tensors:
            gradient = tensor.grad
            if gradient is None:
                continue
            products = self._multiplied(tensor, gradient)
            if self.passes == 1:
                self._products[tensor] = products
                continue
            if number == 0:
                self._products[tensor], self._gradients[tensor] = products, gradient.clone()
            else:
                for mean, product in zip(self._products[tensor], products, strict=True):
                    mean.lerp_(product, 1 / (number + 1))
                self._gradients[tensor].lerp_(gradient, 1 / (number + 1))
            if number == self.passes - 1:
                gradient.copy_(self._gradients.pop(tensor))

    def forget(self) -> None:
        """See Perturbing."""
        for kept in (self._displacements, self._products, self._gradients):
            kept.clear()

    def products(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]] | None:
        """Of each tensor, the mean of displacement times gradient: once. None without trial weights."""
        found = []
        for tensor in tensors:
            if tensor not in self._products:
                return None
            found.append(self._products.pop(tensor))
        return found

    def _multiplied(self, tensor: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """In the place of the displacements."""
        return tuple(part.mul_(gradient) for part in self._displacements.pop(tensor))


def _together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In groups for one call, so that temporaries stay small."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.numel() > _TOGETHER:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    if group:
        yield group


def in_cache(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same lists in pieces for element-wise updates: on a CPU pieces that stay in its cache, else all at once."""
    if not lists[0] or lists[0][0].device.type != "cpu":
        yield lists
        return
    for row in zip(*lists, strict=True):
        if all(tensor.stride() == row[0].stride() for tensor in row) and _is_dense(row[0]):
            flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in row]
            for pieces in zip(*(tensor.split(_CACHED) for tensor in flat), strict=True):
                yield tuple([piece] for piece in pieces)
        else:
            yield tuple([tensor] for tensor in row)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous() or channels_last
