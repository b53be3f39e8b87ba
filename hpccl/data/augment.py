"""Pixels to network input: crop, mirror and normalise a batch, as a pure function of each image's key.

Images are uint8 [n, h, w, channels]. Key 0 leaves an image unchanged. Random numbers are hashes of an image's key, so
that they depend neither on the batch it is in nor on the process that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.order import mix
from hpccl.errors import ConfigError

__all__ = ["BatchAugment", "Normaliser", "crop_flip", "draw_crop_flip"]

Pixels = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_CACHED = 1 << 16  # values that are normalised at a time
# The purposes of hashes of a key.
_TOP, _LEFT, _MIRROR = range(1, 4)


def draw_crop_flip(keys: Keys, *, padding: int, flip: bool) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Draw for every key [n] the crop's top and left in the padded image (0 to 2 padding), and whether to mirror."""
    random = keys != 0
    choices = np.uint64(2 * padding + 1)
    top = np.where(random, (mix(keys, _TOP) % choices).astype(np.int64), padding)
    left = np.where(random, (mix(keys, _LEFT) % choices).astype(np.int64), padding)
    mirror = random & flip & (mix(keys, _MIRROR) >> np.uint64(63)).astype(bool)
    return top, left, mirror


def crop_flip(images: Pixels, keys: Keys, *, padding: int, flip: bool) -> Pixels:
    """Zero-pad by `padding` pixels, crop back at random, mirror with probability 1/2; [n, h, w, channels] as given."""
    num, height, width, channels = images.shape
    top, left, mirror = draw_crop_flip(keys, padding=padding, flip=flip)
    padded = np.zeros((num, height + 2 * padding, width + 2 * padding, channels), dtype=np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = images
    rows = np.arange(num)[:, None] * padded.shape[1] + top[:, None] + np.arange(height)
    columns = left[:, None] + np.where(mirror[:, None], np.arange(width)[::-1], np.arange(width))
    where = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    cropped: Pixels = padded.reshape(-1, channels).take(where.reshape(-1), axis=0)
    return cropped.reshape(images.shape)


@dataclass(frozen=True)
class BatchAugment:
    """Pads, crops and mirrors a batch; padding 0 without flip changes nothing."""

    padding: int = 0
    flip: bool = False

    def __call__(self, images: Pixels, keys: Keys) -> Pixels:
        """Augment images [n, h, w, channels]; may return its argument."""
        if self.padding == 0 and not self.flip:
            return images
        return crop_flip(images, keys, padding=self.padding, flip=self.flip)


@dataclass(frozen=True)
class Normaliser:
    """(pixel / 255 - mean) / std, channel by channel, in one multiplication and one addition.

    scale, shift: [channels] float32
    """

    scale: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], channels: int) -> Normaliser:
        """Make one from data.mean and data.std, which have one value for all channels, or one per channel.

        Raises:
            ConfigError: another number of values, or a deviation that is not positive.
        """
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in {1, channels}:
                raise ConfigError(
                    f"data.{name} has {len(values)} values but the images have {channels} channels; "
                    f"give 1 value" + (f" or {channels}" if channels > 1 else "")
                )
        if min(std) <= 0:
            raise ConfigError(
                f"data.std is {list(std)}; every value must be above 0 (1 leaves pixels in [0, 1] as they are)"
            )
        wide_mean = np.broadcast_to(np.asarray(mean, dtype=np.float64), channels)
        wide_std = np.broadcast_to(np.asarray(std, dtype=np.float64), channels)
        return cls(
            scale=(1 / (255 * wide_std)).astype(np.float32),
            shift=(-wide_mean / wide_std).astype(np.float32),
        )

    def __call__(self, images: Pixels) -> Tensor:
        """Turn uint8 [n, h, w, channels] into float32 [n, channels, h, w], in channels_last memory order."""
        num, height, width, channels = images.shape
        out = np.empty(images.shape, dtype=np.float32)
        # One long row of repeated channels: an inner loop of 3 would not be vectorised.
        pixels, given = (array.reshape(num * height, width * channels) for array in (out, images))
        scale, shift = np.tile(self.scale, width), np.tile(self.shift, width)
        # As many rows at a time as stay in a core's cache between the three passes.
        step = max(_CACHED // max(width * channels, 1), 1)
        for start in range(0, len(pixels), step):
            rows = pixels[start : start + step]
            rows[:] = given[start : start + step]
            rows *= scale
            rows += shift
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def on_device(self, images: Tensor) -> Tensor:
        """Do the same, bit for bit, on the device of the pixels, uint8 [n, h, w, channels]."""
        scale, shift = (
            torch.from_numpy(values)[:, None, None].to(images.device, non_blocking=True)
            for values in (self.scale, self.shift)
        )
        # Two kernels, which round twice as on the CPU: a fused multiply-add would round once.
        return images.permute(0, 3, 1, 2).to(torch.float32).mul_(scale).add_(shift)
