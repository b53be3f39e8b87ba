from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.curvature.columns import Wanted
from hpccl.curvature.coverage import plan_ahead
from hpccl.curvature.diagonal import DiagonalEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.engine.sharded import Mesh, shard
from hpccl.errors import HpcclError
from tests.dist.world import run_in_world
from tests.unit.curvature.oracle import build, examples

COUNT = 11  # not a multiple of 2 or 4: ranks have different numbers of batches
FISHERS: tuple[Wanted, ...] = ("ggn", "mc", "empirical", "weighted", "predicted", "outputs")  # the last: MAS


def shares(comm: Comm, data: Examples) -> list[Examples]:
    mine = comm.share(len(data))
    return [data.select(slice(first, min(first + 2, mine.stop))) for first in range(mine.start, mine.stop, 2)]


def measure(comm: Comm, fisher: Wanted) -> dict[str, Any]:
    model, pixels = build("convs", COUNT, dtype=torch.float32)
    estimator = DiagonalEstimator(fisher, samples=2, seed=5)
    return estimator.estimate(model, shares(comm, examples(pixels)), comm).state_dict()


def everything(comm: Comm) -> dict[str, Any]:
    measured: dict[str, Any] = {fisher: measure(comm, fisher) for fisher in FISHERS}
    return {**measured, "fewer": fewer_than_ranks(comm), "diverged": last_rank_diverges(comm)}


def fewer_than_ranks(comm: Comm) -> dict[str, Any]:
    model, pixels = build("mlp", 2, dtype=torch.float32)
    return DiagonalEstimator().estimate(model, shares(comm, examples(pixels)), comm).state_dict()


def last_rank_diverges(comm: Comm) -> dict[str, Any]:
    model, pixels = build("mlp", 4, dtype=torch.float32)
    pixels[3] = torch.nan
    try:
        DiagonalEstimator().estimate(model, shares(comm, examples(pixels)), comm)
    except HpcclError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none"}


def by_the_image(comm: Comm, name: str) -> dict[str, Any]:
    """Weights in shards; some are measured one image at a time, of which ranks have different numbers."""
    model, pixels = build(name, 5, dtype=torch.float32)
    known = plan_ahead(model, pixels.shape[1:])
    assert known.looped
    if comm.size > 1:
        shard(model, Mesh.of(comm, None))
    mine = comm.share(len(pixels))
    batches = [examples(pixels).select(slice(mine.start, mine.stop))]
    diagonal = DiagonalEstimator(known=known).estimate(model, batches, comm)
    kronecker = KroneckerPass(known=known, fisher="ggn").run(model, batches, comm)
    squares = {name: value.clone() for name, value in kronecker.squares.items()}
    comm.sum_(list(squares.values()))
    values = dict(streamed(diagonal.leaves, comm))
    return {"diagonal": values, "kronecker": squares}


@pytest.mark.parametrize("name", ["attention", "tied"])
def test_images_one_at_a_time_are_as_many_on_every_rank(tmp_path: Path, name: str) -> None:
    (alone,) = run_in_world(by_the_image, 1, tmp_path, name)
    for rank in run_in_world(by_the_image, 2, tmp_path, name):
        for kind, values in alone.items():
            assert values.keys() == rank[kind].keys()
            for parameter, value in values.items():
                torch.testing.assert_close(rank[kind][parameter], value, rtol=1e-4, atol=1e-5 * float(value.max()))


def assert_same(one: dict[str, Any], other: dict[str, Any], *, rtol: float) -> None:
    assert one["num_examples"] == other["num_examples"]
    for name, value in one["values"].items():
        torch.testing.assert_close(other["values"][name], value, rtol=rtol, atol=rtol * float(value.max()))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_world_size_does_not_matter(tmp_path: Path, size: int) -> None:
    (alone,) = run_in_world(everything, 1, tmp_path)
    ranks = run_in_world(everything, size, tmp_path)
    assert alone["ggn"]["num_examples"] == COUNT
    for rank in ranks:
        for kind in (*FISHERS, "fewer"):
            assert_same(alone[kind], rank[kind], rtol=1e-5)
            assert_same(ranks[0][kind], rank[kind], rtol=0)
    # No rank waits for the one that stopped, which alone knows why.
    assert [rank["diverged"]["kind"] for rank in ranks] == ["WorldError"] * (size - 1) + ["DivergedError"]
    assert "samples 103" in ranks[-1]["diverged"]["message"]
