"""Pack symmetric matrices into flat vectors of about half as many numbers, to send factors between processes.

The lower triangle is copied in blocks of rows, [rows i to i + 128, columns 0 to i + 128]: this takes a few copies and
no table of indices, for a share of 128 / k more numbers than the triangle has.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["mirrored_", "pack", "packed_size", "unpack"]

_ROWS = 128
_MIRRORED = 1024  # rows mirrored at a time


def packed_size(groups: int, size: int) -> int:
    """Return how many numbers `pack` makes of [groups, size, size]."""
    return groups * sum((end - first) * end for first, end in _blocks(size))


def pack(matrix: Tensor) -> Tensor:
    """Return the lower triangle of [g, k, k] as a 1-d tensor."""
    groups, size, _ = matrix.shape
    flat = matrix.new_empty(packed_size(groups, size))
    for (first, end), block in _views(flat, groups, size):
        block.copy_(matrix[:, first:end, :end])
    return flat


def unpack(flat: Tensor, groups: int, size: int) -> Tensor:
    """Return [g, k, k], exactly symmetric, from its `pack`."""
    matrix = flat.new_empty(groups, size, size)
    for (first, end), block in _views(flat, groups, size):
        matrix[:, first:end, :first] = block[:, :, :first]
        matrix[:, :first, first:end] = block[:, :, :first].mT
        corner = block[:, :, first:]
        matrix[:, first:end, first:end] = corner.tril() + corner.tril(-1).mT
    return matrix


def _views(flat: Tensor, groups: int, size: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield ((first, end), the part [g, rows, end] of `flat` that holds those rows)."""
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
    """Replace the upper triangle of `total` [g, k, k] by its lower one, in place."""
    for first in range(0, total.shape[1], _MIRRORED):
        some = slice(first, first + _MIRRORED)
        total[:, :first, some] = total[:, some, :first].mT
        corner = total[:, some, some].tril()
        total[:, some, some] = corner + corner.tril(-1).mT
    return total
