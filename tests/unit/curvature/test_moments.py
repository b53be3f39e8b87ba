"""Moments of every geometry of a convolution, with patches and without, against sums over positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.curvature import factors, layers, moments
from hpccl.curvature.moments import Sharing
from tests.unit.curvature.factor_oracle import WEIGHT, assert_true, measure, threes_on
from tests.unit.curvature.oracle import NUM_CLASSES, build, examples

GEOMETRIES: dict[str, dict[str, Any]] = {
    "stem": {"kernel_size": 7, "stride": 2, "padding": 3},
    "point": {"kernel_size": 1},
    "point-stride": {"kernel_size": 1, "stride": 2, "bias": False},
    "point-padded": {"kernel_size": 1, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
    "same-dilated": {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 5, "padding": "same", "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16, "stride": 2},
    "five": {"kernel_size": 5, "padding": 2},
    "five-less": {"kernel_size": 5, "padding": 1},
    "wider-than-it-sees": {"kernel_size": 3, "padding": 4},
    "even-same": {"kernel_size": (2, 4), "padding": "same"},
    "row": {"kernel_size": (1, 3), "padding": (0, 1)},
    "column": {"kernel_size": (3, 1)},
    "as-large-as-the-image": {"kernel_size": (8, 7)},
    "too-large-to-cut": {"kernel_size": (6, 6)},
    "uneven-dense": {"kernel_size": (3, 2), "padding": (2, 1)},
}


def conv_net(**geometry: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    pixels = torch.randn(5, 3, 8, 7)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Conv2d(16, 16, **geometry), nn.Flatten(), nn.LazyLinear(NUM_CLASSES)
    )
    net(pixels)
    return net.double(), pixels.double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # costs torch a copy
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry: str, last: bool, sharing: Sharing) -> None:
    model, pixels = conv_net(**GEOMETRIES[geometry])
    data = examples(pixels.contiguous(memory_format=torch.channels_last) if last else pixels, weight=WEIGHT)
    assert_true(measure(model, data, "empirical", sharing=sharing), model, data, "empirical", sharing)


@pytest.mark.parametrize("size", [(9, 8), (4, 4), (4, 6), (2, 3), (3, 9), (1, 5), (2, 1)])
def test_three_by_three_without_patches(size: tuple[int, int]) -> None:
    model, pixels = threes_on(*size)
    data = examples(pixels, weight=WEIGHT)
    found = measure(model, data, "empirical")
    assert_true(found, model, data, "empirical", rtol=2e-6)


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 0}, {"padding": 1, "padding_mode": "circular"}])
def test_stride_one_uses_no_patches(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = conv_net(kernel_size=3, **geometry)
    asked: list[int] = []
    original = layers.patches

    def watched(module: nn.Conv2d, x: Tensor) -> Tensor:
        asked.append(module.in_channels)
        return original(module, x)

    monkeypatch.setattr(moments, "patches", watched)
    measure(model, examples(pixels))
    assert not asked


def test_small_blocks_and_few_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = build("convs", 5)
    data = examples(pixels)
    monkeypatch.setattr(moments, "_BLOCK", {"cpu": 3})
    monkeypatch.setattr(moments, "_LARGE_BLOCK", 5)
    monkeypatch.setattr(moments, "_rows_at_a_time", lambda module, x: 2)
    monkeypatch.setattr(factors, "_fitting", lambda graph_bytes, batch: 2)
    assert_true(measure(model, data), model, data, "ggn")


def test_channels_that_never_fire() -> None:
    model, pixels = threes_on(9, 8)
    with torch.no_grad():
        model.get_parameter("0.weight")[:3] = 0
        model.get_parameter("0.bias")[:3] = 0
    found = measure(model, examples(pixels)).blocks["2"].a.unflatten(2, (16, 9)).unflatten(1, (16, 9))[0]
    assert not found[:3].any()
    assert found[3:, :, 3:].any()
