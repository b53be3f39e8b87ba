"""The record of the jobs submitted for a run, one JSON object a line in its folder; `hpccl status` reads it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpccl.errors import FolderError
from hpccl.folder import RunFolder, explain_os_error

__all__ = ["JobRecord", "birth", "read_records", "write_record"]


@dataclass(frozen=True)
class JobRecord:
    """One submission.

    kind: where it was submitted to
    id: SLURM's number (`123`, or `123_4` for a task of an array), or the pid of a process on `host`
    submitted: seconds since 1970
    host: the machine that submitted it, and for `local` that runs it
    born: start time of a local process in the system's clock ticks, since pids are reused
    log: file of its output outside of `logs/rank-N.txt`; empty if there is none
    command: the words of the `hpccl` command, quoted for a shell, if it is another one than training; else empty
    dependency: what that job waits for, as for `sbatch --dependency`; empty if for nothing
    """

    kind: Literal["slurm", "local"]
    id: str
    submitted: float
    host: str
    born: int = 0
    log: str = ""
    command: str = ""
    dependency: str = ""


def write_record(folder: RunFolder, record: JobRecord) -> None:
    """Append a record, in one write.

    Raises:
        FolderError: it cannot be written.
    """
    line = json.dumps(asdict(record)).encode() + b"\n"
    try:
        file = os.open(folder.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)
    except OSError as error:
        raise FolderError(f"'{folder.jobs}' cannot be written: {explain_os_error(error)}") from error


def read_records(folder: RunFolder) -> list[JobRecord]:
    """Return all records, oldest first; lines that cannot be parsed are skipped."""
    try:
        lines = folder.jobs.read_bytes().splitlines()
    except OSError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: bytes) -> JobRecord | None:
    try:
        values: dict[str, Any] = json.loads(line)
        return JobRecord(**{key: values[key] for key in JobRecord.__dataclass_fields__ if key in values})
    except (ValueError, TypeError, AttributeError):
        return None


def birth(pid: int) -> int:
    """Return when a process of this machine started, in the system's clock ticks; 0 if none is there (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()  # the name before it may contain anything; see proc(5)
    return 0 if fields[0] in "ZX" else int(fields[19])
