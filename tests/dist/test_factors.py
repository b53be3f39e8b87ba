from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.curvature.factors import EigenPass, KroneckerPass, Measured
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.errors import HpcclError
from tests.dist.world import run_in_world
from tests.unit.curvature.oracle import build, examples

NETS = ("convs", "vit")  # vit has free parameters


def shares(comm: Comm, data: Examples, *, last_only: bool = False) -> list[Examples]:
    mine = comm.share(len(data)) if not last_only else range(len(data) if comm.rank == comm.size - 1 else 0)
    return [data.select(slice(first, min(first + 2, mine.stop))) for first in range(mine.start, mine.stop, 2)]


def summed(measured: Measured, comm: Comm) -> dict[str, Any]:
    values = {f"{name}/{side}": getattr(block, side) for name, block in measured.blocks.items() for side in ("a", "b")}
    values |= measured.squares
    comm.sum_([*values.values(), measured.count])
    return {"count": float(measured.count), "values": values, "names": sorted(values)}


def everything(comm: Comm) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NETS:
        model, pixels = build(name, 7, dtype=torch.float32)
        data = examples(pixels)
        found[name] = summed(KroneckerPass("mc", seed=5).run(model, shares(comm, data), comm), comm)
        few = data.select(slice(0, 1))  # all ranks but one have none, and that is not the first
        found[f"{name}/few"] = summed(KroneckerPass("ggn").run(model, shares(comm, few, last_only=True), comm), comm)
        whole = KroneckerPass("mc", seed=5).run(model, [data], Comm.solo())
        bases = {
            key: (torch.linalg.eigh(block.a)[1], torch.linalg.eigh(block.b)[1]) for key, block in whole.blocks.items()
        }
        eigen = EigenPass(KroneckerPass("mc", seed=5)).run(model, shares(comm, data), comm, bases)
        comm.sum_(list(eigen.values()))
        found[f"{name}/eigen"] = {"count": 7.0, "values": eigen, "names": sorted(eigen)}
    found["none"] = summed(KroneckerPass().run(build("mlp", 1)[0], [], comm), comm)
    found["diverged"] = last_rank_fails(comm)
    return found


def last_rank_fails(comm: Comm) -> dict[str, Any]:
    model, pixels = build("mlp", 4, dtype=torch.float32)
    pixels[3] = torch.nan
    try:
        KroneckerPass().run(model, shares(comm, examples(pixels)), comm)
    except HpcclError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none"}


@pytest.mark.parametrize("size", [2, 4])
def test_world_size_does_not_matter(tmp_path: Path, size: int) -> None:
    (alone,) = run_in_world(everything, 1, tmp_path)
    ranks = run_in_world(everything, size, tmp_path)
    for kind in (name for name in alone if name != "diverged"):
        for rank in ranks:
            assert rank[kind]["count"] == alone[kind]["count"]
            assert rank[kind]["names"] == alone[kind]["names"]
            for name, value in alone[kind]["values"].items():
                atol = 1e-5 * float(value.abs().max())
                torch.testing.assert_close(rank[kind]["values"][name], value, rtol=0, atol=atol)
    assert [rank["diverged"]["kind"] for rank in ranks] == ["WorldError"] * (size - 1) + ["DivergedError"]
    assert "samples 103" in ranks[-1]["diverged"]["message"]
