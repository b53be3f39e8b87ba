"""TOPIC: the net is the same on every rank, and the number of processes and the engine are not in the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.train.evaluate import evaluate_all
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

FEW: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 3, "scenario": {"kind": "few_shot", "base": 5, "way": 2, "shots": 5}},
    "model": {"kind": "mlp", "hidden": [16, 12]},
    "train": {"head": "seen", "epochs": [2, 6], "batch_size": 37, "accumulate": 2, "frozen": ["old_classes"]},
    "optim": {"name": "momentum", "lr": [0.05, 0.01], "schedule": "constant"},
    "prior": {"topology": {"nodes": 21, "new_nodes": 2, "minmax": 0.05}},  # 21: uneven over any number of ranks
}


def three_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """What two sessions leave."""
    state, world = make_world(merged(FEW, changes), Path(folder) / f"size-{comm.size}", comm)
    learn(state, world, 3)
    gas = state.prior.gas
    assert gas is not None
    return {
        "weights": {name: value.clone() for name, value in streamed(state.engine.gather(), comm)},
        "gas": {name: value for name, value in vars(gas).items() if isinstance(value, torch.Tensor)},
        "accuracy": [result["class_incremental"]["accuracy"] for result in evaluate_all(state, world, last=2)],
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    return run_in_world(three_tasks, 1, folder, str(folder), {})[0]


def agree(found: Result, expected: Result) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=2e-5, rtol=2e-5)
    for name in ("ages", "sample", "label"):
        assert torch.equal(found["gas"][name], expected["gas"][name]), name
    for name in ("nodes", "variance", "image"):
        torch.testing.assert_close(found["gas"][name], expected["gas"][name], atol=2e-5, rtol=2e-4)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.02)


def test_two_processes_learn_what_one_learns(alone: Result, tmp_path: Path) -> None:
    ranks = run_in_world(three_tasks, 2, tmp_path, str(tmp_path), {})
    for found in ranks:
        agree(found, alone)
    for part in ("weights", "gas"):  # of one world, to the last bit
        assert all(torch.equal(value, ranks[1][part][name]) for name, value in ranks[0][part].items())


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
}
ZERO = [pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4)]


@pytest.mark.parametrize("name", ["fsdp2", *ZERO])
def test_every_engine_learns_what_ddp_learns(alone: Result, tmp_path: Path, name: str) -> None:
    for found in run_in_world(three_tasks, 2, tmp_path, str(tmp_path), {"engine": ENGINES[name]}):
        agree(found, alone)
