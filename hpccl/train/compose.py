"""From a step's batch to rows: what is said about each image, and with which weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.run import RunConfig
from hpccl.config.sections import RemoveData, per_task
from hpccl.data.order import Batch, BatchPlan
from hpccl.data.protocols import Stream, Task
from hpccl.data.rows import NEW, REPLAY, SOFT, Images, Request, Rows
from hpccl.dist.comm import Comm
from hpccl.memory.budget import quotas
from hpccl.memory.store import Memory, spread
from hpccl.train.removal import less, removed_samples, removed_slots

__all__ = ["Composer", "Part", "plan_task", "planned_steps", "split"]

Ints = npt.NDArray[np.int64]


def plan_task(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> BatchPlan:
    """The steps of a task: its own examples (or all seen ones) and the memory."""
    new = new_samples(config, stream, task)
    return replace(_plan(config, task, len(new), len(memory)), groups=stream.groups("train")[new])


def planned_steps(config: RunConfig, stream: Stream) -> list[int]:
    """How many steps each task will take; 0 for those that are not trained."""
    tasks = stream.tasks
    skipped = len(tasks) - 1 if config.train.only_last else 0
    sizes = [len(task.samples("train")) for task in tasks]
    kept = [sum(quotas(config.memory, sizes[: task.index])) for task in tasks]
    if config.prior.fromp.weight > 0:
        kept = [0] * len(tasks)  # recalled beside the rows of a step
    steps = [
        _plan(config, task, len(new_samples(config, stream, task)), kept[task.index]).num_steps
        for task in tasks[skipped:]
    ]
    return [0] * skipped + steps


def _plan(config: RunConfig, task: Task, num_new: int, num_memory: int) -> BatchPlan:
    mix = config.memory.mix
    return BatchPlan(
        num_new=num_new,
        num_memory=num_memory,
        batch_size=config.train.batch_size,
        epochs=per_task(config.train.epochs, task.index),
        seed=config.seed,
        task=task.index,
        share=mix.share if mix.kind == "stratified" and num_new else None,
        window=config.data.shuffle_window if num_new else 0,
    )


def new_samples(config: RunConfig, stream: Stream, task: Task) -> Ints:
    """[n] sample positions of the data that a task trains on, ascending."""
    own = task.samples("train")
    samples = np.arange(0 if config.train.data == "seen" else own.start, own.stop)
    return (
        np.setdiff1d(samples, removed_samples(config.adapt, stream))
        if isinstance(config.adapt, RemoveData)
        else samples
    )


@dataclass(frozen=True)
class Part:
    """One micro-batch of one rank.

    rows: [p] positions in the step's batch. absent: there were fewer rows than parts and this one only keeps the
    collectives company; its rows count nothing.
    """

    batch: Batch
    rows: npt.NDArray[np.int64]
    absent: bool


def split(batch: Batch, comm: Comm, *, accumulate: int) -> list[Part]:
    """This rank's micro-batches: contiguous, differing by at most one row, no padding."""
    whole = comm.share(len(batch))
    bounds = [whole.start + len(whole) * number // accumulate for number in range(accumulate + 1)]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        rows = np.arange(start, stop)
        # Two rows, not one: BatchNorm cannot normalise a single example.
        company = np.arange(min(2, len(batch)))
        parts.append(Part(batch, rows if len(rows) else company, absent=len(rows) == 0))
    return parts


@dataclass(frozen=True)
class Composer:
    """Turns parts and their images into rows during one task.

    samples: [n] the data that the task trains on; labels: [N] class number of every training example; task_of_class:
    [C]; heads: [T + 1, C] bool, row t is task t's own head, the last row all classes seen so far; tau: [T] weight of a
    memory example by the task it comes from, to which the selector's comes; teacher: the frozen old model on pixels,
    where soft labels belong to the student's view; epochs: of the task; removed: [M] bool, memory examples that are to
    be forgotten, or None.
    """

    config: RunConfig
    samples: Ints
    labels: Tensor
    task_of_class: Tensor
    heads: Tensor
    tau: Tensor
    memory: Memory
    teacher: Callable[[Tensor], Tensor] | None
    device: torch.device
    epochs: int
    removed: Tensor | None = None

    @classmethod
    def build(
        cls,
        config: RunConfig,
        stream: Stream,
        task: Task,
        memory: Memory,
        *,
        teacher: Callable[[Tensor], Tensor] | None,
        device: torch.device,
    ) -> Composer:
        """For one task."""
        num_classes = len(stream.class_names)
        removed = removed_slots(config, stream, memory)
        task_of_class = torch.zeros(num_classes, dtype=torch.int64)
        heads = torch.zeros(len(stream.tasks) + 1, num_classes, dtype=torch.bool)
        for other in stream.tasks:
            task_of_class[list(other.classes)] = other.index
            heads[other.index, list(other.classes)] = True
            heads[-1, list(other.classes)] = other.index <= task.index
        return cls(
            config=config,
            samples=new_samples(config, stream, task),
            labels=torch.from_numpy(stream.labels("train")),
            task_of_class=task_of_class,
            heads=heads,
            tau=_memory_weights(config, stream, memory, removed),
            memory=memory,
            teacher=teacher,
            device=device,
            epochs=per_task(config.train.epochs, task.index),
            removed=removed,
        )

    def request(self, part: Part) -> Request:
        """The images of a part: fresh views, but the stored one where a soft label belongs to it.

        Views that grow (data.progressive) have the epoch's size, whatever the row: a stored label is of the same view
        at data.image_size, a teacher's of the very pixels.
        """
        new, slot = part.batch.new[part.rows], part.batch.slot[part.rows]
        from_memory = slot >= 0
        sample = self.samples[new] if len(self.samples) else new.copy()
        sample[from_memory] = self.memory.sample.numpy()[slot[from_memory]]
        key = part.batch.view[part.rows].copy()
        if self.config.prior.view == "stored":
            soft = from_memory.copy()
            soft[from_memory] = ~self.memory.replay.numpy()[slot[from_memory]]
            key[soft] = 0
        return Request(sample, key, self._side(part.batch.epoch))

    def _side(self, epoch: int) -> int | None:
        """Of the views of an epoch; None where they do not grow."""
        grows, last = self.config.data.progressive, self.config.data.image_size
        return None if grows is None or last is None else grows.side(epoch, self.epochs, last)

    def rows(self, part: Part, images: Images) -> Rows:
        """Rows on the device: one for each image, then those that take back what was learned of some."""
        slot = torch.from_numpy(part.batch.slot[part.rows])
        sample = torch.from_numpy(self.request(part).sample)
        from_memory = slot >= 0
        target, head = self.hard_targets(self.labels[sample])
        weight = torch.full((len(slot),), part.batch.weight_new)
        term = torch.full((len(slot),), NEW)
        temperature = torch.ones(len(slot))
        if bool(from_memory.any()):
            kept = slot[from_memory]
            weight[from_memory] = part.batch.weight_memory * self.memory_weights(kept)
            term[from_memory] = torch.where(self.memory.replay[kept], REPLAY, SOFT)
            soft = term == SOFT
            if bool(soft.any()):
                temperature[soft] = self.config.prior.temperature
                target[soft], head[soft] = self._soft(slot[soft], images.pixels[soft])
        if self.teacher is not None and not bool((term == SOFT).any()):
            self.teacher(images.pixels[:0].to(self.device))  # its passes may be collective: all ranks run equally many
        weight = weight * images.valid
        if part.absent:
            weight = torch.zeros_like(weight)
        rows = Rows(
            pixels=images.pixels,
            noise=torch.from_numpy(part.batch.noise[part.rows]),
            image=torch.arange(len(slot)),
            target=target,
            weight=weight,
            head=head,
            temperature=temperature,
            term=term,
        )
        if self.removed is not None:
            taken = from_memory & self.removed[slot.clamp(min=0)]
            target, head = self.hard_targets(self.labels[sample])
            rows = less(rows, taken, target, head, counted=images.valid & (not part.absent))
        return rows.to(self.device)

    def memory_weights(self, slots: Tensor) -> Tensor:
        """[r] what the examples in some slots of the memory count: tau, times what the selector says.

        Of examples to be forgotten, what is taken back of their soft labels.
        """
        weight = self.tau[self.memory.task[slots]] * self.memory.weight[slots]
        return weight if self.removed is None else self.memory.weight[slots].where(self.removed[slots], weight)

    def hard_targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothed one-hot targets and competing classes of true labels."""
        own = self.config.train.head == "own"
        head = self.heads[self.task_of_class[labels]] if own else self.heads[-1].expand(len(labels), -1)
        smoothing = self.config.train.label_smoothing
        target = head * (smoothing / head.sum(dim=1, keepdim=True))
        target[torch.arange(len(labels)), labels] += 1 - smoothing
        return target, head.clone()

    def _soft(self, slots: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and competing classes that the old model gives."""
        num_classes, temperature = self.heads.shape[1], self.config.prior.temperature
        if self.teacher is None:
            return self.memory.soft_targets(slots, temperature=temperature, num_classes=num_classes)
        columns = self.memory.columns(slots)
        logits = self.teacher(pixels.to(self.device)).cpu().gather(1, columns.clamp(min=0))
        return spread(logits, columns, temperature=temperature, num_classes=num_classes)


def _memory_weights(config: RunConfig, stream: Stream, memory: Memory, removed: Tensor | None) -> Tensor:
    """[T] tau, times N_s / m where memory stands for its whole task, less what is removed."""
    weights = []
    count = len(stream.tasks)
    gone = [0] * count if removed is None else torch.bincount(memory.task[removed], minlength=count).tolist()
    for task, kept in zip(stream.tasks, memory.per_task(count), strict=True):
        less = gone[task.index]
        stands_for = (len(task.samples("train")) - less) / max(kept - less, 1) if config.prior.scale_to_task else 1.0
        weights.append(per_task(config.prior.weight, task.index) * stands_for)
    return torch.tensor(weights)
