from __future__ import annotations

import numpy as np

from hpccl.train.consolidate import stacked


def test_pictures_of_several_sizes_share_a_grid() -> None:
    small, wide = np.full((20, 20, 3), 7, np.uint8), np.full((10, 24, 3), 9, np.uint8)
    grid = stacked([small, wide])
    assert grid.shape == (2, 20, 24, 3)
    assert (grid[0, :, :20] == 7).all()
    assert not grid[0, :, 20:].any()
    assert (grid[1, :10] == 9).all()
    assert not grid[1, 10:].any()
    assert stacked([]).shape == (0, 1, 1, 3)
