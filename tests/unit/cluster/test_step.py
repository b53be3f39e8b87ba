from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpccl.cluster import step, worker
from hpccl.cluster.lock import holding
from hpccl.cluster.records import JobRecord, birth, read_records, write_record
from hpccl.config.load import load
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.machine import SlurmJob
from hpccl.train.stop import Stop
from tests.run.command import SMALL, events

JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "0"}


def start(folder: Path, *settings: str, first: str = "pass", **environ: str) -> subprocess.Popen[str]:
    """A task of a step of one, as a job of hpccl starts it, but without SLURM; `first`: Python to run before it."""
    code = (
        f"{first};"
        "from pathlib import Path; from hpccl.cluster.job import TrainJob; from hpccl.cluster.prepare import prepare;"
        "from hpccl.config.load import load; import sys;"
        f"prepare(load([], sys.argv[1:]), ['test']); TrainJob({str(folder)!r}, ('test',))()"
    )
    blocked = ("env", "--block-signal=USR1", "--block-signal=USR2")
    return subprocess.Popen(
        [*blocked, sys.executable, "-c", code, *SMALL, f"folder={folder}", *settings],
        env={**os.environ, **JOB, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_signal_that_came_while_python_started_is_kept(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert events(tmp_path / "run", "stop")[-1]["reason"] == "signal SIGUSR2"
    assert "continuing" not in output, "what a rank prints is in its own log"
    assert "-- job 7, restart 0, rank 0" in (tmp_path / "run/logs/rank-0.txt").read_text()


def test_a_rank_that_has_saved_says_so_though_srun_ends_it(tmp_path: Path) -> None:
    """The first rank that ends has srun send SIGTERM to the others, some of which are closing their logs."""
    slowed = (
        "import pathlib, time; from hpccl.cluster import step; redirect = step._redirect;"
        f"step._redirect = lambda to: (pathlib.Path({str(tmp_path)!r}, str(to)).touch(), time.sleep(2), redirect(to))"
    )
    process = start(tmp_path / "run", first=slowed)
    until = time.monotonic() + 100
    while not events(tmp_path / "run", "step"):
        assert time.monotonic() < until
        time.sleep(0.02)
    before = len(list(tmp_path.iterdir()))
    process.send_signal(signal.SIGUSR2)
    while len(list(tmp_path.iterdir())) == before:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output


def test_an_error_of_the_users_has_a_code_above_all_others_and_is_written_down(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "optim.lr=1e30", "train.clip_norm=null", SLURM_RESTART_COUNT="3")
    process.communicate(timeout=120)
    assert process.returncode == 201
    told = json.loads((tmp_path / "run/logs/error.json").read_text())
    assert (told["job"], told["restart"], told["rank"], told["kind"]) == ("7", 3, 0, "DivergedError")


@pytest.mark.parametrize(("given", "threads"), [("2", "2"), ("", "3")])
def test_threads_are_those_of_the_environment_before_those_of_the_job(given: str, threads: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    instead = f"lambda *_, **__: pathlib.Path({str(told)!r}).write_text(os.environ['OMP_NUM_THREADS']) and 0"
    first = f"import os, pathlib; from hpccl.cluster import worker; worker.main = {instead}"
    process = start(tmp_path / "run", first=first, OMP_NUM_THREADS=given, SLURM_CPUS_PER_TASK="3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert told.read_text() == threads


def test_a_run_that_is_wrong_is_code_202(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "memory.size=100000")
    process.communicate(timeout=120)
    assert process.returncode == 202


def test_a_run_that_is_done_is_started_again_as_often_as_a_later_one_of_its_sweep_needs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.events.write_text('{"event": "run", "time": 1}\n{"event": "done", "time": 2}\n')
    for restart in range(8):
        step.refuse_standstill(folder, SlurmJob("12", restart))


def test_the_sixth_start_at_one_place_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    for restart in range(5):
        step.refuse_standstill(folder, SlurmJob("12", restart))
    step.refuse_standstill(folder, SlurmJob("13", 0))  # another job begins anew
    with pytest.raises(FolderError, match=r"5 times and the last 5 starts all began at the beginning"):
        step.refuse_standstill(folder, SlurmJob("12", 5))
    (folder.checkpoints / "task-000-fit-00000007").mkdir()
    step.refuse_standstill(folder, SlurmJob("12", 5))


def test_what_ended_the_last_start_is_said_when_the_next_one_is_refused(tmp_path: Path) -> None:
    """A device that is not there is no reason to end at once, for the next node may have it; five of them are."""
    for restart in range(6):
        process = start(tmp_path / "run", "engine.device=cuda", SLURM_RESTART_COUNT=str(restart))
        process.communicate(timeout=120)
        assert process.returncode == (75 if restart < 5 else 201)
    told = json.loads((tmp_path / "run/logs/error.json").read_text())
    assert told["kind"] == "FolderError"
    assert "the last one ended with: engine.device is 'cuda' but torch sees no CUDA device" in told["message"]
    assert "cluster.time" not in told["message"]


def test_a_job_with_gpus_does_not_train_on_cpus_in_silence(tmp_path: Path) -> None:
    gpus = {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}
    process = start(tmp_path / "run", "engine.device=auto", **gpus)
    process.communicate(timeout=120)
    assert process.returncode == 75, "the next node may have them"
    log = (tmp_path / "run/logs/rank-0.txt").read_text()
    assert "SLURM gave this job GPUs (SLURM_GPUS_ON_NODE=4) but torch sees no CUDA device" in log
    assert "or set engine.device=cpu" in log
    process = start(tmp_path / "run", "engine.device=cpu", "memory.size=100000", **gpus)
    process.communicate(timeout=120)
    assert process.returncode == 202, "it began"


def test_the_network_of_cpus_is_not_that_of_a_job_with_gpus() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpccl.cluster.network_check"],
        env={**os.environ, **JOB, "SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "SLURM gave this job GPUs (SLURM_JOB_GPUS=0,1)" in done.stderr


def test_blocked_signals_are_heard_and_stay_blocked_for_children() -> None:
    stop = Stop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        with worker._listening(stop):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
            child.send_signal(signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR2)
            until = time.monotonic() + 10
            while stop.reason is None and time.monotonic() < until:
                time.sleep(0.01)
            assert child.wait() == 0, "a child lives on"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert stop.reason == "signal SIGUSR2"


def test_each_rank_prints_to_its_own_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    with step._own_log(folder, 3):
        os.write(1, b"from a library\n")
        subprocess.run(["echo", "from a child"], check=True)
    os.write(1, b"outside\n")
    assert (tmp_path / "logs/rank-3.txt").read_text() == "from a library\nfrom a child\n"
    assert capfd.readouterr().out == "outside\n"


def test_records_of_jobs_survive_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = [JobRecord("slurm", "3_1", 1.5, "login"), JobRecord("local", "77", 2.5, "here", born=9, log="x")]
    assert read_records(folder) == []
    for record in records:
        write_record(folder, record)
    with folder.jobs.open("a") as file:
        file.write('{"kind": "slurm", "id"')
    assert read_records(folder) == records
    assert birth(os.getpid()) > 0
    assert birth(2**22 + 1) == 0


def test_slurm_is_not_for_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpccl.cluster.local import launch

    assert launch(load([], ["cluster.kind=slurm", f"folder={tmp_path}"]), argv=["test"]) == 2
    assert "queue it with `hpccl submit`" in capsys.readouterr().err


def test_one_task_is_a_rank_where_a_template_says_so(tmp_path: Path) -> None:
    code = "import sys; from hpccl.cli import main; sys.argv = ['hpccl', 'train', *sys.argv[1:]]; main()"
    settings = [*SMALL, f"folder={tmp_path / 'run'}", "cluster.kind=slurm", "memory.size=100000"]
    done = subprocess.run(
        [sys.executable, "-c", code, *settings],
        env={**os.environ, **JOB, "SLURM_STEP_NUM_TASKS": "1", "HPCCL_STEP": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 202, done.stderr
    assert json.loads((tmp_path / "run/logs/error.json").read_text())["kind"] == "ConfigError"
    assert (tmp_path / "run/logs/starts.jsonl").exists(), "it has the guard against standstills"


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Nothing can be written to files, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_start_that_cannot_be_written_down_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    with no_room(), pytest.raises(FolderError, match=r"starts.*' cannot be written: File too large \(larger than"):
        step.refuse_standstill(folder, SlurmJob("12", 0))
    with no_room(), pytest.raises(FolderError, match=r"\.lock' cannot be written: File too large"), holding(folder):
        pass
    with holding(folder):
        pass


def test_a_process_of_another_program_may_have_any_name(tmp_path: Path) -> None:
    """The kernel cuts names at 15 bytes, within a character, too."""
    script = "import ctypes, sys; ctypes.CDLL(None).prctl(15, bytes([0xC3, 0x28])); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert b"\xc3(" in Path(f"/proc/{process.pid}/stat").read_bytes()
        assert birth(process.pid) > 0
