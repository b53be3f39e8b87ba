from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpccl.data.shards.decode import Box, Interpolation, check, decode, decode_scaled, image_format, image_size, resize
from hpccl.data.shards.encodings import Lossless, Original, Reencode, encode
from hpccl.errors import DataError
from tests.unit.data.tiny_images import image_bytes, pixels


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_decodes_as_pillow_does(kind: str) -> None:
    data = image_bytes(pixels(1, 21, 34), kind)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    decoded = decode(data, "x")
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - reference).max() <= 1
    assert image_size(data, "x") == check(data, "x") == (34, 21)


@pytest.mark.parametrize("mode", ["L", "CMYK", "LA", "RGBA", "P", "1", "I;16"])
def test_odd_modes_become_rgb(mode: str) -> None:
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg" if mode in ("L", "CMYK") else "png", **({"transparency": b"\x80"} if mode == "P" else {}))
    decoded = decode(buffer.getvalue(), "x")
    assert decoded.shape == (8, 8, 3)
    tolerance = {"P": 51, "1": 255}.get(mode, 6)  # the default palette has 6 levels a channel
    assert np.abs(decoded.mean(2) - grey).max() <= tolerance
    assert check(buffer.getvalue(), "x") == (8, 8)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("function", [decode, check])
def test_pixels_without_a_known_range_are_refused(dtype: type, function: Callable[[bytes, str], object]) -> None:
    """They would be black, or clipped."""
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype)).save(buffer, "tiff")
    with pytest.raises(DataError, match=r"train/cat/1.*32 bits have no known range: convert them to 8 or 16"):
        function(buffer.getvalue(), "train/cat/1")


def test_grey_of_16_bits_in_a_netpbm_file_is_scaled() -> None:
    grey = (np.arange(64).reshape(8, 8) * 1000).astype(">u2")
    decoded = decode(b"P5 8 8 65535\n" + grey.tobytes(), "x")
    assert np.array_equal(decoded[:, :, 0], grey >> 8)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("function", [decode, check])
def test_damaged_images_are_named(kind: str, function: Callable[[bytes, str], object]) -> None:
    data = image_bytes(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    for damaged in (data[: len(data) // 2], data[:20], b"", b"no image at all"):
        with pytest.raises(DataError, match="train/cat/1"):
            function(damaged, "train/cat/1")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resize_is_pillows(interpolation: Interpolation) -> None:
    array = pixels(3, 90, 120)
    reference = Image.fromarray(array).resize((50, 40), Image.Resampling[interpolation.upper()])
    assert np.abs(resize(array, (40, 50), interpolation).astype(int) - np.asarray(reference)).max() <= 1
    array.flags.writeable = False
    assert resize(array, (40, 50), interpolation).shape == (40, 50, 3)


@pytest.mark.parametrize("box", [(0, 0, 517, 333), (101, 52, 340, 291), (3, 1, 510, 330), (20.5, 10.25, 400.5, 300)])
@pytest.mark.parametrize("size", [224, 64, 20, (30, 40)])
def test_scaled_decoding_equals_crop_then_resize(box: Box, size: int | tuple[int, int]) -> None:
    array = pixels(5, 333, 517)
    noise = np.random.default_rng(0).normal(0, 8, array.shape)
    array = (array + noise).clip(0, 255).astype(np.uint8)
    for kind in ("jpeg", "png"):
        data = image_bytes(array, kind)
        height, width = (size, size) if isinstance(size, int) else size
        whole = Image.fromarray(decode(data, "x"))
        reference = whole.resize((width, height), Image.Resampling.BILINEAR, box=box)
        got = decode_scaled(data, "x", box=box, size=size)
        assert got.shape == (height, width, 3)
        assert got.flags.c_contiguous
        assert np.abs(got.astype(int) - np.asarray(reference)).mean() < 2.0


def test_scaled_decoding_of_real_photographs(real_data: Path) -> None:
    torch.set_num_threads(1)
    archive = real_data / "imagenet-originals.zip"
    if not archive.exists():
        pytest.skip(f"no '{archive}'")
    with zipfile.ZipFile(archive) as opened:
        images = [opened.read(name) for name in sorted(opened.namelist()) if name.endswith("JPEG")][:40]
    boxes = []
    for data in images:
        width, height = image_size(data, "x")
        boxes.append((width // 9, height // 11, width - width // 7, height - height // 5))
    errors = []
    for size in (224, 64):
        for data, box in zip(images, boxes, strict=True):
            opened_image = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
            reference = np.asarray(opened_image.resize((size, size), Image.Resampling.BILINEAR))
            got = decode_scaled(data, "x", box=box, size=size)
            errors.append(np.abs(got.astype(int) - reference).mean())
    assert max(errors) < 6
    assert np.mean(errors) < 2


def test_original_keeps_bytes() -> None:
    for kind, extension in {"jpeg": "jpg", "png": "png", "webp": "webp"}.items():
        data = image_bytes(pixels(1, 30, 50), kind)
        assert encode(data, "x", Original()) == (data, extension, 50, 30)


def test_lossless_keeps_pixels() -> None:
    array = pixels(2, 32, 33)
    for kind, extension in {"png": "png", "webp": "webp", "bmp": "webp", "jpeg": "webp"}.items():
        data = image_bytes(array, kind)
        stored = encode(data, "x", Lossless())
        assert stored.extension == extension
        assert (stored.data == data) == (kind in ("png", "webp"))
        np.testing.assert_array_equal(decode(stored.data, "x"), decode(data, "x"))
    lossy = io.BytesIO()
    Image.fromarray(array).save(lossy, "webp", quality=50)
    stored = encode(lossy.getvalue(), "x", Lossless())
    assert stored.data != lossy.getvalue()
    np.testing.assert_array_equal(decode(stored.data, "x"), decode(lossy.getvalue(), "x"))


def test_reencode_bounds_the_longer_side() -> None:
    small, large = image_bytes(pixels(1, 30, 50)), image_bytes(pixels(2, 400, 600))
    assert encode(small, "x", Reencode(max_side=64)).data == small
    stored = encode(large, "x", Reencode(max_side=64, quality=95))
    assert stored[1:] == ("jpg", 64, 43)
    assert image_size(stored.data, "x") == (64, 43)
    reference = Image.fromarray(decode(large, "x")).resize((64, 43), Image.Resampling.LANCZOS)
    assert np.abs(decode(stored.data, "x").astype(int) - np.asarray(reference)).mean() < 4
    assert image_format(encode(image_bytes(pixels(1), "png"), "x", Reencode()).data) == "jpg"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_antialiased_as_in_floats(interpolation: Interpolation) -> None:
    """Against the same filter in float64: one level, from rounding after each of the two passes."""
    rng = np.random.default_rng(0)
    for size in ((30, 40), (64, 50), (100, 130)):
        image = rng.integers(64, 192, (77, 90, 3), dtype=np.uint8)  # far from where the first pass would be clipped
        planes = torch.from_numpy(image).double().permute(2, 0, 1)[None]
        exact = torch.nn.functional.interpolate(planes, size, mode=interpolation, antialias=True, align_corners=False)
        wanted = exact[0].permute(1, 2, 0).clamp(0, 255).numpy()
        made = resize(image, size, interpolation)
        assert made.flags.c_contiguous
        assert np.abs(made - wanted).max() <= 1.6
