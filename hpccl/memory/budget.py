"""How many examples of each task are kept: pure functions of the configuration and the tasks' sizes."""

from __future__ import annotations

from collections.abc import Sequence

from hpccl.config.sections import MemoryConfig

__all__ = ["kept_of", "quotas"]


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
    return config.size
