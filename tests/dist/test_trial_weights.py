"""Optimisers that draw or perturb weights end where they end on one process, on every engine that takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.train.fit import fit
from tests.dist.test_engines import ENGINES, everything, part
from tests.dist.world import Result, dismiss, run_in_world
from tests.run.method import learn, make_world, merged

COMMON: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [13]},
    "train": {"epochs": 2, "batch_size": 61, "accumulate": 2},
    "memory": {"size": 20},
    "prior": {"replay": 1.0, "quadratic": {"weight": 3.0}},
    "curvature": {"kind": "diagonal", "fisher": "mc", "fraction": 0.3},
}
IVON = {"kind": "ivon", "lr": 0.1, "initial_curvature": 0.1, "curvature_decay": 0.99}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "ivon": IVON,
    "ivon of two draws": {**IVON, "samples": 2},
    "sam": {"kind": "sam", "lr": 0.02, "radius": 0.1},
    "bsam": {"kind": "bsam", "lr": 0.1, "radius": 0.01},
    "vogn": {"kind": "vogn", "lr": 1e-3},
    "soba": {"kind": "soba", "lr": 0.02},
    "lie, affine": {"kind": "lie", "lr": 0.5, "group": {"kind": "affine"}},
    "lie, additive": {"kind": "lie", "lr": 0.05, "group": {"kind": "additive", "noise": 0.01}},
    "lie, multiplicative": {"kind": "lie", "lr": 5.0, "temperature": 0.01, "group": {"kind": "multiplicative"}},
}
CLIPPED = {"train": {"epochs": 2, "batch_size": 61, "accumulate": 2, "clip_norm": 0.5}}


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after two tasks, of which the second has a quadratic and a memory."""
    state, world = make_world(merged(COMMON, changes), Path(folder), comm)
    learn(state, world, 1)
    state.mark = type(state.mark).at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    return everything(state, comm)


def difference(found: Result, expected: Result) -> float:
    a = torch.cat([value.double().flatten() for value in expected.values()])
    b = torch.cat([found[name].double().flatten() for name in expected])
    assert bool(a.isfinite().all())
    return float((a - b).norm() / a.norm())


def ended(tmp_path: Path, size: int, name: str, changes: dict[str, Any]) -> Result:
    folder = tmp_path / f"{size}-{name}"
    return run_in_world(two_tasks, size, folder, str(folder / "run"), {**changes, "engine": ENGINES[name]})[-1]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_two_processes_end_where_one_does(tmp_path: Path, optimiser: str) -> None:
    changes = {"optim": OPTIMISERS[optimiser], **CLIPPED}
    expected = ended(tmp_path, 1, "ddp", changes)
    assert difference(ended(tmp_path, 2, "ddp", changes), expected) < 1e-5


@pytest.mark.parametrize("optimiser", [name for name in OPTIMISERS if name != "vogn"])
def test_shards_end_where_the_whole_does(tmp_path: Path, optimiser: str) -> None:
    changes = {"optim": OPTIMISERS[optimiser], **CLIPPED}
    expected = ended(tmp_path, 2, "ddp", changes)
    assert difference(ended(tmp_path, 2, "fsdp2", changes), expected) < 1e-5


@pytest.mark.parametrize("optimiser", ["ivon", "soba", "lie, affine", "lie, multiplicative"])
@pytest.mark.parametrize("name", ["zero-0", "zero-1", "zero-2", "zero-3"])
def test_deepspeed_ends_where_ddp_does(tmp_path: Path, name: str, optimiser: str) -> None:
    changes = {"optim": OPTIMISERS[optimiser]}
    expected = ended(tmp_path, 2, "ddp", changes)
    assert difference(ended(tmp_path, 2, name, changes), expected) < 1e-5


@pytest.mark.parametrize("optimiser", ["sam", "bsam", "ivon of two draws"])
def test_several_passes_on_stage_0(tmp_path: Path, optimiser: str) -> None:
    changes = {"optim": OPTIMISERS[optimiser], **CLIPPED}
    assert difference(ended(tmp_path, 2, "zero-0", changes), ended(tmp_path, 2, "ddp", changes)) < 1e-5
