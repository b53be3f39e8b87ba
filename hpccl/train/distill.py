"""Distillation from the previous network while a new task is learned, as rows of the one loss.

With the previous network's logits z*, the present ones z, old heads H_1, H_2, ... and temperature T:

    lambda sum_h CE(softmax_{H_h}(z* / T), z / T)        (Hinton et al. 2015; Li and Hoiem 2016, eq. 2 and 3)

times T^2 if configured. With train.loss=sigmoid, targets are sigmoid(z*_c / T) for each class (Rebuffi et al. 2017).
The gradient with respect to z is lambda / T (softmax(z / T) - softmax(z* / T)): zero where both networks agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.prior import DistillConfig
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Stream, Task, heads_of
from hpccl.data.rows import CROSS_ENTROPY, SIGMOID
from hpccl.memory.store import DTYPES, stored
from hpccl.train.passes import answers
from hpccl.train.state import World

__all__ = ["Distilled", "old_heads", "record"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Distilled:
    """Distillation during one task.

    heads:    [H, C] bool, the classes of each old head, or of all of them together
    kind:     loss of the distilled rows, CROSS_ENTROPY or SIGMOID
    weight:   lambda of a row, including T^2
    labels:   factor on the weights of all other rows
    recorded: [n, K] logits of the old classes in ascending order, of the evaluation view, by position in the task's
        samples followed by the memory's slots; None: the teacher runs in every step
    """

    config: DistillConfig
    heads: Tensor
    kind: int
    weight: float
    labels: float
    recorded: Tensor | None = None

    @classmethod
    def of(cls, config: RunConfig, stream: Stream, task: Task) -> Distilled | None:
        """Set up the distillation of a task; None where nothing is distilled."""
        distill = config.prior.distill
        if distill.weight == 0 or task.index == 0:
            return None
        heads = old_heads(config, stream, task)
        seen = heads.any(dim=0)
        old, new = int(seen.sum()), int((~seen[list(task.classes)]).sum())
        share = old / (old + new) if distill.balance == "classes" else 1.0
        scale = distill.temperature**2 if distill.scale_t2 else 1.0
        return cls(
            config=distill,
            heads=heads,
            kind=SIGMOID if config.train.loss == "sigmoid" else CROSS_ENTROPY,
            weight=distill.weight * share * scale,
            labels=new / (old + new) if distill.balance == "classes" else 1.0,
        )

    @property
    def columns(self) -> Tensor:
        """[K] the old classes, ascending."""
        return self.heads.any(dim=0).nonzero().squeeze(1)

    def asks(self, from_memory: Tensor) -> Tensor:
        """Return a mask [p] of the images that the teacher runs on; from_memory: [p] bool."""
        if self.config.view == "recorded":
            return torch.zeros_like(from_memory)
        return self.applies(from_memory)

    def applies(self, from_memory: Tensor) -> Tensor:
        """Return a mask [p] of the images that are distilled; from_memory: [p] bool."""
        return torch.ones_like(from_memory) if self.config.images == "all" else ~from_memory

    def logits(self, place: Tensor) -> Tensor:
        """Return the recorded logits [p, C] at positions `place` [p] of `recorded`; 0 for classes that are not old."""
        assert self.recorded is not None, "the teacher was asked instead"
        found = torch.zeros(len(place), self.heads.shape[1])
        found[:, self.columns] = self.recorded[place].float()
        return found

    def targets(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (targets, competing classes), [p H, C] each, image by image, from the old network's logits [p, C]."""
        scaled = (logits / self.config.temperature).repeat_interleave(len(self.heads), dim=0)
        head = self.heads.repeat(len(logits), 1)
        if self.kind == SIGMOID:
            return scaled.sigmoid() * head, head
        return scaled.masked_fill(~head, -torch.inf).softmax(dim=1), head


def old_heads(config: RunConfig, stream: Stream, task: Task) -> Tensor:
    """Return the classes [H, C] of each earlier task; a single row for all of them where all seen classes compete.

    Tasks with the same classes share one row, as the old network has one prediction for them.
    """
    heads = heads_of(stream.tasks[: task.index], len(stream.class_names))
    if config.train.head == "seen":
        return heads.any(dim=0, keepdim=True)
    first = [t for t in range(task.index) if not (heads[:t] == heads[t]).all(dim=1).any()]
    return heads[first]


def record(samples: Ints, heads: Tensor, teacher: Callable[[Tensor], Tensor], world: World) -> Tensor:
    """Return the teacher's logits [n, K] of the K classes in `heads` [H, C] on the evaluation view; collective.

    Each rank computes its share; all get the whole, on the CPU. The logits are not saved: a resumed run recomputes the
    same ones from the same weights. In half precision the largest logit of each head is subtracted first; where heads
    share classes they stay in fp32.

    Raises:
        Stopped: the run was asked to stop.
    """
    columns = heads.any(dim=0).nonzero().squeeze(1)
    dtype = world.config.memory.dtype if bool((heads.sum(dim=0) <= 1).all()) else "fp32"
    found = [torch.zeros(0, len(columns), dtype=DTYPES[dtype])]
    for sample, said, _ in answers(teacher, samples, world):
        logits = said.cpu() if dtype == "fp32" else _from_largest(said.cpu(), heads)
        found.append(stored(logits[:, columns], columns.expand(len(sample), -1), dtype))
    return world.comm.gather(torch.cat(found))


def _from_largest(logits: Tensor, heads: Tensor) -> Tensor:
    """Subtract from logits [n, C] the largest of each head, to which the head's softmax is invariant."""
    largest = [logits[:, head].amax(dim=1, keepdim=True) * head for head in heads]
    return logits - torch.stack(largest).sum(dim=0)
