"""Which examples are kept or held out: functions of configuration and labels alone, hence the same on every rank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpccl.config.memory import GreedySelector
from hpccl.config.run import RunConfig
from hpccl.data.order import mix, permutation
from hpccl.data.protocols import Listed, Task, training_samples
from hpccl.memory.balance import greedy_balance
from hpccl.memory.budget import kept_of, per_class, quotas, split_quotas
from hpccl.memory.select import choose

__all__ = [
    "admitted_greedily",
    "held_out",
    "kept_after_each",
    "kept_at_end",
    "kept_of_tasks",
    "num_learned",
    "reservoir",
    "selection_words",
    "validation",
]

Ints = npt.NDArray[np.int64]

# Purposes of hashes (numbers differ from those in hpccl.data.order and consolidate).
_SELECT = 101
_HELD, _ARRIVAL, _EVICTION = 105, 106, 107


def kept_of_tasks(config: RunConfig, stream: Listed, tasks: int) -> list[int]:
    """Return how many examples of each of the first `tasks` tasks memory has once all of these are learned."""
    if isinstance(config.memory.selector, GreedySelector):
        return kept_after_each(config, stream, tasks)[-1]
    sizes = [len(task.samples("train")) for task in stream.tasks[:tasks]]
    classes = [len(task.classes) for task in stream.tasks[:tasks]]
    if config.prior.correct.share == 0:
        return quotas(config.memory, sizes, classes)
    return split_quotas(
        config.memory.total,
        config.prior.correct.share,
        sizes=[num_learned(config, stream, task) for task in stream.tasks[:tasks]],
        classes=classes,
    )


def kept_after_each(config: RunConfig, stream: Listed, tasks: int) -> list[list[int]]:
    """Return `kept_of_tasks` for 0, 1, ..., `tasks` tasks; GDumb's sampler goes through the stream once for all."""
    if not isinstance(config.memory.selector, GreedySelector):
        return [kept_of_tasks(config, stream, count) for count in range(tasks + 1)]
    sample, ends = np.zeros(0, dtype=np.int64), [0]
    kept: list[list[int]] = [[]]
    for task in stream.tasks[:tasks]:
        sample = admitted_greedily(config, stream, task, sample)
        ends.append(task.samples("train").stop)
        kept.append(np.diff(np.searchsorted(np.sort(sample), ends)).tolist())
    return kept


def held_out(config: RunConfig, stream: Listed, task: Task) -> Ints:
    """Return the task's samples that are not trained on, ascending: equally many of each class (prior.correct)."""
    if config.prior.correct.share == 0:
        return np.zeros(0, dtype=np.int64)
    # The largest number ever needed: when the task itself is corrected or, for the first task, the next one.
    before = sum(len(other.classes) for other in stream.tasks[: max(task.index, 1)])
    return _first_of_each_class(config, stream, task, before)


def num_learned(config: RunConfig, stream: Listed, task: Task) -> int:
    """Return how many of the task's training examples are trained on, i.e. not held out."""
    return len(task.samples("train")) - len(held_out(config, stream, task))


def validation(config: RunConfig, stream: Listed, task: Task) -> Ints:
    """Return the held-out samples, ascending, that the task's correction is fitted to; equally many per seen class."""
    before = sum(len(other.classes) for other in stream.tasks[: task.index])
    parts = [_first_of_each_class(config, stream, other, before) for other in stream.tasks[: task.index + 1]]
    return np.concatenate(parts)


def _first_of_each_class(config: RunConfig, stream: Listed, task: Task, before: int) -> Ints:
    """Return each class's samples with the smallest hashes, so that a choice for more classes is a subset.

    before: number of classes that share the held-out part of the memory
    """
    number, _ = per_class(config.memory.total, config.prior.correct.share, before)
    samples = training_samples(task)
    labels, found = stream.labels("train")[samples], [np.zeros(0, dtype=np.int64)]
    for label in task.classes:
        own = samples[labels == label]
        keep = min(number, len(own) // 2)  # at least half of a class is trained on
        found.append(own[choose(label + 0 * own, own, keep=keep, balanced=False, words=(config.seed, _HELD))])
    return np.sort(np.concatenate(found))


def kept_at_end(config: RunConfig, stream: Listed, task: Task, memory: Ints) -> Ints:
    """Return the samples of a task that memory will keep when the task ends.

    Where scores of the network decide that, as many are drawn uniformly instead.

    Args:
        config: of the run.
        stream: with the task.
        task: that is about to be learned.
        memory: samples of earlier tasks in memory.
    """
    samples = np.setdiff1d(training_samples(task), held_out(config, stream, task))
    if isinstance(config.memory.selector, GreedySelector):
        kept = admitted_greedily(config, stream, task, memory)
    elif config.memory.total > 0 and config.memory.selector.kind == "reservoir":
        own = _drawn(config, stream, samples, kept_of(config.memory, len(samples)), selection_words(config))
        both = np.concatenate([memory, own])
        kept = both[reservoir(config, stream.labels("train")[both], both)]
    else:
        share = kept_of_tasks(config, stream, task.index + 1)[-1]
        kept = _drawn(config, stream, samples, share, selection_words(config, task.index))
    return np.intersect1d(kept, samples)


def _drawn(config: RunConfig, stream: Listed, samples: Ints, keep: int, words: tuple[int, ...]) -> Ints:
    labels = stream.labels("train")[samples]
    return samples[choose(labels, samples, keep=keep, balanced=config.memory.balanced, words=words)]


def reservoir(config: RunConfig, labels: Ints, samples: Ints) -> Ints:
    """Return the positions of the examples of all tasks with the smallest hashes, up to the budget (Vitter 1985)."""
    keep = min(config.memory.total, len(samples))
    return choose(labels, samples, keep=keep, balanced=config.memory.balanced, words=selection_words(config))


def selection_words(config: RunConfig, task: int | None = None) -> tuple[int, ...]:
    """Return the seed of the hashes by which a task's examples are chosen, or those of all tasks (a reservoir)."""
    return (config.seed, _SELECT) if task is None else (config.seed, _SELECT, task)


def admitted_greedily(config: RunConfig, stream: Listed, task: Task, memory: Ints) -> Ints:
    """Return the samples in memory after a task's examples have passed GDumb's sampler, in the order of arrival."""
    samples = training_samples(task)
    arriving = samples[permutation(len(samples), config.seed, _ARRIVAL, task.index)]
    total = config.memory.total
    own = config.memory.size or max(1, round(config.memory.fraction * len(samples)))
    labels = stream.labels("train")
    kept = greedy_balance(
        labels[memory] if total else np.zeros(0, dtype=np.int64),
        labels[arriving],
        capacity=total or min(own, len(samples)),
        seen=len({label for other in stream.tasks[: task.index] for label in other.classes}) if total else 0,
        draw=lambda event, count: int(mix(config.seed, _EVICTION, task.index, event) % np.uint64(count)),
    )
    known = memory if total else np.zeros(0, dtype=np.int64)
    found = np.concatenate([known, arriving])[kept]
    return found if total else np.concatenate([memory, found])
