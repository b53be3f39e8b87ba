"""Symmetric matrices as one row of numbers, about half as many: what a process sends of a factor.

The lower triangle goes in blocks of whole rows, [rows i to i + 128, columns 0 to i + 128]: a few copies and no table of
indices, for 128 / k more numbers than the triangle has.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["mirrored_", "pack", "packed_size", "unpack"]

_ROWS = 128
_MIRRORED = 1024  # rows that are mirrored at a time


def packed_size(groups: int, size: int) -> int:
    """Numbers in `pack` of [groups, size, size]."""
    return groups * sum((end - first) * end for first, end in _blocks(size))


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of [g, k, k], 1-d."""
    groups, size, _ = matrix.shape
    flat = matrix.new_empty(packed_size(groups, size))
    for (first, end), block in _views(flat, groups, size):
        block.copy_(matrix[:, first:end, :end])
    return flat


def unpack(flat: Tensor, groups: int, size: int) -> Tensor:
    """[g, k, k] from `pack` of a matrix of this shape, exactly symmetric."""
    matrix = flat.new_empty(groups, size, size)
    for (first, end), block in _views(flat, groups, size):
        matrix[:, first:end, :first] = block[:, :, :first]
        matrix[:, :first, first:end] = block[:, :, :first].mT
        corner = block[:, :, first:]
        matrix[:, first:end, first:end] = corner.tril() + corner.tril(-1).mT
    return matrix


def _views(flat: Tensor, groups: int, size: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((first, end), the part [g, rows, end] of `flat` that holds those rows)."""
    assert flat.numel() == packed_size(groups, size), "as long as `pack` makes it"
    position = 0
    for first, end in _blocks(size):
        length = groups * (end - first) * end
        yield (first, end), flat[position : position + length].view(groups, end - first, end)
        position += length


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, _ROWS):
        yield first, min(first + _ROWS, size)


def mirrored_(total: Tensor) -> Tensor:
    """`total` [g, k, k], its upper triangle replaced by its lower one."""
    for first in range(0, total.shape[1], _MIRRORED):
        some = slice(first, first + _MIRRORED)
        total[:, :first, some] = total[:, some, :first].mT
        corner = total[:, some, some].tril()
        total[:, some, some] = corner + corner.tril(-1).mT
    return total
