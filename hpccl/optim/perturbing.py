"""Base classes of optimisers that take gradients at other weights than those that they hold.

A step has one or more passes over its batch. Before each pass, the engine requests trial weights and loads them into
the network; after it, the weights are restored and the gradient is noted. Then `step` updates the weights:

    for number in range(optimizer.passes):
        the network's weights <- optimizer.trial(number, tensors, draw)
        forward and backward passes of the micro-batches, sums over ranks
        the network's weights <- those that the optimiser holds, bit for bit
        optimizer.note(number, tensors)
    clip; optimizer.step()

Everything is element-wise (SAM's norm is passed in): a shard is updated as the whole would be. Tensors may be
parameters, rows of them, or flat buffers of pieces of many; data kept between `trial` and `step` are not part of the
optimiser's state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hpccl.dist.grouping import filled

__all__ = ["Draw", "Norm", "Perturbing", "Sampling", "in_cache"]

# (tensor, number of the draw) -> numbers of N(0, 1) in the tensor's shape and memory layout
Draw: TypeAlias = Callable[[Tensor, int], Tensor]
# Gradients of this rank -> norm [] of the whole gradient, over all ranks
Norm: TypeAlias = Callable[[list[Tensor]], Tensor]

_TOGETHER = 1 << 24  # elements of temporaries that an update makes at a time
_CACHED = 1 << 16  # elements at a time on a CPU, so that consecutive operations work in its cache


class Perturbing(torch.optim.Optimizer):
    """An optimiser with trial weights.

    passes: forward and backward passes per step
    num_train: N, the number of examples in the mean loss; task: its number. The engine sets both by `begin`
    rewrites: whether `note` replaces the last pass's gradient by another one
    """

    passes = 1
    num_train = 1
    task = 0
    rewrites = False

    def begin(self, *, num_train: int, task: int = 0) -> None:
        """Begin a new task."""
        self.num_train, self.task = num_train, task
        self.forget()

    @abstractmethod
    def trial(self, number: int, tensors: Sequence[Tensor], draw: Draw) -> list[Tensor] | None:
        """Return each tensor's weights for pass `number`, without changing it; None: the weights themselves."""

    @abstractmethod
    def note(self, number: int, tensors: Sequence[Tensor], norm: Norm) -> None:
        """Note the gradient of pass `number` in `.grad`; after the last pass, `step` takes `.grad`, once clipped."""

    @abstractmethod
    def forget(self) -> None:
        """Discard what was noted for the coming step; also called after a step that was skipped."""

    @abstractmethod
    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """Take a step for some tensors of one parameter group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # passes are the engine's
        """Update every tensor that has a gradient; no curvature is learned unless there were trial weights before."""
        assert closure is None, "the passes of a step are the engine's"
        for settings in self.param_groups:
            held = [tensor for tensor in settings["params"] if tensor.grad is not None]
            # In groups, so that temporaries stay small.
            for tensors in filled(held, Tensor.numel, _TOGETHER):
                self.update(tensors, [tensor.grad for tensor in tensors if tensor.grad is not None], settings)

    def kept(self, tensors: Sequence[Tensor], name: str, first: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the state `name` of each tensor, made by `first` if there is none yet."""
        for tensor in tensors:
            if name not in self.state[tensor]:
                self.state[tensor][name] = first(tensor)
        return [self.state[tensor][name] for tensor in tensors]


class Sampling(Perturbing):
    """Takes gradients at weights drawn around those that it holds: a mean over `passes` draws, each on the whole batch.

    A draw is the same on all ranks: gradients are averaged, and only with a common draw is displacement times averaged
    gradient an estimate of the Hessian's diagonal (with a draw per rank it would be too small by the number of ranks).
    """

    def __init__(self, parameters: Any, settings: dict[str, Any], *, passes: int) -> None:
        super().__init__(parameters, settings)
        self.passes, self.rewrites = passes, passes > 1
        self._displacements: dict[Tensor, tuple[Tensor, ...]] = {}
        self._products: dict[Tensor, tuple[Tensor, ...]] = {}
        self._gradients: dict[Tensor, Tensor] = {}

    @abstractmethod
    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """Return what is added to `centre`; several parts if their products with the gradient are needed separately."""

    def centre(self, tensor: Tensor) -> Tensor:
        """Return the centre of the draws."""
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
        """See Perturbing; averages gradients and products over passes."""
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
        """Return and drop each tensor's mean of displacement times gradient; None if there were no trial weights."""
        found = []
        for tensor in tensors:
            if tensor not in self._products:
                return None
            found.append(self._products.pop(tensor))
        return found

    def _multiplied(self, tensor: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return displacements times the gradient, computed in place of the displacements."""
        return tuple(part.mul_(gradient) for part in self._displacements.pop(tensor))


def in_cache(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield the lists in pieces for element-wise updates: cache-sized pieces on a CPU, else all at once."""
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
    """Whether its elements fill memory without gaps, in any order."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous() or channels_last
