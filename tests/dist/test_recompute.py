"""Activation checkpointing on every engine: the same weights, pull and curvature included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_engines import ENGINES, agree, two_tasks
from tests.dist.world import run_in_world

# BatchNorm's statistics are of a rank's rows, so that only equal numbers of ranks can be compared.
RESNET: dict[str, Any] = {
    "model": {"kind": "timm", "name": "resnet10t", "options": {"channels": [8, 8, 16, 16], "drop_path_rate": 0.2}},
    "curvature": {"kind": "kronecker", "fraction": 0.1},
}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero-1", "zero-3"])
def test_recomputing_changes_nothing(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "plain", str(tmp_path), {"engine": ENGINES["ddp"]})[0]
    again = {**ENGINES[name], "recompute": True}
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {"engine": again}):
        agree(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("zero-3", marks=pytest.mark.slow)])
def test_batch_statistics_count_once(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "plain", str(tmp_path), {**RESNET, "engine": ENGINES["ddp"]})[0]
    changes = {**RESNET, "engine": {**ENGINES[name], "recompute": True}}
    (found, _) = run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), changes)
    agree(found, expected, 1e-5)
    counted = "bn1.num_batches_tracked"
    assert torch.equal(found["weights"][counted], expected["weights"][counted])
