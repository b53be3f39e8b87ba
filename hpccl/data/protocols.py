"""The interfaces through which the trainer uses data."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.rows import Images, Request
from hpccl.data.transfer import CPU

__all__ = ["Listed", "Split", "Stream", "Task", "heads_of", "training_samples"]

Split = Literal["train", "test"]


class Task(Protocol):
    """One step of the stream."""

    @property
    def index(self) -> int:
        """Position in the stream, from 0."""

    @property
    def name(self) -> str:
        """A short name for reports."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Class numbers in the stream, ascending; tasks may share some, or all of them."""

    def samples(self, split: Split) -> range:
        """The stream's sample positions that belong to this task (contiguous)."""


def training_samples(task: Task) -> npt.NDArray[np.int64]:
    """[n] sample positions of the task's training examples, ascending."""
    own = task.samples("train")
    return np.arange(own.start, own.stop)


def heads_of(tasks: Sequence[Task], num_classes: int) -> Tensor:
    """[tasks, num_classes] bool: which classes each task has."""
    heads = torch.zeros(len(tasks), num_classes, dtype=torch.bool)
    for row, task in zip(heads, tasks, strict=True):
        row[list(task.classes)] = True
    return heads


def task_numbers(tasks: Sequence[Task], split: Split, sample: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[n] index of the task that each sample position belongs to (labels do not tell: tasks may share classes)."""
    ends = [task.samples(split).stop for task in tasks]
    return np.searchsorted(ends, sample, side="right").astype(np.int64)


class Listed(Protocol):
    """What is known of a stream before any image is decoded."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks in learning order."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, by class number in the stream; len(class_names) is C."""

    def labels(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] class number in the stream, by sample position."""


class Stream(Listed, Protocol):
    """A sequence of tasks over one space of classes and one space of sample positions per split.

    Sample positions number the training (test) examples of all tasks consecutively, task 0 first. They do not depend on
    the number of ranks or workers.
    """

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in learning order."""

    @property
    def added(self) -> range:
        """Positions, after those of the tasks, of further training examples of the same classes; usually none."""

    @property
    def fingerprint(self) -> str:
        """An identifier that changes with the images; sample positions are comparable only while it stays the same."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of training images: what the network is built for."""

    def shape(self, split: Split) -> tuple[int, int, int]:
        """(channels, height, width) of the images that `load` yields, unless a request asks for another size."""

    def groups(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] shard number by sample position, non-decreasing within a task (for windowed shuffling)."""

    def sample_names(self, split: Split, samples: npt.NDArray[np.int64]) -> list[str]:
        """Global ids, `<data set>/<shard sample key>`, stable over runs."""

    def load(
        self, requests: Iterable[Request], split: Split = "train", device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, in order, made in the background. Closing the iterator ends its workers.

        Pixels are on `device`; a CUDA device receives one byte per value and normalises them itself.

        Raises DataError for an undecodable image (its name, its shard) unless data.bad_images is `skip`, and for a
        decoding process that died.
        """

    @property
    def fetched(self) -> int:
        """Bytes of training shards that are fetched from URLs whenever they are read."""

    def skipped(self) -> list[tuple[Split, int, str, str]]:
        """Images skipped so far in this process: (split, sample, name, reason); only with data.bad_images=skip."""

    def raw(self, sample: int, split: Split = "train") -> npt.NDArray[np.uint8]:
        """[h, w, channels] uint8 pixels of one image, for pictures in reports: as stored, or as its task changes it."""

    def copy(self, task: int, samples: npt.NDArray[np.int64], folder: Path) -> str:
        """Copy training images of a task, as stored, to where `open_stream` can read them; return the folder's name."""

    def absent(self, samples: npt.NDArray[np.int64]) -> str | None:
        """Return what is wrong if some training images are gone; None if all can be read, as far as is known."""
