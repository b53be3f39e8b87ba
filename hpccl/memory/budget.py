"""How many examples of each task are kept: pure functions of the configuration and the tasks' sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from hpccl.config.memory import MemoryConfig

__all__ = ["kept_of", "per_class", "quotas", "split_quotas"]


def quotas(config: MemoryConfig, sizes: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Examples kept of each of the tasks so far, which have `sizes` training examples of so many `classes`.

    With `total`, classes share evenly as far as their tasks have examples (tasks do without memory.balanced), and what
    remains goes to earlier tasks; a task's share never grows as more tasks come.
    """
    if config.total == 0:
        return [kept_of(config, size) for size in sizes]
    parts = classes if config.balanced else [1] * len(sizes)
    # Places are dealt out in rounds, in which a task of c classes takes its next c, if it has them. Another task only
    # puts its own places between those of others: no share grows.
    low, high = 0, max(sizes, default=0)  # the largest number of whole rounds
    while low < high:
        rounds = (low + high + 1) // 2
        if sum(_taken(sizes, parts, rounds)) <= config.total:
            low = rounds
        else:
            high = rounds - 1
    found = _taken(sizes, parts, low)
    for turn in range(max(parts, default=0)):
        able = [task for task, size in enumerate(sizes) if turn < parts[task] and found[task] < size]
        for task in able[: max(0, config.total - sum(found))]:
            found[task] += 1
    return found


def _taken(sizes: Sequence[int], parts: Sequence[int], rounds: int) -> list[int]:
    return [min(size, rounds * part) for size, part in zip(sizes, parts, strict=True)]


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

    The least since a task was learned: rounded up twice, what is kept of a class may grow by one with the number of
    classes, and what was dropped does not return.

    sizes: examples of each task that are not held out; classes: of each task
    """
    kept = [per_class(total, share, seen)[1] for seen in accumulate(classes)]
    least = list(accumulate(reversed(kept), min))[::-1]
    return [min(each * number, size) for each, number, size in zip(least, classes, sizes, strict=True)]
