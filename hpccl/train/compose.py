"""From a step's batch to rows of the loss: targets, competing classes and weights of each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.run import RunConfig
from hpccl.data.order import Batch, mix
from hpccl.data.protocols import Stream, Task, heads_of
from hpccl.data.rows import CROSS_ENTROPY, DISTILL, NEW, REPLAY, SIGMOID, SOFT, SQUARED, Images, Request, Rows
from hpccl.dist.comm import Comm
from hpccl.memory.store import Memory, scattered, soft_probabilities
from hpccl.train.distill import Distilled
from hpccl.train.kept import kept_at_end
from hpccl.train.plan import new_samples, task_epochs
from hpccl.train.removal import less, removed_slots
from hpccl.train.row_weights import memory_weights as weights_by_task
from hpccl.train.row_weights import task_of_sample, true_shares
from hpccl.train.topology import Topology

__all__ = ["Composer", "MicroBatch", "split"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank shows the network at a time, of one step's batch.

    rows: [p] positions in the step's batch
    num_fillers: how many of the last rows are fillers: rows of other parts, with weight 0 in this one
    anchors: [a] positions among the anchor images, which every step shows
    """

    batch: Batch
    rows: npt.NDArray[np.int64]
    num_fillers: int = 0
    anchors: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def split(batch: Batch, comm: Comm, *, accumulate: int, anchors: int = 0) -> list[MicroBatch]:
    """Split a batch into this rank's micro-batches: contiguous, sizes differing by at most one, no padding."""
    whole = comm.share(len(batch))
    shown = comm.share(anchors)
    parts = []
    for number in range(accumulate):
        rows, extra = (np.array(_cut(items, number, accumulate), dtype=np.int64) for items in (whole, shown))
        fillers = _fillers(rows, len(batch))
        parts.append(MicroBatch(batch, np.concatenate([rows, fillers]), num_fillers=len(fillers), anchors=extra))
    return parts


def _fillers(rows: Ints, count: int) -> Ints:
    """Return the filler rows that bring a part to two rows of a batch of `count` rows.

    An empty part still has to take part in collectives, and BatchNorm cannot normalise a single example. A batch of one
    row is filled with itself.
    """
    start = int(rows[0]) + 1 if len(rows) else 0
    return (start + np.arange(max(0, 2 - len(rows)))) % count


def _cut(items: range, number: int, parts: int) -> range:
    """Return part `number` of `parts` parts whose sizes differ by at most one."""
    return items[len(items) * number // parts : len(items) * (number + 1) // parts]


@dataclass(frozen=True)
class _Examples:
    """What the images of a part show.

    sample: [p] positions in the stream
    slot: [p] places in memory, -1 for new examples
    from_memory: [p] bool
    soft: [p] bool, whether the first row has a soft label
    own: [p] bool, False for fillers
    """

    sample: Tensor
    slot: Tensor
    from_memory: Tensor
    soft: Tensor
    own: Tensor


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
        tau = weights_by_task(config, stream, task, memory, config.prior.weight)
        of_labels = weights_by_task(config, stream, task, memory, (config.prior.label_weight,))
        share = true_shares(config, stream, memory)
        return cls(
            config=config,
            samples=new_samples(config, stream, task, memory),
            labels=torch.from_numpy(stream.labels("train")),
            task_of_sample=torch.from_numpy(task_of_sample(stream)),
            heads=heads,
            tau=tau * (1 - share),
            beta=tau * share if config.prior.mixes else of_labels,
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
        shown = self._examples(part)
        sample, key = shown.sample.numpy(), part.batch.view[part.rows].copy()
        if self.config.prior.view == "stored":
            key[shown.soft.numpy()] = 0
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
        shown = self._examples(part)
        logits = self._teacher_logits(images.pixels[: len(part.rows)], shown)
        rows = self._first(part, images, shown, logits)
        if self.config.prior.label_weight > 0 or self.config.prior.mixes:
            rows = self._with_true_labels(rows, part, shown)
        if self.distilled is not None:
            rows = self._with_distilled(rows, self.distilled, part, shown, logits)
        if self.removed is not None:
            rows = self._with_removed(rows, self.removed, shown)
        rows = replace(rows, weight=rows.weight * images.valid[rows.image] * shown.own[rows.image])
        if self.topology is not None:
            rows = self._with_features(rows, self.topology, part, shown, images.valid)
        plain = self.hard_kind == CROSS_ENTROPY and self.soft_kind == CROSS_ENTROPY
        return replace(rows, kind=None if plain else rows.kind).to(self.device)

    def _examples(self, part: MicroBatch) -> _Examples:
        new, slot = part.batch.new[part.rows], torch.from_numpy(part.batch.slot[part.rows])
        from_memory = slot >= 0
        sample = torch.from_numpy(self.samples[new] if len(self.samples) else new.copy())
        sample[from_memory] = self.memory.sample[slot[from_memory]]
        soft = from_memory.clone()
        soft[from_memory] = ~self.memory.replay[slot[from_memory]]
        own = torch.arange(len(part.rows)) < len(part.rows) - part.num_fillers
        return _Examples(sample, slot, from_memory, soft, own)

    def _first(self, part: MicroBatch, images: Images, shown: _Examples, logits: Tensor) -> Rows:
        """Return one row for each image: with the memory's or the teacher's soft label, or the true label."""
        slot, from_memory, soft = shown.slot, shown.from_memory, shown.soft
        alone = None if self.alone is None else ~from_memory & self.alone[shown.sample]
        target, head = self.hard_targets(shown.sample, alone)
        target[soft], head[soft] = self.soft_targets(slot[soft], logits[soft])
        weight = torch.full((len(slot),), part.batch.weight_new)
        weight[from_memory] = part.batch.weight_memory * self.memory_weights(slot[from_memory])
        return Rows(
            pixels=images.pixels,
            noise=torch.from_numpy(self._noise(part)),
            image=torch.arange(len(slot)),
            target=target,
            weight=weight,
            head=head,
            temperature=torch.where(soft, self._temperatures(slot), 1.0),
            term=torch.where(soft, SOFT, torch.where(from_memory, REPLAY, NEW)),
            kind=torch.where(soft, self.soft_kind, self.hard_kind),
        )

    def _noise(self, part: MicroBatch) -> Ints:
        """Return the noise seeds [p + a] of the part's images; an anchor's depend on step and anchor, not on rank."""
        of_anchors = mix(part.batch.noise[0], part.anchors).astype(np.int64)
        return np.concatenate([part.batch.noise[part.rows], of_anchors])

    def _teacher_logits(self, pixels: Tensor, shown: _Examples) -> Tensor:
        """Return the teacher's logits [p, C] of the images whose rows need them, 0 elsewhere.

        Every rank makes one pass, even over no images, as the teacher's passes may be collective.
        """
        logits = torch.zeros(len(pixels), self.heads.shape[1])
        if self.teacher is None:
            return logits
        asked = shown.soft if self.config.prior.view == "teacher" else torch.zeros_like(shown.soft)
        if self.distilled is not None:
            asked = asked | self.distilled.asks(shown.from_memory)
        logits[asked] = self.teacher(pixels[asked].to(self.device)).cpu()
        return logits

    def _with_true_labels(self, rows: Rows, part: MicroBatch, shown: _Examples) -> Rows:
        """Append a row with the true label for every soft one."""
        image = shown.soft.nonzero().squeeze(1)
        target, head = self.hard_targets(shown.sample[image])
        weight = part.batch.weight_memory * self.memory_weights(shown.slot[image], self.beta)
        return rows.appended(image, target, head, weight=weight, temperature=1.0, term=REPLAY, kind=CROSS_ENTROPY)

    def _with_distilled(
        self, rows: Rows, distilled: Distilled, part: MicroBatch, shown: _Examples, logits: Tensor
    ) -> Rows:
        """Append one row for every old head and every image that is distilled."""
        slot, from_memory = shown.slot, shown.from_memory
        applies = distilled.applies(from_memory)
        if distilled.recorded is not None:
            place = torch.from_numpy(part.batch.new[part.rows]).where(~from_memory, len(self.samples) + slot)
            logits = torch.zeros_like(logits).index_put_((applies,), distilled.logits(place[applies]))
        target, head = distilled.targets(logits[applies])
        counted = rows.weight[: len(slot)]  # of an image's first row, before it is divided between labels and old heads
        weight = (distilled.weight * counted[applies]).repeat_interleave(len(distilled.heads))
        image = applies.nonzero().squeeze(1).repeat_interleave(len(distilled.heads))
        temperature, kind = distilled.config.temperature, distilled.kind
        # Memory's labels count as new images' do, whether its images are distilled or not.
        return replace(rows, weight=rows.weight * distilled.labels).appended(
            image, target, head, weight=weight, temperature=temperature, term=DISTILL, kind=kind
        )

    def _with_removed(self, rows: Rows, removed: Tensor, shown: _Examples) -> Rows:
        """Append a row with the true label and weight -1 for every example that is to be forgotten."""
        taken = shown.from_memory & removed[shown.slot.clamp(min=0)]
        return less(rows, taken, *self.hard_targets(shown.sample))

    def _with_features(self, rows: Rows, topology: Topology, part: MicroBatch, shown: _Examples, valid: Tensor) -> Rows:
        """Add the losses on features: of the anchors, and of the session's own examples."""
        found = topology.rows(shown.sample, shown.own & ~shown.from_memory, part.anchors, valid, batch=len(part.batch))
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

    def _temperatures(self, slots: Tensor) -> Tensor:
        """Return the temperatures [r] of the soft labels of memory examples.

        1 for those to be forgotten: what remains of an example's two rows (removal.py) must not depend on predictions.
        """
        usual = torch.full((len(slots),), self.config.prior.temperature)
        return usual if self.removed is None else usual.masked_fill(self.removed[slots] & (slots >= 0), 1.0)

    def soft_targets(self, slots: Tensor, renewed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return targets and competing classes of soft labels: the memory's, or by the teacher's logits [r, C]."""
        num_classes, temperature = self.heads.shape[1], self._temperatures(slots)[:, None]
        columns = self.memory.columns(slots)
        logits = self.memory.soft[slots]
        if self.teacher is not None and self.config.prior.view == "teacher":
            assert renewed is not None, "the teacher was asked"
            logits = renewed.gather(1, columns.clamp(min=0))
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
