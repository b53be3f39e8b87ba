"""How many examples of each task are kept: pure functions of the configuration and the tasks' sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpccl.config.memory import MemoryConfig

__all__ = ["kept_of", "per_class", "quotas", "split_quotas"]


def quotas(config: MemoryConfig, sizes: Sequence[int]) -> list[int]:
    """Examples kept of each of the tasks so far, which have `sizes` training examples.

    With `total`, tasks share evenly as far as they have examples, remainders go to the earlier ones; a task's share
    never grows as more tasks come.
    """
    if config.total == 0:
        return [kept_of(config, size) for size in sizes]
    low, high = 0, max(sizes, default=0)  # the largest level with sum_s min(size_s, level) <= total
    while low < high:
        level = (low + high + 1) // 2
        if sum(min(size, level) for size in sizes) <= config.total:
            low = level
        else:
            high = level - 1
    level = low
    found = [min(size, level) for size in sizes]
    able = [task for task, size in enumerate(sizes) if size > level]
    for task in able[: config.total - sum(found)]:
        found[task] += 1
    return found


def kept_of(config: MemoryConfig, size: int) -> int:
    """Examples chosen of a task of `size` when it ends; with `total`, as many as it could ever keep."""
    if config.total > 0:
        return min(config.total, size)
    if config.fraction > 0:
        return min(size, max(1, round(config.fraction * size)))
    return min(config.size, size)


def per_class(total: int, share: float, classes: int) -> tuple[int, int]:
    """(held out, kept) of each of `classes` classes, of which `total` examples are kept in all.

    floor(share K / s) and ceil(K / s) - ceil(share K / s): the book-keeping of BiC's authors (Wu et al. 2019).
    """
    each, part = total / classes, share * total / classes
    rounding = 1e-9  # 0.1 * 2000 / 10 may be a little more or less than 20
    return math.floor(part + rounding), math.ceil(each - rounding) - math.ceil(part - rounding)


def split_quotas(total: int, share: float, *, sizes: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Examples kept of each of the tasks so far, where a share of `total` is held out.

    sizes: examples of each task that are not held out; classes: of each task
    """
    if not classes:
        return []
    _, kept = per_class(total, share, sum(classes))
    return [min(kept * number, size) for number, size in zip(classes, sizes, strict=True)]
