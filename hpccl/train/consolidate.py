"""The end of a task: choose memory, measure the curvature of the rest, move the anchor, renew soft labels.

`state.prior` is replaced at the very end, and files that are written before have names and contents that depend on the
run alone: a job may be killed at any point, and repeats the phase.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from hpccl.config.memory import GreedySelector
from hpccl.data.protocols import Task, training_samples
from hpccl.memory.budget import kept_of
from hpccl.memory.select import Candidates, Choice, choose, thinned
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.train.copies import keep_images
from hpccl.train.end_of_task import class_means, correction
from hpccl.train.kept import (
    admitted_greedily,
    held_out,
    kept_of_tasks,
    num_learned,
    reservoir,
    selection_words,
)
from hpccl.train.measure import functional, measure
from hpccl.train.pictures import keep_pictures
from hpccl.train.selection import chosen
from hpccl.train.soft_labels import relabel
from hpccl.train.state import RunState, World
from hpccl.train.topology import end_session

__all__ = ["admit_first", "consolidate", "select"]

Ints = npt.NDArray[np.int64]

# Purpose of hashes (its number differs from those in hpccl.data.order).
_REPLAY = 102


def consolidate(task: Task, state: RunState, world: World) -> None:
    """Replace the state's prior by that of the next task.

    Raises:
        Stopped: the run was asked to stop; nothing was changed.
    """
    if world.config.train.data == "memory":
        keep_images(task, state.prior.memory, world)
        memory = relabel(task, state.prior.memory, state, world)
        state.prior = Prior(memory, means=class_means(task, memory, state, world))
        return
    corrected = correction(task, state, world)
    memory = select(task, state.prior.memory, state, world)
    keep_images(task, memory, world)
    anchor = state.engine.gather()
    quadratic = measure(task, memory, anchor, state, world, before=state.prior.memory)
    memory = relabel(task, memory, state, world, corrected)
    fromp = functional(task, memory, state, world)
    means = class_means(task, memory, state, world)
    gas = end_session(task, state, world)
    state.prior = Prior(memory, quadratic, anchor, corrected, means, fromp, gas)


def admit_first(task: Task, state: RunState, world: World) -> None:
    """Choose the task's memory before training, where training uses the memory alone (train.data=memory).

    With train.only_last, memory of the skipped tasks is chosen first; the choice does not depend on the network.
    """
    if world.config.train.data != "memory":
        return
    for each in world.stream.tasks[0 if world.config.train.only_last else task.index : task.index + 1]:
        state.prior = replace(state.prior, memory=select(each, state.prior.memory, state, world))


def select(task: Task, memory: Memory, state: RunState, world: World) -> Memory:
    """Return the memory with the chosen examples of the task, earlier tasks' reduced to what the budget leaves."""
    config = world.config
    if not config.memory.kept:
        return memory
    with world.phase(task, "select") as phase:
        samples = training_samples(task)
        samples = np.setdiff1d(samples, held_out(config, world.stream, task))
        phase.images = len(samples)
        if isinstance(config.memory.selector, GreedySelector):
            admitted = _balanced(task, memory, world)
        else:
            admitted = _selected(task, samples, memory, state, world)
        admitted = _replayed(memory, admitted, world)
    if world.comm.leader:
        own = admitted.task == task.index
        keep_pictures(task, admitted.sample[own].numpy(), admitted.label[own].numpy(), world)
    return admitted


def _selected(task: Task, samples: Ints, memory: Memory, state: RunState, world: World) -> Memory:
    """Admit what the selector keeps of the task's samples, then reduce the memory to the budget."""
    config = world.config
    drained = config.memory.total > 0 and config.memory.selector.kind == "reservoir"
    share = kept_of_tasks(config, world.stream, task.index + 1)
    given = Candidates(
        samples=samples,
        labels=world.stream.labels("train")[samples],
        keep=kept_of(config.memory, len(samples)) if drained else share[-1],
        balanced=config.memory.balanced,
        words=selection_words(config, None if drained else task.index),
    )
    choice = chosen(task, given, state, world)
    admitted = memory.admit(
        task=task.index,
        sample=torch.from_numpy(choice.sample),
        label=torch.from_numpy(world.stream.labels("train")[choice.sample]),
        replay=torch.zeros(len(choice.sample), dtype=torch.bool),
        weight=torch.from_numpy(choice.weight),
        order=torch.from_numpy(choice.order),
        priority=torch.from_numpy(choice.priority),
    )
    if drained:
        return _drained(admitted, world)
    left = admitted.shrunk(share)
    sampled = getattr(config.memory.selector, "sampled", False)
    return _drawn_anew(admitted, left, world) if sampled and not config.prior.stands_alone else left


def _drawn_anew(before: Memory, left: Memory, world: World) -> Memory:
    """Return `left` with the weights of a smaller sampled choice, for every task that lost examples."""
    config, weight = world.config, left.weight.clone()
    kept = torch.isin(before.sample, left.sample)
    for task in world.stream.tasks[: len(before.heads)]:
        own = before.task == task.index
        if bool(kept[own].all()) or not bool(before.priority[own].any()):  # or of an old checkpoint
            continue
        columns = (before.sample, before.order, before.weight.double(), before.priority)
        choice = Choice(*(column[own].numpy() for column in columns))
        group = before.label[own].unique(return_inverse=True)[1].numpy()
        found = thinned(
            choice,
            group if config.memory.balanced else np.zeros_like(group),
            kept[own].numpy(),
            of=num_learned(config, world.stream, task),
            words=selection_words(config, task.index),
        )
        weight[left.task == task.index] = torch.from_numpy(found).float()[kept[own]]
    return replace(left, weight=weight)


def _balanced(task: Task, memory: Memory, world: World) -> Memory:
    """Return what GDumb's sampler keeps after the task's examples have passed, in the order of their arrival."""
    before = memory.sample.numpy()
    kept = admitted_greedily(world.config, world.stream, task, before)
    new = kept[~np.isin(kept, before)]
    admitted = memory.admit(
        task=task.index,
        sample=torch.from_numpy(new),
        label=torch.from_numpy(world.stream.labels("train")[new]),
        replay=torch.zeros(len(new), dtype=torch.bool),
    )
    return admitted.only(torch.from_numpy(np.isin(admitted.sample.numpy(), kept)))


def _drained(memory: Memory, world: World) -> Memory:
    """Keep what is left in the reservoir of the examples of all tasks."""
    kept = reservoir(world.config, memory.label.numpy(), memory.sample.numpy())
    return memory.only(torch.from_numpy(np.isin(np.arange(len(memory)), kept)))


def _replayed(before: Memory, memory: Memory, world: World) -> Memory:
    """Choose anew which examples are replayed by their true label, for tasks whose kept examples have changed."""
    config = world.config
    replay = memory.replay.clone()
    for task in memory.task.unique().tolist():
        own = memory.task == task
        sample, label = memory.sample[own].numpy(), memory.label[own].numpy()
        if np.array_equal(sample, before.sample[before.task == task].numpy()):
            continue
        learned = world.stream.tasks[task]
        num_train = num_learned(config, world.stream, learned)
        keep, words = config.prior.num_replayed(len(sample), num_train), (config.seed, _REPLAY, task)
        chosen_ones = choose(label, sample, keep=keep, balanced=config.memory.balanced, words=words)
        replay[own] = torch.from_numpy(np.isin(np.arange(len(sample)), chosen_ones))
    return replace(memory, replay=replay)
