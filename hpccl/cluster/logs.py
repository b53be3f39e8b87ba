"""`hpccl logs`: print the output of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hpccl.cluster.jobs import find_jobs, find_runs, is_run, latest_job
from hpccl.cluster.status import statuses_of
from hpccl.errors import FolderError
from hpccl.folder import RunFolder, explain_os_error
from hpccl.output import say
from hpccl.report.standing import read_standing

__all__ = ["find_log", "print_log", "tail"]

_LOOK = 0.5  # seconds between two checks of a growing file
_ASK = 10.0  # seconds between two checks whether the run has ended


def print_log(folder: Path, *, rank: int = 0, lines: int = 40, follow: bool = False) -> None:
    """Print the last `lines` lines of a rank's log, 0 for all; with `follow`, also new ones until the run has ended.

    Raises:
        FolderError: there is no log, or it cannot be read.
    """
    run = _only_run(folder)
    path = _wait_for_log(run, rank) if follow else find_log(run, rank)
    say(f"-- {path}")
    for found in _parts(run, path, lines, follow=follow):
        sys.stdout.buffer.write(found)
        sys.stdout.flush()


def _parts(run: Path, path: Path, lines: int, *, follow: bool) -> Iterator[bytes]:
    """Yield the log's last lines, then what is added.

    Raises:
        FolderError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        yield tail(path, size, lines)
        if follow:
            yield from _growth(run, path, size)
    except OSError as error:
        raise FolderError(f"'{path}' cannot be read: {explain_os_error(error)}") from error


def find_log(run: Path, rank: int = 0) -> Path:
    """Return the file with a rank's output.

    Rank 0 may have no log of its own, or an older one than its newest job (which may have ended before the ranks
    started): then it is the job's log.

    Raises:
        FolderError: there is none.
    """
    own = RunFolder(run).logs / f"rank-{rank}.txt"
    if rank > 0:
        if own.exists():
            return own
        there = sorted(path.stem.removeprefix("rank-") for path in RunFolder(run).logs.glob("rank-*.txt"))
        raise FolderError(f"'{own}' does not exist; ranks with a log: {', '.join(there) or 'none'}")
    job = latest_job(find_jobs({run: read_standing(RunFolder(run).events)})[run])
    if own.exists() and (job is None or not job.log or own.stat().st_mtime >= job.submitted):
        return own
    if job is not None and job.log and Path(job.log).exists():
        return Path(job.log)
    if own.exists():
        return own
    if job is None:
        raise FolderError(f"no output of '{run}': it was not started by hpccl submit, and printed to its own terminal")
    what = f"job {job.id}" if job.kind == "slurm" else f"process {job.id} on {job.host}"
    if not job.log:
        raise FolderError(
            f"no output of '{run}': {what} was not started by hpccl submit; it printed where its script says or to a "
            "terminal"
        )
    raise FolderError(f"no output of '{run}' yet: {what} has not written '{job.log}' (hpccl status {run} says why)")


def tail(path: Path, size: int, lines: int) -> bytes:
    """Return the last lines of the first `size` bytes of a file; all for 0."""
    with path.open("rb") as file:
        if lines <= 0:
            return file.read(size)
        first, found = size, b""
        while first > 0 and found.count(b"\n") <= lines:
            first = max(first - (1 << 16), 0)
            file.seek(first)
            found = file.read(size - first)
        return b"".join(found.splitlines(keepends=True)[-lines:])


def _only_run(folder: Path) -> Path:
    """Return the only run in or below the folder; raise FolderError if there are several or none."""
    runs = [folder] if is_run(folder) else find_runs([folder])
    if len(runs) > 1:
        raise FolderError(f"'{folder}' holds {len(runs)} runs; choose one of them, such as {runs[0]}")
    if not runs[0].is_dir():
        raise FolderError(f"'{folder}' is not a folder; give that of a run, such as runs/<name>")
    if not is_run(runs[0]):
        raise FolderError(f"'{folder}' is not the folder of a run, and no run is below it; give runs/<name>")
    return runs[0]


# ---------------------------------------------------------------- following


def _wait_for_log(run: Path, rank: int) -> Path:
    """Wait for a rank's log; raise FolderError if the run has ended without one."""
    told = False
    while True:
        try:
            return find_log(run, rank)
        except FolderError as error:
            if _has_ended(run):
                raise
            if not told:
                sys.stderr.write(f"{error}; waiting for it\n")
                told = True
        time.sleep(_ASK / 2)


def _growth(run: Path, path: Path, size: int) -> Iterator[bytes]:
    """Yield what is written after the first `size` bytes, until the run has ended."""
    asked = time.monotonic() - _ASK
    ended = False
    while True:
        now = path.stat().st_size
        size = size if now >= size else 0  # truncated: a new start overwrote the file
        if now > size:
            with path.open("rb") as file:
                file.seek(size)
                more = file.read(now - size)
            size += len(more)
            yield more
        elif ended:
            return
        else:
            time.sleep(_LOOK)
        if not ended and time.monotonic() - asked >= _ASK:
            asked, ended = time.monotonic(), _has_ended(run)


def _has_ended(run: Path) -> bool:
    return all(status.ended for status in statuses_of([run]))
