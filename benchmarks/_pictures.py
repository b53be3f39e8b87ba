"""Labelled images in memory, from files or generated, for networks that must not be fed white noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.shards.decode import decode, resize
from hpccl.data.shards.sources import Member, SourceReader, scan

__all__ = ["Pictures"]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images. pixels: [n, 3, size, size] float32, normalised, channels_last; labels: [n]; source: their origin."""

    pixels: Tensor
    labels: Tensor
    source: str

    @classmethod
    def of(cls, path: Path | None, size: int, *, count: int, classes: int) -> Pictures:
        """Load `count` images of the first half of the classes and as many of the second, classes interleaved.

        path: a folder, zip or tar of class folders; large images are cropped at random as often as necessary. None:
            generate images.
        """
        wanted = [number % classes for number in range(2 * count)]
        raw = np.stack(list(_crops(path, size, wanted) if path else _made(size, wanted)))
        pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).float()
        pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
        source = path.name if path else "synthetic"
        return cls(pixels.contiguous(memory_format=torch.channels_last), torch.tensor(wanted), source)


def _crops(path: Path, size: int, labels: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
    listing = scan(path)
    found = listing.get("train") or next(iter(listing.values()))
    by_label: dict[int, list[Member]] = {}
    for number, members in enumerate(found.values()):
        by_label.setdefault(number % (max(labels) + 1), []).extend(members)
    turns = {label: itertools.cycle(members) for label, members in by_label.items()}
    random = np.random.default_rng(0)
    reader = SourceReader(path)
    try:
        for label in labels:
            member = next(turns[label % len(turns)])
            pixels = decode(reader.read(member), member.name)
            height, width = pixels.shape[:2]
            side = round(min(height, width) * random.uniform(0.7, 1.0))
            top, left = random.integers(height - side + 1), random.integers(width - side + 1)
            crop = np.ascontiguousarray(pixels[top : top + side, left : left + side])
            shown = resize(crop, (size, size))
            yield np.ascontiguousarray(shown[:, ::-1] if random.random() < 0.5 else shown)
    finally:
        reader.close()


def _made(size: int, labels: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield noise whose amplitude falls as 1 / frequency, as in photographs, with correlated colours."""
    random = np.random.default_rng(0)
    across = np.fft.fftfreq(size)
    frequency = np.maximum(np.hypot(across[:, None], across[None, :]), 1 / size)

    def noise(power: float) -> npt.NDArray[np.float64]:
        spectrum = np.fft.fft2(random.standard_normal((size, size, 3)), axes=(0, 1)) / frequency[..., None] ** power
        field = np.fft.ifft2(spectrum, axes=(0, 1)).real @ (np.full((3, 3), 0.8) + 0.2 * np.eye(3))
        return np.asarray(field / field.std())

    patterns = [noise(1.5) for _ in range(max(labels) + 1)]
    for label in labels:
        field = 0.7 * patterns[label] + noise(1.0)
        yield np.clip(field * 45 + 128, 0, 255).astype(np.uint8)
