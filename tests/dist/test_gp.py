"""Gaussian processes of rows that are spread over ranks are those of all rows on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint.store import Mark
from hpccl.dist.comm import Comm
from hpccl.errors import HpcclError
from hpccl.gp.kernel import Kernel
from hpccl.gp.likelihood import Gaussian, Softmax
from hpccl.gp.state import Settings, begin
from hpccl.gp.stream import learn, typical_distance
from hpccl.tools.gp_fit import fit_features
from tests.dist.world import run_in_world
from tests.run.method import make_world, merged


def figures(comm: Comm) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    at = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    found: dict[str, Any] = {"distance": typical_distance(x[comm.share(40).start : comm.share(40).stop], comm)}
    for name, likelihood, y in (
        ("regression", Gaussian.of(0.1, 2), torch.stack([x.sum(1).sin(), x[:, 0]], 1)),
        ("classes", Softmax(3), labels),
    ):
        state = begin(Kernel.of("rbf", lengthscale=1.5), likelihood)
        settings = Settings(inducing=12, steps=6, memory=5, tune=4, tune_rate=0.1)
        # The first task has one example, so that one of the ranks has none.
        for start, stop in ((0, 1), (1, 22), (22, 40)):
            part = comm.share(stop - start)
            rows = torch.arange(start + part.start, start + part.stop)
            state = learn(state, x[rows], y[rows], rows, settings=settings, comm=comm)
        assert state.posterior is not None
        assert state.memory is not None
        mean, variance = state.predict(at)
        found[name] = {
            "inducing": state.posterior.inducing,
            "mean": mean,
            "variance": variance,
            "memory": state.memory.number,
            "lengthscale": state.kernel.lengthscale,
        }
    labels[30] = 7
    part = comm.share(40)
    rows = torch.arange(part.start, part.stop)
    try:
        learn(begin(Kernel.of("rbf"), Softmax(3)), x[rows], labels[rows], rows, settings=Settings(), comm=comm)
    except HpcclError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_ranks_does_not_matter(size: int, tmp_path: Path) -> None:
    (alone,) = run_in_world(figures, 1, tmp_path)
    ranks = run_in_world(figures, size, tmp_path)
    for rank in ranks:
        assert rank["distance"] == pytest.approx(alone["distance"])
        for name in ("regression", "classes"):
            assert torch.equal(rank[name]["memory"], alone[name]["memory"])
            assert len(alone[name]["memory"]) == 1 + 5 + 5
            for key in ("inducing", "mean", "variance", "lengthscale"):
                torch.testing.assert_close(rank[name][key], alone[name][key], atol=1e-7, rtol=1e-7)
    assert sum("allowed: [n], 0 to 2" in rank["refused"] for rank in ranks) == 1
    assert sum("another rank could not use its data" in rank["refused"] for rank in ranks) == size - 1


def fitted(comm: Comm, folder: str) -> dict[str, Any]:
    config = merged({"model": {"kind": "mlp", "hidden": [8]}, "stream": {"kind": "digits", "tasks": 5}})
    state, world = make_world(config, Path(folder), comm)
    state.mark = Mark.at(1, "done", 1)
    settings = Settings(inducing=10, steps=4, memory=6, tune=2)
    gp, after = fit_features(state, world, settings, Kernel.of("rbf", variance=5.0), typical=True)
    return {
        "accuracy": [[row["accuracy"] for row in rows] for rows in after],
        "nll": after[-1][0]["nll"],
        "seen": gp.num_seen,
    }


def test_features_of_a_network_are_learned_by_any_number_of_ranks(tmp_path: Path) -> None:
    (alone,) = run_in_world(fitted, 1, tmp_path, str(tmp_path / "one"))
    for rank in run_in_world(fitted, 2, tmp_path, str(tmp_path / "two")):
        assert rank["accuracy"] == alone["accuracy"]
        assert rank["seen"] == alone["seen"]
        assert rank["nll"] == pytest.approx(alone["nll"], rel=1e-3)
