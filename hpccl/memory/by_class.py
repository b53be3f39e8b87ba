"""Greedy selection class by class: all vectors of a class are sent to one rank, which chooses among them.

    this rank's share of all classes  ->  some classes, whole  ->  pick  ->  the choice of all classes on every rank

Classes are assigned to ranks by cost, as many at a time as fit a buffer, and the rows of a class are sorted by sample:
the choice does not depend on the number of ranks. A rank holds its share of all vectors and a buffer of received ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.errors import DivergedError
from hpccl.memory.select import Candidates, Choice, in_order
from hpccl.memory.topk import Chosen

__all__ = ["Pick", "by_class"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
# (vectors [n, D], how many to keep) -> (positions in the order of choice, weight of each).
Pick: TypeAlias = Callable[[Floats, int], tuple[Ints, npt.NDArray[np.float64]]]

_BUFFER = 1 << 28  # bytes of vectors that a rank receives at a time


def by_class(
    rows: Tensor, sample: Ints, valid: npt.NDArray[np.bool_], *, given: Candidates, comm: Comm, pick: Pick
) -> Choice:
    """Apply `pick` to every class and scale its weights by m / n of the task (see `select`); collective.

    rows: [share, D] vectors of this rank's share of the examples; sample: [share] their sample positions
    valid: [share] False where there is no image; such an example is chosen after all others, with weight 0
    pick: returns weights t such that sum_chosen t x approximates the sum of x over the class

    Raises:
        DivergedError: a vector is not finite.
    """
    group, quotas, counts = given.group(sample), given.quotas(), given.counts
    _refuse_infinite(rows, sample, comm)
    table = np.concatenate([sample[:, None], group[:, None], valid[:, None].astype(np.int64)], axis=1)
    found: list[Tensor] = []
    weights: list[Tensor] = []
    for classes in _rounds(counts, rows, comm):
        costs = {f"{each:09d}": float(counts[each]) * max(int(quotas[each]), 1) for each in classes}
        placed = owners(costs, comm.size)
        owner = np.full(len(counts), comm.size)
        owner[classes] = [placed[f"{each:09d}"] for each in classes]
        mine = np.flatnonzero(owner[group] < comm.size)
        order = mine[np.argsort(owner[group[mine]], kind="stable")]
        sizes = np.bincount(owner[group[mine]], minlength=comm.size).tolist()
        came = comm.exchange(rows[torch.from_numpy(order)], sizes).numpy()
        whose = comm.exchange(torch.from_numpy(table[order]), sizes).numpy()
        for number in np.unique(whose[:, 1]):
            chosen, weight = _of_class(came, whose, int(number), int(quotas[number]), pick)
            found.append(torch.from_numpy(chosen))
            weights.append(torch.from_numpy(weight))
    every = comm.gather(torch.cat([torch.zeros(0, 3, dtype=torch.int64), *found])).numpy()
    weight = comm.gather(torch.cat([torch.zeros(0, dtype=torch.float64), *weights])).numpy()
    order = np.lexsort((every[:, 2], every[:, 1]))
    best = Chosen(every[order, 0], every[order, 1], -every[order, 2].astype(np.float64))
    relative = weight[order] * given.keep / max(len(given.samples), 1)
    return in_order(best, relative, given, by_class=True)


def _of_class(came: Floats, whose: Ints, number: int, quota: int, pick: Pick) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Return the choice of one class: [quota, 3] rows (sample, class, place) and [quota] weights."""
    here = np.flatnonzero(whose[:, 1] == number)
    here = here[np.argsort(whose[here, 0], kind="stable")]
    good, bad = here[whose[here, 2] > 0], here[whose[here, 2] == 0]
    positions, weight = pick(came[good], min(quota, len(good)))
    filler = bad[: quota - len(positions)]
    sample = np.concatenate([whose[good[positions], 0], whose[filler, 0]])
    chosen = np.stack([sample, np.full(len(sample), number), np.arange(len(sample))], axis=1)
    return chosen, np.concatenate([weight, np.zeros(len(filler))])


def _rounds(counts: Ints, rows: Tensor, comm: Comm) -> Iterator[Ints]:
    """Yield the classes to exchange together: what a rank receives fits the buffer, or is a single class."""
    width = max(1, rows[:1].numel() // max(1, len(rows[:1])) * rows.element_size())
    room = max(1, _BUFFER // comm.max(width)) * comm.size
    first, held = 0, 0
    for number, count in enumerate(counts):
        if held and held + int(count) > room:
            yield np.arange(first, number)
            first, held = number, 0
        held += int(count)
    if held:
        yield np.arange(first, len(counts))


def _refuse_infinite(rows: Tensor, sample: Ints, comm: Comm) -> None:
    bad = ~rows.isfinite().all(dim=1)
    worst = int(sample[int(bad.nonzero()[0])]) if bool(bad.any()) else -1
    worst = comm.max(worst)
    if worst >= 0:
        raise DivergedError(
            f"the output for sample {worst} is not finite; the network has diverged, or its pixels are not finite"
        )
