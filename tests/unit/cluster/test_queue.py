"""Outputs in `captured/` are those of a real SLURM 22.05 with slurmdbd."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpccl.cluster import queue
from hpccl.cluster.queue import JobState, cancel, parse_sacct, parse_squeue, states

CAPTURED = Path(__file__).parent / "captured"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a shell script in the place of one of SLURM's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    write("squeue", "exit 1")
    write("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    return write


def at(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def test_squeue_is_read() -> None:
    found = {state.id: state for state in parse_squeue((CAPTURED / "squeue.txt").read_text())}
    words = {
        "26": "COMPLETED", "27": "FAILED", "28": "TIMEOUT", "29_0": "RUNNING", "29_1": "PENDING", "29_2": "RUNNING",
        "29_3": "PENDING", "29_4": "PENDING", "30": "CANCELLED", "31": "CANCELLED", "32": "FAILED", "33": "FAILED",
        "34": "PENDING", "35": "PENDING", "36": "NODE_FAIL", "37": "PENDING", "38": "PREEMPTED", "41": "CANCELLED",
    }  # fmt: skip
    assert {number: state.word for number, state in found.items()} == words
    assert found["27"].exit_code == 3
    assert found["27"].signal == 0
    assert found["33"].signal == 9
    assert (found["32"].signal, found["32"].exit_code, found["32"].reason) == (53, 0, "JobLaunchFailure")
    assert (found["29_1"].reason, found["29_1"].restarts, found["29_1"].nodes) == ("JobArrayTaskLimit", 1, "")
    assert (found["37"].reason, found["37"].restarts, found["37"].limit) == ("BeginTime", 2, None)
    assert found["34"].reason == "DependencyNeverSatisfied"
    assert (found["29_0"].nodes, found["29_0"].limit, found["29_0"].reason) == ("n1", 600.0, "")
    assert found["29_0"].start == at("2026-11-28T01:13:02")
    assert found["29_0"].left is not None
    assert 0 < found["29_0"].left < 600
    assert (found["30"].limit, found["30"].left) == (2 * 86400.0, None)


def test_what_lives() -> None:
    found = {state.id: state for state in parse_squeue((CAPTURED / "squeue.txt").read_text())}
    alive = {number for number, state in found.items() if state.alive}
    assert alive == {"29_0", "29_1", "29_2", "29_3", "29_4", "34", "35", "37"}
    now = time.time()
    # SLURM queues a job again after a node has failed, if it may; it takes a moment.
    assert JobState("1", "NODE_FAIL", requeue=True, end=now - 5).alive
    assert not JobState("1", "NODE_FAIL", requeue=True, end=now - 3600).alive
    assert not JobState("1", "NODE_FAIL", requeue=False, end=now - 5).alive
    assert JobState("1", "COMPLETING").alive
    assert JobState("1", queue.UNKNOWN).alive
    assert not JobState("1", queue.GONE).alive


def test_sacct_is_read() -> None:
    found = {state.id: state for state in parse_sacct((CAPTURED / "sacct.txt").read_text())}
    assert {number: found[number].word for number in ("26", "27", "28", "30", "36", "38")} == {
        "26": "COMPLETED",
        "27": "FAILED",
        "28": "TIMEOUT",
        "30": "CANCELLED",
        "36": "NODE_FAIL",
        "38": "PREEMPTED",
    }
    assert found["27"].exit_code == 3
    assert found["32"].signal == 53
    assert found["30"].reason == "by 0"
    assert found["26"].end == at("2026-11-28T01:13:03")
    # Tasks that wait are one line: 29_[3-4,6-12%2].
    waiting = {number for number, state in found.items() if state.word == "PENDING" and number.startswith("29_")}
    assert waiting == {"29_1", "29_3", "29_4", *(f"29_{task}" for task in range(6, 13))}
    assert found["41"].start is None


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[3]", ["12_3"]),
        ("12_[0-2,7%4]", ["12_0", "12_1", "12_2", "12_7"]),
        ("12_[1-7:3]", ["12_1", "12_4", "12_7"]),
        ("12_[1-2,30...]", ["12_1", "12_2"]),
        ("12+0", ["12"]),
    ],
)
def test_tasks_of_an_array(text: str, ids: list[str]) -> None:
    assert list(queue._expand(text)) == ids


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:00:00", 93600), ("2:00:00", 7200), ("10:00", 600), ("0:05", 5), ("UNLIMITED", None), ("N/A", None)],
)
def test_spans(text: str, seconds: float | None) -> None:
    assert queue._span(text) == seconds


def test_one_question_for_all(install: Install, tmp_path: Path) -> None:
    install("squeue", f'echo "$@" >> {tmp_path}/asked; cat {CAPTURED}/squeue.txt')
    found = states(["26", "29_0", "29_3", "29_4"])
    assert [(state.id, state.word) for state in found.values()] == [
        ("26", "COMPLETED"),
        ("29_0", "RUNNING"),
        ("29_3", "PENDING"),
        ("29_4", "PENDING"),
    ]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=26,29 " in asked
    assert states([]) == {}


def test_a_forgotten_job_is_asked_of_the_accounts(install: Install) -> None:
    install("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    install("sacct", f"cat {CAPTURED}/sacct.txt")
    assert {number: state.word for number, state in states(["27", "99"]).items()} == {"27": "FAILED", "99": "GONE"}


def test_a_cluster_without_accounts(install: Install) -> None:
    install("squeue", "exit 0")
    state = states(["27"])["27"]
    assert (state.word, state.alive) == ("GONE", False)
    assert state.reason == "squeue does not know it any more, and sacct failed: Slurm accounting storage is disabled"


def test_a_controller_that_is_silent_for_a_moment(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_PAUSES", (0.0, 0.0))
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    install("squeue", f"[ -e {tmp_path}/again ] && cat {CAPTURED}/squeue.txt && exit; touch {tmp_path}/again\n"
                      f"echo '{words}' >&2; exit 1")  # fmt: skip
    assert states(["27"])["27"].word == "FAILED"


def test_a_controller_that_is_silent(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_PAUSES", (0.0, 0.0))
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    install("squeue", f"echo >> {tmp_path}/tries; echo '{words}' >&2; exit 1")
    state = states(["27"])["27"]
    assert (state.word, state.alive, state.known) == ("UNKNOWN", True, False)
    assert state.reason == "squeue failed: Unable to contact slurm controller (connect failure)"
    assert len((tmp_path / "tries").read_text().splitlines()) == 3


def test_a_controller_that_does_not_answer(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_TIMEOUT", 0.2)
    monkeypatch.setattr(queue, "_PATIENCE", 0.1)
    install("squeue", "exec sleep 30")
    assert states(["27"])["27"].reason == "squeue did not answer within 0 s"


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    state = states(["27"])["27"]
    assert (state.word, state.reason) == ("UNKNOWN", "squeue is not installed here")


def test_filters_of_the_user_do_not_count(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    install("squeue", f'[ -z "$SQUEUE_USERS" ] && [ $SLURM_TIME_FORMAT = standard ] && cat {CAPTURED}/squeue.txt')
    assert states(["27"])["27"].word == "FAILED"


def test_long_complaints_are_cut_to_the_cause() -> None:
    words = (
        "squeue: error: resolve_ctls_from_dns_srv: Unknown host\nsqueue: fatal: Could not establish a configuration\n"
    )
    assert queue._plain(words) == "Could not establish a configuration"
    assert queue._plain("scancel: error: one\nscancel: error: two\n") == "one; two"


def test_cancel(install: Install, tmp_path: Path) -> None:
    install("scancel", f'echo "$@" >> {tmp_path}/asked')
    assert cancel(["12_3", "14"]) == ""
    assert (tmp_path / "asked").read_text() == "12_3 14\n"
    install("scancel", "echo 'scancel: error: Kill job error on job id 14: Access/permission denied' >&2; exit 1")
    assert cancel(["14"]) == "scancel failed: Kill job error on job id 14: Access/permission denied"
