"""The jobs of runs, and whether they are alive: SLURM jobs, and processes of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpccl.cluster.lock import holder
from hpccl.cluster.queue import GONE, UNKNOWN, JobState, states
from hpccl.cluster.records import JobRecord, birth, read_records
from hpccl.cluster.slurm import ENDED
from hpccl.errors import ConfigError
from hpccl.folder import RunFolder, similar
from hpccl.report.standing import Standing

__all__ = ["Job", "find_jobs", "find_runs", "is_run", "latest_job", "refuse_absent"]

_OF_A_RUN = {"checkpoints", "memory", "logs", "tensorboard", "report"}  # folders inside a run that hold none
_SIGNS = ("config.yaml", "jobs.jsonl", "events.jsonl")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the runs among and below these folders, each once; a folder without any is returned itself."""
    found: dict[Path, None] = {}
    for folder in folders:
        below = list(_below(folder))
        found |= dict.fromkeys(below or [folder])
    return list(found)


def is_run(folder: Path) -> bool:
    """Whether the folder itself is a run's, whatever is below it."""
    return any((folder / sign).exists() for sign in _SIGNS)


def refuse_absent(folders: Sequence[Path]) -> None:
    """Refuse mistyped paths, which would otherwise look like runs without any events.

    Raises:
        ConfigError: a path does not exist; suggests one with a similar name.
    """
    told = [_absence(folder) for folder in folders if _is_absent(folder)]
    if told:
        raise ConfigError(f"{'; '.join(told)}. Give folders of runs, or of sweeps and campaigns with runs below")


def _is_absent(folder: Path) -> bool:
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it may not be read, which its status will report
        return False
    return False


def _absence(folder: Path) -> str:
    near = similar(folder, (path.name for path in folder.parent.glob("*")))
    return f"'{folder}' does not exist" + (f" (did you mean '{near}'?)" if near else "")


def _below(folder: Path, depth: int = 8) -> Iterator[Path]:
    """Yield runs, and folders of jobs that do not train, sorted by name.

    Searches inside runs, which may hold a sweep or a reference, but does not follow links, which may form a cycle.
    """
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    found = any(entry.name in _SIGNS for entry in inside)
    if found:
        yield folder
    passed = _OF_A_RUN if found else ()
    for entry in inside:
        if depth > 1 and entry.name not in passed and entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
            yield from _below(folder / entry.name, depth - 1)


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A SLURM job or process that executes a run.

    kind: `slurm`, or `local` for a process
    alive: whether it waits or runs; None if that cannot be known from here
    submitted: seconds since 1970
    host: the machine of a process
    state: SLURM's state of the job
    log: file of its output outside of `logs/rank-N.txt`; empty if there is none
    recorded: it was submitted for the run; if False, the run is only a part of what it does
    trains: False for another `hpccl` command, of which there are no events
    """

    kind: Literal["slurm", "local"]
    id: str
    alive: bool | None
    submitted: float
    host: str = ""
    state: JobState | None = None
    log: str = ""
    recorded: bool = True
    trains: bool = True


def find_jobs(runs: Mapping[Path, Standing]) -> dict[Path, list[Job]]:
    """Return the jobs of each run, oldest first. SLURM is queried once for all of them."""
    records = {folder: read_records(RunFolder(folder)) for folder in runs}
    ids = [record.id for found in records.values() for record in found if record.kind == "slurm"]
    ids += [standing.job for standing in runs.values() if standing.job is not None]
    known = states(list(dict.fromkeys(ids)))
    return {
        folder: _with_unrecorded(
            RunFolder(folder), standing, [_job(record, known) for record in records[folder]], known
        )
        for folder, standing in runs.items()
    }


def latest_job(jobs: Sequence[Job]) -> Job | None:
    """Return the job that counts: the newest that is or may be alive, else the newest."""
    alive = [job for job in jobs if job.alive or job.alive is None]
    return next(reversed(alive or list(jobs)), None)


def _job(record: JobRecord, known: Mapping[str, JobState]) -> Job:
    if record.kind == "slurm":
        state = _as_logged(record, known[record.id]) if record.command else known[record.id]
        alive = None if state.word == UNKNOWN else state.alive
        trains = not record.command
        return Job("slurm", record.id, alive, record.submitted, state=state, log=record.log, trains=trains)
    here = record.host == os.uname().nodename
    alive = (record.id.isdecimal() and birth(int(record.id)) == record.born > 0) if here else None
    return Job("local", record.id, alive, record.submitted, host=record.host, log=record.log)


def _as_logged(record: JobRecord, state: JobState) -> JobState:
    """Return how a command's job ended, of which no events tell, from its log where SLURM does not know any more."""
    if state.word != GONE:
        return state
    try:
        last = Path(record.log).read_bytes()[-4096:].decode(errors="replace").rpartition(ENDED)
    except OSError:
        return state
    code = re.match(r"\d+", last[2])
    if not last[1] or code is None:
        return state
    return replace(state, word="FAILED" if int(code[0]) else "COMPLETED", reason="", exit_code=int(code[0]))


def _with_unrecorded(
    folder: RunFolder, standing: Standing, jobs: list[Job], known: Mapping[str, JobState]
) -> list[Job]:
    """Add the user's own SLURM job in which the run started, or else the process that holds the folder's lock."""
    if standing.job is not None and not any(job.id == standing.job for job in jobs):
        record = JobRecord("slurm", standing.job, standing.began or 0.0, standing.host)
        jobs = sorted([*jobs, replace(_job(record, known), recorded=False)], key=lambda job: job.submitted)
    found = None if any(job.alive for job in jobs) else holder(folder)
    if found is None:
        return jobs
    if any(job.alive is None and job.id == standing.job for job in jobs):  # SLURM does not answer, but the lock is held
        return [replace(job, alive=True) if job.id == standing.job else job for job in jobs]
    return [*jobs, Job("local", str(found.pid), True, found.since, host=found.host, recorded=False)]
