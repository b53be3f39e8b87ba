"""timm's training augmentation, with its random resized crop done on a JPEG decoded no larger than needed.

The crop is drawn by timm itself; everything after it (mirror, colour, automatic augmentation, erasing) is timm's own
pipeline. Only the pixels of the crop are made differently: they are decoded at 1/2, 1/4 or 1/8 of the size where that
is still as large as the view.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.compat import import_timm
from hpccl.config.data import TimmAugment
from hpccl.data.shards.decode import decode_scaled, image_size
from hpccl.data.views import to_array, to_picture
from hpccl.errors import ConfigError

__all__ = ["TimmView", "seed_all"]

Pixels = npt.NDArray[np.uint8]


def seed_all(key: int) -> None:
    """Seed this process's generators (Python, numpy, torch on the CPU) with a 64-bit key."""
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])  # noqa: NPY002 - timm draws from the old global generator
    # Not torch.manual_seed, which would also reseed the devices; the CPU's generator takes 32 bits.
    torch.default_generator.manual_seed((key ^ key >> 32) & 0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class TimmView:
    """A random view of one image, determined by its key alone.

    crop: timm's RandomResizedCropAndInterpolation
    mirror: transforms that follow it (they work on tensors as well as on pictures)
    picture: transforms of a Pillow image, may be empty
    erase: transforms that set parts of the normalised tensor to 0, may be empty
    """

    size: int
    crop: Any
    mirror: tuple[Any, ...]
    picture: tuple[Any, ...]
    erase: tuple[Any, ...]

    @classmethod
    def of(cls, config: TimmAugment, *, size: int, mean: tuple[float, ...]) -> TimmView:
        """Take the pipeline of timm.data.create_transform apart.

        Raises:
            ConfigError: timm does not understand data.augment.auto_augment, or scale or ratio is no interval.
        """
        import_timm()
        from timm.data.transforms_factory import create_transform

        try:
            primary, secondary, final = create_transform(
                size,
                is_training=True,
                separate=True,
                scale=_interval("scale", config.scale),
                ratio=_interval("ratio", config.ratio),
                hflip=config.hflip,
                color_jitter=config.color_jitter or None,  # type: ignore[arg-type]  # timm leaves it out for None
                auto_augment=config.auto_augment,
                interpolation=config.interpolation,
                mean=tuple(np.broadcast_to(mean, 3).tolist()),
                re_prob=config.random_erase,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(
                f"timm does not understand data.augment.auto_augment {config.auto_augment!r} ({error}); examples: "
                "rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a"
            ) from error
        crop, *mirror = primary.transforms
        # The first two of the final transforms are conversion and normalisation.
        return cls(size, crop, tuple(mirror), tuple(secondary.transforms), tuple(final.transforms[2:]))

    def __call__(self, data: bytes, name: str, key: int) -> tuple[Pixels, npt.NDArray[np.bool_] | None]:
        """Return uint8 [size, size, 3] and, with random erasing, the mask [size, size] of erased pixels.

        Seeds this process's generators; the caller has to restore them.

        Raises:
            DataError: the image cannot be decoded.
        """
        seed_all(key)
        image: Any = self._cropped(data, name)
        for transform in self.mirror:
            image = transform(image)
        pixels: Pixels = image.permute(1, 2, 0).numpy()
        if self.picture:
            changed: Any = to_picture(np.ascontiguousarray(pixels))
            for transform in self.picture:
                changed = transform(changed)
            pixels = to_array(changed)
        return pixels, self._erased() if self.erase else None

    def _erased(self) -> npt.NDArray[np.bool_]:
        """Return which pixels are erased: timm erases in place, to 0, and independently of the tensor's values."""
        kept = torch.ones(1, self.size, self.size)
        for transform in self.erase:
            transform(kept)
        return (kept[0] == 0).numpy()

    def _cropped(self, data: bytes, name: str) -> Tensor:
        """Return the random resized crop, uint8 [3, size, size] in channels_last memory."""
        width, height = image_size(data, name)
        # timm only uses the size of this argument, and an expanded tensor takes no memory.
        shape = torch.empty(1).expand(1, height, width)
        top, left, rows, columns = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        filters = self.crop.interpolation
        chosen = random.choice(filters) if isinstance(filters, (tuple, list)) else filters
        box = (left, top, left + columns, top + rows)
        pixels = decode_scaled(data, name, box=box, size=self.size, interpolation=chosen.value)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _interval(name: str, values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ConfigError(f"data.augment.{name} is {list(values)}; it takes two numbers, 0 < smallest <= largest")
    return values[0], values[1]
