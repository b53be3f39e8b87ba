"""`hpccl cancel`: ask the jobs of runs to end. They save first, if the time allows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpccl.cluster import queue
from hpccl.cluster.jobs import Job, find_jobs, find_runs, is_run
from hpccl.folder import RunFolder
from hpccl.report.standing import Standing, read_standing

__all__ = ["cancel"]


def cancel(folders: Sequence[Path]) -> tuple[list[str], bool]:
    """Cancel every live job of the runs among and below the folders.

    Returns:
        Lines on what was done for each run, and whether everything succeeded.
    """
    runs = find_runs(folders)
    standings = {run: read_standing(RunFolder(run).events) for run in runs}
    live = {
        run: [job for job in found if job.alive is not False and _is_for(standings[run], job)]
        for run, found in find_jobs(standings).items()
    }
    ids = dict.fromkeys(job.id for found in live.values() for job in found if job.kind == "slurm")
    refused = queue.cancel(list(ids)) if ids else ""
    lines, ended, strange = [], dict[str, str](), [run for run in runs if not is_run(run)]
    for run, found in live.items():
        nothing = "not the folder of a run, and no run below it" if run in strange else "nothing to cancel"
        lines += [f"{run}: {word}" for word in _words(found, ended, refused)] or [f"{run}: {nothing}"]
    problems = [refused, *ended.values()] if refused else list(ended.values())
    return lines, not any(problems) and not strange


def _is_for(standing: Standing, job: Job) -> bool:
    """Whether the job works on this run: a process may be at another run, and a user's own job at anything."""
    if standing.turn == "done":
        return False
    if job.state is None:
        return standing.turn in (None, "run") or standing.turn_time < job.submitted
    if job.recorded or standing.turn == "run":
        return True
    return standing.turn == "stop" and (job.state.word != "RUNNING" or job.state.restarts > standing.restart)


def _words(jobs: Sequence[Job], ended: dict[str, str], refused: str) -> Iterator[str]:
    """Yield what was done with each job. `ended`: the problem by process, which is signalled once for all its runs."""
    for job in jobs:
        if job.kind == "slurm":
            yield f"job {job.id}: {refused}" if refused else f"job {job.id} cancelled"
            continue
        problem = ended[job.id] if job.id in ended else _end(job)
        again = ", as above" if job.id in ended else ""
        ended[job.id] = problem
        yield f"process {job.id}: {problem}" if problem else f"process {job.id} asked to save and stop{again}"


def _end(job: Job) -> str:
    """Send SIGTERM to a process; return what went wrong, empty if nothing."""
    if job.host != os.uname().nodename:
        return f"runs on {job.host}; cancel it there"
    try:
        os.kill(int(job.id), signal.SIGTERM)
    except (OSError, ValueError, OverflowError) as error:
        return f"cannot be asked to stop: {error}"
    return ""
