"""The memory: which examples of past tasks are kept, and what the newest old model says of them.

Images stay where they are (shards or the decoded cache) and are named by sample position; the memory itself is a few
tensors. M examples, K the widest head that labelled them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Memory"]


@dataclass(frozen=True)
class Memory:
    """Kept examples, in the order they were admitted.

    sample:  [M] int64, position in the stream's training data
    task:    [M] int64, the task an example comes from
    label:   [M] int64, class number in the stream
    replay:  [M] bool, True: speaks by its true label; False: by the old model's soft label
    soft:    [M, K] fp32, the old model's logits of the classes in `columns`
    columns: [M, K] int64, class number of each soft logit, -1 where a head is narrower than K
    """

    sample: Tensor
    task: Tensor
    label: Tensor
    replay: Tensor
    soft: Tensor
    columns: Tensor

    @classmethod
    def empty(cls) -> Memory:
        """Nothing kept."""
        numbers = torch.zeros(0, dtype=torch.int64)
        return cls(numbers, numbers, numbers, numbers.bool(), torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors (images are stored elsewhere)."""
        return sum(value.numel() * value.element_size() for value in vars(self).values())

    @property
    def soft_bytes(self) -> int:
        """Bytes of the soft labels."""
        return self.soft.numel() * self.soft.element_size()

    def admit(self, *, task: int, sample: Tensor, label: Tensor, replay: Tensor) -> Memory:
        """This memory and the chosen examples of a task; soft labels are those of `relabelled`, to be called next."""
        width = self.soft.shape[1]
        return Memory(
            sample=torch.cat([self.sample, sample]),
            task=torch.cat([self.task, torch.full_like(sample, task)]),
            label=torch.cat([self.label, label]),
            replay=torch.cat([self.replay, replay]),
            soft=torch.cat([self.soft, torch.zeros(len(sample), width)]),
            columns=torch.cat([self.columns, torch.full((len(sample), width), -1)]),
        )

    def relabelled(self, logits: Tensor, heads: Sequence[Sequence[int]]) -> Memory:
        """The same examples with new soft labels.

        logits: [M, C] of the newest model; heads: by task, the classes its soft labels speak of.
        """
        width = max((len(head) for head in heads), default=1)
        table = torch.full((max(len(heads), 1), width), -1, dtype=torch.int64)
        for task, head in enumerate(heads):
            table[task, : len(head)] = torch.tensor(sorted(head), dtype=torch.int64)
        columns = table[self.task]
        soft = logits.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0.0)
        return replace(self, soft=soft.float(), columns=columns)

    def soft_targets(self, slots: Tensor, *, temperature: float, num_classes: int) -> tuple[Tensor, Tensor]:
        """(target [r, C] probabilities softmax(soft / T), head [r, C] bool) of some examples."""
        return spread(self.soft[slots], self.columns[slots], temperature=temperature, num_classes=num_classes)

    def agreement(self, tasks: int) -> list[float]:
        """By past task, the share of soft labels whose largest class is the true one."""
        best = self.columns.gather(1, self.soft.masked_fill(self.columns < 0, -torch.inf).argmax(1, keepdim=True))
        right = (best.squeeze(1) == self.label).float()
        return [float(right[self.task == task].mean()) for task in range(tasks) if bool((self.task == task).any())]

    def per_task(self, tasks: int) -> list[int]:
        """How many examples of each of the first `tasks` tasks."""
        return [int((self.task == task).sum()) for task in range(tasks)]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Memory:
        """The inverse."""
        return cls(**state)


def spread(soft: Tensor, columns: Tensor, *, temperature: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Soft logits [r, K] of classes `columns` [r, K] as (probabilities [r, C], competing classes [r, C] bool)."""
    named = columns >= 0
    probabilities = (soft / temperature).masked_fill(~named, -torch.inf).softmax(dim=1)
    # Unused columns are sent to an extra class that is cut off, so that they cannot touch class 0.
    where = columns.where(named, torch.full_like(columns, num_classes))
    target = probabilities.new_zeros(len(soft), num_classes + 1).scatter_(1, where, probabilities)
    head = torch.zeros(len(soft), num_classes + 1, dtype=torch.bool, device=soft.device).scatter_(1, where, named)
    return target[:, :num_classes], head[:, :num_classes]
