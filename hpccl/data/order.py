"""Which examples make up a step: pure functions of (seed, task, step), the same for any number of ranks or workers.

Nothing here has state, so resuming in the middle of an epoch is arithmetic. Randomness is a hash of counters (Steele,
Lea, Flood 2014, "Fast splittable pseudorandom number generators": the finaliser of SplitMix64), because a generator's
state would have to be saved and could diverge between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["Batch", "BatchPlan", "mix", "permutation", "splitmix", "subset"]

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_ALL = (1 << 64) - 1
_ZERO = np.uint64(0)

# Consecutive images of a shard that a window takes together: a few MB, and few enough for many runs of every class.
_RUN = 32

# The purposes of hashes, which keep the streams of random numbers apart.
_ORDER_NEW, _ORDER_MEMORY, _ORDER_UNION, _VIEW, _NOISE, _MIX = range(1, 7)


def mix(*words: int | Ints | Words) -> Words:
    """Hash integers (broadcast against each other) to uint64, elementwise."""
    state: int | Words = 0
    for word in words:
        # Scalars are hashed once for all elements, as Python integers, which are faster than arrays of one element.
        if isinstance(state, int) and isinstance(word, int):
            state = _mixed(state, word)
        else:
            state = splitmix(np.asarray(state, dtype=np.uint64), np.asarray(word).astype(np.uint64))
    return np.asarray(state, dtype=np.uint64)


def _mixed(state: int, word: int) -> int:
    state = (state + 0x9E3779B97F4A7C15 + word) & _ALL
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _ALL
    return state ^ (state >> 31)


def splitmix(state: Words, word: Words | np.uint64 = _ZERO) -> Words:
    """splitmix64 (Steele, Lea and Flood 2014) with a word added to its state: one step and its output function."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15) + word
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: Words = state ^ (state >> np.uint64(31))
    return found


def permutation(count: int, *words: int) -> Ints:
    """Return a random permutation of range(count), determined by `words` alone."""
    return np.argsort(mix(*words, np.arange(count)), kind="stable").astype(np.int64)


def subset(samples: Ints, count: int, *words: int) -> Ints:
    """A uniform draw of `count` of the samples [n] without replacement, ascending, decided by `words` alone."""
    if count >= len(samples):
        return np.sort(samples)
    return np.sort(samples[np.argsort(mix(*words, samples), kind="stable")[:count]])


@dataclass(frozen=True)
class Batch:
    """One step's rows over all ranks, in order.

    new:    [b] int64, offset within the new data, or -1 where the row is a memory row
    slot:   [b] int64, position in the memory, or -1 where the row is new
    view:   [b] uint64 non-zero, seeds the augmentation
    noise:  [b] int64, seeds the randomness inside the network
    epoch:  of the task, from 0
    weight_new, weight_memory: weight of a row (before tau), such that
        E[sum(weight * nats) / b] = (sum of new nats + sum of memory nats) / (num_new + num_memory)
    """

    new: Ints
    slot: Ints
    view: Words
    noise: Ints
    weight_new: float
    weight_memory: float
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.new)


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The steps of one task.

    share is None for natural mixing (shuffle the union of new data and memory, every example once an epoch) or the
    share of memory rows in every step (stratified: new data once an epoch, memory in a cycle of its own).
    An epoch is cut into equal batches of at most `batch_size` rows.
    groups: [num_new] shard number. With `window` > 0, examples are shuffled within windows of about as many examples as
    that many shards have. A window consists of short runs of neighbours, drawn from all shards, because a shard has one
    class: reads lie close together, and windows differ little in their classes.
    """

    num_new: int
    num_memory: int
    batch_size: int
    epochs: int
    seed: int
    task: int
    share: float | None = None
    window: int = 0
    groups: Ints | None = None

    @property
    def num_train(self) -> int:
        """Training examples, memory included: the divisor of the objective."""
        return self.num_new + self.num_memory

    @cached_property
    def memory_rows(self) -> int:
        """Memory rows per step when stratified, else 0."""
        if self.share is None or self.num_memory == 0:
            return 0
        return min(max(round(self.share * self.batch_size), 1), self.batch_size - 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every new example is used once."""
        stratified = self.memory_rows > 0
        examples = self.num_new if stratified else self.num_train
        return -(-examples // (self.batch_size - self.memory_rows))

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the task."""
        return self.epochs * self.steps_per_epoch

    def num_rows(self, first: int, last: int) -> int:
        """Count the rows of the steps first, ..., last - 1, without making them."""
        examples = self.num_new if self.memory_rows else self.num_train
        ends = [examples * (step % self.steps_per_epoch + 1) // self.steps_per_epoch for step in range(first, last)]
        starts = [examples * (step % self.steps_per_epoch) // self.steps_per_epoch for step in range(first, last)]
        return sum(ends) - sum(starts) + self.memory_rows * (last - first)

    def batch(self, step: int) -> Batch:
        """Return the rows of step `step` (from 0)."""
        new, slot = self._stratified(step) if self.memory_rows else self._natural(step)
        position = np.arange(len(new))
        view = mix(self.seed, _VIEW, self.task, step, position) | np.uint64(1)
        noise = mix(self.seed, _NOISE, self.task, step, position).astype(np.int64)
        weight_new, weight_memory = 1.0, 1.0
        if self.memory_rows:
            size, num_memory_rows = len(new), int((slot >= 0).sum())
            weight_new = self.num_new / self.num_train * size / (size - num_memory_rows)
            weight_memory = self.num_memory / self.num_train * size / num_memory_rows
        return Batch(new, slot, view, noise, weight_new, weight_memory, step // self.steps_per_epoch)

    def _natural(self, step: int) -> tuple[Ints, Ints]:
        epoch, start = divmod(step, self.steps_per_epoch)
        entries = _equal_part(_union_order(self, epoch), start, self.steps_per_epoch)
        is_new = entries < self.num_new
        return np.where(is_new, entries, -1), np.where(is_new, -1, entries - self.num_new)

    def _stratified(self, step: int) -> tuple[Ints, Ints]:
        epoch, start = divmod(step, self.steps_per_epoch)
        new = _equal_part(_new_order(self, epoch), start, self.steps_per_epoch)
        first = step * self.memory_rows
        slot = np.empty(self.memory_rows, dtype=np.int64)
        counters = np.arange(first, first + self.memory_rows)
        for cycle in np.unique(counters // self.num_memory):
            inside = counters // self.num_memory == cycle
            slot[inside] = _memory_order(self, int(cycle))[counters[inside] % self.num_memory]
        # Shuffled, so that every rank and micro-batch has its share of both (and BatchNorm sees both).
        mixed = permutation(len(new) + len(slot), self.seed, _MIX, self.task, step)
        absent = np.full(self.memory_rows, -1), np.full(len(new), -1)
        return np.concatenate([new, absent[0]])[mixed], np.concatenate([absent[1], slot])[mixed]


def _equal_part(order: Ints, number: int, parts: int) -> Ints:
    """Return one of `parts` parts of equal size up to one: a small last batch would be a noisy step of full length."""
    return order[number * len(order) // parts : (number + 1) * len(order) // parts]


# An epoch's order is used by hundreds of steps in a row; computing it is O(n log n).
@lru_cache(maxsize=2)
def _union_order(plan: BatchPlan, epoch: int) -> Ints:
    """Return an order in which entries below num_new are new data, the rest memory slots shifted by num_new."""
    order = permutation(plan.num_train, plan.seed, _ORDER_UNION, plan.task, epoch)
    if plan.window:
        # Keep which positions are memory, but visit the new data window by window.
        order[order < plan.num_new] = _new_order(plan, epoch)
    return order


@lru_cache(maxsize=2)
def _new_order(plan: BatchPlan, epoch: int) -> Ints:
    shuffled = permutation(plan.num_new, plan.seed, _ORDER_NEW, plan.task, epoch)
    if not plan.window or plan.groups is None:
        return shuffled
    run = _runs(plan.groups)
    num_runs, num_shards = int(run[-1]) + 1, len(np.unique(plan.groups))
    # Of equal size: a small last window would end every epoch on few classes.
    num_windows = -(-num_shards // plan.window)
    rank_of_run = np.argsort(permutation(num_runs, plan.seed, _ORDER_NEW, plan.task, epoch, 1))
    window = rank_of_run[run] * num_windows // num_runs
    return shuffled[np.argsort(window[shuffled], kind="stable")]


def _runs(groups: Ints) -> Ints:
    """Number the runs: at most _RUN neighbours of one group each."""
    position = np.arange(len(groups))
    first = np.r_[True, groups[1:] != groups[:-1]]
    place = position - np.maximum.accumulate(np.where(first, position, 0))
    return np.cumsum(place % _RUN == 0) - 1


@lru_cache(maxsize=2)
def _memory_order(plan: BatchPlan, cycle: int) -> Ints:
    return permutation(plan.num_memory, plan.seed, _ORDER_MEMORY, plan.task, cycle)
