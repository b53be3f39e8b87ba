from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpccl.data.augment import Normaliser, crop_flip, draw_crop_flip
from hpccl.errors import ConfigError


def images(num: int, channels: int = 3, height: int = 6, width: int = 5) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, (num, height, width, channels), dtype=np.uint8)


def brute_force(image: npt.NDArray[np.uint8], top: int, left: int, mirror: bool, padding: int) -> npt.NDArray[np.uint8]:
    height, width = image.shape[:2]
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row = row + top - padding
            source_column = (width - 1 - column if mirror else column) + left - padding
            if 0 <= source_row < height and 0 <= source_column < width:
                result[row, column] = image[source_row, source_column]
    return result


@given(st.integers(0, 4), st.booleans(), st.sampled_from([1, 3]), st.integers(0, 2**63))
def test_crop_flip_is_the_brute_force_one(padding: int, flip: bool, channels: int, first_key: int) -> None:
    pixels = images(4, channels)
    keys = np.array([0, first_key, 2**64 - 1, 12345], dtype=np.uint64)
    top, left, mirror = draw_crop_flip(keys, padding=padding, flip=flip)
    expected = [
        brute_force(*drawn, padding=padding)
        for drawn in zip(pixels, top.tolist(), left.tolist(), mirror.tolist(), strict=True)
    ]
    result = crop_flip(pixels, keys, padding=padding, flip=flip)
    np.testing.assert_array_equal(result, np.stack(expected))
    np.testing.assert_array_equal(result[0], pixels[0])  # key 0


def test_every_offset_is_equally_likely_and_half_are_mirrored() -> None:
    keys = np.arange(1, 40_001, dtype=np.uint64)
    top, left, mirror = draw_crop_flip(keys, padding=4, flip=True)
    joint = np.bincount(top * 18 + left * 2 + mirror, minlength=162)
    expected = len(keys) / 162
    assert joint.size == 162
    chi_square = float(((joint - expected) ** 2 / expected).sum())
    assert chi_square < 230  # the 99.97 % point of 161 degrees of freedom


def test_an_image_does_not_depend_on_its_batch() -> None:
    pixels, keys = images(9), np.arange(1, 10, dtype=np.uint64)
    whole = crop_flip(pixels, keys, padding=2, flip=True)
    single = [crop_flip(pixels[[i]], keys[[i]], padding=2, flip=True)[0] for i in range(9)]
    np.testing.assert_array_equal(whole, np.stack(single))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_as_the_formula_says(channels: int) -> None:
    mean, std = (0.2, 0.4, 0.6)[:channels], (0.5, 0.25, 0.3)[:channels]
    pixels = images(3, channels)
    result = Normaliser.of(mean, std, channels)(pixels)
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).view(1, -1, 1, 1)) / (
        torch.tensor(std).view(1, -1, 1, 1)
    )
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5, 0.5), (0.5,), "data.mean has 2 values"),
        ((0.5,), (0.5, 0.0, 1.0), "data.std is"),
        ((0.5,), (1, 1), "or 3"),
    ],
)
def test_wrong_statistics_are_named(mean: tuple[float, ...], std: tuple[float, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Normaliser.of(mean, std, 3)
