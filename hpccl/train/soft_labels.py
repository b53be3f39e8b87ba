"""Soft labels of the memory: the logits of the newest old model, in a file that all ranks of a machine map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hpccl.checkpoint.apart import Apart, read_apart, write_apart
from hpccl.data.protocols import Task
from hpccl.dist.agree import on_leader
from hpccl.memory.store import DTYPES, Memory, head_columns, stored
from hpccl.prior.correction import Correction
from hpccl.train.passes import answers
from hpccl.train.state import RunState, World

__all__ = ["relabel", "soft_labels", "write_soft_labels"]


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
            file, soft = write_soft_labels(task, soft_labels(share, table, state, world, corrected), world, whole=whole)
        else:
            phase.images = len(memory)
            file, soft = write_soft_labels(task, soft_labels(memory, table, state, world, corrected), world)
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
    for sample, said, _ in answers(state.engine.predict, memory.sample.numpy(), world):
        named = heads[memory.task[start : start + len(sample)]]
        logits = said.cpu() if corrected is None else corrected(said.cpu())
        found.append(stored(logits.gather(1, named.clamp(min=0)), named, world.config.memory.dtype))
        start += len(sample)
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


def write_soft_labels(
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
    comm = world.comm
    # As bytes, as not every backend supports half precision.
    every = comm.exchange(soft.view(torch.uint8), [len(soft), *[0] * (comm.size - 1)]).view(soft.dtype)

    def write() -> Apart:
        return write_apart(world.folder.path, f"memory/soft/task-{task.index:03d}", whole(every))

    written = on_leader(comm, write, "write the soft labels")
    found = Apart(comm.broadcast_text(None if written is None else written.path))
    return found, read_apart(world.folder.path, found)
