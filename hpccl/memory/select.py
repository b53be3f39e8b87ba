"""Selection of memory examples: pure functions of labels, scores and counters, with the same result on every rank.

A uniform sample without replacement is the set with the smallest hashes of (seed, task, sample): it does not depend on
who computes it, on other methods run with the same seed, or on what was drawn before.

Every choice is ordered by value, so that a memory can shrink without a new selection: the first examples of the order
are the choice of a smaller size. Where classes are balanced, so is every prefix of the order.

Weights are relative to a uniform choice, whose weights are 1: where m of n examples are kept, an example of weight u
stands for u n / m of them. So the weighted sum over the memory, times n / m, estimates the sum over the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

from hpccl.data.order import mix
from hpccl.dist.comm import Comm
from hpccl.memory.topk import Chosen, exponential, group_means, inclusion, largest

__all__ = ["Candidates", "Choice", "choose", "class_quotas", "in_order", "scored", "shares", "thinned", "uniform"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_UNIFORM_SHARE = 0.1  # uniform part of the sampling probabilities: no weight exceeds 1 / share


@final
@dataclass(frozen=True)
class Choice:
    """Chosen examples.

    sample: [m] int64, ascending
    order: [m] int64, place in the order of value: 0 is the last to be dropped
    weight: [m] float64 >= 0, relative to a uniform choice of the same size
    priority: [m] float64 >= 0, with which each was drawn; 0 if the choice is not sampled
    """

    sample: Ints
    order: Ints
    weight: Floats
    priority: Floats


@final
@dataclass(frozen=True)
class Candidates:
    """A task's examples, known to all ranks, and how many to keep.

    samples: [n] int64, ascending; labels: [n]
    keep: m; balanced: equally many of each class as far as classes have them
    words: seed of the hashes that break ties
    """

    samples: Ints
    labels: Ints
    keep: int
    balanced: bool
    words: tuple[int, ...]

    @cached_property
    def classes(self) -> Ints:
        """[G] classes that occur, ascending."""
        return np.unique(self.labels)

    @cached_property
    def counts(self) -> Ints:
        """[G] number of examples of each class."""
        return np.unique(self.labels, return_counts=True)[1].astype(np.int64)

    def group(self, sample: Ints) -> Ints:
        """Return the positions in `classes` of the classes of some samples."""
        return np.searchsorted(self.classes, self.labels[np.searchsorted(self.samples, sample)])

    def quotas(self) -> Ints:
        """[G] how many to keep of each class: equally many if balanced, else in proportion to the task."""
        if self.balanced:
            return class_quotas(self.counts, self.keep, tie_break=mix(*self.words, 1, self.classes))
        return shares(self.counts, self.keep)


def choose(labels: Ints, samples: Ints, *, keep: int, balanced: bool, words: tuple[int, ...]) -> Ints:
    """Return the positions [keep], ascending, of a uniform choice without replacement.

    labels: [n] class of each candidate; samples: [n] its sample position, hashed with `words` to its priority.
    balanced: equally many of each class as far as classes have them.
    """
    assert keep <= len(labels), f"cannot keep {keep} of {len(labels)}"
    priority = mix(*words, samples)
    if not balanced:
        return np.sort(np.argsort(priority, kind="stable")[:keep])
    classes, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = class_quotas(counts, keep, tie_break=mix(*words, 1, classes))
    order = np.lexsort((priority, group))
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(order[place < quotas[group[order]]])


def uniform(given: Candidates) -> Choice:
    """Choose uniformly (see `choose`), in the order of the hashes; without communication."""
    words = given.words
    chosen = choose(given.labels, given.samples, keep=given.keep, balanced=given.balanced, words=words)
    sample = given.samples[chosen]
    group = given.group(sample) if given.balanced else np.zeros(len(sample), dtype=np.int64)
    order = np.lexsort((mix(*words, sample), group))
    found = Chosen(sample[order], group[order], np.zeros(len(order)))
    return in_order(found, np.ones(len(order)), given, by_class=given.balanced)


def scored(score: Floats, sample: Ints, given: Candidates, comm: Comm, *, sampled: bool) -> Choice:
    """Choose the examples with the largest scores, or draw a sample with probabilities that grow with them; collective.

    sampled: draw without replacement with priorities 0.9 score / mean score + 0.1, means by class if balanced, and
    weight each inversely to its inclusion probability (`topk.inclusion`): the weighted sum over the memory is unbiased,
    and no weight is more than about ten times that of a uniform choice.

    score: [n] float64 of this rank's share, of any sign (sampled: >= 0); -inf: choose only if there is nothing else.
    sample: [n] their sample positions.

    Raises:
        DivergedError: a score is not a number.
    """
    balanced = given.balanced
    group = given.group(sample) if balanced else np.zeros(len(sample), dtype=np.int64)
    quotas = given.quotas() if balanced else np.array([given.keep], dtype=np.int64)
    if not sampled:
        found = largest(score, sample, group, quotas, words=given.words, comm=comm)
        return in_order(found, np.ones(len(found)), given, by_class=balanced)
    counts = given.counts if balanced else np.array([len(given.samples)], dtype=np.int64)
    priority = _priorities(score, group, counts, comm)
    keys = np.where(np.isnan(score), np.nan, exponential(priority, sample, words=given.words))
    found = largest(keys, sample, group, np.minimum(quotas + 1, counts), words=given.words, comm=comm)
    inside = found.place < quotas[found.group]
    threshold = np.full(len(quotas), -np.inf)
    threshold[found.group[~inside]] = found.score[~inside]  # that of the first example not chosen
    kept = Chosen(found.sample[inside], found.group[inside], found.score[inside])
    drawn = exponential(np.ones(len(kept)), kept.sample, words=given.words)
    own = np.where(np.isneginf(kept.score), 0.0, drawn / kept.score)
    weight = given.keep / len(given.samples) / _chances(own, threshold[kept.group])
    return in_order(kept, weight, given, by_class=balanced, priority=own)


def thinned(choice: Choice, group: Ints, left: npt.NDArray[np.bool_], *, of: int, words: tuple[int, ...]) -> Floats:
    """[m] weights of a sampled choice (see `scored`) of which only some are `left` [m], the best of every group.

    The first example dropped from a group determines the inclusion probabilities of those that remain. A group that
    loses none keeps its probabilities.

    group: [m] number of the group within which an example was drawn; of: number of candidates of the task; words: seed
        of the draw
    """
    keys = exponential(choice.priority, choice.sample, words=words)
    dropped = np.full(int(group.max(initial=0)) + 1, np.nan)
    np.fmax.at(dropped, group[~left], keys[~left])
    share = left.sum() / max(len(left), 1)
    chances = _chances(choice.priority, np.where(np.isnan(dropped), -np.inf, dropped)[group])
    weight: Floats = np.where(np.isnan(dropped)[group], choice.weight * share, left.sum() / of / chances)
    return weight


def _chances(priority: Floats, threshold: Floats) -> Floats:
    """[m] inclusion probabilities; 1 for examples of priority 0, which are chosen for want of others."""
    with np.errstate(invalid="ignore"):
        chances: Floats = np.where(priority > 0, inclusion(priority, threshold), 1.0)
    return chances


def in_order(
    found: Chosen, weight: Floats, given: Candidates, *, by_class: bool, priority: Floats | None = None
) -> Choice:
    """Make a `Choice`, with the order in which it shrinks.

    by_class: `found.group` are positions in `given.classes`; the best example of every class comes first, then the
    second, ...; if classes are not balanced, a class's k-th example comes where its proportional share is k - 1/2.
    """
    order = found.place
    if by_class:
        tie = mix(*given.words, 1, given.classes[found.group])
        depth = found.place if given.balanced else (found.place + 0.5) / given.counts[found.group]
        order = np.empty(len(found), dtype=np.int64)
        order[np.lexsort((tie, depth))] = np.arange(len(found))
    ascending = np.argsort(found.sample, kind="stable")
    priority = np.zeros(len(found)) if priority is None else priority
    return Choice(found.sample[ascending], order[ascending], weight[ascending], priority[ascending])


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


def shares(counts: Ints, keep: int) -> Ints:
    """[classes] how many of each class in proportion to `counts`, summing to `keep` (Webster; ties: lower class)."""
    assert keep <= counts.sum(), f"cannot keep {keep} of {counts.sum()}"
    group = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(group)) - np.repeat(counts.cumsum() - counts, counts)
    order = np.lexsort((group, (place + 0.5) / counts[group]))
    return np.bincount(group[order[:keep]], minlength=len(counts)).astype(np.int64)


def _priorities(score: Floats, group: Ints, counts: Ints, comm: Comm) -> Floats:
    positive = np.where(np.isfinite(score) & (score > 0), score, 0.0)
    means = group_means(positive, group, counts, comm)[group]
    relative = np.where(means > 0, positive / np.where(means > 0, means, 1.0), 1.0)
    return np.where(np.isneginf(score), 0.0, (1 - _UNIFORM_SHARE) * relative + _UNIFORM_SHARE)
