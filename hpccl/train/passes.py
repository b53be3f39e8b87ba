"""Passes over stored images outside training, synchronous on all ranks: with sharded weights a pass is collective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.protocols import Split
from hpccl.data.rows import Request
from hpccl.errors import WorldError
from hpccl.train.state import World
from hpccl.train.stop import Stopped

__all__ = ["Seen", "answers", "shared_images", "with_mirror_images"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """A batch of this rank's images in the evaluation view.

    sample: [n] positions
    pixels: [n, channels, h, w] on the device; one blank image if n is 0
    valid: [n] bool, could be decoded; [1] False if n is 0
    """

    sample: Ints
    pixels: Tensor
    valid: Tensor


def shared_images(
    samples: Ints, world: World, *, size: int, split: Split = "train", whole: bool = False
) -> Generator[Seen, None, None]:
    """Yield this rank's share of `samples` in batches of at most `size`, equally many on every rank. Collective.

    whole: batches of exactly `size` (fewer only at the end), composed alike whatever the number of ranks

    A pass may take longer than the job has left, so ranks agree to go on before each batch and at the end.

    Raises:
        Stopped: a rank was asked to stop.
        WorldError: another rank failed in the pass and reported that (Comm.any) instead of agreeing.
    """
    if whole:
        groups = world.comm.parts(-(-len(samples) // size), 1)
        parts = [samples[part.start * size : part.stop * size] for part in groups]
    else:
        parts = [samples[part.start : part.stop] for part in world.comm.parts(len(samples), size)]
    requests = (Request(part, np.zeros(len(part), dtype=np.uint64)) for part in parts if len(part))
    with contextlib.closing(world.stream.load(requests, split, world.comm.device)) as loaded:
        for part in parts:
            _agree(world)
            if len(part):
                images = next(loaded)
                yield Seen(part, images.pixels, images.valid)
            else:
                blank = torch.zeros(1, *world.stream.shape(split), device=world.comm.device)
                yield Seen(part, blank, torch.zeros(1, dtype=torch.bool))
        _agree(world)
        assert next(loaded, None) is None, "everything that was asked for was used"


def answers(
    function: Callable[[Tensor], Tensor], samples: Ints, world: World, *, split: Split = "train"
) -> Generator[tuple[Ints, Tensor, Tensor], None, None]:
    """Yield positions [n], `function` of pixels [n, ...] and `Seen.valid` [n] of `shared_images`, n perhaps 0."""
    for seen in shared_images(samples, world, size=world.stream_batch, split=split):
        number = len(seen.sample)
        yield seen.sample, function(seen.pixels)[:number], seen.valid[:number]


def with_mirror_images(predict: Callable[[Tensor], Tensor], world: World) -> Callable[[Tensor], Tensor]:
    """With train.flip_test, average predictions over each image and its mirror image; else return `predict`."""
    if not world.config.train.flip_test:
        return predict
    return lambda pixels: (predict(pixels) + predict(pixels.flip(-1))) / 2


def _agree(world: World) -> None:
    """Leave the pass if any rank was asked to stop (2) or has failed, whose Comm.any(True) contributes 1 here."""
    answer = world.comm.max(2 if world.stop.reason is not None else 0)
    if answer == 2:
        raise Stopped
    if answer == 1:
        raise WorldError("another rank failed in a pass over the task; see its message")
