"""The stream that the trainer uses: a layout of tasks, and a source of images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hpccl.data.decoded import DecodedImages
from hpccl.data.layout import ClassTask, Layout
from hpccl.data.protocols import Split
from hpccl.data.rows import Images, Request
from hpccl.data.shards.copies import copied_name, copy_images
from hpccl.data.shards.reader import ShardSet
from hpccl.data.transfer import CPU

__all__ = ["ImageSource", "ImageStream"]


class ImageSource(Protocol):
    """A source of images, by sample position."""

    def load(
        self, requests: Iterable[Request], split: Split, device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, in order, on a device."""

    def raw(self, sample: int, split: Split) -> npt.NDArray[np.uint8]:
        """[h, w, channels] uint8 pixels of one image."""

    def skipped(self) -> list[tuple[Split, int, str]]:
        """(split, sample, reason) of the undecodable images known so far."""


@dataclass(frozen=True, eq=False)
class ImageStream:
    """A stream of tasks that are classes of images.

    name_of: (split, sample) -> `<data set>/<key>`
    fingerprint: changes with the images
    test_shape: (channels, height, width) of test images; None: as image_shape
    shards: shards of training images, by part; empty if images are not in shards
    """

    layout: Layout
    image_shape: tuple[int, int, int]
    source: ImageSource
    name_of: Callable[[Split, int], str]
    fingerprint: str
    test_shape: tuple[int, int, int] | None = None
    shards: Sequence[ShardSet] = ()

    @property
    def tasks(self) -> tuple[ClassTask, ...]:
        """The tasks in learning order."""
        return self.layout.tasks

    @property
    def added(self) -> range:
        """Positions, after those of the tasks, of further training examples of the same classes."""
        return self.layout.added

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, by class number in the stream."""
        return self.layout.class_names

    def shape(self, split: Split) -> tuple[int, int, int]:
        """(channels, height, width) of a split's images, unless a request asks for another size."""
        return self.image_shape if split == "train" else self.test_shape or self.image_shape

    def labels(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] class number in the stream, by sample position."""
        return self.layout.index[split].label

    def groups(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] shard number by sample position."""
        return self.layout.index[split].group

    def sample_names(self, split: Split, samples: npt.NDArray[np.int64]) -> list[str]:
        """Global ids, `<data set>/<key>`."""
        return [self.name_of(split, int(sample)) for sample in samples]

    def load(
        self, requests: Iterable[Request], split: Split = "train", device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, in order, on a device, made ahead of time. Closing the iterator ends workers.

        Raises:
            DataError: an image cannot be decoded (unless data.bad_images is `skip`), or a shard cannot be read.
        """
        return self.source.load(requests, split, device)

    def raw(self, sample: int, split: Split = "train") -> npt.NDArray[np.uint8]:
        """[h, w, channels] uint8 pixels of one image, as stored or as its task changes it."""
        return self.source.raw(sample, split)

    def copy(self, task: int, samples: npt.NDArray[np.int64], folder: Path) -> str:
        """Copy training images of a task as they are stored; return the name of their folder in `folder`.

        Raises:
            DataError: an image cannot be read.
            FolderError: the folder cannot be written.
        """
        index, name = self.layout.index["train"], copied_name(task, len(samples))
        (part,) = np.unique(index.part[samples]).tolist()  # a task is of one part
        copy_images(folder, name, self.shards[part], index.local[samples], part=part)
        return name

    def absent(self, samples: npt.NDArray[np.int64]) -> str | None:
        """Return what is wrong if some of the training images cannot be read because their shards are gone."""
        index = self.layout.index["train"]
        for number, shards in enumerate(self.shards):
            mine = samples[index.part[samples] == number]
            gone = shards.gone(index.local[mine])
            if len(gone):
                return f"{len(gone)} images, such as '{shards.name(int(gone[0]))}', are gone: {shards.trouble}"
        return None

    @property
    def fetched(self) -> int:
        """Bytes of training shards that are fetched from URLs whenever they are read; 0 if images are decoded once."""
        if isinstance(self.source, DecodedImages):
            return 0
        index = self.layout.index["train"]
        found: dict[tuple[str, int], int] = {}
        for number, shards in enumerate(self.shards):
            if shards.remote:
                read = np.unique(shards.shard_of[index.local[index.part == number]])
                found |= {(shards.path, each): shards.manifest.shards[each].bytes for each in read.tolist()}
        return sum(found.values())

    def skipped(self) -> list[tuple[Split, int, str, str]]:
        """(split, sample, name, reason) of the undecodable images known so far, each once, in a stable order."""
        found = sorted(self.source.skipped(), key=lambda item: (item[0] == "test", item[1]))
        return [(split, sample, self.name_of(split, sample), reason) for split, sample, reason in found]
