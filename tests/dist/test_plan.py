"""A plan is what a run holds: predicted bytes against those of live tensors, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hpccl.curvature.protocols import Precision
from hpccl.dist.comm import Comm
from hpccl.train.plan.build import make_plan
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

TASKS = 2
NETWORK: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": TASKS},
    "model": {"kind": "mlp", "hidden": [96, 48]},
    "train": {"epochs": 1, "batch_size": 128},
    "memory": {"size": 30},
    "prior": {"replay": 0.5, "quadratic": {"weight": 1.0}},
    "curvature": {"kind": "kronecker", "fisher": "empirical"},
}
ENGINES: dict[str, dict[str, Any]] = {"ddp": {"kind": "ddp"}}


def num_bytes(tree: Any) -> int:
    """Of all tensors in a nest; of those that are spread, of this rank's part."""
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    if isinstance(tree, (list, tuple)):
        return sum(map(num_bytes, tree))
    own = getattr(tree, "local", tree)
    return own.nbytes if isinstance(own, Tensor) else 0


def held_bytes(precision: Precision) -> int:
    return num_bytes(precision.state_dict()) + num_bytes(precision.shard_dict())


def two_tasks(comm: Comm, folder: str, engine: dict[str, Any]) -> Result:
    """What a rank holds after both tasks."""
    state, world = make_world(merged(NETWORK, {"engine": engine}), Path(folder) / f"size-{comm.size}", comm)
    learn(state, world, TASKS)
    saved, quadratic = state.engine.state_dict(), state.prior.quadratic
    assert quadratic is not None
    gradients = [parameter.grad for parameter in state.engine.module.parameters() if parameter.grad is not None]
    return {
        "weights": num_bytes(saved["weights"]),
        "gradients": num_bytes([getattr(each, "_local_tensor", each) for each in gradients]),
        "optimizer": num_bytes(saved["optimizer"]["moments"]),
        "old weights": num_bytes(state.prior.anchor),
        "curvature": held_bytes(quadratic.precision),
        "memory": state.prior.memory.num_bytes,
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_held_is_what_was_planned(engine: str, size: int, tmp_path: Path) -> None:
    results = run_in_world(two_tasks, size, tmp_path, str(tmp_path), ENGINES[engine])
    plan = make_plan(merged(NETWORK, {"engine": ENGINES[engine]}), nodes=1, nproc=size, measured=False)
    planned = {each.name: each.num_bytes for each in plan.held if each.when == "always"}
    for name in results[0]:
        most = max(result[name] for result in results)
        assert planned[name] == pytest.approx(most, rel=0.15), name
    together = sum(max(result[name] for result in results) for name in results[0])
    assert sum(planned[name] for name in results[0]) == pytest.approx(together, rel=0.15)
