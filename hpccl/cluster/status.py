"""The current state of runs, from their folders and SLURM's states of their jobs. Does not import torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from hpccl.cluster.jobs import Job, find_jobs, find_runs, latest_job
from hpccl.cluster.outcome import DONE, FAILED
from hpccl.cluster.queue import UNKNOWN, JobState
from hpccl.config.load import load_recorded
from hpccl.errors import HpcclError
from hpccl.folder import RunFolder
from hpccl.report.standing import Standing, read_standing

__all__ = ["ENDED", "RunStatus", "State", "judge", "read_statuses", "statuses_of", "wait_for"]

State: TypeAlias = Literal[
    "queued", "queued again", "starting", "running", "suspended", "ending",
    "done", "failed", "stopped", "cancelled", "timed out", "lost", "not started", "unknown", "unreadable",
]  # fmt: skip
ENDED: Final = {"done", "failed", "stopped", "cancelled", "timed out", "lost", "not started", "unreadable"}

_SILENCE = 600.0  # seconds without an event after which a running run is called silent
_ENDING = 120.0  # seconds that a job needs to end after its run has stopped
_CLOCKS = 60.0  # seconds by which the clocks of machines may differ
_AGAIN = "the same command continues it"
_DAMAGED = "its config.yaml cannot be read: put it back, and the same command continues it"
_PARTNER = ("WorldError", "StragglerError")  # errors whose cause is elsewhere: the job may be queued again


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of one run. Unknown values are None or empty.

    detail: details of the state, for people
    job: SLURM's number, or the pid of a process
    task: counted from 0
    left: seconds until the run is done, at the pace of its last steps; only while it trains
    limit_left: seconds until the job's time limit
    error: first line of the error that ended the last start
    silent: seconds since the last event
    """

    run: Path
    state: State
    detail: str = ""
    job: str = ""
    nodes: str = ""
    restarts: int = 0
    task: int | None = None
    num_tasks: int | None = None
    phase: str | None = None
    step: int | None = None
    num_steps: int | None = None
    epoch: float | None = None
    images_per_second: float | None = None
    left: float | None = None
    limit_left: float | None = None
    error: str = ""
    silent: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the run will not go on by itself."""
        return self.state in ENDED

    def as_dict(self) -> dict[str, Any]:
        """Return the status in types of JSON."""
        return {**asdict(self), "run": str(self.run), "ended": self.ended}


def read_statuses(folders: Sequence[Path]) -> list[RunStatus]:
    """Return the status of each run among and below the folders; never raises."""
    return statuses_of(find_runs(folders))


def statuses_of(runs: Sequence[Path]) -> list[RunStatus]:
    """Return the status of each of these runs, not of those below them; never raises."""
    standings = {run: read_standing(RunFolder(run).events) for run in runs}
    jobs = find_jobs(standings)
    now = time.time()
    return [_status(run, standings[run], latest_job(jobs[run]), now) for run in runs]


def wait_for(runs: Sequence[Path], *, interval: float = 5.0) -> int:
    """Wait until these runs have ended; return exit code 0 if all are done, else 1."""
    while True:
        found = statuses_of(runs)
        if all(status.ended for status in found):
            return DONE if all(status.state == "done" for status in found) else FAILED
        time.sleep(interval)


def _status(run: Path, standing: Standing, job: Job | None, now: float) -> RunStatus:
    absent = _absent(run, standing, job)
    if absent:
        return RunStatus(run=run, state="unreadable", detail=absent)
    state, detail = judge(standing, job, now)
    if detail.endswith(_AGAIN) and not _can_continue(run):
        detail = detail.removesuffix(_AGAIN) + _DAMAGED
    told = job.state if job is not None else None
    live = state in ("running", "ending")
    silent = None if standing.time is None else max(now - standing.time, 0.0)
    left = max(standing.left - (silent or 0.0), 0.0) if standing.left is not None and state == "running" else None
    return RunStatus(
        run=run,
        state=state,
        detail=detail,
        job=_name(job),
        nodes=told.nodes if told is not None and told.alive else "",
        restarts=told.restarts if told is not None and told.known else standing.restart,
        task=standing.task,
        num_tasks=standing.num_tasks,
        phase=standing.phase,
        step=standing.step,
        num_steps=standing.num_steps,
        epoch=standing.epoch,
        images_per_second=standing.images_per_second if live else None,
        left=left,
        limit_left=told.left if told is not None and state in ("starting", "running", "suspended") else None,
        error="" if state == "done" else _error(run, standing),
        silent=silent,
    )


def _absent(run: Path, standing: Standing, job: Job | None) -> str:
    """Return why a folder has no status; empty if it has one."""
    if standing.problem or standing.time is not None or job is not None:
        return ""
    try:
        if not run.is_dir():
            return "a file, not the folder of a run" if run.exists() else "no such folder"
        if not any(path.exists() for path in (RunFolder(run).config, RunFolder(run).events, RunFolder(run).jobs)):
            next(run.iterdir(), None)
            return "not the folder of a run, and no run below it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def _can_continue(run: Path) -> bool:
    """Whether the run's config.yaml can be read."""
    try:
        load_recorded(RunFolder(run).config)
    except (HpcclError, OSError):
        return False
    return True


def _name(job: Job | None) -> str:
    if job is None:
        return ""
    return job.id if job.kind == "slurm" else f"process {job.id}"


def _error(run: Path, standing: Standing) -> str:
    """Return the error that ended the newest start, in one line: from an event, or from the error file of a rank."""
    if standing.turn == "error":
        return f"{standing.error_kind}: {_first_line(standing.message)}"
    try:
        found = json.loads(RunFolder(run).error.read_bytes())
        later = standing.began is None or float(found["time"]) >= standing.began
        line = _last_line(found["message"]) if found["kind"] == "crash" else _first_line(found["message"])
        return f"rank {found['rank']}: {line}" if later else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _last_line(text: str) -> str:
    """Return the last line: of a traceback, the one with the error."""
    return next(iter(reversed(text.strip().splitlines())), "")


# ---------------------------------------------------------------- deciding on the state


def judge(standing: Standing, job: Job | None, now: float) -> tuple[State, str]:
    """Return a run's state and details, from its events and newest job; only events tell whether it is done."""
    if standing.turn == "done":
        return "done", ""
    if standing.problem:
        return ("running" if job is not None and job.alive else "unreadable"), standing.problem
    if job is None:
        return _without_job(standing)
    if not job.trains and job.state is not None and job.state.word != UNKNOWN:
        return _of_command(job.state)
    if job.alive is None:
        own = standing.turn == "error" and standing.error_kind not in _PARTNER and standing.job == job.id
        return ("failed", "") if own else ("unknown", _doubt(standing, job))
    if not job.alive:
        return _after_job(standing, job)
    return _waiting(job.state) or _working(standing, job, now)


def _without_job(standing: Standing) -> tuple[State, str]:
    """The state of a run without a job, whose folder nobody is known to have locked."""
    match standing.turn:
        case None:
            return "not started", ""
        case "run":
            return "lost", f"its process on {standing.host or 'another machine'} ended without a message; {_AGAIN}"
        case _:
            return _last_words(standing)


def _last_words(standing: Standing) -> tuple[State, str]:
    """The state of a run whose last start ended with a stop or error event."""
    if standing.turn == "error":
        return "failed", ""
    return "stopped", f"{standing.message}; {_AGAIN}"


def _doubt(standing: Standing, job: Job) -> str:
    said = {"run": "running", "stop": "stopped", "error": "failed"}.get(standing.turn or "", "none yet")
    why = job.state.reason if job.state is not None else f"its process is on {job.host}"
    return f"{why}; its last event: {said}"


def _of_command(state: JobState) -> tuple[State, str]:
    """The state of a job that does not train."""
    if state.word == "COMPLETED":
        return "done", ""
    return (_waiting(state) or ("running", "")) if state.alive else _as_slurm_says(Standing(), state)


def _waiting(state: JobState | None) -> tuple[State, str] | None:
    """The state of a run whose job holds no machine; None if it holds one."""
    if state is None or state.word in ("RUNNING", "COMPLETING", "SIGNALING", "RESIZING", "STAGE_OUT", UNKNOWN):
        return None
    if state.word == "CONFIGURING":
        return "starting", "its nodes are being prepared"
    if state.word in ("SUSPENDED", "STOPPED"):
        return "suspended", state.reason
    why = state.reason if state.word == "PENDING" else f"{state.word} {state.reason}".strip()
    if why == "DependencyNeverSatisfied":
        why += ": a job that it waits for failed; cancel it"
    return ("queued again" if state.restarts or state.word != "PENDING" else "queued"), why


def _working(standing: Standing, job: Job, now: float) -> tuple[State, str]:
    """The state of a run whose job holds a machine, or whose process is alive."""
    since = _since(standing, job)
    if standing.turn is None or standing.turn_time < since:
        if job.state is not None and job.state.word == "COMPLETING":
            return "ending", ""
        return "starting", "" if job.kind == "slurm" else "or waiting for the runs before it"
    match standing.turn:
        case "error" if standing.error_kind not in _PARTNER:
            return "failed", ""
        case "error" | "stop" if job.kind == "local" or now - standing.turn_time > _ENDING:
            return _last_words(standing)  # the job or process has gone on to something else
        case "error":
            return "ending", "a rank was lost"
        case "stop":
            return "ending", f"saved; {standing.message}"
        case _:
            pass
    if job.state is not None and job.state.word == "COMPLETING":
        return "ending", ""
    silent = now - (standing.time or now)
    return "running", f"no event for {silent / 60:.0f} min" if silent > _SILENCE else ""


def _since(standing: Standing, job: Job) -> float:
    """Return the time before which events belong to an earlier start."""
    if job.state is None:
        return job.submitted
    if standing.job == job.id and standing.restart >= job.state.restarts:
        return 0.0  # the clocks of machines may differ
    return max(job.state.start or 0.0, standing.turn_time + 1.0 if standing.job == job.id else 0.0)


def _after_job(standing: Standing, job: Job) -> tuple[State, str]:
    """The state of a run that is not done and whose job or process has ended."""
    if job.state is None:
        if standing.turn in ("stop", "error") and standing.turn_time >= job.submitted:
            return _last_words(standing)
        return "lost", f"its process ended without a message; {_AGAIN}"
    if standing.job != job.id:
        if job.state.end is not None and (standing.began or 0.0) > job.state.end + _CLOCKS:
            return _without_job(standing)  # it was started in some other way since
        if standing.turn_time < job.submitted - _CLOCKS:
            standing = replace(standing, turn=None)  # the last events are of an earlier start
    if standing.turn == "error":
        return _last_words(standing)
    return _as_slurm_says(standing, job.state)


def _as_slurm_says(standing: Standing, state: JobState) -> tuple[State, str]:
    saved = standing.turn == "stop"
    again = f"saved; {_AGAIN}" if saved else "" if standing.time is None else _AGAIN
    match state.word:
        case "CANCELLED":
            return "cancelled", again
        case "TIMEOUT" | "DEADLINE":
            return "timed out", again
        case "COMPLETED" | "FAILED" | "GONE" if saved:
            return _last_words(standing)
        case "FAILED" | "OUT_OF_MEMORY":
            return "failed", _how(state)
        case "COMPLETED":
            return "lost", "its job ended without an error, but the run is not done"
        case "GONE":
            early = "it was cancelled while it waited, or " if standing.time is None else ""
            return "lost", f"its job is gone: {early}{state.reason}"
        case _:
            return "lost", f"{state.word} {state.reason}".strip()


def _how(state: JobState) -> str:
    if state.word == "OUT_OF_MEMORY":
        return "out of memory; raise cluster.mem"
    if state.signal == 53:
        return "could not be launched; does the folder of its log exist on the node?"
    end = f"signal {state.signal}" if state.signal else f"exit code {state.exit_code}"
    return end if state.reason in ("", "NonZeroExitCode") else f"{end}, {state.reason}"
