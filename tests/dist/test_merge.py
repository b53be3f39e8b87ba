"""Runs of several processes are merged and looked at as those of one: curvature and weights lie in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpccl.checkpoint.store import Mark
from hpccl.config.load import dump
from hpccl.dist.comm import Comm
from hpccl.tools.merge import merge
from hpccl.tools.uncertainty import posterior_of, predictions
from hpccl.train.consolidate import consolidate
from tests.dist.world import run_in_world
from tests.run.method import make_world, merged

ENGINES: dict[str, Any] = {
    "ddp": {"engine": {"kind": "ddp"}},
    "fsdp2": {"engine": {"kind": "fsdp2"}},
    "diagonal fsdp2": {"engine": {"kind": "fsdp2"}, "curvature": {"kind": "diagonal"}},
}


def saved(comm: Comm, folder: str, engine: str) -> dict[str, Any]:
    """Untrained networks with the curvature of a task each: what differs between worlds is who holds what."""
    for number in range(3):
        config = merged(
            {"prior": {"quadratic": {"weight": 1.0}}, "model": {"kind": "mlp", "hidden": [20]}, "seed": number},
            ENGINES[engine],
        )
        path = Path(folder) / str(number)
        state, world = make_world(config, path, comm)
        state.mark = Mark.at(number, "done", 1)
        consolidate(world.stream.tasks[number], state, world)
        world.save(state, state.mark)
        if comm.leader:
            (path / "config.yaml").write_text(dump(config))
        comm.barrier()
    return {}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("diagonal fsdp2", marks=pytest.mark.slow)])
def test_any_number_of_processes_may_have_written_what_is_merged(engine: str, tmp_path: Path) -> None:
    found = {}
    for size, kind in ((1, engine.replace("fsdp2", "").strip() or "ddp"), (2, engine)):
        folder = tmp_path / str(size)
        name = {"diagonal": "diagonal fsdp2"}.get(kind, kind)
        run_in_world(saved, size, tmp_path / f"world-{size}", str(folder), "ddp" if kind == "ddp" else name)
        merge([folder / "1", folder / "2"], folder / "out", base=folder / "0", weights=[1, 0.5], prior_precision=0.1)
        found[size] = safetensors.torch.load_file(folder / "out" / "model.safetensors")
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, atol=2e-5, rtol=1e-4)


def predicted(comm: Comm, folder: str) -> dict[str, Any]:
    config = merged({"prior": {"quadratic": {"weight": 1.0}}, "model": {"kind": "mlp", "hidden": [8]}})
    state, world = make_world(config, Path(folder), comm)
    state.mark = Mark.at(0, "done", 1)
    consolidate(world.stream.tasks[0], state, world)
    posterior = posterior_of(state, world, 3.0)
    return {
        kind: {
            name: torch.from_numpy(column)
            for name, column in predictions(
                state, world, posterior, kind, samples=4, examples=None if kind == "sampled" else 31
            ).items()
        }
        for kind in ("sampled", "probit", "monte_carlo")
    }


def test_predictions_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    (alone,) = run_in_world(predicted, 1, tmp_path, str(tmp_path / "one"))
    for rank in run_in_world(predicted, 2, tmp_path, str(tmp_path / "two")):
        for kind, table in alone.items():
            for name, column in table.items():
                torch.testing.assert_close(rank[kind][name], column, atol=1e-4, rtol=1e-4)
