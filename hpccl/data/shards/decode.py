"""Fast decoding of images to uint8 pixels: JPEG by libjpeg-turbo, at a fraction of its size when that is enough.

A JPEG of 8x8 blocks can be decoded at 1/2, 1/4 or 1/8 of its size from its low frequencies alone (libjpeg's "scaled
decoding"), with less work than decoding and shrinking. Fractions in between are slower than the full size, so they are
not used. Orientation tags are ignored, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from hpccl.errors import DataError

__all__ = ["Box", "Interpolation", "check", "decode", "decode_scaled", "image_format", "image_size", "resize"]

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    **{b"P%d" % kind: "ppm" for kind in range(1, 7)},
}
# Exceptions that Pillow's readers raise on damaged files; there is no documented common class.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def image_format(data: bytes) -> str | None:
    """Return `jpg`, `png`, `webp`, ... by the first bytes (a file's name may be wrong); None if unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return (width, height) from the header.

    Raises:
        DataError: not an image.
    """
    if image_format(data) == "jpg":
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError:
            pass  # let Pillow decide
        else:
            return int(width), int(height)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except _DAMAGED as error:
        raise _undecodable(name, error) from error


def check(data: bytes, name: str) -> tuple[int, int]:
    """Decode an image to check it and return (width, height); cheaper than `decode`.

    Raises:
        DataError: it cannot be decoded.
    """
    if image_format(data) == "jpg":
        try:
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1)
        except ValueError:
            pass
        else:
            return image_size(data, name)
    height, width = _decode_by_pillow(data, name).shape[:2]
    return width, height


def decode(data: bytes, name: str) -> Pixels:
    """Decode an image to [height, width, 3] uint8 RGB.

    Raises:
        DataError: it cannot be decoded; the message has its `name`.
    """
    if image_format(data) == "jpg":
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # CMYK, or a recoverable error
        else:
            return pixels
    return _decode_by_pillow(data, name)


def decode_scaled(
    data: bytes, name: str, *, box: Box, size: int | tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Pixels:
    """Crop `box` and resize it to `size` without decoding more pixels than needed.

    Args:
        data: an image file's bytes.
        name: for error messages.
        box: (left, top, right, bottom) in pixels of the stored image.
        size: side, or (height, width), of the result.
        interpolation: with antialiasing.

    Returns:
        [height, width, 3] uint8, equal to cropping and resizing the full image up to interpolation.

    Raises:
        DataError: the image cannot be decoded.
    """
    height, width = (size, size) if isinstance(size, int) else size
    factor = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    pixels, scale = _decode_at_least(data, name, factor)
    scaled = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
    return _crop_and_resize(pixels, scaled, (height, width), interpolation)


def resize(pixels: Pixels, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Pixels:
    """Resize [h, w, 3] to [*size, 3], antialiased."""
    return _crop_and_resize(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), size, interpolation)


def _crop_and_resize(pixels: Pixels, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Pixels:
    """Crop and resize by torch's uint8 kernels, which agree with Pillow's to one level and take a quarter of the time.

    Pillow does the rest: boxes that cut through pixels, and other filters.
    """
    rows, columns = pixels.shape[:2]
    left, top = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    right, bottom = min(math.ceil(box[2]), columns), min(math.ceil(box[3]), rows)
    crop = pixels[top:bottom, left:right]
    whole = all(float(edge).is_integer() for edge in box)
    if whole and crop.shape[:2] == size:
        return np.ascontiguousarray(crop)
    if whole and interpolation in ("bilinear", "bicubic"):
        # Contiguous, so that the result has the same memory order and need not be transposed; writable, or torch warns.
        # The batch axis is added first: added last, its stride hides from torch that the layout is channels_last.
        planes = torch.from_numpy(np.require(crop, requirements=["C", "W"])[None]).permute(0, 3, 1, 2)
        result = functional.interpolate(planes, size, mode=interpolation, antialias=True, align_corners=False)
        return np.ascontiguousarray(result[0].permute(1, 2, 0).numpy())
    inside = (
        max(box[0] - left, 0),
        max(box[1] - top, 0),
        min(box[2] - left, right - left),
        min(box[3] - top, bottom - top),
    )
    image = Image.fromarray(np.ascontiguousarray(crop))
    return np.array(image.resize((size[1], size[0]), _PILLOW_FILTERS[interpolation], box=inside))


def _decode_at_least(data: bytes, name: str, factor: float) -> tuple[Pixels, float]:
    """Decode at the smallest scale of 1, 1/2, 1/4, 1/8 that is at least 1 / factor; return the pixels and the scale."""
    divisor = next((divisor for divisor in (8, 4, 2) if factor >= divisor), 1)
    if divisor == 1 or image_format(data) != "jpg":
        return decode(data, name), 1.0
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        smallest = {"min_height": math.ceil(height / divisor), "min_width": math.ceil(width / divisor)}
        return simplejpeg.decode_jpeg(data, **smallest), 1 / divisor
    except ValueError:
        return decode(data, name), 1.0


def _decode_by_pillow(data: bytes, name: str) -> Pixels:
    # Otherwise Pillow tries a dozen other formats first, which takes as long as decoding a small image.
    formats = ["WEBP"] if image_format(data) == "webp" else None
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=formats) as image:
            warnings.simplefilter("ignore")  # about tags, palettes and very large images: all harmless here
            image.load()
            return _rgb(image)
    except _DAMAGED as error:
        raise _undecodable(name, error) from error


def _rgb(image: Image.Image) -> Pixels:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        # The value of white is not specified; Pillow clips all values, mostly to black.
        raise ValueError("pixels of 32 bits have no known range: convert them to 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _undecodable(name: str, error: BaseException) -> DataError:
    # Pillow's message contains a memory address, which would make the manifest of every build different.
    why = "not an image of a known format" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"image '{name}' cannot be decoded ({type(error).__name__}: {why})")
