"""The memory: the kept examples of past tasks, and the soft labels that the newest old model gives them.

Images stay where they are (shards, copies of some, or the decoded cache) and are identified by sample position; the
memory itself is a few tensors. The soft labels, which are most of it, are in a file that all ranks of a machine map;
the rest is replicated on every rank. Legend: M examples, T tasks, K classes of the widest head that labelled them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hpccl.checkpoint.apart import Apart

__all__ = ["DTYPES", "Memory", "head_columns", "scattered", "soft_probabilities", "stored"]

_TOGETHER = 8192  # soft labels that are processed at a time
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Memory:
    """Kept examples, in the order they were admitted.

    sample:  [M] int64, position in the stream's training data
    task:    [M] int64, the task an example comes from
    label:   [M] int64, class number in the stream
    replay:  [M] bool, True: trained on with its true label; False: with the old model's soft label
    soft:    [M, K] the old model's logits of the task's classes in `heads`; fp32, or less precise, see `stored`
    heads:   [T, K] int64, by task the class number of each soft logit, -1 where a head is narrower than K
    weight:  [M] fp32 >= 0, relative to a uniform choice of the same size, whose weights are 1
    order:   [M] int64, place in the order of value of its task's examples: the largest are dropped first
    priority: [M] float64 >= 0, with which an example was drawn; 0 if the choice was not sampled
    file:    the file in the run folder that `soft` is mapped from; None: `soft` is in this process's memory
    """

    sample: Tensor
    task: Tensor
    label: Tensor
    replay: Tensor
    soft: Tensor
    heads: Tensor
    weight: Tensor
    order: Tensor
    priority: Tensor
    file: Apart | None = None

    @classmethod
    def empty(cls) -> Memory:
        """Return a memory without examples."""
        numbers = torch.zeros(0, dtype=torch.int64)
        heads = torch.zeros(0, 1, dtype=torch.int64)
        soft, weight, priority = torch.zeros(0, 1), torch.zeros(0), numbers.double()
        return cls(numbers, numbers, numbers, numbers.bool(), soft, heads, weight, numbers, priority)

    def __len__(self) -> int:
        return len(self.sample)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: value for name, value in vars(self).items() if name != "file"}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors (images are stored elsewhere)."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())

    @property
    def soft_bytes(self) -> int:
        """Bytes of the soft labels."""
        return self.soft.numel() * self.soft.element_size()

    def admit(
        self,
        *,
        task: int,
        sample: Tensor,
        label: Tensor,
        replay: Tensor,
        weight: Tensor | None = None,
        order: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> Memory:
        """Add the chosen examples of a task. The result has no soft labels: `mapped` attaches new ones.

        weight: None for 1 each; order: None for that in which they are given; priority: None for 0 each.
        """
        heads = max(len(self.heads), task + 1)
        drawn = torch.zeros(len(sample)) if priority is None else priority
        return Memory(
            sample=torch.cat([self.sample, sample]),
            task=torch.cat([self.task, torch.full_like(sample, task)]),
            label=torch.cat([self.label, label]),
            replay=torch.cat([self.replay, replay]),
            soft=self.soft.new_zeros(len(self) + len(sample), 0),
            heads=torch.zeros(heads, 0, dtype=torch.int64),
            weight=torch.cat([self.weight, torch.ones(len(sample)) if weight is None else weight.float()]),
            order=torch.cat([self.order, torch.arange(len(sample)) if order is None else order]),
            priority=torch.cat([self.priority, drawn.double()]),
        )

    def shrunk(self, quotas: Sequence[int]) -> Memory:
        """Keep `quotas[t]` examples of task t: the first in its order.

        Within a task and class, weights are scaled so that their mean stays the same.
        """
        kept = self.order < torch.tensor([*quotas, 0])[self.task]
        return self if bool(kept.all()) else self.only(kept)

    def only(self, kept: Tensor) -> Memory:
        """Keep the examples where `kept` [M] is True; their places in the order are renumbered.

        Within a task and class, weights are scaled so that their mean stays the same.
        """
        _, group = torch.stack([self.task, self.label]).unique(dim=1, return_inverse=True)
        before, after = _means(self.weight, group), _means(self.weight[kept], group[kept], like=group)
        scale = torch.where((after > 0) & (before != after), before / after.clamp_min(1e-30), 1.0)
        rows = {name: value[kept] for name, value in self.tensors().items() if name != "heads"}
        few = replace(self, **rows, file=None)
        return replace(few, weight=few.weight * scale[group[kept]].float(), order=_places(few.task, few.order))

    def mapped(self, soft: Tensor, heads: Tensor, file: Apart) -> Memory:
        """Return the same examples with soft labels that are mapped from a file in the run folder."""
        return replace(self, soft=soft, heads=heads, file=file)

    def columns(self, slots: Tensor) -> Tensor:
        """[r, K] class number of each soft logit of the examples `slots` [r], -1 where there is none."""
        return self.heads[self.task[slots]]

    def soft_targets(self, slots: Tensor, *, temperature: float, num_classes: int) -> tuple[Tensor, Tensor]:
        """Return (target [r, C] probabilities softmax(soft / T), head [r, C] bool) of the examples `slots` [r]."""
        return soft_probabilities(
            self.soft[slots], self.columns(slots), temperature=temperature, num_classes=num_classes
        )

    def agreement(self, tasks: int) -> list[float]:
        """Return the accuracy of the soft labels, for each past task that has examples in memory."""
        right = torch.zeros(len(self))
        for slots in torch.arange(len(self)).split(_TOGETHER):
            columns = self.columns(slots)
            logits = self.soft[slots].float().masked_fill(columns < 0, -torch.inf)
            best = columns.gather(1, logits.argmax(1, keepdim=True))
            right[slots] = (best.squeeze(1) == self.label[slots]).float()
        return [float(right[self.task == task].mean()) for task in range(tasks) if bool((self.task == task).any())]

    def per_task(self, tasks: int) -> list[int]:
        """Return the number of examples of each of the first `tasks` tasks."""
        return [int((self.task == task).sum()) for task in range(tasks)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which only refers to a file of soft labels."""
        state: dict[str, Any] = self.tensors()
        state["rank"] = state.pop("order")  # as checkpoints have always called it
        return state if self.file is None else {**state, "soft": self.file, "file": self.file.path}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Memory:
        """Restore a memory, also from checkpoints without priorities or without weights and order (uniform choices)."""
        old = {"priority": torch.zeros(len(state["sample"]), dtype=torch.float64), **state}
        if "file" in state:
            old["file"] = Apart(state["file"])
        if "weight" in state:
            return cls(order=old.pop("rank"), **old)
        columns, task, label = old.pop("columns"), old["task"], old["label"]  # [M, K], the same within a task
        heads = columns.new_full((int(task.max()) + 1 if len(task) else 0, columns.shape[1]), -1)
        heads[task] = columns
        _, group = torch.stack([task, label]).unique(dim=1, return_inverse=True)
        depth = _places(group, torch.arange(len(task)))  # the first of every class, then the second
        return cls(**old, heads=heads, weight=torch.ones(len(task)), order=_places(task, depth))


def head_columns(heads: Sequence[Sequence[int]]) -> Tensor:
    """[T, K] class numbers of each head, ascending; -1 where it is narrower than K."""
    width = max((len(head) for head in heads), default=1)
    table = torch.full((max(len(heads), 1), width), -1, dtype=torch.int64)
    for task, head in enumerate(heads):
        assert len(set(head)) == len(head), "a class that is named twice would have a part of its probability alone"
        table[task, : len(head)] = torch.tensor(sorted(head), dtype=torch.int64)
    return table


def stored(logits: Tensor, columns: Tensor, dtype: Literal["fp32", "fp16", "bf16"]) -> Tensor:
    """Return the logits [r, K] of classes `columns` [r, K] as they are stored; 0 where there is no class.

    fp32: unchanged. fp16 and bf16: minus the row's maximum, to which softmax is invariant. The relative rounding error
    of a logit is then at most 2^-11 (2^-9), and where its magnitude is large, its probability is small: at temperature
    1 a probability changes by less than 4e-4 (1.5e-3).
    """
    named = columns >= 0
    if dtype == "fp32":
        return logits.masked_fill(~named, 0.0).float()
    largest = logits.masked_fill(~named, -torch.inf).amax(dim=1, keepdim=True)
    return (logits - largest).masked_fill(~named, 0.0).to(DTYPES[dtype])


def soft_probabilities(
    soft: Tensor, columns: Tensor, *, temperature: float | Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Turn soft logits [r, K] of classes `columns` [r, K] into (probabilities [r, C], class mask [r, C] bool)."""
    probabilities = (soft.float() / temperature).masked_fill(columns < 0, -torch.inf).softmax(dim=1)
    return scattered(probabilities, columns, num_classes=num_classes)


def scattered(values: Tensor, columns: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Scatter values [r, K] of classes `columns` [r, K] to (values [r, C], 0 elsewhere; class mask [r, C] bool)."""
    named = columns >= 0
    # Unused columns are sent to an extra class that is cut off, so that they cannot touch class 0.
    where = columns.where(named, torch.full_like(columns, num_classes))
    found = values.new_zeros(len(values), num_classes + 1).scatter_(1, where, values)
    head = torch.zeros(len(values), num_classes + 1, dtype=torch.bool, device=values.device).scatter_(1, where, named)
    return found[:, :num_classes], head[:, :num_classes]


def _means(values: Tensor, group: Tensor, like: Tensor | None = None) -> Tensor:
    """[groups] float64 mean of each group, 0 for an empty one. like: [n] numbers of all groups, if not `group`."""
    size = int((group if like is None else like).max()) + 1 if len(group if like is None else like) else 0
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, group, values.double())
    return total / torch.bincount(group, minlength=size).clamp_min(1)


def _places(group: Tensor, key: Tensor) -> Tensor:
    """[n] place of each element in its group when sorted by `key`, from 0; ties keep their order."""
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = group[order].unique_consecutive(return_counts=True)[1]
    places = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return torch.empty_like(places).scatter_(0, order, places)
