"""The batch script puts its job back where running again helps, and only there (hpccl/cluster/requeue.sh)."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.testbed.testbed import Testbed
from tests.slurm.cluster import ask, kill_rank, submit, wait_for, wait_for_state
from tests.slurm.conftest import ROOT

# Each start of a rank leaves a line, and does what the test says.
JOB = """
. {root}/hpccl/cluster/requeue.sh
srun --kill-on-bad-exit=1 bash -c 'echo start $SLURM_PROCID $SLURM_RESTART_COUNT; {rank}'
hpccl_finish $?
"""
SECOND_TIME = '[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0'
WAIT = "for k in {1..600}; do sleep 0.1; done"
ONE = ("--nodes=1", "--ntasks=1")
TWO = ("--nodes=2", "--ntasks=2", "--requeue", "--time=5")


def start(folder: Path, rank: str, *options: str) -> str:
    return submit(folder, JOB.format(root=ROOT, rank=rank), options=[*TWO, *options])


# Of two ranks that end by themselves at once, srun may end the other before it listens, and tell of that: 143.
@pytest.mark.parametrize("code", [75, 143, pytest.param(139, marks=pytest.mark.slow)])
def test_a_run_that_stopped_or_crashed_runs_again(cluster: Testbed, tmp_path: Path, code: int) -> None:
    job = start(tmp_path, f"{SECOND_TIME}; exit {code}", *ONE)
    ended = wait_for_state(job)
    log = (tmp_path / f"{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert f"hpccl: job {job} ended with {code} after 0 restarts: requeue\n" in log


def test_a_killed_rank_runs_again_with_its_partners(cluster: Testbed, tmp_path: Path) -> None:
    job = start(tmp_path, f'{SECOND_TIME}; trap "exit 75" TERM; {WAIT}')
    wait_for("both ranks", lambda: _starts(tmp_path, job) == 2)
    kill_rank(job, 1)
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


@pytest.mark.parametrize(("code", "told"), [(1, 1), (201, 1), (202, 2)])
def test_a_failure_does_not_run_again(cluster: Testbed, tmp_path: Path, code: int, told: int) -> None:
    job = start(tmp_path, f"exit {code}", *ONE)
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", f"{told}:0")
    assert f"job {job} ended with {told} after 0 restarts: not requeued: " in (tmp_path / f"{job}.log").read_text()


def test_partners_that_ask_to_run_again_do_not_hide_a_failure(cluster: Testbed, tmp_path: Path) -> None:
    job = start(tmp_path, f'[ $SLURM_PROCID = 1 ] && sleep 1 && exit 201; trap "exit 75" TERM; {WAIT}')
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "1:0")


def test_a_cancelled_job_stays_cancelled(cluster: Testbed, tmp_path: Path) -> None:
    job = start(tmp_path, f'trap "exit 75" TERM; {WAIT}')
    wait_for("both ranks", lambda: _starts(tmp_path, job) == 2)
    ask("scancel", job)
    wait_for("its last word", lambda: "not requeued: SLURM ended the job" in (tmp_path / f"{job}.log").read_text())
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_a_node_that_is_gone_when_the_step_starts_is_left(cluster: Testbed, tmp_path: Path) -> None:
    late = JOB.replace("srun", "sleep 3; srun")
    job = submit(tmp_path, late.format(root=ROOT, rank="hostname"), options=TWO)
    wait_for_state(job, "RUNNING")
    cluster.power_off("n2")
    ended = wait_for_state(job)
    assert ended["JobState"] == "COMPLETED"
    assert int(ended["Restarts"]) >= 1
    assert ended["NodeList"] == "n[1,3]"


def test_restarts_are_limited(cluster: Testbed, tmp_path: Path) -> None:
    job = start(tmp_path, "exit 75", *ONE, "--export=ALL,HPCCL_MAX_RESTARTS=1")
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "1", "75:0")
    assert "not requeued: restarted 1 times, HPCCL_MAX_RESTARTS is 1" in (tmp_path / f"{job}.log").read_text()


def test_only_the_task_of_an_array_that_stopped_runs_again(cluster: Testbed, tmp_path: Path) -> None:
    rank = f"{SECOND_TIME}; [ $SLURM_ARRAY_TASK_ID = 2 ] && exit 75; exit 0"
    job = start(tmp_path, rank, "--array=0-2", *ONE)
    wait_for("the requeue", lambda: ": requeue\n" in _log(tmp_path / f"{job}_2.log"))
    ended = [wait_for_state(f"{job}_{task}") for task in range(3)]
    assert [task["JobState"] for task in ended] == ["COMPLETED"] * 3
    assert [task["Restarts"] for task in ended] == ["0", "0", "1"]
    assert ended[2]["JobId"] == job, "the last task bears the number of the array, which is what this test is about"


def _log(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _starts(folder: Path, job: str) -> int:
    return _log(folder / f"{job}.log").count("start")
