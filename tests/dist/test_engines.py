"""Every engine ends where the others end, and goes on where another one stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.checkpoint.store import Mark, latest, load, open_shards
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import test as evaluate_all
from hpccl.train.fit import fit
from hpccl.train.reconstruction import reconstruct
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SECTIONS: dict[str, Any] = {
    "model": {"kind": "timm", "name": "vit_tiny_patch16_224", "options": VIT},
    "train": {"epochs": 1, "batch_size": 37, "accumulate": 2, "clip_norm": 1.0},
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant"},
    "memory": {"size": 21},
    "curvature": {"kind": "kronecker", "fisher": "ggn", "fraction": 0.3},
    "prior": {"replay": 0.4, "quadratic": {"weight": 3.0}},
    "log": {"reconstruction": 0.1},
}
DDP: dict[str, Any] = {"kind": "ddp"}
FSDP2: dict[str, Any] = {"kind": "fsdp2"}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
}


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after two tasks, and what was measured on the way."""
    events: list[dict[str, Any]] = []
    state, world = make_world(merged(SECTIONS, changes), Path(folder) / f"size-{comm.size}", comm)
    world.log.write = lambda event, **fields: events.append({**fields, "event": event})  # type: ignore[method-assign]
    learn(state, world, 1)
    state.mark = Mark.at(1, "fit", 0)
    task = world.stream.tasks[1]
    assert fit(task, state, world)
    reconstruct(task, state, world)
    weights = everything(state, comm)
    consolidate(task, state, world)
    assert state.prior.quadratic is not None
    (error,) = [event["terms"] for event in events if event["event"] == "reconstruction"]
    return {
        "weights": weights,
        "soft": state.prior.memory.soft,
        "trace": torch.tensor(state.prior.quadratic.precision.totals(comm).trace),
        "cosine": torch.tensor([term["cosine"] for term in error.values()]),
        "accuracy": [result["task_incremental"]["accuracy"] for result in evaluate_all(state, world, last=1)],
    }


def everything(state: Any, comm: Comm) -> dict[str, Tensor]:
    """All weights, whole."""
    return {name: value.clone() for name, value in streamed(state.engine.gather(), comm)}


def agree(found: Result, expected: Result, tolerance: float) -> None:
    """To a relative difference, over all weights together and for the rest."""
    a = torch.cat([value.double().flatten() for value in expected["weights"].values()])
    b = torch.cat([found["weights"][name].double().flatten() for name in expected["weights"]])
    assert float((a - b).norm() / a.norm()) <= tolerance
    for name in ("soft", "trace", "cosine"):
        difference = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert float(difference) <= 1e3 * tolerance, name
    assert found["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "ddp"])
def test_engines_agree(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {"engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {"engine": ENGINES[name]}):
        agree(found, expected, 1e-6)
