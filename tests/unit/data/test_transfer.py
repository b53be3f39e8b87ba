"""Bytes travel and floats arrive: the same numbers wherever normalisation happens."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

from hpccl.data.augment import Normaliser
from hpccl.data.rows import Images, Views
from hpccl.data.transfer import CPU, delivered

NORMALISE = Normaliser.of((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3)


def views(count: int, *, side: int = 9) -> Views:
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side + 2, 3), dtype=np.uint8)
    valid, erased = np.ones(count, dtype=bool), np.zeros(pixels.shape[:3], dtype=bool)
    valid[0], erased[-1, 2:5, 1:4] = False, True
    return Views(pixels, valid, erased)


def expected(batch: Views) -> torch.Tensor:
    """In float32, as one multiplication and one addition, with numpy."""
    floats = batch.pixels.astype(np.float32) * NORMALISE.scale + NORMALISE.shift
    floats[~batch.valid] = 0
    if batch.erased is not None:
        floats[batch.erased] = 0
    return torch.from_numpy(floats).permute(0, 3, 1, 2)


def test_every_byte_is_normalised_to_the_same_bits_on_a_device_and_on_the_host() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    host, device = NORMALISE(every), NORMALISE.on_device(torch.from_numpy(every))
    assert host.dtype == device.dtype == torch.float32
    assert torch.equal(host, device)
    assert host.stride() == device.stride()
    wanted = (every / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    np.testing.assert_allclose(host.permute(0, 2, 3, 1).numpy(), wanted, atol=2e-6)


@pytest.mark.parametrize("background", [False, True])
def test_what_arrives_is_what_was_sent(background: bool) -> None:
    batches = [views(count) for count in (3, 1, 5)]
    arrived = list(delivered((batch for batch in batches), NORMALISE, CPU, background=background))
    for batch, images in zip(batches, arrived, strict=True):
        assert torch.equal(images.pixels, expected(batch))
        assert images.pixels.is_contiguous(memory_format=torch.channels_last)
        assert images.valid.tolist() == batch.valid.tolist()


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu_while_it_computes() -> None:
    device = torch.device("cuda")
    batches = [views(32, side=64) for _ in range(20)]
    ballast = torch.randn(2048, 2048, device=device)
    for batch, images in zip(
        batches, delivered((batch for batch in batches), NORMALISE, device, background=True), strict=True
    ):
        for _ in range(5):
            ballast = ballast @ ballast / 2048
        assert images.pixels.device.type == "cuda"
        assert torch.equal(images.pixels.cpu(), expected(batch))


@pytest.mark.parametrize("background", [False, True])
def test_closing_closes_the_source(background: bool) -> None:
    closed = []

    def source() -> Generator[Views, None, None]:
        try:
            while True:
                yield views(2)
        finally:
            closed.append(True)

    images = delivered(source(), NORMALISE, CPU, background=background)
    assert isinstance(next(images), Images)
    images.close()
    assert closed == [True]
