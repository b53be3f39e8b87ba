"""The end of a task: choose memory, measure the curvature of the rest, move the anchor, renew soft labels.

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

# Purposes of hashes (numbers differ from those in hpccl.data.order).
_SELECT, _REPLAY = 101, 102
_PICTURES = 100
_THUMBNAIL = 64


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
        _keep_pictures(task, admitted.sample[own].numpy(), admitted.label[own].numpy(), world)
    return admitted


def _selected(task: Task, samples: Ints, memory: Memory, state: RunState, world: World) -> Memory:
    """Admit what the selector keeps of the task's samples, then reduce the memory to the budget."""
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
    """Return `left` with the weights of a smaller sampled choice, for every task that lost examples."""
    config, weight = world.config, left.weight.clone()
    kept = torch.isin(before.sample, left.sample)
    for task in world.stream.tasks[: len(before.heads)]:
        own = before.task == task.index
        if bool(kept[own].all()) or not bool(before.priority[own].any()):  # or of an old checkpoint
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
    """Keep the examples of all tasks with the smallest hashes, up to the budget (reservoir by keys; Vitter 1985)."""
    config = world.config
    keep = min(config.memory.total, len(memory))
    label, sample = memory.label.numpy(), memory.sample.numpy()
    kept = choose(label, sample, keep=keep, balanced=config.memory.balanced, words=(config.seed, _SELECT))
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
        num_train = len(learned.samples("train")) - len(held_out(config, world.stream, learned))
        keep, words = config.prior.num_replayed(len(sample), num_train), (config.seed, _REPLAY, task)
        chosen_ones = choose(label, sample, keep=keep, balanced=config.memory.balanced, words=words)
        replay[own] = torch.from_numpy(np.isin(np.arange(len(sample)), chosen_ones))
    return replace(memory, replay=replay)


def relabel(task: Task, memory: Memory, state: RunState, world: World, corrected: Correction | None = None) -> Memory:
    """Return the memory with soft labels by the present model on the evaluation view.

    With memory.labels=kept, only the new task's examples are labelled; others keep their labels. corrected: correction
    applied to the logits, if any
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
    """Return, by task so far, the classes of its examples' soft labels.

    With train.head=own those of the task; else those seen when the labels are made. With squared differences (DER) all
    classes of the stream, those to come included: if their logits were free, new classes would take over old images.
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
    """Return logits [share, K] of this rank's share of the memory for each task's classes in `heads` [T, K].

    On the CPU, in the memory's dtype. Logits of other classes are dropped batch by batch. corrected: correction applied
    to the logits, if any
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
    """Return soft labels [M, K]: `own` for the task's examples, for all others those in the memory `before`."""
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
    """Write the soft labels [M, K] of all ranks to a file; return the file and the labels, memory-mapped. Collective.

    The leader writes. Files of earlier tasks stay, as checkpoints refer to them.

    Args:
        task: the task that has ended.
        soft: this rank's share.
        world: of the run.
        whole: maps all shares together to what is written.

    Raises:
        FolderError: the run folder cannot be written (on the leader).
        WorldError: the same, on the other ranks.
    """
    comm, path, failure = world.comm, "", None
    # As bytes, as not every backend supports half precision.
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
    """Return a small image unchanged, and the centre of a large one resized to 64 x 64 pixels."""
    if max(picture.shape[:2]) <= _THUMBNAIL or picture.shape[2] != 3:
        return picture
    fitted = ImageOps.fit(Image.fromarray(picture), (_THUMBNAIL, _THUMBNAIL))
    return np.asarray(fitted)


def _keep_pictures(task: Task, sample: Ints, label: Ints, world: World) -> None:
    """Save thumbnails of some of the chosen images for the report's picture grid."""
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
    except FolderError as error:  # they are for the report alone, and other ranks do not wait here
        world.progress.message(f"pictures of the memory are left out of the report: {error}")


def stacked(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Stack pictures to [n, h, w, channels]; smaller ones are padded with black at the right and below."""
    if not pictures:
        return np.zeros((0, 1, 1, 3), np.uint8)
    height, width, channels = np.max([picture.shape for picture in pictures], axis=0)
    found = np.zeros((len(pictures), height, width, channels), np.uint8)
    for place, picture in zip(found, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return found
