"""How much an example in memory counts, by the task that it comes from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.adaptation import RemoveData
from hpccl.config.base import per_task
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Stream, Task
from hpccl.memory.store import Memory
from hpccl.train.kept import num_learned
from hpccl.train.removal import removed_samples, removed_slots

__all__ = ["counted_examples", "memory_weights", "task_of_sample", "true_shares"]

Ints = npt.NDArray[np.int64]


def task_of_sample(stream: Stream) -> Ints:
    """Return the task [N] of every training example; added ones belong to the last task that has their class."""
    last_with = np.zeros(len(stream.class_names), dtype=np.int64)
    for task in stream.tasks:
        last_with[list(task.classes)] = task.index
    found: Ints = last_with[stream.labels("train")]
    for task in stream.tasks:
        own = task.samples("train")
        found[own.start : own.stop] = task.index
    return found


def memory_weights(config: RunConfig, stream: Stream, task: Task, memory: Memory, values: tuple[float, ...]) -> Tensor:
    """Return `values` by task [T], scaled by N_s / m (prior.scale_to_task) or N_t / M (prior.scale_to_new).

    N_s, m: learned examples of past task s, and how many of them are in memory; N_t, M: learned examples of the new
    task, and the size of the memory. Examples that are to be forgotten count in neither N_s nor m, whether they are
    still in memory or not.
    """
    weights = []
    left, kept = counted_examples(config, stream, memory) if config.prior.scale_to_task else ([], [])
    new = num_learned(config, stream, task)
    for other in stream.tasks:
        stands_for = left[other.index] / max(kept[other.index], 1) if config.prior.scale_to_task else 1.0
        if config.prior.scale_to_new:
            stands_for = new / max(len(memory), 1)
        weights.append(per_task(values, other.index) * stands_for)
    return torch.tensor(weights)


def true_shares(config: RunConfig, stream: Stream, memory: Memory) -> Tensor:
    """Return, by task [T], the true label's share of a memory example's weight where examples have both labels."""
    tasks = stream.tasks
    if not config.prior.mixes:
        return torch.zeros(len(tasks))
    own = [num_learned(config, stream, task) for task in tasks]
    kept = memory.per_task(len(tasks))
    return torch.tensor([config.prior.true_share(*each) for each in zip(kept, own, strict=True)])


def counted_examples(config: RunConfig, stream: Stream, memory: Memory) -> tuple[list[int], list[int]]:
    """Return, by task, how many learned examples are not to be forgotten, and how many of these are in memory."""
    count = len(stream.tasks)
    left, kept = [num_learned(config, stream, task) for task in stream.tasks], memory.per_task(count)
    slots = removed_slots(config, stream, memory)
    if slots is None or not isinstance(config.adapt, RemoveData):
        return left, kept
    samples = task_of_sample(stream)[removed_samples(config.adapt, stream)]
    gone = np.bincount(samples, minlength=count), torch.bincount(memory.task[slots], minlength=count).numpy()
    return (np.array(left) - gone[0]).tolist(), (np.array(kept) - gone[1]).tolist()
