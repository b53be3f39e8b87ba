"""`hpccl status`, `logs` and `cancel` tell the truth about jobs of a real SLURM."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hpccl.cluster.status import RunStatus, read_statuses
from slurm.testbed.testbed import Testbed
from tests.slurm.cluster import ask, wait_for_state
from tests.slurm.runs import hpccl, submitted


def status(run: Path) -> RunStatus:
    """Of one run."""
    (found,) = read_statuses([run])
    return found


def wait_until(run: Path, *states: str, step: int = 0, restarts: int = 0, timeout: float = 120) -> RunStatus:
    """Wait for one of these states, so many steps and restarts."""
    deadline, seen = time.monotonic() + timeout, dict[str, None]()
    while True:
        found = status(run)
        seen[f"{found.state} ({found.detail})"] = None
        if found.state in states and (found.step or 0) >= step and found.restarts >= restarts:
            return found
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {states}; seen: {', '.join(seen)}"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_from_the_queue_through_a_lost_node_to_its_end(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run, "cluster.extra={hold: true}", "train.epochs=2000", "checkpoint.every=50")
    found = status(run)
    assert (found.state, found.detail, found.job) == ("queued", "JobHeldUser", job)
    ask("scontrol", "release", job)
    found = wait_until(run, "running", step=60)
    assert (found.num_tasks, found.task, found.phase, found.nodes) == (5, 0, "fit", "n[1-2]")
    assert found.limit_left is not None
    assert 0 < found.limit_left <= 1200
    assert found.left is not None
    assert found.left > 0
    assert found.images_per_second is not None
    assert found.images_per_second > 0
    assert found.silent is not None
    assert found.silent < 60

    cluster.kill_controller()
    found = status(run)
    assert found.state in ("running", "unknown")  # the file system may tell what SLURM does not
    cluster.start_controller()

    cluster.power_off("n2")
    wait_until(run, "queued again", "starting", "running", restarts=1)
    found = wait_until(run, "running", step=60, restarts=1)
    assert found.nodes == "n[1,3]"

    told = hpccl("logs", run, "--lines", "5").splitlines()
    assert any("step=" in line for line in told)
    assert hpccl("cancel", run) == f"{run}: job {job} cancelled\n"
    found = wait_until(run, "cancelled")
    assert found.detail == "saved; the same command continues it"
    assert hpccl("cancel", run) == f"{run}: nothing to cancel\n"


def test_jobs_that_fail_and_tasks_that_wait(cluster: Testbed, tmp_path: Path) -> None:
    one = "cluster.nodes=1"
    early, wrong, sweep = (tmp_path / name for name in ("early", "wrong", "sweep"))
    submitted(early, one, "cluster.setup=['echo no such module; exit 7']")
    submitted(wrong, one, "optim.lr=1e30", "train.clip_norm=null")
    job = submitted(sweep, one, "seed=0,1,2", "cluster.array=1", "train.epochs=2000").partition("_")[0]
    found = wait_until(early, "failed")
    assert (found.detail, found.error) == ("exit code 7", "")
    assert hpccl("logs", early, "--lines", "1") == "no such module\n"

    first, second, third = (sweep / f"seed={seed}" for seed in range(3))
    wait_until(first, "running")
    found = wait_until(second, "queued")
    assert (found.detail, found.job) == ("JobArrayTaskLimit", f"{job}_1")
    assert hpccl("cancel", third) == f"{third}: job {job}_2 cancelled\n"
    # SLURM forgets a task of an array that was cancelled while it waited.
    assert status(third).state in ("lost", "cancelled")
    assert [each.state for each in read_statuses([first, second])] == ["running", "queued"]

    found = wait_until(wrong, "failed")
    assert found.error.startswith("DivergedError: the gradient is not finite")
    told = json.loads(hpccl("status", tmp_path, "--json"))
    assert {each["run"] for each in told} == {str(run) for run in (early, wrong, first, second, third)}


@pytest.mark.slow
def test_a_run_that_is_done_and_watched(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run)
    told = hpccl("status", run, "--watch", "1")
    assert told.splitlines()[-1].split()[1:3] == ["done", job]
    wait_for_state(job)
    found = status(run)
    assert (found.state, found.ended, found.limit_left) == ("done", True, None)
    assert "step=" in hpccl("logs", run, "--follow")
