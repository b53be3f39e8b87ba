"""Assign pieces of work to ranks: pure functions, so that every rank computes the same result."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

__all__ = ["owners", "pieces"]


def owners(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Longest-processing-time placement (Graham 1969): the most expensive piece first, to the least loaded rank.

    Ties go to the lower rank and to the name that sorts first, so the order of `costs` does not matter.
    """
    load = [(0.0, rank) for rank in range(size)]
    placed: dict[str, int] = {}
    for name in sorted(costs, key=lambda piece: (-costs[piece], piece)):
        total, rank = heapq.heappop(load)
        placed[name] = rank
        heapq.heappush(load, (total + costs[name], rank))
    return placed


def pieces(costs: Mapping[str, float], size: int, *, most: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the ranks that share each item: one, or several if it costs more than a rank's fair share.

    An item is cut into equal pieces, at most `most[name]`, so that none costs more than the fair share where possible;
    pieces are placed as in `owners`. The list has one rank per piece; a rank may hold two pieces of one item.
    """
    fair = sum(costs.values()) / size
    counts = {name: min(most[name], max(1, _ceil(cost, fair))) for name, cost in costs.items()}
    # Names sort by item, then piece; the separator cannot occur in a module's name.
    cut = {f"{name}\0{part:06d}": costs[name] / counts[name] for name in costs for part in range(counts[name])}
    placed = owners(cut, size)
    return {name: [placed[f"{name}\0{part:06d}"] for part in range(counts[name])] for name in costs}


def _ceil(cost: float, fair: float) -> int:
    # The factor: a single item is its own fair share on one rank, and rounding must not cut it.
    return int(-(-cost // (fair * (1 + 1e-9)))) if fair > 0 else 1
