"""Tensors that are spread over ranks: each rank has a contiguous range of a tensor's elements in row-major order.

The range may be rows (FSDP2), equal parts (ZeRO-3), a piece of a flat buffer (ZeRO-1, ZeRO-2) or empty. So a tensor
that was saved by one engine can be read by any other, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.dist.grouping import filled

__all__ = [
    "Leaf",
    "Leaves",
    "Place",
    "Slab",
    "Span",
    "Stored",
    "aligned",
    "elements",
    "fetch",
    "mapped",
    "own",
    "placed_whole",
    "streamed",
    "whole",
    "wholes",
]

_TOGETHER = 1 << 22  # most elements of small tensors that are gathered in one message


@final
@dataclass(frozen=True)
class Span:
    """The elements of a tensor of `shape` that this rank has: start to stop, in row-major order.

    copy: number of lower ranks with the same elements (above 0 in replicated groups only)
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    copy: int = 0

    @classmethod
    def of_rows(cls, shape: tuple[int, ...], rank: int, size: int, *, copy: int = 0) -> Span:
        """Return the rows of `rank` among `size` ranks, as torch.chunk cuts them: trailing ranks may have none."""
        row = math.prod(shape[1:])
        rows = -(-shape[0] // size)
        first, last = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
        return cls(shape, first * row, last * row, copy)

    @property
    def numel(self) -> int:
        """The number of elements that this rank has."""
        return self.stop - self.start


@final
@dataclass(frozen=True)
class Slab:
    """This rank's elements of a spread tensor.

    local: [span.numel]
    """

    local: Tensor
    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.span.shape

    def to(self, device: torch.device) -> Slab:
        """Return the slab on `device`."""
        return replace(self, local=self.local.to(device))


@runtime_checkable
class Stored(Protocol):
    """A tensor in files, of which any range of elements can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    def read(self, start: int, stop: int) -> Tensor:
        """Read elements `start` to `stop` in row-major order: [stop - start], on the CPU."""


Leaf: TypeAlias = Tensor | Slab  # whole on every rank, or a part
Leaves: TypeAlias = Mapping[str, Leaf]
Place: TypeAlias = Callable[[Mapping[str, Tensor | Slab | Stored]], Leaves]  # such as Engine.place


def own(leaf: Leaf) -> Tensor:
    """Return this rank's elements: of a Slab its part, otherwise the tensor itself."""
    return leaf.local if isinstance(leaf, Slab) else leaf


def mapped(leaf: Leaf, change: Callable[[Tensor], Tensor]) -> Leaf:
    """Return the leaf with its elements changed by `change`, which keeps their number."""
    return replace(leaf, local=change(leaf.local)) if isinstance(leaf, Slab) else change(leaf)


def elements(value: Tensor | Slab | Stored, start: int, stop: int) -> Tensor:
    """Return elements `start` to `stop` in row-major order [stop - start]; of a Slab, only this rank's."""
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[start:stop]
    if isinstance(value, Slab):
        offset = value.span.start
        assert offset <= start <= stop <= value.span.stop, "a rank knows its own part only"
        return value.local[start - offset : stop - offset]
    return value.read(start, stop)


def whole(value: Tensor | Stored) -> Tensor:
    """Return the whole tensor in its shape."""
    return value if isinstance(value, Tensor) else value.read(0, math.prod(value.shape)).view(value.shape)


def placed_whole(values: Mapping[str, Tensor | Slab | Stored]) -> dict[str, Tensor]:
    """Return every tensor whole: how engines that spread nothing place saved tensors; Slabs are left out."""
    return {name: whole(value) for name, value in values.items() if not isinstance(value, Slab)}


def aligned(leaf: Leaf, like: Leaf, comm: Comm) -> Leaf:
    """Return the tensor divided over ranks as `like` is; collective where one of them is spread."""
    if isinstance(leaf, Tensor) and isinstance(like, Tensor):
        return leaf
    if isinstance(leaf, Slab) and isinstance(like, Slab) and not comm.any(leaf.span != like.span):
        return leaf
    ((_, full),) = streamed({"": leaf}, comm)
    return (
        full if isinstance(like, Tensor) else Slab(elements(full, like.span.start, like.span.stop).clone(), like.span)
    )


def wholes(leaves: Leaves) -> dict[str, Tensor]:
    """Return the leaves as whole tensors; for engines that spread nothing."""
    found = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    assert len(found) == len(leaves), "the weights are spread over ranks: see fetch and streamed"
    return found


def streamed(leaves: Leaves, comm: Comm) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor whole, one after the other (small ones gathered together); each step is collective."""
    for names in _messages(leaves):
        slabs = {name: leaf for name, leaf in ((name, leaves[name]) for name in names) if isinstance(leaf, Slab)}
        gathered = _gathered(slabs, comm) if slabs else {}
        for name in names:
            leaf = leaves[name]
            yield name, leaf if isinstance(leaf, Tensor) else gathered.pop(name)


def fetch(leaves: Leaves, names: Collection[str], comm: Comm) -> dict[str, Tensor]:
    """Return whole the tensors that this rank names; collective, and ranks may name different ones.

    A rank holds no more at a time than the tensors that it names and one message.
    """
    spread = [name for name, leaf in leaves.items() if isinstance(leaf, Slab)]
    found = {name: leaf for name in names if isinstance(leaf := leaves[name], Tensor)}
    if not spread:
        return found
    wanted = torch.tensor([name in names for name in spread], dtype=torch.float32)
    comm.sum_([wanted])
    asked = {name: leaves[name] for name, anyone in zip(spread, wanted.tolist(), strict=True) if anyone}
    found |= {name: value for name, value in streamed(asked, comm) if name in names}
    return found


def _messages(leaves: Leaves) -> Iterator[list[str]]:
    return filled(
        leaves, lambda name: math.prod(leaves[name].shape) if isinstance(leaves[name], Slab) else 0, _TOGETHER
    )


def _gathered(slabs: Mapping[str, Slab], comm: Comm) -> dict[str, Tensor]:
    """Gather whole tensors from slabs; one message of elements and one of spans if they share a dtype.

    Elements that no rank has are 0. The results are on the rank's device, even if the slabs are not.
    """
    dtypes = {slab.local.dtype for slab in slabs.values()}
    if len(dtypes) > 1:
        return {name: value for name, slab in slabs.items() for name, value in _gathered({name: slab}, comm).items()}
    flat = comm.gather(torch.cat([slab.local.reshape(-1).to(comm.device) for slab in slabs.values()]))
    places = torch.tensor([[slab.span.start, slab.span.stop] for slab in slabs.values()], device=comm.device)
    by_rank = comm.gather(places).view(-1, len(slabs), 2).cpu()
    found = {
        name: torch.zeros(math.prod(slab.shape), dtype=slab.local.dtype, device=comm.device)
        for name, slab in slabs.items()
    }
    position = 0
    for spans in by_rank.tolist():
        for name, (start, stop) in zip(slabs, spans, strict=True):
            found[name][start:stop] = flat[position : position + stop - start]
            position += stop - start
    return {name: value.view(slabs[name].shape) for name, value in found.items()}
