from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpccl.config.prior import PriorConfig
from hpccl.train.consolidate import consolidate
from hpccl.train.pictures import stacked
from tests.run.method import make_world, merged


def test_pictures_of_several_sizes_share_a_grid() -> None:
    small, wide = np.full((20, 20, 3), 7, np.uint8), np.full((10, 24, 3), 9, np.uint8)
    grid = stacked([small, wide])
    assert grid.shape == (2, 20, 24, 3)
    assert (grid[0, :, :20] == 7).all()
    assert not grid[0, :, 20:].any()
    assert (grid[1, :10] == 9).all()
    assert not grid[1, 10:].any()
    assert stacked([]).shape == (0, 1, 1, 3)


def test_true_labels_by_coverage_are_the_share_of_its_task_that_memory_keeps(tmp_path: Path) -> None:
    """A task that is kept whole is replayed; of each other one the same share speaks by its label as is kept."""
    config = merged(
        {"memory": {"fraction": 0.3, "size": 0}, "prior": {"replay": "coverage"}, "train": {"epochs": 1}},
    )
    state, world = make_world(config, tmp_path / "run")
    for task in world.stream.tasks[:2]:
        state.mark = type(state.mark).at(task.index, "fit", 0)
        consolidate(task, state, world)
    memory = state.prior.memory
    for task in world.stream.tasks[:2]:
        own = memory.task == task.index
        kept, num_train = int(own.sum()), len(task.samples("train"))
        assert 0.25 < kept / num_train < 0.35
        assert int(memory.replay[own].sum()) == kept * kept // num_train


@pytest.mark.parametrize(
    ("kept", "num_train", "expected"), [(0, 10, 0), (1, 10, 0), (5, 10, 2), (10, 10, 10), (0, 0, 0)]
)
def test_number_of_true_labels_by_coverage(kept: int, num_train: int, expected: int) -> None:
    prior = PriorConfig(replay="coverage")
    assert prior.num_replayed(kept, num_train) == expected
    assert prior.some_true
    assert prior.some_soft


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.29, 29), (0.5, 50), (1.0, 100)])
def test_number_of_true_labels_by_a_share(share: float, expected: int) -> None:
    prior = PriorConfig(replay=share)
    assert prior.num_replayed(100, 1000) == expected
    assert prior.some_true == (share > 0)
    assert prior.some_soft == (share < 1)
