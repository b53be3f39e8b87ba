from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from hpccl.compat import import_timm
from hpccl.data.views import EvaluationView, Filter, to_array, to_picture


def photo(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Smooth, coloured, with some noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 7 + shift) + np.cos(columns / 5 - shift) for shift in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return (np.stack(waves, axis=2) * 60 + 127 + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(50, 70), (71, 50), (40, 40), (20, 33)])
@pytest.mark.parametrize("filters", ["bilinear", "bicubic"])
def test_equals_timms_evaluation_transform(shape: tuple[int, int], filters: Filter) -> None:
    import_timm()
    from timm.data.transforms_factory import create_transform

    pixels = photo(*shape)
    reference = create_transform(32, crop_pct=0.875, interpolation=filters, normalize=False)
    expected = reference(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    result = EvaluationView(32, 0.875, filters)(pixels)
    assert result.shape == (32, 32, 3)
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1  # rounding of the filters


def test_images_of_the_right_size_stay_as_they_are() -> None:
    pixels = photo(32, 32)
    assert EvaluationView(32)(pixels) is pixels
    assert EvaluationView(None)(pixels) is pixels


def test_one_channel() -> None:
    grey = photo(20, 20)[:, :, :1]
    assert EvaluationView(8)(grey).shape == (8, 8, 1)
    np.testing.assert_array_equal(to_array(to_picture(grey)), grey)
