"""What a user of a cluster does: submit, look, wait; and what a test does: kill a rank."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm.testbed.testbed import Testbed
from tests.run.command import environment

__all__ = [
    "ENDED",
    "ask",
    "kill_rank",
    "rank_pid",
    "show",
    "state",
    "submit",
    "wait_for",
    "wait_for_state",
    "wait_until_saved",
]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def ask(*command: str | Path, folder: Path | None = None, timeout: float = 60) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, text=True, capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command} failed with {done.returncode}: {done.stderr}{done.stdout}"
    return done.stdout


def submit(folder: Path, script: str | Path, *arguments: str | Path, options: Sequence[str] = ()) -> str:
    """Number of the job that sbatch makes of a file, or of the text of a script; its log is `folder`/%j.log.

    A text has what follows `#!/bin/bash`. Options of sbatch may name another --output.
    """
    if isinstance(script, str):
        text, script = script, folder / f"script-{time.monotonic_ns()}.sh"
        script.write_text(f"#!/bin/bash\n{text}\n")
    output = f"--output={folder}/%A_%a.log" if any("--array" in option for option in options) else ""
    return ask(
        "sbatch",
        "--parsable",
        output or f"--output={folder}/%j.log",
        "--open-mode=append",
        *options,
        script,
        *arguments,
        folder=folder,
    ).strip()


def show(job: str) -> dict[str, str]:
    """What `scontrol show job` tells, field by field: JobState, Restarts, ExitCode, NodeList, Reason, ..."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "-o", "show", "job", job)))


def state(job: str) -> str:
    """State of a job, or of a task of an array such as 7_0."""
    return show(job)["JobState"]


def wait_for(what: str, find: Callable[[], bool], timeout: float = 60) -> None:
    """Wait until `find` is true."""
    deadline = time.monotonic() + timeout
    while not find():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}"
        time.sleep(0.1)


def wait_for_state(job: str, *wanted: str, timeout: float = 120) -> dict[str, str]:
    """Wait until a job is in one of the wanted states (in any in which it has ended, by default), and show it."""
    states = wanted or ENDED
    deadline = time.monotonic() + timeout
    while (shown := show(job))["JobState"] not in states:
        assert time.monotonic() < deadline, f"job {job} is {shown['JobState']} ({shown['Reason']}), not one of {states}"
        time.sleep(0.2)
    return shown


def wait_until_saved(cluster: Testbed) -> None:
    """Wait until slurmctld has written to disk what it knows now: killed earlier, it forgets up to 5 seconds.

    All jobs are written at once, so where the name of a later one can be read, the earlier ones are there too.
    """
    name = f"mark-{time.monotonic_ns()}"
    mark = ask("sbatch", "--parsable", "--hold", f"--job-name={name}", "--output=/dev/null", "--wrap=true").strip()
    file = cluster.directory / "state" / "job_state"
    wait_for("slurmctld to save", lambda: file.exists() and name.encode() in file.read_bytes(), 30)
    ask("scancel", mark)


def rank_pid(job: str, rank: int) -> int:
    """Process of a rank of a job's step, as this machine counts: it sees the processes of all nodes.

    The job's raw number is meant, which for a task of an array is JobId of `show`. A running job's ranks may be yet to
    start, so they are waited for.
    """
    deadline = time.monotonic() + 60
    while (found := _running_rank(job, rank)) is None:
        assert time.monotonic() < deadline, f"rank {rank} of job {job} did not run: {state(job)}"
        time.sleep(0.1)
    return found


def _running_rank(job: str, rank: int) -> int | None:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        variables = environment(int(entry.name))
        if variables.get("SLURM_JOB_ID") != job or variables.get("SLURM_PROCID") != str(rank):
            continue
        if "SLURM_STEP_ID" in variables and _started_by_slurm(entry):
            return int(entry.name)
    return None


def _started_by_slurm(process: Path) -> bool:
    """True for the rank itself, False for what it started."""
    with contextlib.suppress(OSError):
        parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")
    return False


def kill_rank(job: str, rank: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to one rank."""
    os.kill(rank_pid(job, rank), number)
