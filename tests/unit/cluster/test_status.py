from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hpccl.cli import app, main
from hpccl.cluster import status_table
from hpccl.cluster.cancel import cancel
from hpccl.cluster.jobs import Job, find_runs
from hpccl.cluster.logs import find_log, print_log, tail
from hpccl.cluster.queue import JobState
from hpccl.cluster.records import JobRecord, birth, write_record
from hpccl.cluster.status import RunStatus, judge, read_statuses, wait_for
from hpccl.config.load import dump, load
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report.events import EventLog
from hpccl.report.standing import Standing

ROOT = Path(__file__).parents[3]
NOW = 1_000_000.0


def slurm(word: str, *, submitted: float = NOW - 500, recorded: bool = True, **more: Any) -> Job:
    state = JobState("12", word, **{"start": NOW - 400, **more})
    return Job("slurm", "12", None if word == "UNKNOWN" else state.alive, submitted, state=state, recorded=recorded)


def standing(turn: Any = None, ago: float = 100.0, **more: Any) -> Standing:
    """Of job 12, which last started or ended so many seconds ago."""
    return Standing(
        turn=turn, turn_time=NOW - ago, began=NOW - ago, time=NOW - 1 if turn else None, job="12", **more
    )  # fmt: skip


FRESH = Standing()
AGAIN = "the same command continues it"
STOP: dict[str, Any] = {"message": "signal SIGUSR2"}
LOST: dict[str, Any] = {"error_kind": "WorldError", "message": "rank 1 was lost"}
BUG: dict[str, Any] = {"error_kind": "DataError", "message": "no image"}


@pytest.mark.parametrize(
    ("told", "job", "state", "detail"),
    [
        # waiting
        (FRESH, slurm("PENDING", reason="Priority"), "queued", "Priority"),
        (FRESH, slurm("PENDING", reason="DependencyNeverSatisfied"), "queued", "DependencyNeverSatisfied: a job that"),
        (standing("run"), slurm("PENDING", reason="BeginTime", restarts=1), "queued again", "BeginTime"),
        (standing("stop", **STOP), slurm("PENDING", reason="Resources", restarts=1), "queued again", "Resources"),
        (standing("run"), slurm("NODE_FAIL", requeue=True, end=None), "queued again", "NODE_FAIL"),
        (standing("run"), slurm("SUSPENDED"), "suspended", ""),
        # at work
        (FRESH, slurm("CONFIGURING"), "starting", "its nodes are being prepared"),
        (FRESH, slurm("RUNNING"), "starting", ""),
        (standing("run"), slurm("RUNNING"), "running", ""),
        (standing("run"), slurm("RUNNING", start=NOW + 9), "running", ""),  # clocks that differ
        (standing("run"), slurm("RUNNING", restarts=1), "starting", ""),  # what the events say is of an earlier start
        (standing("run", restart=1), slurm("RUNNING", restarts=1), "running", ""),
        (standing("stop", 5, **STOP), slurm("RUNNING"), "ending", "saved; signal SIGUSR2"),
        (standing("stop", 300, **STOP), slurm("RUNNING"), "stopped", "signal SIGUSR2; " + AGAIN),  # of a shell, say
        (standing("error", 5, **LOST), slurm("RUNNING"), "ending", "a rank was lost"),
        (standing("error", 5, **BUG), slurm("RUNNING"), "failed", ""),
        (standing("run"), slurm("COMPLETING"), "ending", ""),
        # ended
        (standing("done"), slurm("RUNNING"), "done", ""),
        (standing("done"), slurm("GONE"), "done", ""),
        (standing("done"), slurm("FAILED"), "done", ""),
        (standing("run"), slurm("FAILED", exit_code=3, reason="NonZeroExitCode"), "failed", "exit code 3"),
        (standing("run"), slurm("FAILED", signal=9, reason="JobLaunchFailure"), "failed", "signal 9, JobLaunchFailure"),
        (FRESH, slurm("FAILED", signal=53, reason="JobLaunchFailure"), "failed", "could not be launched"),
        (standing("run"), slurm("OUT_OF_MEMORY"), "failed", "out of memory"),
        (standing("error", **BUG), slurm("FAILED"), "failed", ""),
        (standing("error", **BUG), slurm("CANCELLED"), "failed", ""),
        (standing("run"), slurm("TIMEOUT"), "timed out", AGAIN),
        (standing("stop", **STOP), slurm("TIMEOUT"), "timed out", "saved; " + AGAIN),
        (standing("stop", **STOP), slurm("CANCELLED"), "cancelled", "saved; " + AGAIN),
        (FRESH, slurm("CANCELLED"), "cancelled", ""),
        (standing("stop", **STOP), slurm("FAILED"), "stopped", "signal SIGUSR2; " + AGAIN),
        (standing("run"), slurm("COMPLETED"), "lost", "its job ended without an error, but the run is not done"),
        (standing("run"), slurm("NODE_FAIL"), "lost", "NODE_FAIL"),
        (standing("run"), slurm("GONE", reason="forgotten"), "lost", "its job is gone: forgotten"),
        (FRESH, slurm("GONE", reason="forgotten"), "lost", "its job is gone: it was cancelled while it waited, or"),
        # SLURM does not answer
        (
            standing("run"),
            slurm("UNKNOWN", reason="squeue failed"),
            "unknown",
            "squeue failed; its last event: running",
        ),
        (standing("done"), slurm("UNKNOWN"), "done", ""),
        (standing("error", **BUG), slurm("UNKNOWN"), "failed", ""),
        (standing("error", **LOST), slurm("UNKNOWN", reason="why"), "unknown", "why; its last event: failed"),
        # no job
        (FRESH, None, "not started", ""),
        (standing("run", host="n1"), None, "lost", "its process on n1 ended without a message"),
        (standing("stop", **STOP), None, "stopped", "signal SIGUSR2; " + AGAIN),
        (standing("error", **BUG), None, "failed", ""),
        # processes
        (FRESH, Job("local", "7", True, NOW - 50), "starting", "or waiting for the runs before it"),
        (standing("run", 40), Job("local", "7", True, NOW - 50), "running", ""),
        (
            standing("stop", 100, **STOP),
            Job("local", "7", True, NOW - 50),
            "starting",
            "or waiting",
        ),  # of an earlier one
        (standing("stop", 4, **STOP), Job("local", "7", True, NOW - 50), "stopped", "signal SIGUSR2"),
        (standing("run", 40), Job("local", "7", False, NOW - 50), "lost", "its process ended without a message"),
        (standing("stop", 40, **STOP), Job("local", "7", False, NOW - 50), "stopped", "signal SIGUSR2"),
        (standing("run", 40), Job("local", "7", None, NOW - 50, host="n9"), "unknown", "its process is on n9; its"),
        # files
        (Standing(problem="events.jsonl is odd"), slurm("RUNNING"), "running", "events.jsonl is odd"),
        (Standing(problem="events.jsonl is odd"), None, "unreadable", "events.jsonl is odd"),
    ],
)
def test_states(told: Standing, job: Job | None, state: str, detail: str) -> None:
    found, more = judge(told, job, NOW)
    assert found == state
    assert more.startswith(detail)
    assert more == "" or detail != ""


@pytest.mark.parametrize(
    ("word", "log", "expected"),
    [
        ("PENDING", "", "queued "),
        ("RUNNING", "", "running "),
        ("COMPLETED", "", "done "),
        ("FAILED", "", "failed exit code 1"),
        ("GONE", "...\nhpccl: the command ended with 143\nhpccl: the command ended with 0\n", "done "),
        ("GONE", "hpccl: the command ended with 2\n...", "failed exit code 2"),
        ("GONE", "", "lost its job is gone"),
    ],
)
def test_jobs_that_do_not_train(
    word: str, log: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text(log)
    folder = tmp_path / "campaign" / "slurm" / "report"
    folder.mkdir(parents=True)
    job = JobRecord("slurm", "7", NOW, "here", log=str(tmp_path / "log"), command="report runs/a")
    write_record(RunFolder(folder), job)
    given = JobState("7", word, exit_code=int(word == "FAILED"))
    monkeypatch.setattr("hpccl.cluster.jobs.states", lambda ids: {"7": given})
    (status,) = read_statuses([tmp_path / "campaign"])
    assert status.run == folder
    assert f"{status.state} {status.detail}".startswith(expected)


def test_an_earlier_start_says_nothing_about_the_newest_job() -> None:
    earlier = Standing(turn="stop", turn_time=NOW - 5000, began=NOW - 6000, time=NOW - 5000, job="11", message="x")
    assert judge(earlier, slurm("FAILED", exit_code=7), NOW) == ("failed", "exit code 7")
    assert judge(earlier, slurm("RUNNING"), NOW) == ("starting", "")


def test_a_later_start_elsewhere_counts() -> None:
    later = Standing(turn="run", turn_time=NOW - 10, began=NOW - 10, time=NOW, host="n5")
    assert judge(later, slurm("FAILED", end=NOW - 300), NOW)[1].startswith("its process on n5 ended without a message")


def test_silence_is_told() -> None:
    told = Standing(turn="run", turn_time=NOW - 5000, began=NOW - 5000, time=NOW - 720, job="12")
    assert judge(told, slurm("RUNNING"), NOW) == ("running", "no event for 12 min")


# ---------------------------------------------------------------- folders


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def make_run(folder: Path, *events: tuple[str, dict[str, Any]]) -> Path:
    RunFolder(folder).create()
    RunFolder(folder).config.write_text(dump(load([], ["name=x"])))
    if events:
        with EventLog(RunFolder(folder).events) as log:
            for name, fields in events:
                log.write(name, **fields)
    return folder


RUN: tuple[str, dict[str, Any]] = ("run", {"steps": [100, 100], "machine": {"hostname": "n1"}})
STEP: tuple[str, dict[str, Any]] = (
    "step",
    {"task": 0, "step": 60, "num_steps": 100, "epoch": 6.0, "images_per_second": 320.0, "eta_seconds": 40.0},
)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as found:
        yield found
        found.kill()


def record(run: Path, pid: int, **more: Any) -> None:
    values = {"submitted": time.time() - 5, "host": os.uname().nodename, "born": birth(pid), **more}
    write_record(RunFolder(run), JobRecord("local", str(pid), **values))


def test_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "sweep/seed=0", "sweep/seed=1")]
    make_run(tmp_path / "a" / "checkpoints" / "no-run")
    make_run(tmp_path / "a" / "report" / "no-run")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert find_runs([tmp_path]) == runs
    assert find_runs([tmp_path / "sweep", tmp_path / "a", tmp_path]) == [runs[1], runs[2], runs[0]]
    assert find_runs([tmp_path / "absent"]) == [tmp_path / "absent"]
    called = [make_run(tmp_path / "campaign" / name) for name in ("memory", "report")]
    assert find_runs([tmp_path / "campaign"]) == called, "names of runs"


def test_folders_without_a_run(tmp_path: Path) -> None:
    assert cancel([tmp_path]) == ([f"{tmp_path}: not the folder of a run, and no run below it"], False)
    with pytest.raises(FolderError, match=f"'{tmp_path}' is not the folder of a run, and no run is below it"):
        print_log(tmp_path)


def test_runs_inside_a_run_are_found(tmp_path: Path) -> None:
    """A sweep under the name of a run that was there before it; what adaptations are compared with."""
    runs = [make_run(tmp_path / name, RUN, ("done", {})) for name in ("x", "x/reference", "x/seed=0", "x/seed=1")]
    assert find_runs([tmp_path]) == find_runs([runs[0]]) == runs
    lost = make_run(tmp_path / "x" / "seed=2", RUN)
    assert [status.state for status in read_statuses([runs[0]])] == [*["done"] * 4, "lost"]
    assert cancel([runs[0]])[0][-1] == f"{lost}: nothing to cancel"
    # Of the run alone:
    assert wait_for([runs[0]]) == 0
    RunFolder(runs[0]).logs.joinpath("rank-0.txt").write_text("well\n")
    result = CliRunner().invoke(app, ["logs", str(runs[0])])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "well")


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["status", "--watch", "1"], ["cancel"]])
def test_what_does_not_exist_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/quickstart"), RUN)
    monkeypatch.setattr(sys, "argv", ["hpccl", *command, "runs/quickstart", "runs/quickstrat", "nowhere/at/all"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: 'runs/quickstrat' does not exist (did you mean 'runs/quickstart'?); 'nowhere/at/all' does not exist. "
        "Give folders of runs, or of sweeps and campaigns with runs below\n"
    )


def test_every_folder_has_a_row(tmp_path: Path) -> None:
    make_run(tmp_path / "new")
    make_run(tmp_path / "odd").joinpath("events.jsonl").mkdir()
    torn = make_run(tmp_path / "torn", RUN)
    with (torn / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = ("new", "odd", "torn", "empty", "file", "absent")
    found = {status.run.name: status for status in read_statuses([tmp_path / name for name in names])}
    assert {name: found[name].state for name in names} == {
        "new": "not started",
        "odd": "unreadable",
        "torn": "lost",
        "empty": "unreadable",
        "file": "unreadable",
        "absent": "unreadable",
    }
    assert found["odd"].detail.startswith("events.jsonl cannot be read: Is a directory")
    assert found["empty"].detail == "not the folder of a run, and no run below it"
    assert found["file"].detail == "a file, not the folder of a run"
    assert found["absent"].detail == "no such folder"


def test_a_process_lives_only_as_long_as_it_is_the_same(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path / "run", RUN, STEP)
    record(run, process.pid)
    (status,) = read_statuses([run])
    assert (status.state, status.job, status.task, status.num_tasks) == ("running", f"process {process.pid}", 0, 2)
    assert (status.step, status.num_steps, status.epoch, status.images_per_second) == (60, 100, 6.0, 320.0)
    assert status.left is not None
    assert 130 < status.left <= 140
    record(run, process.pid, born=1)  # the number was given to another one
    assert judge_of(run) == "running"  # by the first record
    process.kill()
    process.wait()
    assert judge_of(run) == "lost"
    record(run, process.pid, host="elsewhere", born=1)
    assert judge_of(run) == "unknown"


def judge_of(run: Path) -> str:
    (status,) = read_statuses([run])
    return status.state


HOLD = """
import sys, time
from pathlib import Path
from hpccl.cluster.lock import holding
from hpccl.folder import RunFolder
with holding(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_somebody_typed_holds_the_lock(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert judge_of(run) == "starting"
        with EventLog(RunFolder(run).events) as log:
            log.write("run", steps=[100])
        (status,) = read_statuses([run])
        assert (status.state, status.job) == ("running", f"process {process.pid}")
        assert cancel([run]) == ([f"{run}: process {process.pid} asked to save and stop"], True)
        process.wait(timeout=30)
    assert judge_of(run) == "lost"


def test_a_slurm_job_where_there_is_no_slurm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("run", {"job": {"id": "12", "restart": 3}}))
    (status,) = read_statuses([run])
    assert (status.state, status.job, status.restarts) == ("unknown", "12", 3)
    assert status.detail == "squeue is not installed here; its last event: running"


def test_the_last_error_is_that_of_the_newest_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUN)
    left = {"job": "1", "restart": 0, "rank": 3, "kind": "crash", "message": "Traceback\n  x\nKeyError: 'a'\n"}
    RunFolder(run).error.write_text(json.dumps({**left, "time": time.time() + 1}))
    (status,) = read_statuses([run])
    assert status.error == "rank 3: KeyError: 'a'"
    with EventLog(RunFolder(run).events, clock=lambda: time.time() + 5) as log:
        log.write("run")
    (status,) = read_statuses([run])
    assert status.error == ""
    with EventLog(RunFolder(run).events) as log:
        log.write("error", kind="DataError", message="no image\nat all")
    (status,) = read_statuses([run])
    assert (status.state, status.error) == ("failed", "DataError: no image")
    RunFolder(run).error.write_text("{")
    assert read_statuses([run])[0].error == "DataError: no image"


def test_a_run_whose_configuration_is_gone_is_not_said_to_continue(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUN, ("stop", {"task": 0, "phase": "fit", "step": 60, "reason": "SIGUSR1"}))
    (status,) = read_statuses([run])
    assert status.detail.endswith("; the same command continues it")
    text = RunFolder(run).config.read_text()
    for damaged in (text[: len(text) // 2], "", "name: [x\n"):
        RunFolder(run).config.write_text(damaged)
        (status,) = read_statuses([run])
        assert (status.state, status.detail.partition("; ")[2]) == (
            "stopped",
            "its config.yaml cannot be read: put it back, and the same command continues it",
        )


def test_waiting_for_runs(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    done = make_run(tmp_path / "done", RUN, ("done", {}))
    failed = make_run(tmp_path / "failed", RUN, ("error", {"kind": "DataError", "message": "no image"}))
    assert wait_for([done]) == 0
    assert wait_for([done, failed]) == 1


# ---------------------------------------------------------------- the commands


def test_the_table(tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(make_run(Path("runs/a"), RUN, STEP), process.pid)
    make_run(Path("runs/b"), RUN, ("error", {"kind": "DataError", "message": "[no] image"}))
    make_run(Path("runs/c"), RUN, ("done", {}))
    result = CliRunner().invoke(app, ["status", "runs"])
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines() if line.strip()]
    assert lines[0] == ["in", "runs"]
    assert lines[1] == ["run", "state", "job", "task", "step", "epoch", "images/s", "left", "last", "event"]
    assert lines[2][:7] == ["a", "running", "process", str(process.pid), "1/2", "fit", "60/100"]
    assert lines[3][:3] == ["b", "failed", "-"]
    assert lines[4][:3] == ["c", "done", "-"]
    assert "b: DataError: [no] image" in result.output


def test_the_table_fits_a_narrow_terminal() -> None:
    status = RunStatus(run=Path("/runs/a"), state="unknown", detail="squeue failed", job="12_3", task=0, num_tasks=9)
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the test
    console.print(status_table.render([status]))
    text = console.export_text()
    console.file.close()
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "12_3" in text


def test_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUN, STEP, ("done", {}))
    result = CliRunner().invoke(app, ["status", str(run), "--json"])
    (found,) = json.loads(result.output)
    assert result.exit_code == 0
    assert (found["run"], found["state"], found["ended"], found["num_tasks"]) == (str(run), "done", True, 2)


def test_watching_ends_with_the_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUN, ("done", {}))
    result = CliRunner().invoke(app, ["status", str(run), "--watch", "1"])
    assert result.exit_code == 0
    assert "done" in result.output


def test_cancel_leaves_alone_what_is_not_alive(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    done = make_run(tmp_path / "done", RUN, ("done", {}))
    record(done, process.pid, submitted=0.0)  # the process is at another run by now
    new = make_run(tmp_path / "new")
    lines = [f"{done}: nothing to cancel", f"{new}: nothing to cancel"]
    assert cancel([done, new]) == (lines, True)
    assert process.poll() is None
    result = CliRunner().invoke(app, ["cancel", str(tmp_path)])
    assert (result.exit_code, result.output.splitlines()) == (0, lines)


def test_cancel_asks_a_process_once(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        record(run, process.pid)
    lines, well = cancel([tmp_path])
    assert well
    assert lines == [
        f"{runs[0]}: process {process.pid} asked to save and stop",
        f"{runs[1]}: process {process.pid} asked to save and stop, as above",
    ]
    assert process.wait(timeout=30) == -15


def test_a_process_elsewhere_is_cancelled_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUN)
    record(run, 1, host="elsewhere", born=1)
    assert cancel([run]) == ([f"{run}: process 1: runs on elsewhere; cancel it there"], False)


def test_logs(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(FolderError, match="was not started by hpccl submit"):
        find_log(run)
    with pytest.raises(FolderError, match=r"ranks with a log: none"):
        find_log(run, 3)
    log = tmp_path / "job.txt"
    record(run, 1, log=str(log), born=1)
    with pytest.raises(FolderError, match=r"has not written '.*job.txt'"):
        find_log(run)
    log.write_text("from the job\n")
    assert find_log(run) == log
    own = RunFolder(run).logs / "rank-0.txt"
    own.write_text("".join(f"line {number}\n" for number in range(100)))
    assert find_log(run) == own
    os.utime(own, (0, 0))  # of an earlier job
    assert find_log(run) == log
    print_log(run)
    assert capfdbinary.readouterr().out == b"from the job\n"
    (RunFolder(run).logs / "rank-3.txt").write_text("third\n")
    print_log(run, rank=3)
    assert capfdbinary.readouterr().out == b"third\n"
    make_run(tmp_path / "other")
    with pytest.raises(FolderError, match="holds 2 runs; choose one of them"):
        print_log(tmp_path)
    with pytest.raises(FolderError, match="is not a folder"):
        print_log(tmp_path / "absent")


@pytest.mark.parametrize("lines", [0, 1, 3, 2000, 9000])
def test_tail(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "log"
    text = "".join(f"{number} {'x' * 100}\n" for number in range(3000))
    path.write_text(text + "torn")
    expected = (text + "torn").splitlines(keepends=True)[-lines if lines else 0 :]
    assert tail(path, path.stat().st_size, lines).decode() == "".join(expected)


def test_a_log_is_followed_to_the_end_of_the_run(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path / "run", RUN)
    log = tmp_path / "job.txt"
    log.write_text("first\n")
    record(run, process.pid, log=str(log))
    command = [sys.executable, "-c", FOLLOW, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ}) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"first\n"
        with log.open("a") as file:
            file.write("second\n")
        assert follower.stdout.readline() == b"second\n"
        log.write_text("new\n")  # a file that begins again
        assert follower.stdout.readline() == b"new\n"
        process.kill()
        process.wait()
        assert follower.wait(timeout=30) == 0


FOLLOW = """
import sys
from pathlib import Path
from hpccl.cluster import logs
logs._LOOK, logs._ASK = 0.05, 0.2
logs.print_log(Path(sys.argv[1]), follow=True)
"""
