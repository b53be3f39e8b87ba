"""From a step's batch to rows of the loss: targets, competing classes and weights of each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.adaptation import AnyAdaptation, RemoveData
from hpccl.config.base import per_task
from hpccl.config.run import RunConfig
from hpccl.data.order import Batch, BatchPlan, mix
from hpccl.data.protocols import Listed, Stream, Task, heads_of, training_samples
from hpccl.data.rows import CROSS_ENTROPY, DISTILL, NEW, REPLAY, SIGMOID, SOFT, SQUARED, Images, Request, Rows
from hpccl.dist.comm import Comm
from hpccl.memory.store import Memory, scattered, soft_probabilities
from hpccl.train.distill import Distilled
from hpccl.train.kept import held_out, kept_after_each, kept_at_end, kept_of_tasks, num_learned
from hpccl.train.removal import less, removed_samples, removed_slots
from hpccl.train.topology import Topology

__all__ = [
    "Composer",
    "MicroBatch",
    "head_steps",
    "new_samples",
    "num_new",
    "plan_task",
    "planned",
    "planned_steps",
    "split",
    "task_epochs",
]

Ints = npt.NDArray[np.int64]


def plan_task(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> BatchPlan:
    """Plan the steps of a task over its new data (its own examples, all seen ones, or the memory's) and the memory."""
    new = new_samples(config, stream, task, memory)
    num_memory = 0 if config.train.data == "memory" else len(memory)
    return replace(_plan(config, task, len(new), num_memory), groups=stream.groups("train")[new])


def planned(config: RunConfig, stream: Listed) -> list[BatchPlan]:
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
    plans = planned(config, stream)
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
    mix = config.memory.mix
    return BatchPlan(
        num_new=num_new,
        num_memory=num_memory,
        batch_size=config.train.batch_size,
        epochs=task_epochs(config, task.index),
        seed=config.seed,
        task=task.index,
        share=mix.share if mix.kind == "stratified" and num_new else None,
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


@dataclass(frozen=True)
class MicroBatch:
    """What one rank shows the network at a time, of one step's batch.

    rows: [p] positions in the step's batch
    company: how many of the last rows are fillers: rows of other parts, with weight 0 in this one
    anchors: [a] positions among the anchor images, which every step shows
    """

    batch: Batch
    rows: npt.NDArray[np.int64]
    company: int = 0
    anchors: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def slot(self) -> Tensor:
        """[p] place in memory of each row's example, -1 for new ones."""
        return torch.from_numpy(self.batch.slot[self.rows])

    @property
    def from_memory(self) -> Tensor:
        """[p] bool."""
        return self.slot >= 0

    @property
    def own(self) -> Tensor:
        """[p] bool, False for fillers."""
        return torch.arange(len(self.rows)) < len(self.rows) - self.company


def split(batch: Batch, comm: Comm, *, accumulate: int, anchors: int = 0) -> list[MicroBatch]:
    """Split a batch into this rank's micro-batches: contiguous, sizes differing by at most one, no padding."""
    whole = comm.share(len(batch))
    shown = comm.share(anchors)
    parts = []
    for number in range(accumulate):
        rows, extra = (np.array(_cut(items, number, accumulate), dtype=np.int64) for items in (whole, shown))
        company = _company(rows, len(batch))
        parts.append(MicroBatch(batch, np.concatenate([rows, company]), company=len(company), anchors=extra))
    return parts


def _company(rows: Ints, count: int) -> Ints:
    """Return the filler rows that bring a part to two rows of a batch of `count` rows.

    An empty part still has to take part in collectives, and BatchNorm cannot normalise a single example. A batch of one
    row has no second one.
    """
    start = int(rows[0]) + 1 if len(rows) else 0
    return (start + np.arange(max(0, min(2, count) - len(rows)))) % count


def _cut(items: range, number: int, parts: int) -> range:
    """Return part `number` of `parts` parts whose sizes differ by at most one."""
    return items[len(items) * number // parts : len(items) * (number + 1) // parts]


@dataclass(frozen=True)
class Composer:
    """Turns parts and their images into rows during one task.

    samples: [n] sample positions of the new data that the task trains on
    labels, task_of_sample: [N] class and task of every training example (tasks may share classes)
    heads: [T + 1, C] bool, row t is task t's own head, the last row all classes seen so far
    tau, beta: [T] weight of a memory example, and of the true label of a soft-labelled one, by the task it comes from;
        multiplied by the selector's weight
    teacher: the frozen old model (pixels to logits), where its logits are of the student's view; or None
    epochs: of the task
    distilled: settings and recorded logits of distillation, or None
    alone: [N] bool, training examples for which as new images only their task's classes compete, or None
    removed: [M] bool, memory examples that are to be forgotten, or None
    topology: losses on features from a net of nodes (TOPIC), or None
    """

    config: RunConfig
    samples: Ints
    labels: Tensor
    task_of_sample: Tensor
    heads: Tensor
    tau: Tensor
    beta: Tensor
    memory: Memory
    teacher: Callable[[Tensor], Tensor] | None
    device: torch.device
    epochs: int
    distilled: Distilled | None = None
    alone: Tensor | None = None
    removed: Tensor | None = None
    topology: Topology | None = None

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
        distilled: Distilled | None = None,
        topology: Topology | None = None,
    ) -> Composer:
        """Build the composer of one task."""
        num_classes = len(stream.class_names)
        removed = removed_slots(config, stream, memory)
        own = heads_of(stream.tasks, num_classes)
        heads = torch.cat([own, own[: task.index + 1].any(dim=0, keepdim=True)])
        tau = _memory_weights(config, stream, task, memory, config.prior.weight)
        said_too = _memory_weights(config, stream, task, memory, (config.prior.label_weight,))
        share = _true_shares(config, stream, memory)
        return cls(
            config=config,
            samples=new_samples(config, stream, task, memory),
            labels=torch.from_numpy(stream.labels("train")),
            task_of_sample=torch.from_numpy(_task_of_sample(stream)),
            heads=heads,
            tau=tau * (1 - share),
            beta=tau * share if config.prior.mixes else said_too,
            memory=memory,
            teacher=teacher,
            device=device,
            epochs=task_epochs(config, task.index),
            distilled=distilled,
            alone=_alone(config, stream, task, memory),
            removed=removed,
            topology=topology,
        )

    @property
    def num_anchors(self) -> int:
        """Number of anchor images that every step shows in addition to its batch."""
        return 0 if self.topology is None else len(self.topology.anchors)

    def request(self, part: MicroBatch) -> Request:
        """Request the images of a part: newly augmented views, or the evaluation view where a soft label is of that.

        With growing views (data.progressive) all have the epoch's size: a stored soft label is of the evaluation view
        at data.image_size, a teacher's of the very pixels.
        """
        sample, key = self._samples(part).numpy(), part.batch.view[part.rows].copy()
        if self.config.prior.view == "stored":
            key[self._soft(part).numpy()] = 0
        if self.topology is not None:
            sample = np.concatenate([sample, self.topology.anchors[part.anchors]])
            key = np.concatenate([key, np.zeros(len(part.anchors), dtype=np.uint64)])
        return Request(sample, key, self._side(part.batch.epoch))

    def _side(self, epoch: int) -> int | None:
        """Return the side of an epoch's views in pixels; None where they do not grow."""
        grows, last = self.config.data.progressive, self.config.data.image_size
        return None if grows is None or last is None else grows.side(epoch, self.epochs, last)

    def rows(self, part: MicroBatch, images: Images) -> Rows:
        """Return the rows of a part, on the device: one for each image, then further rows of some of the images."""
        said = self._ask(images.pixels[: len(part.rows)], part)
        rows = self._first(part, images, said)
        if self.config.prior.label_weight > 0 or self.config.prior.mixes:
            rows = self._with_true_labels(rows, part)
        if self.distilled is not None:
            rows = self._with_distilled(rows, self.distilled, part, said)
        if self.removed is not None:
            rows = self._with_removed(rows, self.removed, part)
        rows = replace(rows, weight=rows.weight * images.valid[rows.image] * part.own[rows.image])
        if self.topology is not None:
            rows = self._with_features(rows, self.topology, part, images.valid)
        plain = self.hard_kind == CROSS_ENTROPY and self.soft_kind == CROSS_ENTROPY
        return replace(rows, kind=None if plain else rows.kind).to(self.device)

    def _samples(self, part: MicroBatch) -> Tensor:
        """Return the sample positions [p] of a part's rows."""
        new, from_memory = part.batch.new[part.rows], part.from_memory
        sample = torch.from_numpy(self.samples[new] if len(self.samples) else new.copy())
        sample[from_memory] = self.memory.sample[part.slot[from_memory]]
        return sample

    def _soft(self, part: MicroBatch) -> Tensor:
        """Return which images [p] of a part have a soft label in their first row."""
        from_memory = part.from_memory
        soft = from_memory.clone()
        soft[from_memory] = ~self.memory.replay[part.slot[from_memory]]
        return soft

    def _first(self, part: MicroBatch, images: Images, said: Tensor) -> Rows:
        """Return one row for each image: with the memory's or the teacher's soft label, or the true label."""
        slot, from_memory, soft = part.slot, part.from_memory, self._soft(part)
        sample = self._samples(part)
        alone = None if self.alone is None else ~from_memory & self.alone[sample]
        target, head = self.hard_targets(sample, alone)
        target[soft], head[soft] = self.soft_targets(slot[soft], said[soft])
        weight = torch.full((len(slot),), part.batch.weight_new)
        weight[from_memory] = part.batch.weight_memory * self.memory_weights(slot[from_memory])
        return Rows(
            pixels=images.pixels,
            noise=torch.from_numpy(self._noise(part)),
            image=torch.arange(len(slot)),
            target=target,
            weight=weight,
            head=head,
            temperature=torch.where(soft, self.config.prior.temperature, 1.0),
            term=torch.where(soft, SOFT, torch.where(from_memory, REPLAY, NEW)),
            kind=torch.where(soft, self.soft_kind, self.hard_kind),
        )

    def _noise(self, part: MicroBatch) -> Ints:
        """Return the noise seeds [p + a] of the part's images; an anchor's depend on step and anchor, not on rank."""
        of_anchors = mix(part.batch.noise[0], part.anchors).astype(np.int64)
        return np.concatenate([part.batch.noise[part.rows], of_anchors])

    def _ask(self, pixels: Tensor, part: MicroBatch) -> Tensor:
        """Return the teacher's logits [p, C] of the images whose rows need them, 0 elsewhere.

        Every rank makes one pass, even over no images, as the teacher's passes may be collective.
        """
        said = torch.zeros(len(pixels), self.heads.shape[1])
        if self.teacher is None:
            return said
        asked = self._soft(part) if self.config.prior.view == "teacher" else torch.zeros(len(pixels), dtype=torch.bool)
        if self.distilled is not None:
            asked = asked | self.distilled.asks(part.from_memory)
        said[asked] = self.teacher(pixels[asked].to(self.device)).cpu()
        return said

    def _with_true_labels(self, rows: Rows, part: MicroBatch) -> Rows:
        """Append a row with the true label for every soft one."""
        soft = self._soft(part)
        target, head = self.hard_targets(self._samples(part)[soft])
        weight = part.batch.weight_memory * self.memory_weights(part.slot[soft], self.beta)
        return _with(rows, soft, target, head, weight=weight, temperature=1.0, term=REPLAY, kind=CROSS_ENTROPY)

    def _with_distilled(self, rows: Rows, distilled: Distilled, part: MicroBatch, said: Tensor) -> Rows:
        """Append one row for every old head and every image that is distilled."""
        slot, from_memory = part.slot, part.from_memory
        applies = distilled.applies(from_memory)
        if distilled.recorded is not None:
            place = torch.from_numpy(part.batch.new[part.rows]).where(~from_memory, len(self.samples) + slot)
            said = torch.zeros_like(said).index_put_((applies,), distilled.logits(place[applies]))
        target, head = distilled.targets(said[applies])
        counted = rows.weight[: len(slot)]  # of an image's first row, before it is divided between labels and old heads
        weight = (distilled.weight * counted[applies]).repeat_interleave(len(distilled.heads))
        by_label = torch.where(applies, distilled.labels, 1.0)[rows.image]
        image = applies.nonzero().squeeze(1).repeat_interleave(len(distilled.heads))
        return _with(
            replace(rows, weight=rows.weight * by_label), image, target, head,
            weight=weight, temperature=distilled.config.temperature, term=DISTILL, kind=distilled.kind,
        )  # fmt: skip

    def _with_removed(self, rows: Rows, removed: Tensor, part: MicroBatch) -> Rows:
        """Append a row with the true label and weight -1 for every example that is to be forgotten."""
        taken = part.from_memory & removed[part.slot.clamp(min=0)]
        return less(rows, taken, *self.hard_targets(self._samples(part)))

    def _with_features(self, rows: Rows, topology: Topology, part: MicroBatch, valid: Tensor) -> Rows:
        """Add the losses on features: of the anchors, and of the session's own examples."""
        new = part.own & ~part.from_memory
        found = topology.rows(self._samples(part), new, part.anchors, valid, batch=len(part.batch))
        return replace(rows, features=found)

    @property
    def hard_kind(self) -> int:
        """The loss of rows with true labels: SIGMOID or CROSS_ENTROPY."""
        return SIGMOID if self.config.train.loss == "sigmoid" else CROSS_ENTROPY

    @property
    def soft_kind(self) -> int:
        """The loss of the memory's soft-labelled rows: SQUARED or CROSS_ENTROPY."""
        return SQUARED if self.config.prior.loss == "squared" else CROSS_ENTROPY

    def memory_weights(self, slots: Tensor, by_task: Tensor | None = None) -> Tensor:
        """Return the weights [r] of examples in some slots of the memory: tau (or `by_task` [T]) times the selector's.

        Examples to be forgotten have the weight of the soft label that is taken back: their memory weight alone.
        """
        alone = self.memory.weight[slots]
        weight = (self.tau if by_task is None else by_task)[self.memory.task[slots]] * alone
        return weight if self.removed is None else alone.where(self.removed[slots], weight)

    def hard_targets(self, samples: Tensor, alone: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return smoothed one-hot targets and competing classes, [r, C] each, of training examples with true labels.

        alone: [r] bool, examples for which only the classes of their own task compete, whatever `train.head` is.
        With one sigmoid per class, the old classes are left out where the same images are distilled.
        """
        own, labels = self.config.train.head == "own", self.labels[samples]
        seen = torch.ones_like(self.heads[-1]) if self.config.train.competing == "all" else self.heads[-1]
        head = self.heads[self.task_of_sample[samples]] if own else seen.expand(len(labels), -1)
        if alone is not None:
            head = self.heads[self.task_of_sample[samples]].where(alone[:, None], head)
        smoothing = self.config.train.label_smoothing
        target = head * (smoothing / head.sum(dim=1, keepdim=True))
        target[torch.arange(len(labels)), labels] += 1 - smoothing
        if self.distilled is not None and self.hard_kind == SIGMOID:
            head = head & ~self.distilled.heads.any(dim=0)
            target = target * head
        return target, head.clone()

    def soft_targets(self, slots: Tensor, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return targets and competing classes of soft labels: the memory's, or the teacher's logits `said` [r, C]."""
        num_classes, temperature = self.heads.shape[1], self.config.prior.temperature
        columns = self.memory.columns(slots)
        renewed = self.teacher is not None and self.config.prior.view == "teacher"
        logits = self.memory.soft[slots]
        if renewed:
            assert said is not None, "the teacher was asked"
            logits = said.gather(1, columns.clamp(min=0))
        if self.soft_kind == SQUARED:
            return scattered(logits.float(), columns, num_classes=num_classes)
        target, known = soft_probabilities(logits, columns, temperature=temperature, num_classes=num_classes)
        later = self.config.train.head == "seen" and self.config.prior.classes == "seen"
        return target, known | self.heads[-1] if later else known


def _alone(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> Tensor | None:
    """Return for which training examples [N] only their task's classes compete as long as they are new (ER-ACE).

    Those that memory will keep compete among all classes already, as those in a buffer that is filled as the stream
    passes: rows of memory would know the new classes as wrong answers alone, and push their logits down.
    """
    if config.train.competing != "task":
        return None
    alone = torch.ones(len(stream.labels("train")), dtype=torch.bool)
    if config.memory.kept and not isinstance(config.adapt, AnyAdaptation):  # which keeps no further examples
        alone[torch.from_numpy(kept_at_end(config, stream, task, memory.sample.numpy()))] = False
    return alone


def _with(
    rows: Rows,
    image: Tensor,
    target: Tensor,
    head: Tensor,
    *,
    weight: Tensor,
    temperature: float,
    term: int,
    kind: int,
) -> Rows:
    """Append rows of images that are given by index or by mask [n] bool."""
    assert rows.kind is not None, "it is left out at the end"
    image = image.nonzero().squeeze(1) if image.dtype == torch.bool else image
    return replace(
        rows,
        image=torch.cat([rows.image, image]),
        target=torch.cat([rows.target, target]),
        weight=torch.cat([rows.weight, weight]),
        head=torch.cat([rows.head, head]),
        temperature=torch.cat([rows.temperature, torch.full((len(image),), temperature)]),
        term=torch.cat([rows.term, torch.full((len(image),), term)]),
        kind=torch.cat([rows.kind, torch.full((len(image),), kind)]),
    )


def _task_of_sample(stream: Stream) -> Ints:
    """Return the task [N] of every training example; added ones belong to the last task that has their class."""
    last_with = np.zeros(len(stream.class_names), dtype=np.int64)
    for task in stream.tasks:
        last_with[list(task.classes)] = task.index
    found: Ints = last_with[stream.labels("train")]
    for task in stream.tasks:
        own = task.samples("train")
        found[own.start : own.stop] = task.index
    return found


def _memory_weights(config: RunConfig, stream: Stream, task: Task, memory: Memory, values: tuple[float, ...]) -> Tensor:
    """Return `values` by task [T], scaled by N_s / m (prior.scale_to_task) or N_t / M (prior.scale_to_new).

    N_s, m: training examples of past task s, and how many of them are in memory; N_t, M: learned examples of the new
    task, and the size of the memory. Examples that are to be forgotten count in neither N_s nor m, whether they are
    still in memory or not.
    """
    weights = []
    left, kept = _remaining(config, stream, memory) if config.prior.scale_to_task else ([], [])
    new = num_learned(config, stream, task)
    for other in stream.tasks:
        stands_for = left[other.index] / max(kept[other.index], 1) if config.prior.scale_to_task else 1.0
        if config.prior.scale_to_new:
            stands_for = new / max(len(memory), 1)
        weights.append(per_task(values, other.index) * stands_for)
    return torch.tensor(weights)


def _true_shares(config: RunConfig, stream: Stream, memory: Memory) -> Tensor:
    """Return, by task [T], the true label's share of a memory example's weight where examples have both labels."""
    tasks = stream.tasks
    if not config.prior.mixes:
        return torch.zeros(len(tasks))
    own = [num_learned(config, stream, task) for task in tasks]
    kept = memory.per_task(len(tasks))
    return torch.tensor([config.prior.true_share(*each) for each in zip(kept, own, strict=True)])


def _remaining(config: RunConfig, stream: Stream, memory: Memory) -> tuple[list[int], list[int]]:
    """Return, by task, how many training examples are not to be forgotten, and how many of these are in memory."""
    count = len(stream.tasks)
    left, kept = [len(task.samples("train")) for task in stream.tasks], memory.per_task(count)
    slots = removed_slots(config, stream, memory)
    if slots is None or not isinstance(config.adapt, RemoveData):
        return left, kept
    samples = _task_of_sample(stream)[removed_samples(config.adapt, stream)]
    gone = np.bincount(samples, minlength=count), torch.bincount(memory.task[slots], minlength=count).numpy()
    return (np.array(left) - gone[0]).tolist(), (np.array(kept) - gone[1]).tolist()
