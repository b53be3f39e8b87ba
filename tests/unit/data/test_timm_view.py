from __future__ import annotations

import io
import random

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from hpccl.compat import import_timm
from hpccl.config.data import TimmAugment
from hpccl.data.augment import Normaliser
from hpccl.data.timm_view import TimmView, seed_all
from hpccl.errors import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height: int, width: int) -> npt.NDArray[np.uint8]:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 17 + shift) + np.cos(columns / 13 - shift) for shift in range(3)]
    return (np.stack(waves, axis=2) * 60 + 127).clip(0, 255).astype(np.uint8)


def encoded(pixels: npt.NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return buffer.getvalue()


def view_of(config: TimmAugment, size: int = 32) -> TimmView:
    return TimmView.of(config, size=size, mean=MEAN)


def make(view: TimmView, data: bytes, key: int) -> torch.Tensor:
    pixels, erased = view(data, "image", key)
    made = Normaliser.of(MEAN, STD, 3)(pixels[None])[0]
    return made if erased is None else made.masked_fill(torch.from_numpy(erased), 0)


@pytest.mark.parametrize(
    "config",
    [
        TimmAugment(),
        TimmAugment(interpolation="random", random_erase=0.8),
        TimmAugment(interpolation="bilinear", color_jitter=0.4, scale=(0.3, 0.5), ratio=(1.0, 2.0)),
        TimmAugment(auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25),
    ],
    ids=["plain", "erase", "jitter", "auto"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_same_as_timm_with_the_same_seed(config: TimmAugment, kind: str) -> None:
    import_timm()
    from timm.data.transforms_factory import create_transform

    reference = create_transform(
        32,
        is_training=True,
        scale=config.scale,  # type: ignore[arg-type]
        ratio=config.ratio,  # type: ignore[arg-type]
        color_jitter=config.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        re_prob=config.random_erase,
        mean=MEAN,
        std=STD,
    )
    view, data = view_of(config), encoded(photo(60, 90), kind)
    for key in range(1, 25):
        seed_all(key)
        expected = reference(Image.open(io.BytesIO(data)).convert("RGB"))
        difference = (make(view, data, key) - expected).abs()
        # Half of the pixels within one level; automatic augmentation may amplify a level's difference.
        assert float(difference.median()) <= 1.01 / 255 / 0.224
        assert float(difference.mean()) < 0.03, key


def test_large_jpegs_are_decoded_smaller_and_look_alike() -> None:
    config = TimmAugment(scale=(0.5, 1.0))
    data = encoded(photo(600, 800), "JPEG")
    plain = encoded(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), "PNG")
    view = view_of(config)
    for key in range(1, 9):
        small, full = make(view, data, key), make(view, plain, key)
        assert float((small - full).abs().mean()) < 0.05


def test_a_key_is_a_view() -> None:
    view, data = view_of(TimmAugment(auto_augment="rand-m9", random_erase=0.5)), encoded(photo(60, 90), "PNG")
    first = [make(view, data, key) for key in (1, 2, 2**64 - 1)]
    again = [make(view, data, key) for key in (2**64 - 1, 2, 1)][::-1]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert not torch.equal(first[0], first[1])


def test_all_bits_of_a_key_seed_every_generator() -> None:
    def draws(key: int) -> tuple[float, float, float]:
        seed_all(key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    for one, other in zip(draws(5), draws(5 + 2**32), strict=True):
        assert one != other


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TimmAugment(auto_augment="nonsense"), "does not understand data.augment.auto_augment 'nonsense'"),
        (TimmAugment(scale=(0.5,)), r"data.augment.scale is \[0.5\]; it takes two numbers"),
        (TimmAugment(ratio=(2.0, 1.0)), "data.augment.ratio"),
    ],
)
def test_wrong_settings_are_named(config: TimmAugment, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        view_of(config)
