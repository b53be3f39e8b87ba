"""Passes over stored images outside training, in step on all ranks: where weights are spread, a pass is collective."""

from __future__ import annotations

from collections.abc import Generator
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

__all__ = ["Seen", "ask", "shared_images"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """Some of this rank's images in the evaluation view.

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
    """This rank's share of `samples`, at most `size` at a time; as many times as every other rank.

    whole: `size` at a time and always the same ones together, whatever the number of ranks; fewer only at the end.
    """
    if whole:
        groups = world.comm.parts(-(-len(samples) // size), 1)
        parts = [samples[part.start * size : part.stop * size] for part in groups]
    else:
        parts = [samples[part.start : part.stop] for part in world.comm.parts(len(samples), size)]
    requests = (Request(part, np.zeros(len(part), dtype=np.uint64)) for part in parts if len(part))
    loaded = world.stream.load(requests, split, world.comm.device)
    for part in parts:
        if len(part):
            images = next(loaded)
            yield Seen(part, images.pixels, images.valid)
        else:
            blank = torch.zeros(1, *world.stream.shape(split), device=world.comm.device)
            yield Seen(part, blank, torch.zeros(1, dtype=torch.bool))
    assert next(loaded, None) is None, "everything that was asked for was used"


def ask(world: World) -> None:
    """Leave the pass if any rank was asked to stop. A rank that failed in it says 1 (Comm.any) at this very moment.

    Raises:
        Stopped: on all ranks.
        WorldError: another rank failed.
    """
    answer = world.comm.max(2 if world.stop.reason is not None else 0)
    if answer == 2:
        raise Stopped
    if answer == 1:
        raise WorldError("another rank failed in a pass over the task; see its message")
