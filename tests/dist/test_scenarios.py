"""Streams with shared classes, or few images: the number of processes is not in the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.train.evaluate import evaluate_all
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

BASE: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [12]},
    "train": {"epochs": 1, "batch_size": 37, "head": "own"},  # 37: uneven over any number of ranks
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant"},
    "memory": {"size": 21},
    "curvature": {"kind": "diagonal"},
    "prior": {"replay": 0.4, "quadratic": {"weight": 1.0}},
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "permuted": {"kind": "permuted"},
    "blurry": {"kind": "blurry", "blur": 0.2, "disjoint": 0.5},
    "few_shot": {"kind": "few_shot", "base": 5, "way": 2, "shots": 5},
}


def two_tasks(comm: Comm, folder: str) -> Result:
    """By scenario, what two tasks leave."""
    return {name: _learned(comm, Path(folder) / f"{name}-{comm.size}", chosen) for name, chosen in SCENARIOS.items()}


def _learned(comm: Comm, folder: Path, scenario: dict[str, Any]) -> Result:
    stream = {"kind": "digits", "tasks": 5 if scenario["kind"] == "blurry" else 3, "scenario": scenario}
    state, world = make_world(merged(BASE, {"stream": stream}), folder, comm)
    learn(state, world, 2)
    quadratic = state.prior.quadratic
    assert quadratic is not None
    return {
        "weights": {name: value.clone() for name, value in wholes(state.engine.gather()).items()},
        "memory": state.prior.memory.sample,
        "trace": quadratic.precision.totals(comm).trace,
        "accuracy": [result["task_incremental"]["accuracy"] for result in evaluate_all(state, world, last=1)],
    }


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    one = run_in_world(two_tasks, 1, tmp_path, str(tmp_path))[0]
    for found in run_in_world(two_tasks, 2, tmp_path, str(tmp_path)):
        for name, expected in one.items():
            assert torch.equal(found[name]["memory"], expected["memory"]), name
            assert found[name]["trace"] == pytest.approx(expected["trace"], rel=1e-4), name
            assert found[name]["accuracy"] == pytest.approx(expected["accuracy"], abs=0.01), name
            for parameter, value in expected["weights"].items():
                assert float((found[name]["weights"][parameter] - value).norm()) <= 1e-4 * float(value.norm()), name
