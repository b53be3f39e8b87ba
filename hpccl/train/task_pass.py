"""A pass over some of a task's examples as curvature is measured on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.curvature.protocols import Examples
from hpccl.data.protocols import Task
from hpccl.train.passes import ask, shared_images
from hpccl.train.score import competing
from hpccl.train.state import World

__all__ = ["TaskPass"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskPass:
    """This rank's share of the samples in the evaluation view, with the head they are judged by; may be repeated."""

    task: Task
    samples: Ints
    world: World

    def __iter__(self) -> Iterator[Examples]:
        device, head = self.world.comm.device, self._head().to(self.world.comm.device)
        labels = torch.from_numpy(self.world.stream.labels("train"))
        size = self.world.config.curvature.batch_size
        with contextlib.closing(shared_images(self.samples, self.world, size=size)) as images:
            while True:
                # This pass may take minutes: all ranks ask equally often, and have a batch equally often.
                ask(self.world)
                seen = next(images, None)
                if seen is None:
                    return
                blank = np.resize(self.samples, 1)  # stands for nothing: its weight is 0
                positions = torch.from_numpy(seen.sample if len(seen.sample) else blank)
                yield Examples(
                    pixels=seen.pixels,
                    labels=labels[positions].to(device),
                    head=head,
                    sample=positions.to(device),
                    weight=seen.valid.float().to(device),
                )

    def _head(self) -> Tensor:
        head = torch.zeros(len(self.world.stream.class_names), dtype=torch.bool)
        head[competing(self.task, self.world)] = True
        return head
