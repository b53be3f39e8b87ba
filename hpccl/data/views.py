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
    """The view that is evaluated, and from which crop_flip starts.

    size: side of the square view; None to take images as they are. An image that has this size already is unchanged.
    """

    size: int | None
    crop_pct: float = 0.875
    filter: Filter = "bicubic"

    def __call__(self, pixels: Pixels) -> Pixels:
        """Turn uint8 [h, w, channels] into [size, size, channels]."""
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
    """Turn [h, w, 1 or 3] into a Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_array(picture: Image.Image) -> Pixels:
    """Turn a Pillow image into a writable array [h, w, 1 or 3]."""
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
