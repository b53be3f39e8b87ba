"""Real processes, really killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hpccl.cluster.local import pick_port, spawn
from hpccl.errors import FolderError, WorldError
from hpccl.folder import RunFolder

FAKE = Path(__file__).with_name("fake_worker.py")
LAUNCH = """
import sys
from pathlib import Path
from hpccl.cluster.local import spawn
from hpccl.folder import RunFolder
folder, fake, behaviour, grace, lost = sys.argv[1:]
command = [sys.executable, fake, folder, behaviour]
sys.exit(spawn(command, RunFolder(Path(folder)), nproc=2, threads=1, port=1234, grace=float(grace), lost=int(lost)))
"""


@pytest.fixture(autouse=True)
def _findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake worker is a script elsewhere: it finds hpccl where it is not installed, too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


Launcher = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Starts a launcher in a process of its own, and waits until its two ranks are ready."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str, grace: float = 20.0, lost: int = 1) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(tmp_path), str(FAKE), behaviour, str(grace), str(lost)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            until(lambda: bool(pid(tmp_path, "ready-0") and pid(tmp_path, "ready-1")))
            return process

        yield start


def pid(folder: Path, name: str) -> int:
    """What a rank noted, or 0 as long as it has not."""
    try:
        return int((folder / name).read_text() or 0)
    except FileNotFoundError:
        return 0


def gone(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def run(folder: Path, behaviour: str) -> int:
    command = [sys.executable, str(FAKE), str(folder), behaviour]
    return spawn(command, RunFolder(folder), nproc=2, threads=3, port=4321)


def test_ranks_know_their_world_and_rank_0_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "done") == 0
    expected = (
        "rank {0}: RANK={0} LOCAL_RANK={0} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4321 OMP_NUM_THREADS=3\n"
    )
    out, err = capfd.readouterr()
    assert (out, err) == (expected.format(0), "")
    assert (tmp_path / "logs" / "rank-1.txt").read_text() == expected.format(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_passed_on_and_the_run_is_stopped(
    tmp_path: Path, launcher: Launcher, number: signal.Signals
) -> None:
    process = launcher("wait")
    process.send_signal(number)
    assert process.wait(30) == 75
    assert {path.name for path in tmp_path.glob("SIG*")} == {f"{number.name}-0", f"{number.name}-1"}
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_second_interrupt_stops_hard(tmp_path: Path, launcher: Launcher) -> None:
    process = launcher("stubborn")
    process.send_signal(signal.SIGINT)
    until((tmp_path / "SIGINT-1").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert gone(pid(tmp_path, "ready-0"))
    assert gone(pid(tmp_path, "ready-1"))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_killed_and_the_other_stops(tmp_path: Path, launcher: Launcher, rank: int) -> None:
    process = launcher("wait")
    os.kill(pid(tmp_path, f"ready-{rank}"), signal.SIGKILL)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 1
    assert err.splitlines()[0] == (
        f"error: rank {rank} was killed by signal 9 (SIGKILL, which the system does when memory runs out); "
        "the other one was stopped; run the same command again to continue from the last checkpoint"
    )
    assert err.count("error:") == 1
    assert (tmp_path / f"SIGTERM-{1 - rank}").exists()
    assert gone(pid(tmp_path, f"ready-{1 - rank}"))


def test_a_rank_that_does_not_listen_is_killed_and_the_children_of_all_too(tmp_path: Path, launcher: Launcher) -> None:
    process = launcher("grandchild")
    until(lambda: bool(pid(tmp_path, "child-0") and pid(tmp_path, "child-1")))
    stopped = psutil.Process(pid(tmp_path, "ready-1"))
    stopped.suspend()  # deaf to SIGTERM
    os.kill(pid(tmp_path, "ready-0"), signal.SIGKILL)
    assert process.wait(15) == 1
    until(lambda: all(gone(pid(tmp_path, name)) for name in ("ready-1", "child-0", "child-1")))


def test_ranks_die_with_the_launcher(tmp_path: Path, launcher: Launcher) -> None:
    process = launcher("stubborn")
    process.kill()
    process.wait(10)
    until(lambda: gone(pid(tmp_path, "ready-0")) and gone(pid(tmp_path, "ready-1")), 5)


def test_the_rank_that_failed_first_is_blamed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "crash") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 1 ended with exit code 1; the other one was stopped; run the same command again")
    assert "RuntimeError: the cause" in err
    assert "connection closed" not in err
    assert err.count("error:") == 1


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [("data error", 1, "image 'x' cannot be decoded"), ("config error", 2, "memory too large")],
)
def test_an_error_of_the_user_is_told_once_without_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], behaviour: str, code: int, message: str
) -> None:
    assert run(tmp_path, behaviour) == code
    assert capfd.readouterr().err == f"error: {message}\n"


def test_the_last_lines_of_a_rank_that_left_no_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.txt").write_text("from an earlier start\n")
    assert run(tmp_path, "silent") == 1
    err = capfd.readouterr().err
    assert "error: rank 1 ended with exit code 3" in err
    assert err.endswith("some output before the end\n")
    assert "earlier" not in err
    assert "from an earlier start" in (tmp_path / "logs" / "rank-1.txt").read_text()


def test_a_crash_is_blamed_before_those_who_lost_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "lost") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 1 ended with exit code 1")
    assert "RuntimeError: the cause" in err
    assert "lost the connection" not in err


@pytest.mark.parametrize("lost", [1, 75])
def test_where_a_killed_rank_runs_again_its_code_says_so(tmp_path: Path, launcher: Launcher, lost: int) -> None:
    process = launcher("heard", lost=lost)
    os.kill(pid(tmp_path, "ready-1"), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == lost
    assert err.startswith("error: rank 1 was killed by signal 9")


def test_a_held_rank_that_others_waited_for_is_named_and_ended(tmp_path: Path, launcher: Launcher) -> None:
    process = launcher("wait")
    held = psutil.Process(pid(tmp_path, "ready-1"))
    held.suspend()
    began = time.monotonic()
    (tmp_path / "give up").touch()
    _, err = process.communicate(timeout=15)
    assert process.returncode == 1
    assert err == (
        "error: rank 0 waited; rank 1 did not answer (it was held by SIGSTOP) and was ended; "
        "run the same command again to continue from the last checkpoint\n"
    )
    assert gone(held.pid)
    assert time.monotonic() - began < 10


def test_a_held_rank_is_named_also_where_another_aborts(tmp_path: Path, launcher: Launcher) -> None:
    """As NCCL does, which says nothing that the launcher can hear."""
    process = launcher("abort")
    psutil.Process(pid(tmp_path, "ready-1")).suspend()
    (tmp_path / "give up").touch()
    _, err = process.communicate(timeout=15)
    assert process.returncode == 1
    assert err.startswith(
        "error: rank 0 was killed by signal 6 (SIGABRT, which NCCL does when another rank did not answer"
    )
    assert "; rank 1 did not answer (it was held by SIGSTOP) and was ended; the other one was stopped; run the" in err


def test_a_rank_that_others_waited_for_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as hurried:
        hurried.setattr("hpccl.cluster.local._NOTICE", 0.2)
        assert run(tmp_path, "waited") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 0 waited; rank 1 did not answer and was ended; run the same command again")
    assert run(tmp_path, "late") == 1
    assert capfd.readouterr().err.startswith("error: rank 0 waited; rank 1 answered too late; run the same command")
    assert run(tmp_path, "all waited") == 1
    assert "waited; every rank waited for another; run the same command again" in capfd.readouterr().err


def test_of_a_long_message_the_end_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "long") == 1
    err = capfd.readouterr().err
    assert err.endswith("xxx the end\n")
    assert len(err) < 20_000


def test_a_log_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "logs" / "rank-1.txt").mkdir(parents=True)
    with pytest.raises(FolderError, match=r"rank 1 cannot be started with '.*rank-1.txt': Is a directory"):
        run(tmp_path, "wait")
    assert gone(pid(tmp_path, "ready-0") or 1 << 30)


def test_a_free_port_is_chosen_and_a_taken_one_is_named() -> None:
    assert 0 < pick_port(0) < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(WorldError, match=rf"cluster\.port={port} cannot be used: Address already in use"):
            pick_port(port)
