"""Tensors that no rank holds whole: each rank has a run of a tensor's elements in row-major order.

The run may be anything: rows (FSDP2), equal parts (ZeRO-3), a piece of a long buffer (ZeRO-1, ZeRO-2), nothing. So a
tensor that was saved by one engine can be read by any other, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor

from hpccl.dist.comm import Comm

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
    "placed_whole",
    "streamed",
    "whole",
    "wholes",
]

_TOGETHER = 1 << 22  # elements of small tensors that are gathered in one message


@final
@dataclass(frozen=True)
class Span:
    """Which elements of a tensor of `shape` this rank has: start to stop, in row-major order.

    copy: how many other ranks before this one have the same elements (replicated groups)
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    copy: int = 0

    @classmethod
    def of_rows(cls, shape: tuple[int, ...], rank: int, size: int, *, copy: int = 0) -> Span:
        """The rows of `rank` among `size`, as torch.chunk cuts them: trailing ranks may have none."""
        row = math.prod(shape[1:])
        rows = -(-shape[0] // size)
        first, last = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
        return cls(shape, first * row, last * row, copy)

    @property
    def numel(self) -> int:
        """Elements that this rank has."""
        return self.stop - self.start


@final
@dataclass(frozen=True)
class Slab:
    """This rank's elements of a tensor.

    local: [span.numel]
    """

    local: Tensor
    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.span.shape

    def to(self, device: torch.device) -> Slab:
        """The same on a device."""
        return replace(self, local=self.local.to(device))


@runtime_checkable
class Stored(Protocol):
    """A tensor in files, of which any run of elements can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start], on the CPU."""


Leaf: TypeAlias = Tensor | Slab  # whole on every rank, or a part
Leaves: TypeAlias = Mapping[str, Leaf]
Place: TypeAlias = Callable[[Mapping[str, Tensor | Slab | Stored]], Leaves]  # such as Engine.place


def elements(value: Tensor | Slab | Stored, start: int, stop: int) -> Tensor:
    """[stop - start] elements in row-major order; of a Slab, only what this rank has."""
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[start:stop]
    if isinstance(value, Slab):
        offset = value.span.start
        assert offset <= start <= stop <= value.span.stop, "a rank knows its own part only"
        return value.local[start - offset : stop - offset]
    return value.read(start, stop)


def whole(value: Tensor | Stored) -> Tensor:
    """The tensor in its shape."""
    return value if isinstance(value, Tensor) else value.read(0, math.prod(value.shape)).view(value.shape)


def placed_whole(values: Mapping[str, Tensor | Slab | Stored]) -> dict[str, Tensor]:
    """Every tensor whole on this rank: how engines that spread nothing place what was saved."""
    return {name: whole(value) for name, value in values.items() if not isinstance(value, Slab)}


def aligned(leaf: Leaf, like: Leaf, comm: Comm) -> Leaf:
    """The same tensor, divided over ranks as `like` is; collective where it must move."""
    if isinstance(leaf, Tensor) and isinstance(like, Tensor):
        return leaf
    if isinstance(leaf, Slab) and isinstance(like, Slab) and not comm.any(leaf.span != like.span):
        return leaf
    ((_, full),) = streamed({"": leaf}, comm)
    return (
        full if isinstance(like, Tensor) else Slab(elements(full, like.span.start, like.span.stop).clone(), like.span)
    )


def wholes(leaves: Leaves) -> dict[str, Tensor]:
    """Leaves of an engine that spreads nothing."""
    found = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    assert len(found) == len(leaves), "the weights are spread over ranks: see fetch and streamed"
    return found


def streamed(leaves: Leaves, comm: Comm) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, one after the other (small ones a few at a time); collective as it goes."""
    for names in _messages(leaves):
        slabs = {name: leaf for name, leaf in ((name, leaves[name]) for name in names) if isinstance(leaf, Slab)}
        gathered = _gathered(slabs, comm) if slabs else {}
        for name in names:
            leaf = leaves[name]
            yield name, leaf if isinstance(leaf, Tensor) else gathered.pop(name)


def fetch(leaves: Leaves, names: Collection[str], comm: Comm) -> dict[str, Tensor]:
    """The tensors that this rank names, whole; collective, and each rank may name others.

    No rank holds more at a time than what it asked for and one message.
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
    names: list[str] = []
    filled = 0
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape) if isinstance(leaf, Slab) else 0
        if names and filled + size > _TOGETHER:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _gathered(slabs: Mapping[str, Slab], comm: Comm) -> dict[str, Tensor]:
    """Whole tensors of some slabs that have one dtype each, in one exchange of elements and one of places.

    They are on the rank's device, where slabs need not be.
    """
    dtypes = {slab.local.dtype for slab in slabs.values()}
    if len(dtypes) > 1:
        return {name: value for name, slab in slabs.items() for name, value in _gathered({name: slab}, comm).items()}
    flat = comm.gather(torch.cat([slab.local.reshape(-1).to(comm.device) for slab in slabs.values()]))
    places = torch.tensor([[slab.span.start, slab.span.stop] for slab in slabs.values()], device=comm.device)
    by_rank = comm.gather(places).view(-1, len(slabs), 2).cpu()
    found = {
        name: torch.empty(math.prod(slab.shape), dtype=slab.local.dtype, device=comm.device)
        for name, slab in slabs.items()
    }
    position = 0
    for spans in by_rank.tolist():
        for name, (start, stop) in zip(slabs, spans, strict=True):
            found[name][start:stop] = flat[position : position + stop - start]
            position += stop - start
    return {name: value.view(slabs[name].shape) for name, value in found.items()}
