"""GDumb's sampler: a memory of balanced classes from a stream of labels (Prabhu et al. 2020, alg. 1).

    an example of class y is kept if y is new, or has fewer than capacity / (classes seen so far);
    if the memory is full, a random example of a largest class is dropped.

Class counts then differ by at most one, except for classes of which too few examples arrived.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["greedy_balance"]

Ints = npt.NDArray[np.int64]


def greedy_balance(
    before: Ints, arriving: Ints, *, capacity: int, seen: int = 0, draw: Callable[[int, int], int]
) -> Ints:
    """Return the kept positions in the concatenation of the labels `before` and `arriving`, in order of arrival.

    seen: number of classes seen before `arriving`; `before` holds examples of them
    draw: (number of the arriving example, n) -> a random one of 0, ..., n - 1: which example of a largest class is
        dropped. Of several largest classes, the one with the lowest number is taken.
    """
    held: dict[int, list[int]] = {}
    for position, label in enumerate(before.tolist()):
        held.setdefault(label, []).append(position)
    classes = max(seen, len(held))
    size = len(before)
    for event, label in enumerate(arriving.tolist()):
        classes += label not in held
        own = held.setdefault(label, [])
        if len(own) * classes >= capacity:
            continue
        if size == capacity:
            largest = max(held, key=lambda each: (len(held[each]), -each))  # never `label`, which is below the mean
            held[largest].pop(draw(event, len(held[largest])))
            size -= 1
        own.append(len(before) + event)
        size += 1
    return np.sort(np.array([position for own in held.values() for position in own], dtype=np.int64))
