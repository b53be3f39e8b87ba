"""The states of SLURM jobs, queried in one call for all of them, with retries if the controller does not answer."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["GONE", "UNKNOWN", "JobState", "cancel", "parse_sacct", "parse_squeue", "states"]

UNKNOWN = "UNKNOWN"  # SLURM did not answer
GONE = "GONE"  # SLURM answered, and does not know the job (any more)

# SLURM's states of a job that waits (also for a person to release it), runs or is ending.
_ALIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT",
    "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip
_INTERRUPTED = {"NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}  # SLURM requeues the job, if it may
_RETURN = 600.0  # seconds within which it is requeued


@dataclass(frozen=True)
class JobState:
    """The state of one job.

    id: `123`, or `123_4` for a task of an array
    word: SLURM's state (PENDING, RUNNING, COMPLETED, ...), or UNKNOWN or GONE
    reason: SLURM's reason why it waits or ended; for UNKNOWN and GONE, why
    nodes: compact list, empty while it waits
    restarts: how often it was requeued
    exit_code: exit code of the script; 0 until it ends
    signal: signal that ended the script, or 0
    start, end: seconds since 1970, expected ones for a waiting job; None if SLURM gives none
    limit, left: seconds of its time limit, and how many remain; None without limit, `left` None if it does not run
    requeue: whether SLURM may requeue it after a failure of a node, say
    """

    id: str
    word: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int = 0
    signal: int = 0
    start: float | None = None
    end: float | None = None
    limit: float | None = None
    left: float | None = None
    requeue: bool = False

    @property
    def alive(self) -> bool:
        """Whether it waits, runs or is about to be requeued. True also for UNKNOWN, as it may be."""
        if self.word in _INTERRUPTED:
            return self.requeue and (self.end is None or time.time() - self.end < _RETURN)
        return self.word in _ALIVE or self.word == UNKNOWN

    @property
    def known(self) -> bool:
        """Whether SLURM knows its state."""
        return self.word not in (UNKNOWN, GONE)


def states(ids: Sequence[str]) -> dict[str, JobState]:
    """Return the state of each job.

    `squeue` has jobs that wait, run, or ended within the cluster's MinJobAge; `sacct` is queried for the others, and
    fails on clusters without accounting. Never raises: if SLURM does not answer, the word is UNKNOWN.
    """
    if not ids:
        return {}
    found: dict[str, JobState] = {}
    for part in _parts(sorted({_array_of(each) for each in ids})):
        answer = _ask(
            ["squeue", "--noheader", "--all", "--array", "--states=all", f"--jobs={part}", f"--Format={_FORMAT}"]
        )
        if answer.problem:
            return {each: JobState(each, UNKNOWN, answer.problem) for each in ids}
        found |= {state.id: state for state in parse_squeue(answer.output)}
    absent = [each for each in ids if each not in found]
    return {each: found[each] for each in ids if each in found} | _older(absent)


def _older(ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of jobs that the controller has forgotten, from SLURM's accounts."""
    found: dict[str, JobState] = {}
    why = "SLURM does not know it any more"
    for part in _parts(sorted({_array_of(each) for each in ids})):
        answer = _ask(
            ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={part}", f"--format={_ACCOUNTS}"]
        )
        found |= {state.id: state for state in parse_sacct(answer.output)}
        if answer.problem:
            why = f"squeue does not know it any more, and {answer.problem}"
    return {each: found.get(each, JobState(each, GONE, why)) for each in ids}


def cancel(ids: Sequence[str]) -> str:
    """Cancel jobs; return SLURM's errors, empty if there are none."""
    problems = [_ask(["scancel", *part.split(",")]).problem for part in _parts(ids)]
    return "; ".join(filter(None, problems))


def _array_of(job: str) -> str:
    """Return `123` of `123_4`: arrays are queried as a whole."""
    return job.partition("_")[0]


def _parts(ids: Sequence[str], most: int = 1000) -> list[str]:
    """Return comma-separated lists that fit into an argument."""
    return [",".join(ids[first : first + most]) for first in range(0, len(ids), most)]


# ---------------------------------------------------------------- SLURM's commands


@dataclass(frozen=True)
class _Answer:
    """The output of a command; problem: why it may be incomplete, empty if the command succeeded."""

    output: str
    problem: str = ""


_TIMEOUT = 20.0  # seconds for one try
_PAUSES = (0.5, 2.0)  # seconds before the second and the third try
_PATIENCE = 8.0  # seconds after which there is no further try: SLURM's commands retry by themselves
_NOT_KNOWN = "Invalid job id specified"  # squeue's error if it is queried for a single job that it does not know
_FINAL = ("accounting storage is disabled", "accounting_storage", "denied", "Invalid job id", "nvalid user")


def _ask(command: Sequence[str]) -> _Answer:
    """Run one of SLURM's commands, with retries if the controller does not answer."""
    problem, began = "", time.monotonic()
    for pause in (0.0, *_PAUSES):
        if time.monotonic() - began > _PATIENCE:
            break
        time.sleep(pause)
        try:
            done = subprocess.run(
                command,
                env=_environment(),
                capture_output=True,
                timeout=_TIMEOUT,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            return _Answer("", f"{command[0]} is not installed here")
        except (OSError, subprocess.SubprocessError) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            problem = f"{command[0]} " + (f"did not answer within {_TIMEOUT:.0f} s" if late else f"failed: {error}")
            continue
        output, words = (text.decode("utf-8", errors="replace") for text in (done.stdout, done.stderr))
        if done.returncode == 0 or (_NOT_KNOWN in words and command[0] == "squeue"):
            return _Answer(output)
        problem = f"{command[0]} failed: {_plain(words) or f'exit code {done.returncode}'}"
        if any(sign in words for sign in _FINAL):
            return _Answer(output, problem)
    return _Answer("", problem)


def _plain(words: str) -> str:
    """Join error messages in one line, without prefixes of commands and functions; a fatal one alone."""
    _, fatal, why = words.rpartition("fatal: ")
    if fatal:
        return why.strip()
    lines = (re.sub(r"^(?:\w+: )?(?:\w+ )?error: ", "", line.strip()) for line in words.splitlines())
    return "; ".join(dict.fromkeys(filter(None, lines)))


def _environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without the user's filters and formats of SLURM's commands."""
    kept = {name: value for name, value in environ.items() if not name.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    return {**kept, "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}


# ---------------------------------------------------------------- reading


_COLUMNS = {
    "JobArrayID": 40, "State": 24, "RestartCnt": 12, "exit_code": 12, "Requeue": 8, "StartTime": 24, "EndTime": 24,
    "TimeLimit": 20, "TimeLeft": 20, "NodeList": 400, "Reason": 300,
}  # fmt: skip
_FORMAT = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
_ACCOUNTS = "JobID,State,ExitCode,Start,End,Timelimit,NodeList,Reason"


def parse_squeue(text: str) -> list[JobState]:
    """Parse lines of `squeue --Format`: columns of fixed width, in which longer values are truncated."""
    return [state for line in text.splitlines() if line.strip() for state in _of_queue(line)]


def _of_queue(line: str) -> Iterator[JobState]:
    cells: dict[str, str] = {}
    first = 0
    for name, width in _COLUMNS.items():
        cells[name] = line[first : first + width].strip()
        first += width
    code, signal = _exit(cells["exit_code"])
    word = cells["State"]
    state = JobState(
        cells["JobArrayID"],
        word,
        reason=_said(cells["Reason"]),
        nodes=_said(cells["NodeList"]),
        restarts=_number(cells["RestartCnt"]),
        exit_code=code,
        signal=signal,
        start=_time(cells["StartTime"]),
        end=_time(cells["EndTime"]),
        limit=_span(cells["TimeLimit"]),
        left=_span(cells["TimeLeft"], overdue=0.0) if word in ("RUNNING", "SUSPENDED") else None,
        requeue=cells["Requeue"] not in ("0", ""),
    )
    yield from (replace(state, id=each) for each in _expand(state.id))


def parse_sacct(text: str) -> list[JobState]:
    """Parse lines of `sacct --parsable2`; for a job that ran several times, the last one."""
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        cells = dict(zip(_ACCOUNTS.split(","), line.split("|"), strict=False))
        if len(cells) < 3 or not cells["JobID"][:1].isdigit():
            continue
        word, _, by = cells["State"].partition(" ")  # `CANCELLED by 1000`
        code, signal = _exit(cells["ExitCode"])
        state = JobState(
            cells["JobID"],
            word,
            reason=by or _said(cells.get("Reason", "")),
            nodes=_said(cells.get("NodeList", "")),
            exit_code=code,
            signal=signal,
            start=_time(cells.get("Start", "")),
            end=_time(cells.get("End", "")),
            limit=_span(cells.get("Timelimit", "")),
        )
        found |= {each: replace(state, id=each) for each in _expand(state.id)}
    return list(found.values())


def _expand(job: str) -> Iterable[str]:
    """Expand the waiting tasks of an array, which share a line: `12_[0-2,7%4]` is 12_0, 12_1, 12_2 and 12_7."""
    found = re.fullmatch(r"(\d+)_\[([^\]%]*)(?:%\d+)?\]", job)
    if found is None:
        return [job.partition("+")[0]]  # `12+0`: the first component of a heterogeneous job
    return [f"{found[1]}_{number}" for part in found[2].split(",") for number in _range(part)]


def _range(part: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
    if found is None:
        return range(0)  # truncated
    first = int(found[1])
    return range(first, int(found[2] or first) + 1, int(found[3] or 1))


def _said(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A", "None assigned", "Unknown") else text


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _exit(text: str) -> tuple[int, int]:
    """Return exit code and signal, from `3:0` or from a wait status."""
    code, colon, signal = text.partition(":")
    if colon:
        return _number(code), _number(signal)
    status = _number(code)
    return (0, status & 127) if status & 127 else (status >> 8, 0)


def _time(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _span(text: str, overdue: float | None = None) -> float | None:
    """Return the seconds of `1-02:00:00`, `2:00:00` or `10:00`; `overdue` for INVALID; None if there is no limit."""
    if text == "INVALID":
        return overdue
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(86400 * days + 3600 * hours + 60 * minutes + rest)
