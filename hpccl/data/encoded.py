"""Images that are decoded each time they are used, in worker processes: large ones, or augmented by timm.

A worker gets one Request and makes its images one by one. What is random in an image's view depends on that image's key
alone, so that workers and ranks do not matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from hpccl.data.augment import BatchAugment, Normaliser
from hpccl.data.layout import Index
from hpccl.data.protocols import Split
from hpccl.data.rows import Images, Request
from hpccl.data.shards.decode import decode
from hpccl.data.timm_view import TimmView
from hpccl.data.views import EvaluationView
from hpccl.errors import DataError

if TYPE_CHECKING:
    from hpccl.data.shards.reader import ShardSet

__all__ = ["EncodedImages", "Made", "Maker"]

_NOT_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Made:
    """What a worker hands over.

    bad: (sample, reason) of the images that could not be decoded
    failure: why nothing could be made (a shard is missing or cut short)
    """

    images: Images
    bad: tuple[tuple[int, str], ...] = ()
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Maker(Dataset[Made]):
    """From requests to images of one split; travels to the workers.

    shape: (channels, height, width) of every view
    """

    sets: Sequence[ShardSet]
    index: Index
    shape: tuple[int, int, int]
    view: EvaluationView
    augment: BatchAugment | TimmView
    normalise: Normaliser

    def __getitem__(self, request: Request) -> Made:
        """Make one request's images; failures are values, because an exception from a worker loses its message."""
        channels, height, width = self.shape
        pixels = np.zeros((len(request), height, width, channels), dtype=np.float32)
        images = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.ones(len(request), dtype=torch.bool))
        bad: list[tuple[int, str]] = []
        with _own_randomness():
            for position, (sample, key) in enumerate(zip(request.sample.tolist(), request.key.tolist(), strict=True)):
                try:
                    data, name = self.read(sample)
                except DataError as error:
                    return Made(images, failure=str(error))
                try:
                    self._one(data, name, key, pixels[position])
                except DataError as error:
                    images.valid[position] = False
                    bad.append((sample, str(error)))
        return Made(images, tuple(bad))

    def read(self, sample: int) -> tuple[bytes, str]:
        """The encoded image and its name.

        Raises:
            DataError: its shard is missing or cut short.
        """
        shards, local = self.sets[self.index.part[sample]], int(self.index.local[sample])
        return shards.read(local), shards.name(local)

    def _one(self, data: bytes, name: str, key: int, out: npt.NDArray[np.float32]) -> None:
        if isinstance(self.augment, TimmView) and key != 0:
            self.augment(data, name, key, out)
            return
        pixels = self.view(decode(data, name))
        if (pixels.shape[2], *pixels.shape[:2]) != self.shape:
            raise DataError(f"image '{name}' has {pixels.shape[1]} x {pixels.shape[0]} pixels; set data.image_size")
        if isinstance(self.augment, BatchAugment):
            pixels = self.augment(pixels[None], np.array([key], dtype=np.uint64))[0]
        self.normalise.into(out[None], pixels[None])


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Runs a Maker: in this process, or in `workers` others that are there while an iterator is open."""

    makers: Mapping[Split, Maker]
    workers: int
    stop_at_bad: bool
    seen_bad: dict[tuple[Split, int], str] = field(default_factory=dict)

    def load(self, requests: Iterable[Request], split: Split) -> Generator[Images, None, None]:
        """One Images a request, in order.

        Raises:
            DataError: an image cannot be decoded and data.bad_images is `stop`, or a shard cannot be read.
        """
        maker = self.makers[split]
        made = _in_workers(maker, requests, self.workers) if self.workers else _inline(maker, requests)
        with contextlib.closing(made):
            for result in made:
                self._note(result, split)
                yield result.images

    def _note(self, made: Made, split: Split) -> None:
        if made.failure is not None:
            raise DataError(made.failure)
        if made.bad and self.stop_at_bad:
            raise DataError(f"{made.bad[0][1]}; set data.bad_images to skip to go on without such images")
        for sample, reason in made.bad:
            self.seen_bad.setdefault((split, sample), reason)

    def raw(self, sample: int, split: Split) -> Pixels:
        """[h, w, channels] of one image as stored."""
        return decode(*self.makers[split].read(sample))

    def skipped(self) -> list[tuple[Split, int, str]]:
        """(split, sample, reason) of all undecodable images that were met up to now."""
        return [(split, sample, reason) for (split, sample), reason in self.seen_bad.items()]


def _inline(maker: Maker, requests: Iterable[Request]) -> Generator[Made, None, None]:
    for request in requests:
        yield maker[request]


def _in_workers(maker: Maker, requests: Iterable[Request], workers: int) -> Generator[Made, None, None]:
    loader: DataLoader[Made] = DataLoader(
        maker,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        # Without one of its own it would draw from the trainer's.
        generator=torch.Generator(),
        multiprocessing_context="fork",
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the workers only read files and decode.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        with _signals_held():
            made = iter(loader)
    try:
        yield from made
    finally:
        # The iterator ends its workers when it is collected.
        del made, loader


def _as_is(made: Any) -> Any:
    return made


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back while workers are started: one that came before a worker ignores it would kill the worker."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Leave signals to the main process, but do not outlive it."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
    if sys.platform == "linux":
        # Else torch's watchdog notices within five seconds, in which files and locks stay open.
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Give this process's generators back as they were."""
    python, old_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm uses them
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old_numpy)  # noqa: NPY002
