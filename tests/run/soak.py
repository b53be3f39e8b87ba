"""Kill a process of a run with SIGKILL again and again, continue it, and compare it with a run left alone.

By hand, with any configuration that one machine can run (without FILES: a small run on the embedded digits):

    python -m tests.run.soak --kills 100 --nproc 2 [--seed 0] [--folder DIR] [FILES...] [key=value]...

After every kill it asserts that the launcher ended by itself and said which rank was killed by what and how to go on,
that no process is left, and that all checkpoints and events of the folder can be read; at the end, that the weights are
those of the undisturbed run to the last bit. The last line is a JSON object that says how often each phase was hit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpccl.checkpoint.store import load, marks, open_shards
from hpccl.report.events import read_events
from tests.run.command import ROOT, SMALL, environment, events, ranks

__all__ = ["AIMS", "SHORT", "Kill", "Setting", "Soak", "draw_aims", "soak"]

# Most of a run is saving, measuring and testing.
SHORT = (*SMALL, "train.epochs=2", "checkpoint.every=3")

# Where a kill is aimed, and how many seconds at most after that phase was entered. `anywhere`: seconds since the start.
AIMS = {
    "anywhere": 12.0,
    "start": 5.0,
    "train": 0.2,
    "save": 0.02,
    "consolidate": 0.06,
    "evaluate": 0.01,
    "report": 1.0,
}
_LIMIT = 300.0  # seconds that a start may take
_SOON = 60.0  # seconds in which the launcher ends after a rank was killed; a fraction of it where cores are free
_MARK = "SOAK_MARK"


@dataclass(frozen=True)
class Setting:
    """What is run.

    folder: of all runs; emptied by nobody
    arguments: of `hpccl train`
    """

    folder: Path
    nproc: int = 2
    arguments: tuple[str, ...] = SHORT


@dataclass(frozen=True)
class Kill:
    """One kill: where it was aimed and what it hit (rank -1 is the launcher), and how long until all had ended."""

    aim: str
    phase: str
    rank: int
    seconds: float


@dataclass
class Soak:
    """What came of it."""

    kills: list[Kill] = field(default_factory=list)
    finished: int = 0  # runs, each equal to the undisturbed one

    def summary(self) -> dict[str, Any]:
        """Numbers for people."""
        return {
            "kills": len(self.kills),
            "runs": self.finished,
            "phases": dict(Counter(kill.phase for kill in self.kills)),
            "ranks": dict(Counter("launcher" if kill.rank < 0 else f"rank {kill.rank}" for kill in self.kills)),
            "slowest_end_seconds": round(max((kill.seconds for kill in self.kills), default=0.0), 2),
        }


def soak(
    setting: Setting, aims: Sequence[str], *, seed: int = 0, tell: Callable[[str], None] = lambda _line: None
) -> Soak:
    """Kill once for each of `aims`, in runs that are continued until they are done; raises AssertionError."""
    chance = random.Random(seed)
    whole = setting.folder / "whole"
    tell("the undisturbed run")
    _run_to_the_end(setting, whole)
    result, left = Soak(), list(aims)
    while left or not result.finished:
        folder = setting.folder / f"run-{result.finished}"
        while left:
            kill = _start_and_kill(setting, folder, left[0], chance)
            if kill is None:
                break  # it was done before
            result.kills.append(kill)
            tell(f"{len(result.kills)} of {len(aims)}: {kill}")
            del left[0]
        _run_to_the_end(setting, folder)
        assert _digest(folder) == _digest(whole), f"'{folder}' has other weights than '{whole}'"
        result.finished += 1
        tell(f"run {result.finished} is equal to the undisturbed one")
    return result


def _digest(folder: Path) -> str:
    return str(events(folder, "done")[-1]["weights_sha256"])


# ---------------------------------------------------------------- one start


@dataclass(frozen=True)
class _Run:
    """A started command, its output and the mark that all its processes bear."""

    process: subprocess.Popen[bytes]
    output: Path
    mark: str

    def words(self) -> str:
        return self.output.read_text(errors="replace")

    def alive(self) -> list[int]:
        """Every process that bears the mark, whoever started it."""
        numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [number for number in numbers if environment(number).get(_MARK) == self.mark]


def _start(setting: Setting, folder: Path) -> _Run:
    mark = secrets.token_hex(8)
    output = folder.with_suffix(".txt")
    command = [sys.executable, "-m", "hpccl.cli", "train", *setting.arguments, f"folder={folder}"]
    command += [f"cluster.nproc={setting.nproc}", "log.quiet=true"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, _MARK: mark}, stdout=file, stderr=file, start_new_session=True
        )
    return _Run(process, output, mark)


def _run_to_the_end(setting: Setting, folder: Path) -> None:
    run = _start(setting, folder)
    try:
        code = run.process.wait(_LIMIT)
    finally:
        _kill_all(run)
    assert code == 0, run.words()


def _kill_all(run: _Run) -> None:
    """Leave nothing behind, whatever failed."""
    for number in run.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    run.process.wait()


def _start_and_kill(setting: Setting, folder: Path, aim: str, chance: random.Random) -> Kill | None:
    """Start, wait for the moment, kill, and check what is left; None if the run ended before."""
    watch = _Watch(folder)
    run = _start(setting, folder)
    try:
        phase = _wait(run, watch, aim, chance)
        if phase is None:
            code = run.process.wait()
            assert code == 0, run.words()
            return None
        return _kill(run, folder, aim, phase, chance)
    finally:
        _kill_all(run)


def _wait(run: _Run, watch: _Watch, aim: str, chance: random.Random) -> str | None:
    """Wait for the moment; returns the phase that the run is in then, or None if it ended."""
    again, delay = chance.randrange(3), chance.uniform(0, AIMS[aim])
    if aim in ("anywhere", "start", "report"):
        again = 0  # they come once
    deadline = time.monotonic() + _LIMIT
    before = ""
    while True:
        now = aim if aim == "anywhere" else watch.phase()
        if now == aim and before != aim:
            if again == 0:
                break
            again -= 1
        before = now
        if run.process.poll() is not None:
            return None
        assert time.monotonic() < deadline, run.words()
        time.sleep(0.0005)
    time.sleep(delay)
    return watch.phase() if run.process.poll() is None else None


def _kill(run: _Run, folder: Path, aim: str, phase: str, chance: random.Random) -> Kill | None:
    victims = {-1: run.process.pid, **ranks(run.process.pid)}
    rank = chance.choice(list(victims))
    os.kill(victims[rank], signal.SIGKILL)  # a zombie at worst: it is reaped by the process that is its parent
    began = time.monotonic()
    code = run.process.wait(_SOON)
    if code == 0 and phase == "report":
        return None  # the victim had ended a moment before
    until = time.monotonic() + _SOON
    while run.alive() and time.monotonic() < until:
        time.sleep(0.02)
    left = run.alive()
    assert not left, f"processes {left} live on after {aim} in {phase}"
    seconds = time.monotonic() - began
    words = run.words()
    if rank >= 0:
        assert code == 1, (code, words)
        assert f"error: rank {rank} was killed by signal 9 (SIGKILL" in words, words
        assert words.count("error:") == 1, words
        assert "run the same command again to continue from the last checkpoint" in words, words
    else:
        assert code == -signal.SIGKILL, (code, words)
    _check(folder)
    return Kill(aim, phase, rank, round(seconds, 3))


def _check(folder: Path) -> None:
    """Everything that is there can be read."""
    checkpoints = folder / "checkpoints"
    for mark in marks(checkpoints):
        load(checkpoints, mark)
        if list((checkpoints / mark.name).glob("curvature-*")):
            open_shards(checkpoints, mark)(lambda _layer: True)
    if (folder / "events.jsonl").exists():
        read_events(folder / "events.jsonl")
    if (folder / "report.json").exists():
        json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- where a run is


# By the newest event and the phase that it names.
_AFTER = {
    ("run", None): "start",
    ("phase", "fit"): "consolidate",
    ("checkpoint", "fitted"): "consolidate",
    ("reconstruction", None): "consolidate",
    ("phase", "select"): "consolidate",
    ("phase", "curvature"): "consolidate",
    ("curvature", None): "consolidate",
    ("phase", "relabel"): "evaluate",
    ("memory", None): "evaluate",
    ("done", None): "report",
}


class _Watch:
    """Reads what one start adds to a run folder, as fast as it is written."""

    def __init__(self, folder: Path) -> None:
        self._events = folder / "events.jsonl"
        self._checkpoints = folder / "checkpoints"
        self._offset = self._events.stat().st_size if self._events.exists() else 0
        self._last: dict[str, Any] = {}
        self._before = self._parts()  # left by an earlier kill, until something is saved

    def phase(self) -> str:
        """One of AIMS, by the folders that are half-written and by the newest event."""
        self._read()
        if self._last and self._parts() - self._before:
            return "save"
        if not self._last:
            return "start"
        return _AFTER.get((self._last["event"], self._last.get("phase")), "train")

    def _parts(self) -> set[str]:
        try:
            return {name for name in os.listdir(self._checkpoints) if name.startswith(".")}
        except OSError:
            return set()

    def _read(self) -> None:
        try:
            with self._events.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        if whole:
            self._offset += len(whole)
            self._last = json.loads(whole.splitlines()[-1])


# ---------------------------------------------------------------- by hand


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are left; a new one, deleted at the end")
    parser.add_argument("arguments", nargs="*", metavar="FILES... key=value...")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # not without ending what it started
    files = any("=" not in argument for argument in given.arguments)
    arguments = tuple(given.arguments) if files else (*SHORT, *given.arguments)
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(
            Setting(folder, given.nproc, arguments),
            draw_aims(given.kills, given.seed),
            seed=given.seed,
            tell=lambda line: print(line, flush=True),
        )
    print(json.dumps(result.summary()))


def draw_aims(count: int, seed: int) -> list[str]:
    """Every aim equally often, in an order that is drawn."""
    names = list(AIMS)
    aims = [names[number % len(names)] for number in range(count)]
    random.Random(seed).shuffle(aims)
    return aims


if __name__ == "__main__":
    main()
