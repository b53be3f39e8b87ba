"""How many examples of each task are kept: pure functions of the configuration and the tasks' sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from hpccl.config.memory import MemoryConfig

__all__ = ["kept_of", "per_class", "quotas", "split_quotas"]


def quotas(config: MemoryConfig, sizes: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Return how many examples to keep of each task so far; tasks have `sizes` training examples, `classes` classes.

    With `total`, the budget is shared evenly among classes (among tasks without memory.balanced), up to what each task
    has; the remainder goes to earlier tasks. A task's share never grows as more tasks come.
    """
    if config.total == 0:
        return [kept_of(config, size) for size in sizes]
    parts = classes if config.balanced else [1] * len(sizes)
    # Places are dealt out in rounds: in each, a task of c classes takes its next c, if it has them. A further task only
    # inserts its places between those of the others, so that no share grows.
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
    """Return how many examples are chosen at the end of a task of `size`; with `total`, the most it could ever keep."""
    if config.total > 0:
        return min(config.total, size)
    if config.fraction > 0:
        return min(size, max(1, round(config.fraction * size)))
    return min(config.size, size)


def per_class(total: int, share: float, classes: int) -> tuple[int, int]:
    """Return the numbers (held out, kept) of each of `classes` classes that share a memory of `total` examples.

    floor(share K / s) and ceil(K / s) - ceil(share K / s) for K = total, s = classes, as BiC's authors count (Wu et al.
    2019).
    """
    each, part = total / classes, share * total / classes
    rounding = 1e-9  # 0.1 * 2000 / 10 may be a little more or less than 20
    return math.floor(part + rounding), math.ceil(each - rounding) - math.ceil(part - rounding)


def split_quotas(total: int, share: float, *, sizes: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Return how many examples to keep of each task so far, where a share of `total` is held out.

    A task keeps the minimum since it was learned: through the two ceilings the number per class may grow by one with
    the number of classes, but a dropped example does not come back.

    sizes: examples of each task that are not held out; classes: number of classes of each task
    """
    kept = [per_class(total, share, seen)[1] for seen in accumulate(classes)]
    least = list(accumulate(reversed(kept), min))[::-1]
    return [min(each * number, size) for each, number, size in zip(least, classes, sizes, strict=True)]
