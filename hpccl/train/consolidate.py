"""What happens at the end of a task: choose memory, measure the curvature of the rest, move the anchor, re-label.

`state.prior` is replaced at the very end, and files that are written before have names and contents that depend on the
run alone: a job may be killed at any point, and repeats the phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hpccl.checkpoint.apart import Apart, read_apart, write_apart
from hpccl.config.memory import GreedySelector
from hpccl.data.protocols import Task, training_samples
from hpccl.errors import DataError, FolderError, WorldError
from hpccl.folder import replacing
from hpccl.memory.budget import kept_of
from hpccl.memory.select import Candidates, Choice, choose, thinned
from hpccl.memory.store import DTYPES, Memory, head_columns, stored
from hpccl.prior.correction import Correction
from hpccl.prior.prior import Prior
from hpccl.train.copies import keep_images
from hpccl.train.end_of_task import class_means, correction
from hpccl.train.kept import admitted_greedily, held_out, kept_of_tasks, num_learned
from hpccl.train.measure import functional, measure
from hpccl.train.passes import shared_images
from hpccl.train.selection import chosen
from hpccl.train.state import RunState, World
from hpccl.train.topology import end_session

__all__ = ["admit_first", "consolidate", "thumbnail"]

Ints = npt.NDArray[np.int64]

# What a hash is for (apart from those of hpccl.data.order).
_SELECT, _REPLAY = 101, 102
_PICTURES = 100
_THUMBNAIL = 64


def consolidate(task: Task, state: RunState, world: World) -> None:
    """Make the prior of the next task.

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
    """Choose the task's memory before it is trained on, where the memory is all that is trained on.

    With train.only_last, that of the tasks that are skipped first: the choice knows no network.
    """
    if world.config.train.data != "memory":
        return
    for each in world.stream.tasks[0 if world.config.train.only_last else task.index : task.index + 1]:
        state.prior = replace(state.prior, memory=select(each, state.prior.memory, state, world))


def select(task: Task, memory: Memory, state: RunState, world: World) -> Memory:
    """The memory with the chosen examples of the task admitted, and as few of earlier tasks as the budget leaves."""
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
        _keep_pictures(task, admitted.sample[own].numpy(), admitted.label[own].numpy(), world)
    return admitted


def _selected(task: Task, samples: Ints, memory: Memory, state: RunState, world: World) -> Memory:
    """With what the selector keeps of the task's samples, cut down to the budget."""
    config = world.config
    reservoir = config.memory.total > 0 and config.memory.selector.kind == "reservoir"
    share = kept_of_tasks(config, world.stream, task.index + 1)
    given = Candidates(
        samples=samples,
        labels=world.stream.labels("train")[samples],
        keep=kept_of(config.memory, len(samples)) if reservoir else share[-1],
        balanced=config.memory.balanced,
        words=(config.seed, _SELECT) if reservoir else (config.seed, _SELECT, task.index),
    )
    choice = chosen(task, given, state, world)
    admitted = memory.admit(
        task=task.index,
        sample=torch.from_numpy(choice.sample),
        label=torch.from_numpy(world.stream.labels("train")[choice.sample]),
        replay=torch.zeros(len(choice.sample), dtype=torch.bool),
        weight=torch.from_numpy(choice.weight),
        rank=torch.from_numpy(choice.rank),
        priority=torch.from_numpy(choice.priority),
    )
    if reservoir:
        return _drained(admitted, world)
    left = admitted.shrunk(share)
    return _drawn_anew(admitted, left, world) if getattr(config.memory.selector, "sampled", False) else left


def _drawn_anew(before: Memory, left: Memory, world: World) -> Memory:
    """With the weights of a sampled choice of as many, for every task that lost examples."""
    config, weight = world.config, left.weight.clone()
    kept = torch.isin(before.sample, left.sample)
    for task in world.stream.tasks[: len(before.heads)]:
        own = before.task == task.index
        if bool(kept[own].all()) or not bool(before.priority[own].any()):  # of a checkpoint that knows none
            continue
        columns = (before.sample, before.rank, before.weight.double(), before.priority)
        choice = Choice(*(column[own].numpy() for column in columns))
        group = before.label[own].unique(return_inverse=True)[1].numpy()
        found = thinned(
            choice,
            group if config.memory.balanced else np.zeros_like(group),
            kept[own].numpy(),
            of=num_learned(config, world.stream, task),
            words=(config.seed, _SELECT, task.index),
        )
        weight[left.task == task.index] = torch.from_numpy(found).float()[kept[own]]
    return replace(left, weight=weight)


def _balanced(task: Task, memory: Memory, world: World) -> Memory:
    """What GDumb's sampler leaves when the task's examples have gone by; in the order of their arrival."""
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
    """The smallest hashes of all tasks' examples, as many as the budget allows (Vitter 1985, by sorted keys)."""
    config = world.config
    keep = min(config.memory.total, len(memory))
    label, sample = memory.label.numpy(), memory.sample.numpy()
    kept = choose(label, sample, keep=keep, balanced=config.memory.balanced, words=(config.seed, _SELECT))
    return memory.only(torch.from_numpy(np.isin(np.arange(len(memory)), kept)))


def _replayed(before: Memory, memory: Memory, world: World) -> Memory:
    """Say anew, of the tasks whose examples are others than before, which examples speak by their true label."""
    config = world.config
    replay = memory.replay.clone()
    for task in memory.task.unique().tolist():
        own = memory.task == task
        sample, label = memory.sample[own].numpy(), memory.label[own].numpy()
        if np.array_equal(sample, before.sample[before.task == task].numpy()):
            continue
        learned = world.stream.tasks[task]
        num_train = len(learned.samples("train")) - len(held_out(config, world.stream, learned))
        keep, words = config.prior.num_replayed(len(sample), num_train), (config.seed, _REPLAY, task)
        chosen_ones = choose(label, sample, keep=keep, balanced=config.memory.balanced, words=words)
        replay[own] = torch.from_numpy(np.isin(np.arange(len(sample)), chosen_ones))
    return replace(memory, replay=replay)


def relabel(task: Task, memory: Memory, state: RunState, world: World, corrected: Correction | None = None) -> Memory:
    """All memory with the soft labels of the present model on the stored view; memory.labels=kept: the task's own.

    corrected: of the present model's logits, before they become labels
    """
    if len(memory) == 0:
        return memory
    table = head_columns(_labelled(task, world))
    with world.phase(task, "relabel") as phase:
        if world.config.memory.labels == "kept":
            new = memory.task == task.index
            phase.images = int(new.sum())
            share, whole = memory.only(new), partial(_with_kept, task=task, memory=memory, before=state.prior.memory)
            file, soft = in_a_file(task, soft_labels(share, table, state, world, corrected), world, whole=whole)
        else:
            phase.images = len(memory)
            file, soft = in_a_file(task, soft_labels(memory, table, state, world, corrected), world)
        relabelled = memory.mapped(soft, table, file)
    world.log.write(
        "memory",
        task=task.index,
        size=len(memory),
        per_task=memory.per_task(task.index + 1),
        bytes=relabelled.num_bytes,
        soft_bytes=relabelled.soft_bytes,
        agreement=relabelled.agreement(task.index + 1),
        selector=world.config.memory.selector.kind,
        largest_weight=float(memory.weight.max()),
    )
    return relabelled


def _labelled(task: Task, world: World) -> list[list[int]]:
    """By task so far, the classes that the soft labels of its examples speak of.

    The own head; or the classes that were seen when they are made. Squared differences (DER) then hold all logits, also
    those of classes to come: where nothing holds them, new classes take over old images.
    """
    config, tasks = world.config, world.stream.tasks[: task.index + 1]
    if config.train.head == "own":
        return [list(other.classes) for other in tasks]
    if config.prior.loss == "squared":
        return [list(range(len(world.stream.class_names)))] * len(tasks)
    kept = config.memory.labels == "kept"
    return [
        sorted({number for seen in tasks[: index + 1 if kept else len(tasks)] for number in seen.classes})
        for index in range(len(tasks))
    ]


def soft_labels(
    memory: Memory, heads: Tensor, state: RunState, world: World, corrected: Correction | None = None
) -> Tensor:
    """[share, K] logits of this rank's share of the memory, of each task's classes in `heads` [T, K], as stored.

    corrected: of the logits, if there is one. On the CPU. Logits of other classes live no longer than their batch.
    """
    found = [torch.zeros(0, heads.shape[1], dtype=DTYPES[world.config.memory.dtype])]
    start = world.comm.share(len(memory)).start
    for seen in shared_images(memory.sample.numpy(), world, size=world.stream_batch):
        number = len(seen.sample)
        named = heads[memory.task[start : start + number]]
        logits = state.engine.predict(seen.pixels)[:number].cpu()
        logits = logits if corrected is None else corrected(logits)
        found.append(stored(logits.gather(1, named.clamp(min=0)), named, world.config.memory.dtype))
        start += number
    return torch.cat(found)


def _with_kept(own: Tensor, task: Task, memory: Memory, before: Memory) -> Tensor:
    """[M, K] soft labels: `own` of the task's examples, and of all others those they had in the memory `before`."""
    new = memory.task == task.index
    soft = own.new_zeros(len(memory), own.shape[1])
    assert bool(torch.isin(memory.sample[~new], before.sample).all()), "what came earlier was in memory"
    order = before.sample.argsort()
    old = order[torch.searchsorted(before.sample[order], memory.sample[~new])]
    soft[~new, : before.soft.shape[1]] = before.soft[old].to(soft.dtype)
    soft[new] = own
    return soft


def in_a_file(
    task: Task, soft: Tensor, world: World, whole: Callable[[Tensor], Tensor] = lambda every: every
) -> tuple[Apart, Tensor]:
    """Where the soft labels [M, K] are after `task`, and themselves, mapped; from every rank's share. Collective.

    The leader writes. Files of earlier tasks stay, for checkpoints name them.

    Args:
        task: the last one.
        soft: this rank's share.
        world: of the run.
        whole: what is written, of all shares together.

    Raises:
        FolderError: the run folder cannot be written.
        WorldError: ... by the leader.
    """
    comm, path, failure = world.comm, "", None
    # As bytes, for not every backend knows half precision.
    every = comm.exchange(soft.view(torch.uint8), [len(soft), *[0] * (comm.size - 1)]).view(soft.dtype)
    if comm.leader:
        try:
            path = write_apart(world.folder.path, f"memory/soft/task-{task.index:03d}", whole(every)).path
        except FolderError as error:
            failure = error
    if comm.any(failure is not None):
        raise failure or WorldError("soft labels were not written: the first process could not; see its message")
    found = Apart(comm.broadcast_text(path))
    return found, read_apart(world.folder.path, found)


def thumbnail(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A small image as it is; the middle of a large one, shrunk to 64 pixels."""
    if max(picture.shape[:2]) <= _THUMBNAIL or picture.shape[2] != 3:
        return picture
    fitted = ImageOps.fit(Image.fromarray(picture), (_THUMBNAIL, _THUMBNAIL))
    return np.asarray(fitted)


def _keep_pictures(task: Task, sample: Ints, label: Ints, world: World) -> None:
    """Some of the chosen images, as stored, for the report's picture grid."""
    few = np.linspace(0, len(sample) - 1, num=min(len(sample), _PICTURES)).astype(np.int64)
    pictures, shown = [], []
    for number in few:
        try:
            pictures.append(thumbnail(world.stream.raw(int(sample[number]))))
            shown.append(number)
        except DataError:  # already reported; data.bad_images is `skip`
            continue
    names = world.stream.sample_names("train", sample[shown])
    try:
        with replacing(world.folder.memory / f"task-{task.index}.npz") as path, open(path, "wb") as file:
            images, number = stacked(pictures), np.array(task.index)
            np.savez(file, images=images, labels=label[shown], names=np.array(names), task=number)
    except FolderError as error:  # only a report shows them, and the other processes are going on
        world.progress.message(f"pictures of the memory are left out of the report: {error}")


def stacked(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """[n, h, w, channels]; smaller ones have black margins at the right and below."""
    if not pictures:
        return np.zeros((0, 1, 1, 3), np.uint8)
    height, width, channels = np.max([picture.shape for picture in pictures], axis=0)
    found = np.zeros((len(pictures), height, width, channels), np.uint8)
    for place, picture in zip(found, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return found
