"""Runs of hpccl on the test bed: a small one with everything in it, submitted, disturbed and compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.run.command import SMALL, events
from tests.slurm.cluster import ask, show, wait_for, wait_for_state

__all__ = ["CLUSTER", "account", "enter", "hpccl", "sha", "steps", "submitted", "wait_for_steps", "weights"]

# Two nodes, a process each; more cores and memory than the machine has are promised, none is used.
CLUSTER = ("cluster.kind=slurm", "cluster.nodes=2", "cluster.threads=1", "cluster.time=0:20:00", "cluster.timeout=60")


def hpccl(*arguments: str | Path, folder: Path | None = None, timeout: float = 120) -> str:
    """What a command prints; it must succeed."""
    return ask(sys.executable, "-m", "hpccl.cli", *arguments, folder=folder, timeout=timeout)


def submitted(run: Path, *settings: str) -> str:
    """Number of the job that trains the small run in the folder `run`."""
    told = hpccl("submit", *SMALL, *CLUSTER, f"folder={run}", *settings)
    found = re.match(r"job (\S+): ", told)
    assert found is not None, told
    return found[1]


def steps(run: Path) -> int:
    """How many steps are in the diary."""
    return len(events(run, "step"))


def wait_for_steps(run: Path, more: int, timeout: float = 120) -> None:
    """Wait until so many more steps were taken, whatever was repeated."""
    before = steps(run)
    wait_for(f"{more} more steps", lambda: steps(run) >= before + more, timeout)


def enter(run: Path, job: str, *, more: int = 5) -> None:
    """Wait until the job is in the middle of training."""
    wait_for_state(job, "RUNNING")
    wait_for_steps(run, more)


def sha(run: Path) -> str:
    """Digest of the final weights."""
    (done,) = events(run, "done")[-1:]
    return str(done["weights_sha256"])


def weights(run: Path, job: str, timeout: float = 240) -> str:
    """Wait for the job's good end; the digest of its weights.

    Raises:
        AssertionError: it did not come; the message has what SLURM, the logs and the diary of the run say.
    """
    try:
        ended = wait_for_state(job, timeout=timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{account(run, job)}") from None
    assert ended["JobState"] == "COMPLETED", account(run, job)
    return sha(run)


def account(run: Path, job: str) -> str:
    """What there is to read about a run that went wrong: its job, the ends of its logs and of its diary."""
    files = sorted([*run.glob("logs/*.txt"), *run.glob("logs/*.json*"), *run.glob("logs/slurm/*.out")])
    ends = [f"--- {path.relative_to(run)}\n{path.read_text(errors='replace')[-2000:]}" for path in files]
    diary = run / "events.jsonl"
    lines = diary.read_text().splitlines()[-15:] if diary.exists() else ["there is none"]
    try:
        told = json.dumps(show(job))
    except (AssertionError, subprocess.TimeoutExpired) as error:  # slurmctld may be what went wrong
        told = str(error)
    return "\n".join([told, *ends, "--- end of events.jsonl", *(line[:300] for line in lines)])
