"""Products of chains of matrices [g, m, n], one chain per group, in the order with the fewest multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["chain", "chain_flops", "halves", "matmul"]


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [g, m, k] by [g, k, n]."""
    if len(left) == 1:
        # By far the most common case: libraries have the most kernels for a plain product.
        return torch.mm(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right)


def chain(*matrices: Tensor) -> Tensor:
    """Return the product of matrices [g, m, .], ..., [g, ., n]; the order depends on their shapes only."""
    return matrices[0] if len(matrices) == 1 else matmul(*halves(*matrices))


def halves(*matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two matrices of the last product of `chain`, for at least two matrices."""
    _, split = _plan(_sizes([matrix.shape for matrix in matrices]))
    return chain(*matrices[:split]), chain(*matrices[split:])


def chain_flops(*shapes: Sequence[int]) -> int:
    """Return the multiplications and additions of `chain` for matrices of these shapes (g, m, n)."""
    multiplications, _ = _plan(_sizes(shapes))
    return 2 * shapes[0][0] * multiplications


def _sizes(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return (shapes[0][1], *(shape[2] for shape in shapes))


@lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Return (multiplications, number of matrices in the left part of the last product)."""
    if len(sizes) == 2:
        return 0, 0
    outer = sizes[0] * sizes[-1]
    return min(
        (_plan(sizes[: split + 1])[0] + _plan(sizes[split:])[0] + outer * sizes[split], split)
        for split in range(1, len(sizes) - 1)
    )
