"""Images that are decoded each time they are used, in worker processes: large ones, or augmented by timm.

A worker gets one Request and makes its images one by one. All randomness of an image's view depends on that image's key
alone, so that the number of workers and ranks does not matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hpccl.data.augment import BatchAugment, Normaliser
from hpccl.data.layout import Index
from hpccl.data.protocols import Split
from hpccl.data.rows import Images, Request, Views
from hpccl.data.shards.decode import decode
from hpccl.data.timm_view import TimmView
from hpccl.data.transfer import CPU, delivered
from hpccl.data.views import EvaluationView
from hpccl.data.workers import in_workers
from hpccl.errors import DataError

if TYPE_CHECKING:
    from hpccl.data.shards.reader import ShardSet

__all__ = ["EncodedImages", "Made", "Maker"]

Pixels = npt.NDArray[np.uint8]
_NOTHING = Views(np.empty((0, 0, 0, 0), dtype=np.uint8), np.empty(0, dtype=bool))


@dataclass(frozen=True)
class Made:
    """A worker's result for one request.

    views: without pixels if `failure` is set
    bad: (sample, reason) of the images that could not be decoded
    failure: why nothing could be made (a shard is missing or cut short)
    """

    views: Views
    bad: tuple[tuple[int, str], ...] = ()
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes images of one split from requests; it is passed on to the workers.

    shape: (channels, height, width) of the views, unless a request asks for another size
    augment: augmentation of batches, or timm's views by their size
    """

    sets: Sequence[ShardSet]
    index: Index
    shape: tuple[int, int, int]
    view: EvaluationView
    augment: BatchAugment | Mapping[int, TimmView]

    def __call__(self, request: Request) -> Made:
        """Make one request's images. Failures are returned: an exception raised in a worker loses its message."""
        views = self._blank(request)
        bad: list[tuple[int, str]] = []
        with _own_randomness():
            for position, (sample, key) in enumerate(zip(request.sample.tolist(), request.key.tolist(), strict=True)):
                try:
                    data, name = self.read(sample)
                except DataError as error:
                    return Made(_NOTHING, failure=str(error))
                try:
                    views.pixels[position], erased = self._one(data, name, key, views.pixels.shape[1:3])
                except DataError as error:
                    views.valid[position] = False
                    bad.append((sample, str(error)))
                    continue
                if views.erased is not None and erased is not None:
                    views.erased[position] = erased
        return Made(views, tuple(bad))

    def _blank(self, request: Request) -> Views:
        channels, height, width = self.shape
        shape = (len(request), request.size or height, request.size or width)
        erases = not isinstance(self.augment, BatchAugment) and any(view.erase for view in self.augment.values())
        return Views(
            np.zeros((*shape, channels), dtype=np.uint8),
            np.ones(len(request), dtype=bool),
            np.zeros(shape, dtype=bool) if erases else None,
        )

    def read(self, sample: int) -> tuple[bytes, str]:
        """Return the encoded image and its name.

        Raises:
            DataError: its shard is missing or cut short.
        """
        shards, local = self.sets[self.index.part[sample]], int(self.index.local[sample])
        return shards.read(local), shards.name(local)

    def _one(
        self, data: bytes, name: str, key: int, shape: tuple[int, int]
    ) -> tuple[Pixels, npt.NDArray[np.bool_] | None]:
        """Return [h, w, channels], and the mask [h, w] of erased pixels, if any."""
        if not isinstance(self.augment, BatchAugment) and key != 0:
            return self.augment[shape[0]](data, name, key)
        view = self.view if self.view.size is None else dataclasses.replace(self.view, size=shape[0])
        pixels = view(decode(data, name))
        if pixels.shape != (*shape, self.shape[0]):
            raise DataError(f"image '{name}' has {pixels.shape[1]} x {pixels.shape[0]} pixels; set data.image_size")
        if isinstance(self.augment, BatchAugment):
            pixels = self.augment(pixels[None], np.array([key], dtype=np.uint64))[0]
        return pixels, None


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Runs a Maker in this process, or in `workers` processes that live as long as an iterator is open."""

    makers: Mapping[Split, Maker]
    normalise: Normaliser
    workers: int
    timeout: float | None
    stop_at_bad: bool
    seen_bad: dict[tuple[Split, int], str] = field(default_factory=dict)

    def load(
        self, requests: Iterable[Request], split: Split, device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, in order.

        Raises:
            DataError: an image cannot be decoded and data.bad_images is `stop`, a shard cannot be read, or a decoding
                process died.
        """
        maker = self.makers[split]
        # Started in this thread: the system kills workers when the thread that started them ends.
        made = (
            in_workers(maker, requests, self.workers, timeout=self.timeout)
            if self.workers
            else _inline(maker, requests)
        )
        # Without workers, timm draws from the trainer's generators, which must not happen in another thread.
        yield from delivered(self._views(made, split), self.normalise, device, background=self.workers > 0)

    def _views(self, made: Generator[Made, None, None], split: Split) -> Generator[Views, None, None]:
        with contextlib.closing(made):
            for result in made:
                self._note(result, split)
                yield result.views

    def _note(self, made: Made, split: Split) -> None:
        if made.failure is not None:
            raise DataError(made.failure)
        if made.bad and self.stop_at_bad:
            raise DataError(
                f"{made.bad[0][1]}; restore its shard, or begin in another folder=... with data.bad_images=skip, which "
                "leaves out such images"
            )
        for sample, reason in made.bad:
            self.seen_bad.setdefault((split, sample), reason)

    def raw(self, sample: int, split: Split) -> Pixels:
        """Return the pixels [h, w, channels] of one image as stored."""
        return decode(*self.makers[split].read(sample))

    def skipped(self) -> list[tuple[Split, int, str]]:
        """(split, sample, reason) of all undecodable images encountered so far."""
        return [(split, sample, reason) for (split, sample), reason in self.seen_bad.items()]


def _inline(maker: Maker, requests: Iterable[Request]) -> Generator[Made, None, None]:
    for request in requests:
        yield maker(request)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the state of this process's random generators on exit."""
    python, old_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm uses them
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old_numpy)  # noqa: NPY002 - the same
