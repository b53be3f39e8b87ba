"""The evaluation view of an image: shorter side resized to image_size / crop_pct, centre cropped, as timm does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpccl.data.shards.decode import resize

__all__ = ["EvaluationView", "Filter", "to_array", "to_picture"]

Pixels = npt.NDArray[np.uint8]
Filter = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class EvaluationView:
    """What is evaluated, and what crop_flip starts from.

    size: sides of the square view, None to take images as they are. An image that has this size already stays as it is.
    """

    size: int | None
    crop_pct: float = 0.875
    filter: Filter = "bicubic"

    def __call__(self, pixels: Pixels) -> Pixels:
        """uint8 [h, w, channels] to [size, size, channels]."""
        size = self.size
        if size is None or pixels.shape[:2] == (size, size):
            return pixels
        height, width = pixels.shape[:2]
        shorter = math.floor(size / self.crop_pct)
        longer = int(shorter * max(height, width) / min(height, width))
        height, width = (shorter, longer) if height <= width else (longer, shorter)
        resized = resize(pixels, (height, width), self.filter)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return resized[top : top + size, left : left + size]


def to_picture(pixels: Pixels) -> Image.Image:
    """[h, w, 1 or 3] to a Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_array(picture: Image.Image) -> Pixels:
    """A Pillow image to [h, w, 1 or 3], writable."""
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
