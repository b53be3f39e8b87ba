"""From bytes to network input on a device: a CUDA device receives one byte per value and normalises the pixels itself.

A background thread keeps a few batches ahead: on a CUDA device they are copied from pinned memory on a stream of
their own while the network computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.ahead import ahead
from hpccl.data.augment import Normaliser
from hpccl.data.rows import Images, Views

__all__ = ["CPU", "delivered"]

CPU = torch.device("cpu")


def delivered(
    views: Generator[Views, None, None], normalise: Normaliser, device: torch.device, *, background: bool
) -> Generator[Images, None, None]:
    """Yield the views as normalised images on `device`; closing the iterator closes `views`.

    background: make them ahead of time in a thread, which `views` must allow.
    """
    if device.type == "cuda":
        copier = _Copier(normalise, device, torch.cuda.Stream(device))
        deliver, receive = copier.send, copier.receive
    else:
        deliver, receive = _Here(normalise, device).send, _as_it_is
    sent = (deliver(batch) for batch in views)
    with contextlib.closing(views), contextlib.closing(ahead(sent) if background else sent) as items:
        for item in items:
            yield receive(item)


@dataclass(frozen=True)
class _Sent:
    """Images that may still be in transfer. arrived: the event at its end; None if they are there."""

    images: Images
    arrived: torch.cuda.Event | None = None


def _as_it_is(sent: _Sent) -> Images:
    return sent.images


@dataclass(frozen=True)
class _Here:
    """Normalises in host memory, then copies to any device."""

    normalise: Normaliser
    device: torch.device

    def send(self, views: Views) -> _Sent:
        pixels = _blanked(self.normalise(views.pixels), views, torch.from_numpy)
        return _Sent(Images(pixels.to(self.device), torch.from_numpy(views.valid)))


@dataclass(frozen=True, eq=False)
class _Copier:
    """Copies bytes to a CUDA device and normalises them there, on a stream of its own."""

    normalise: Normaliser
    device: torch.device
    stream: torch.cuda.Stream

    def send(self, views: Views) -> _Sent:
        def moved(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            pixels = _blanked(self.normalise.on_device(moved(views.pixels)), views, moved)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return _Sent(Images(pixels, torch.from_numpy(views.valid)), arrived)

    def receive(self, sent: _Sent) -> Images:
        assert sent.arrived is not None
        present = torch.cuda.current_stream(self.device)
        present.wait_event(sent.arrived)
        # Otherwise the memory could be reused for the next batch while the network still reads it.
        sent.images.pixels.record_stream(present)
        return sent.images


def _blanked(pixels: Tensor, views: Views, moved: Callable[[npt.NDArray[Any]], Tensor]) -> Tensor:
    """Set erased pixels and invalid images to zero, in place."""
    if views.erased is not None:
        pixels.masked_fill_(moved(views.erased)[:, None], 0)
    if not views.valid.all():
        pixels.masked_fill_(moved(~views.valid)[:, None, None, None], 0)
    return pixels
