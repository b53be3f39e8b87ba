"""The jobs that were made for a run, one JSON object a line in its folder: how `hpccl status` finds them again."""

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

    kind: where it went
    id: SLURM's number (`123`, or `123_4` for a task of an array), or that of a process on `host`
    submitted: seconds since 1970
    host: the machine that submitted it, and for `local` that runs it
    born: of a local process, when it began in the system's clock ticks, for numbers are given again
    log: file of what it printed outside of `logs/rank-N.txt`; empty where there is none
    """

    kind: Literal["slurm", "local"]
    id: str
    submitted: float
    host: str
    born: int = 0
    log: str = ""


def write_record(folder: RunFolder, record: JobRecord) -> None:
    """Append, in one write.

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
    """All that can be read, oldest first; a torn line is passed over."""
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
    """When a process of this machine began, in the system's clock ticks; 0 for one that is not there or has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything; see proc(5)
    return 0 if fields[0] in "ZX" else int(fields[19])
