"""Importances of weights do not depend on the number of processes, and little on the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint.store import Mark, latest, load, open_shards
from hpccl.curvature.mas_local import LocalMasEstimator
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.train.fit import fit
from tests.dist.test_curvature import COUNT, assert_same, shares
from tests.dist.test_engines import DDP, ENGINES, SECTIONS, agree, two_tasks
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged
from tests.unit.curvature.oracle import build, examples

SI: dict[str, Any] = {"curvature": {"kind": "si"}, "prior": {"quadratic": {"weight": 0.1, "decay": 0.9}}}


def measured(comm: Comm) -> Result:
    """The local variant of MAS on an uneven share of the examples."""
    model, pixels = build("convs", COUNT, dtype=torch.float32)
    return LocalMasEstimator().estimate(model, shares(comm, examples(pixels)), comm).state_dict()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_world_size_does_not_matter(tmp_path: Path, size: int) -> None:
    alone = measured(Comm.solo())
    for rank in run_in_world(measured, size, tmp_path):
        assert alone["num_examples"] == COUNT
        assert_same(alone, rank, rtol=1e-5)


def test_the_path_in_shards_is_that_of_whole_weights(tmp_path: Path) -> None:
    expected = two_tasks(Comm.solo(), str(tmp_path), {**SI, "engine": DDP})
    for found in run_in_world(two_tasks, 2, tmp_path / "fsdp2", str(tmp_path), {**SI, "engine": ENGINES["fsdp2"]}):
        agree(found, expected, 1e-6)


GROUPED: dict[str, Any] = {
    "mas": {"curvature": {"kind": "mas", "group": 25}},
    "ewc": {"curvature": {"kind": "diagonal", "fisher": "empirical", "group": 25}},
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_the_same_examples_on_any_number_of_processes(tmp_path: Path, name: str) -> None:
    """Else their mean gradients would be others."""
    changes = {**GROUPED[name], "engine": DDP}
    expected = two_tasks(Comm.solo(), str(tmp_path), changes)
    for found in run_in_world(two_tasks, 2, tmp_path / "two", str(tmp_path), changes):
        agree(found, expected, 1e-6)


def part(comm: Comm, folder: str, changes: dict[str, Any], *, to_the_end: bool) -> Result:
    """The second task, to its end or to somewhere within, from where the folder stands; what each weight did in it."""
    state, world = make_world(merged(SECTIONS, changes), Path(folder), comm)
    checkpoints = world.folder.checkpoints
    found = latest(checkpoints)
    if found is None:
        learn(state, world, 1)
        state.mark = Mark.at(1, "fit", 0)
    else:
        state.load_state_dict(load(checkpoints, found), found, open_shards(checkpoints, found), comm)
    if not to_the_end:
        world.stop.on_signal(15, None)
    assert fit(world.stream.tasks[1], state, world) == to_the_end
    world.settle(state)
    credit, begun = ({name: value.clone() for name, value in streamed(leaves, comm)} for leaves in state.engine.path())
    return {"credit": credit, "begun": begun, "step": state.mark.step}


def first_part(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    return part(comm, folder, changes, to_the_end=False)


def last_part(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    return part(comm, folder, changes, to_the_end=True)


@pytest.mark.slow
def test_a_path_goes_on_elsewhere(tmp_path: Path) -> None:
    """Stopped in shards and ended on one process, against one process alone."""
    alone, shards = {**SI, "engine": DDP}, {**SI, "engine": ENGINES["fsdp2"]}
    (whole,) = run_in_world(last_part, 1, tmp_path / "one", str(tmp_path / "whole"), alone)
    stopped = run_in_world(first_part, 2, tmp_path / "two", str(tmp_path / "run"), shards)[0]
    (ended,) = run_in_world(last_part, 1, tmp_path / "three", str(tmp_path / "run"), alone)
    assert 0 < stopped["step"] < ended["step"]
    for kept in ("credit", "begun"):
        for name, value in whole[kept].items():
            scale = float(value.abs().max())
            torch.testing.assert_close(ended[kept][name], value, rtol=1e-4, atol=1e-4 * scale, msg=f"{kept} {name}")
