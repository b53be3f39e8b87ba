"""The command as a user runs it: real processes, real signals, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = [
    "SMALL",
    "command",
    "environment",
    "events",
    "finish",
    "hpccl",
    "kill_tree",
    "ranks",
    "report",
    "start",
    "trained",
    "wait_for_steps",
]

ROOT = Path(__file__).resolve().parents[2]

# A run of a few seconds with everything in it: memory of both kinds, a quadratic, dropout, averaged weights.
SMALL = (
    "model.kind=mlp",
    "model.hidden=[24]",
    "train.epochs=6",
    "train.batch_size=32",
    "train.ema=0.9",
    "train.clip_norm=5.0",
    "optim.lr=3e-3",
    "memory.size=30",
    "prior.replay=0.5",
    "prior.temperature=2.0",
    "prior.quadratic.weight=1.0",
    "curvature.fisher=ggn",  # labels that are drawn may change with the rounding of their probabilities
    "checkpoint.every=7",
    "log.every=1",
    "log.tensorboard=false",
    "engine.device=cpu",
)


def command(folder: Path, *arguments: str) -> list[str]:
    """The command line of a training run."""
    return [sys.executable, "-m", "hpccl.cli", "train", *SMALL, f"folder={folder}", *arguments]


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a run in a session of its own."""
    return subprocess.Popen(
        command(folder, *arguments),
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    """(exit code, what it printed)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill_tree(process)
    return process.returncode, output


def trained(folder: Path, *settings: str) -> Path:
    """The folder of a run that was trained to its end."""
    code, said = finish(start(folder, *settings))
    assert code == 0, said
    return folder


def hpccl(*arguments: str, timeout: float = 200, **environment: str) -> tuple[int, str]:
    """Any other hpccl command."""
    done = subprocess.run(
        [sys.executable, "-m", "hpccl.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of a run and all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # also closes its pipe


def ranks(launcher: int) -> dict[int, int]:
    """Process of each rank: the launcher's children that know theirs; none where it trains itself."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            rank = environment(child).get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return found


def environment(pid: int) -> dict[str, str]:
    """Variables that a process was started with; empty for one that has ended."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The whole lines of one kind that are there now."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_for_steps(folder: Path, process: subprocess.Popen[str], count: int, timeout: float = 250) -> None:
    """Wait until `count` steps were logged, whatever task they are in."""
    deadline = time.monotonic() + timeout
    while len(events(folder, "step")) < count:
        assert process.poll() is None, f"the run ended by itself: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "the run is too slow"
        time.sleep(0.005)


def report(folder: Path) -> dict[str, Any]:
    """report.json of a finished run."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content
