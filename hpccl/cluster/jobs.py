"""The jobs of runs, and whether they live: SLURM's, and processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpccl.cluster.lock import holder
from hpccl.cluster.queue import JobState, states
from hpccl.cluster.records import JobRecord, read_records
from hpccl.folder import RunFolder
from hpccl.report.standing import Standing

__all__ = ["Job", "born", "find_jobs", "find_runs", "latest_job"]

_NOT_RUNS = {"checkpoints", "memory", "logs", "tensorboard", "report", "__pycache__"}
_SIGNS = ("config.yaml", "jobs.jsonl", "events.jsonl")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs among and below these folders, each once; a folder without any stands for itself."""
    found: dict[Path, None] = {}
    for folder in folders:
        below = list(_below(folder))
        found |= dict.fromkeys(below or [folder])
    return list(found)


def _below(folder: Path, depth: int = 8) -> Iterator[Path]:
    """Sorted by name. Not into runs, which hold none, nor through links, which may lead in a circle."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name in _SIGNS for entry in inside):
        yield folder
        return
    for entry in inside:
        if depth > 1 and entry.name not in _NOT_RUNS and entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
            yield from _below(folder / entry.name, depth - 1)


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """Where a run is carried out.

    kind: `slurm`, or `local`: a process
    alive: it waits or runs; None where that cannot be known from here
    submitted: seconds since 1970
    host: of a process
    state: what SLURM says
    log: file of what it printed outside of `logs/rank-N.txt`; empty where there is none
    """

    kind: Literal["slurm", "local"]
    id: str
    alive: bool | None
    submitted: float
    host: str = ""
    state: JobState | None = None
    log: str = ""


def find_jobs(runs: Mapping[Path, Standing]) -> dict[Path, list[Job]]:
    """The jobs of each run, oldest first. SLURM is asked once for all of them."""
    records = {folder: _records(RunFolder(folder), standing) for folder, standing in runs.items()}
    ids = dict.fromkeys(record.id for found in records.values() for record in found if record.kind == "slurm")
    known = states(list(ids))
    return {
        folder: [*(_job(record, known) for record in found), *_unrecorded(RunFolder(folder), found)]
        for folder, found in records.items()
    }


def latest_job(jobs: Sequence[Job]) -> Job | None:
    """The one that counts: the newest that lives or may live, else the newest."""
    alive = [job for job in jobs if job.alive or job.alive is None]
    return (alive or list(jobs) or [None])[-1]


def _records(folder: RunFolder, standing: Standing) -> list[JobRecord]:
    """What was recorded, and the job that the last start was part of, which may be one of the user's own."""
    found = {(record.kind, record.id): record for record in read_records(folder)}
    if standing.job is not None and standing.began is not None and ("slurm", standing.job) not in found:
        record = JobRecord("slurm", standing.job, standing.began, standing.host)
        found["slurm", record.id] = record
    return sorted(found.values(), key=lambda record: record.submitted)


def _job(record: JobRecord, known: Mapping[str, JobState]) -> Job:
    if record.kind == "slurm":
        state = known[record.id]
        alive = None if not state.known and state.alive else state.alive
        return Job("slurm", record.id, alive, record.submitted, state=state, log=record.log)
    here = record.host == os.uname().nodename
    alive = (record.id.isdecimal() and born(int(record.id)) == record.born > 0) if here else None
    return Job("local", record.id, alive, record.submitted, host=record.host, log=record.log)


def _unrecorded(folder: RunFolder, records: Sequence[JobRecord]) -> Iterator[Job]:
    """`hpccl train` that somebody typed on this machine: it holds the folder's lock."""
    found = None if any(record.kind == "slurm" and not record.log for record in records) else holder(folder)
    if found is None or found.host != os.uname().nodename or found.pid <= 0:
        return
    if not any(record.kind == "local" and born(int(record.id)) == record.born for record in records):
        yield Job("local", str(found.pid), True, 0.0, host=found.host)


def born(pid: int) -> int:
    """When a process of this machine began, in clock ticks since the machine did; 0 if there is none (any more)."""
    try:
        # The name of the program, in parentheses, may hold anything; see proc(5) for the fields after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0
