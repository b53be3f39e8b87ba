"""Checkpoints that cannot be written or read: what was saved before stays, and the same command continues."""

import contextlib
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run.command import events, finish, hpccl, ranks, report, start, trained, wait_for_steps


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096:
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk needs the right to mount")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_full_disk_and_again_after_making_room(small_disk: Path, tmp_path: Path, nproc: int) -> None:
    several = f"--nproc={nproc}"
    folder, whole = small_disk / "run", tmp_path / "whole"
    ballast = small_disk / "ballast"
    process = start(folder, several)
    wait_for_steps(folder, process, 20)  # checkpoints of steps 7 and 14 are there
    fill(ballast)
    code, output = finish(process)
    assert code == 1
    assert output.count("error:") == 1, output
    assert "the disk is full: free some space and run the same command again" in output
    assert "Traceback" not in output
    assert list((folder / "checkpoints").glob("task-*")), "an older checkpoint was lost"
    fill(ballast)
    code, output = finish(start(folder, several))  # still no room
    assert code == 1
    assert "the disk is full: free some space and run the same command again" in output
    assert "Traceback" not in output
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    for target in (folder, whole):
        code, output = finish(start(target, several))
        assert code == 0, output
    assert report(folder)["weights_sha256"] == report(whole)["weights_sha256"]


def wait_for_task(folder: Path, task: int) -> None:
    deadline = time.monotonic() + 150
    while not any(event["task"] == task for event in events(folder, "task")):
        assert time.monotonic() < deadline, "the run is too slow"
        time.sleep(0.005)


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_one_rank_cannot_write_its_part(tmp_path: Path) -> None:
    """The second rank may write no file as large as its share of the curvature."""
    folder, several = tmp_path / "run", ("--nproc=2", "train.epochs=2", "checkpoint.every=0")
    process = start(folder, *several)
    wait_for_task(folder, 1)
    before = {path: contents(path) for path in (folder / "checkpoints").glob("task-000-*")}
    _, hard = resource.prlimit(ranks(process.pid)[1], resource.RLIMIT_FSIZE)
    resource.prlimit(ranks(process.pid)[1], resource.RLIMIT_FSIZE, (1000, hard))
    code, output = finish(process)
    assert code == 1
    assert output.count("error:") == 1, output
    assert "cannot be written: File too large (" in output
    assert "ulimit -f" in output
    assert "the checkpoints before it are untouched" in output
    assert "Traceback" not in output
    assert not list((folder / "checkpoints").glob(".*")), "half a checkpoint was left"
    assert len(before) == 2
    assert {path: contents(path) for path in before} == before
    code, output = finish(start(folder, *several))
    assert code == 0, output


@pytest.mark.slow
def test_a_torn_checkpoint_says_what_to_delete(tmp_path: Path) -> None:
    folder, several = tmp_path / "run", ("--nproc=2", "train.epochs=1", "checkpoint.every=0")
    assert finish(start(folder, *several))[0] == 0
    weights = report(folder)["weights_sha256"]
    (newest,) = (folder / "checkpoints").glob("task-004-done-*")
    for name in ("state", "curvature-00001-of-00002"):
        torn = newest / f"{name}.safetensors"
        whole = torn.read_bytes()
        torn.write_bytes(whole[:-100])
        code, output = finish(start(folder, *several))
        assert code == 1
        assert output.count("error:") == 1, output
        assert f"checkpoint '{newest}' cannot be read ({name}: " in output
        assert "delete it to continue from the one before" in output
        assert "Traceback" not in output
        torn.write_bytes(whole)
    shutil.rmtree(newest)
    code, output = finish(start(folder, *several))
    assert code == 0, output
    assert report(folder)["weights_sha256"] == weights


def test_an_export_to_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "train.epochs=1", "stream.tasks=1")
    fill(small_disk / "ballast")
    code, output = hpccl("export", str(folder), str(small_disk / "out"))
    assert code == 1
    assert f"'{small_disk / 'out'}' cannot be written: No space left on device (the disk is full" in output
    assert "Traceback" not in output
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
