"""Which rank owns which piece of work: a pure function, so that every rank computes the same answer."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

__all__ = ["owners"]


def owners(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Longest-processing-time placement (Graham 1969): the dearest piece first, to the least loaded rank.

    Ties go to the lower rank and to the name that sorts first, so the order of `costs` does not matter.
    """
    load = [(0.0, rank) for rank in range(size)]
    placed: dict[str, int] = {}
    for name in sorted(costs, key=lambda piece: (-costs[piece], piece)):
        total, rank = heapq.heappop(load)
        placed[name] = rank
        heapq.heappush(load, (total + costs[name], rank))
    return placed
