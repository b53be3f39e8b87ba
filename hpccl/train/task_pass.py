"""A pass over some of a task's examples, in the form that curvature estimators need."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.curvature.protocols import Examples
from hpccl.data.order import mix
from hpccl.data.protocols import Task
from hpccl.train.passes import Seen, shared_images
from hpccl.train.score import competing
from hpccl.train.state import World

__all__ = ["TaskPass"]

Ints = npt.NDArray[np.int64]

_GROUP = 127  # purpose of a hash (differs from those in hpccl.data.order, hpccl.train and hpccl.tools)


@dataclass(frozen=True)
class TaskPass:
    """This rank's share of the samples in the evaluation view, with their head; may be iterated repeatedly.

    group: above 1, the batch size; batches are drawn by the seed and the same whatever the number of ranks
    """

    task: Task
    samples: Ints
    world: World
    group: int = 1

    def __iter__(self) -> Iterator[Examples]:
        device, head = self.world.comm.device, self._head().to(self.world.comm.device)
        labels = torch.from_numpy(self.world.stream.labels("train"))
        blank = np.resize(self.samples, 1)  # a placeholder with weight 0
        for seen in self._images():
            positions = torch.from_numpy(seen.sample if len(seen.sample) else blank)
            yield Examples(
                pixels=seen.pixels,
                labels=labels[positions].to(device),
                head=head,
                sample=positions.to(device),
                weight=seen.valid.float().to(device),
            )

    def _images(self) -> Generator[Seen, None, None]:
        if self.group == 1:
            return shared_images(self.samples, self.world, size=self.world.config.curvature.batch_size)
        # Stored examples may be sorted by class; in a group of one class, opposite gradients would not cancel.
        priority = mix(self.world.config.seed, _GROUP, self.task.index, self.samples)
        drawn = self.samples[np.argsort(priority, kind="stable")]
        return shared_images(drawn, self.world, size=self.group, whole=True)

    def _head(self) -> Tensor:
        head = torch.zeros(len(self.world.stream.class_names), dtype=torch.bool)
        head[competing(self.task, self.world)] = True
        return head
