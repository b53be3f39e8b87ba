"""What a failed collective is called: real errors of gloo, and errors of anything else."""

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hpccl.dist.comm import Comm
from hpccl.dist.lost import lost_partner
from tests.dist.world import Result, run_in_world


def left_alone(comm: Comm, late: float) -> Result:
    """Rank 1 comes `late` seconds after the time-out of a second, or leaves at once for 0."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    if comm.rank == 1:
        time.sleep(1 + late if late else 0)
        return {}
    try:
        dist.all_reduce(torch.ones(3), group=group)
    except RuntimeError as error:
        lost = lost_partner(error, comm, 1.0)
        return {"kind": type(lost).__name__, "message": str(lost)}
    return {"kind": "nothing"}


def test_a_rank_that_is_late(tmp_path: Path) -> None:
    found = run_in_world(left_alone, 2, tmp_path, 2.0)[0]
    assert found["kind"] == "StragglerError"
    assert found["message"].startswith("rank 0 of 2 waited 1 s (cluster.timeout) for another rank in vain")


def test_a_rank_that_left(tmp_path: Path) -> None:
    found = run_in_world(left_alone, 2, tmp_path, 0.0)[0]
    assert found["kind"] == "WorldError"
    assert found["message"].startswith("rank 0 of 2 lost the connection to another rank (")
    assert "run the same command again" in found["message"]


def test_other_errors_are_not_of_the_world() -> None:
    several = Comm(0, 2, torch.device("cpu"))
    assert lost_partner(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), several, 1.0) is None
    assert lost_partner(RuntimeError("a data loader timed out"), several, 1.0) is None
    assert lost_partner(RuntimeError("[/gloo/x.cc:1] Timed out"), Comm.solo(), 1.0) is None
