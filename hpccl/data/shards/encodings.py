"""How an image is stored in a shard."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from hpccl.data.shards import decode as decoding
from hpccl.errors import ConfigError

__all__ = ["Encoded", "Encoding", "Lossless", "Original", "Reencode", "describe", "encode"]

_WEBP_LIMIT = 16383  # pixels a side


@dataclass(frozen=True)
class Original:
    """The source's bytes, untouched."""


@dataclass(frozen=True)
class Reencode:
    """JPEG of `quality`, longer side at most `max_side` pixels; a JPEG that is small enough keeps its bytes."""

    max_side: int = 400
    quality: int = 90

    def __post_init__(self) -> None:
        if self.max_side < 1:
            raise ConfigError(f"max_side is {self.max_side}; allowed: a positive number of pixels")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality is {self.quality}; allowed: 1 (smallest file) to 100 (best picture)")


@dataclass(frozen=True)
class Lossless:
    """Unchanged pixels: PNG and lossless WebP keep their bytes, the rest becomes lossless WebP (for small images)."""


Encoding = Original | Reencode | Lossless


class Encoded(NamedTuple):
    """A stored image: its bytes, its extension (jpg, png, webp, ...) and its size in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def describe(encoding: Encoding) -> dict[str, Any]:
    """Describe an encoding for the manifest, such as {"kind": "reencode", "max_side": 400, "quality": 90}."""
    return {"kind": type(encoding).__name__.lower(), **dataclasses.asdict(encoding)}


def encode(data: bytes, name: str, encoding: Encoding) -> Encoded:
    """Encode an image for storage; every image is decoded once, so that damaged ones are found before training.

    Raises:
        DataError: the image cannot be decoded.
    """
    extension = decoding.image_format(data)
    if extension is None or isinstance(encoding, Original):
        size = decoding.check(data, name)
        return Encoded(data, extension or "img", *size)
    if isinstance(encoding, Reencode):
        return _reencode(data, name, extension, encoding)
    if extension == "png" or (extension == "webp" and _is_lossless_webp(data)):
        return Encoded(data, extension, *decoding.check(data, name))
    return _lossless(data, name)


def _reencode(data: bytes, name: str, extension: str, encoding: Reencode) -> Encoded:
    width, height = decoding.image_size(data, name)
    scale = min(encoding.max_side / max(width, height), 1.0)
    if extension == "jpg" and scale == 1.0:
        return Encoded(data, "jpg", *decoding.check(data, name))
    small = max(round(height * scale), 1), max(round(width * scale), 1)
    pixels = decoding.decode_scaled(data, name, box=(0, 0, width, height), size=small, interpolation="lanczos")
    stored: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), encoding.quality, colorsubsampling="420")
    return Encoded(stored, "jpg", small[1], small[0])


def _lossless(data: bytes, name: str) -> Encoded:
    pixels = decoding.decode(data, name)
    height, width = pixels.shape[:2]
    buffer = io.BytesIO()
    if max(height, width) > _WEBP_LIMIT:
        Image.fromarray(pixels).save(buffer, "png")
        return Encoded(buffer.getvalue(), "png", width, height)
    Image.fromarray(pixels).save(buffer, "webp", lossless=True, exact=True)
    return Encoded(buffer.getvalue(), "webp", width, height)


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first picture chunk is VP8L (https://developers.google.com/speed/webp/docs/riff_container)."""
    position = 12
    while position + 8 <= len(data):
        kind = data[position : position + 4]
        if kind in (b"VP8L", b"VP8 ", b"ANIM", b"ANMF"):
            return kind == b"VP8L"
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    return False
