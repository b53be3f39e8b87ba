"""What a task trains on, and in how many steps: known before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import numpy as np
import numpy.typing as npt

from hpccl.config.adaptation import RemoveData
from hpccl.config.base import per_task
from hpccl.config.run import RunConfig
from hpccl.data.order import BatchPlan
from hpccl.data.protocols import Listed, Stream, Task, training_samples
from hpccl.memory.store import Memory
from hpccl.train.kept import held_out, kept_after_each, kept_of_tasks, num_learned
from hpccl.train.removal import removed_samples

__all__ = ["head_steps", "new_samples", "num_new", "plan_run", "plan_task", "planned_steps", "task_epochs"]

Ints = npt.NDArray[np.int64]


def plan_task(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> BatchPlan:
    """Plan the steps of a task over its new data (its own examples, all seen ones, or the memory's) and the memory."""
    new = new_samples(config, stream, task, memory)
    num_memory = 0 if config.train.data == "memory" else len(memory)
    return replace(_plan(config, task, len(new), num_memory), groups=stream.groups("train")[new])


def plan_run(config: RunConfig, stream: Listed) -> list[BatchPlan]:
    """Plan the steps of every task that a run will train, before it starts; not for adaptations, whose tasks differ."""
    kept = [sum(counts) for counts in kept_after_each(config, stream, len(stream.tasks))]
    alone = config.train.data == "memory"
    apart = alone or config.prior.fromp.weight > 0  # memory has no rows in a step
    plans = []
    for task in stream.tasks[-1:] if config.train.only_last else stream.tasks:
        new = kept[task.index + 1] if alone else num_new(config, stream, task)
        plans.append(_plan(config, task, new, 0 if apart else kept[task.index]))
    return plans


def planned_steps(config: RunConfig, stream: Listed) -> list[int]:
    """Return the number of steps of each task; 0 for those that are not trained."""
    plans = plan_run(config, stream)
    return [0] * (len(stream.tasks) - len(plans)) + [plan.num_steps for plan in plans]


def num_new(config: RunConfig, stream: Listed, task: Task) -> int:
    """Return how many examples a task will train on, memory rows not included."""
    match config.train.data:
        case "task":
            return num_learned(config, stream, task)
        case "seen":
            return task.samples("train").stop
        case "memory":
            return sum(kept_of_tasks(config, stream, task.index + 1))
        case _ as never:
            assert_never(never)


def task_epochs(config: RunConfig, task: int) -> int:
    """Return the epochs of a task (counted from 0), including those in which only the last layer learns."""
    return per_task(config.train.epochs, task) + (config.train.head_epochs if task > 0 else 0)


def head_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Return how many steps at the start of a task train only the new classes' rows of the last layer."""
    return config.train.head_epochs * plan.steps_per_epoch if plan.task > 0 else 0


def _plan(config: RunConfig, task: Task, num_new: int, num_memory: int) -> BatchPlan:
    mixed = config.memory.mix
    return BatchPlan(
        num_new=num_new,
        num_memory=num_memory,
        batch_size=config.train.batch_size,
        epochs=task_epochs(config, task.index),
        seed=config.seed,
        task=task.index,
        share=mixed.share if mixed.kind == "stratified" and num_new else None,
        window=config.data.shuffle_window if num_new else 0,
    )


def new_samples(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> Ints:
    """Return the sample positions [n], ascending, of the data that a task trains on, memory rows not included."""
    own = training_samples(task)
    match config.train.data:
        case "task":
            held = held_out(config, stream, task)
            return own if len(held) == 0 else np.setdiff1d(own, held)
        case "seen":
            seen = np.arange(task.samples("train").stop)
            adapt = config.adapt
            return np.setdiff1d(seen, removed_samples(adapt, stream)) if isinstance(adapt, RemoveData) else seen
        case "memory":
            return np.sort(memory.sample.numpy())
        case _ as never:
            assert_never(never)
