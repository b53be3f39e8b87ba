"""Choosing memory: pure functions from labels and counters to positions, the same on every rank.

A uniform sample without replacement is the set with the smallest hashes of (seed, task, sample): it does not depend on
who computes it, on other methods run with the same seed, or on what was drawn before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpccl.data.order import mix

__all__ = ["choose", "class_quotas"]

Ints = npt.NDArray[np.int64]


def choose(labels: Ints, samples: Ints, *, keep: int, balanced: bool, words: tuple[int, ...]) -> Ints:
    """Positions [keep] (ascending) of a uniform choice without replacement.

    labels: [n] class of each candidate; samples: [n] its sample position, which seeds its priority with `words`.
    balanced: equally many of each class as far as classes have them.
    """
    assert keep <= len(labels), f"cannot keep {keep} of {len(labels)}"
    priority = mix(*words, samples)
    if not balanced:
        return np.sort(np.argsort(priority, kind="stable")[:keep])
    classes, counts = np.unique(labels, return_counts=True)
    quotas = class_quotas(counts, keep, tie_break=mix(*words, 1, classes))
    chosen = []
    for number, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == number)
        chosen.append(members[np.argsort(priority[members], kind="stable")[:quota]])
    return np.sort(np.concatenate(chosen))


def class_quotas(counts: Ints, keep: int, *, tie_break: npt.NDArray[np.uint64]) -> Ints:
    """[classes] how many of each class: as equal as `counts` allow, summing to `keep`; remainders by `tie_break`."""
    quotas = np.zeros_like(counts)
    while quotas.sum() < keep:
        able = np.flatnonzero(quotas < counts)
        each, left = divmod(int(keep - quotas.sum()), len(able))
        if each == 0:
            able = able[np.argsort(tie_break[able], kind="stable")[:left]]
            each = 1
        quotas[able] = np.minimum(quotas[able] + each, counts[able])
    return quotas
