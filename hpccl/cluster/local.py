"""Runs on this machine: in this process, or in several that live and die together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from hpccl.cluster.outcome import DONE, FAILED, INTERRUPTED, STOPPED, WRONG_CONFIG, tell
from hpccl.cluster.prepare import prepare
from hpccl.config.run import RunConfig
from hpccl.errors import HpcclError, WorldError
from hpccl.folder import RunFolder
from hpccl.machine import machine

__all__ = ["launch", "pick_port", "spawn"]

_GRACE = 20.0  # seconds that ranks have to end after another one died
_TAIL = 20  # lines of a failed rank's output that are shown


def launch(config: RunConfig, *, argv: Sequence[str]) -> int:
    """Prepare the run folder and run with `cluster.nproc` processes.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong configuration, 75 stopped and saved (run again to continue), 130
        stopped hard.
    """
    try:
        folder = prepare(config, argv)
        threads = _threads(config)
        if config.cluster.nproc == 1:
            return _inline(config, argv, threads)
        port = pick_port(config.cluster.port)
    except HpcclError as error:
        return tell(error)
    command = [sys.executable, "-m", "hpccl.cluster.worker", str(folder.config), *argv]
    return spawn(command, folder, nproc=config.cluster.nproc, threads=threads, port=port)


def _inline(config: RunConfig, argv: Sequence[str], threads: int) -> int:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, and for the processes that decode images
    from hpccl.cluster import worker

    return worker.main(config, argv)


def _threads(config: RunConfig) -> int:
    """Threads a process: as configured, or as OMP_NUM_THREADS says, or an equal share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    chosen = config.cluster.threads or (int(given) if given.isdecimal() else 0)
    return chosen or max(1, int(machine()["cores"]) // config.cluster.nproc)


def pick_port(port: int) -> int:
    """`port` if it is free, or any free one for 0.

    Raises:
        WorldError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise WorldError(
                f"cluster.port={port} cannot be used: {error.strerror}; "
                "set another port, or cluster.port=0 for a free one"
            ) from error
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- several processes


@dataclass
class _Rank:
    """One process. `start`: where its log began, for a resumed run appends to it."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    start: int
    error: Path

    def code(self) -> int | None:
        """Exit code, negative for a signal, None while it runs."""
        return self.process.poll()

    def failed(self) -> bool:
        return self.code() not in (None, DONE, STOPPED)

    def word(self) -> tuple[str, str] | None:
        """(kind, message) of the error that it left, or None."""
        try:
            word = json.loads(self.error.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(word["kind"]), str(word["message"])

    def send(self, number: int) -> None:
        if self.code() is None:
            self.process.send_signal(number)


@dataclass
class _Asked:
    """Signals that were passed on."""

    numbers: list[int] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        """A second Ctrl-C."""
        return self.numbers.count(signal.SIGINT) > 1


def spawn(
    command: Sequence[str], folder: RunFolder, *, nproc: int, threads: int, port: int, grace: float = _GRACE
) -> int:
    """Run `command` as `nproc` ranks that live and die together; print at most one message.

    Rank 0 writes to this terminal, the others to `logs/rank-N.txt`. SIGTERM, SIGINT and SIGUSR2 are passed on. When a
    rank dies the others are asked to end, and killed after `grace` seconds.
    """
    ranks: list[_Rank] = []
    asked = _Asked()
    with _passing_on(asked, ranks):
        try:
            for number in range(nproc):
                rank = _start(command, folder, _variables(number, nproc, threads, port))
                ranks.append(rank)
            if asked.numbers:  # while they were started: one may have missed it
                for rank in ranks:
                    rank.send(signal.SIGTERM)
            return _watch(ranks, asked, grace)
        finally:
            for rank in ranks:
                _kill(rank)


def _variables(number: int, nproc: int, threads: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HPCCL_PARENT": str(os.getpid()),
    }


def _start(command: Sequence[str], folder: RunFolder, variables: Mapping[str, str]) -> _Rank:
    number = int(variables["RANK"])
    folder.logs.mkdir(parents=True, exist_ok=True)
    log, error = folder.logs / f"rank-{number}.txt", folder.logs / f"rank-{number}.error"
    error.unlink(missing_ok=True)
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        # Rank 0 shows progress where the user looks. All are in sessions of their own: a Ctrl-C reaches only this
        # process, which passes it on once.
        target: IO[bytes] | None = None if number == 0 else output
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables, "HPCCL_ERROR_FILE": str(error.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=target,
            start_new_session=True,
        )
    return _Rank(number, process, log, start, error)


@contextlib.contextmanager
def _passing_on(asked: _Asked, ranks: Sequence[_Rank]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.numbers.append(number)
        for rank in ranks:
            rank.send(number)

    handler: Callable[[int, FrameType | None], None] = pass_on
    former = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, previous in former.items():
            signal.signal(number, previous)


def _watch(ranks: Sequence[_Rank], asked: _Asked, grace: float) -> int:
    """Wait until all have ended well, or one has not."""
    while any(rank.code() is None for rank in ranks):
        if asked.hard:
            return INTERRUPTED
        if any(rank.failed() for rank in ranks):
            break
        time.sleep(0.05)
    if not any(rank.failed() for rank in ranks):
        return STOPPED if any(rank.code() == STOPPED for rank in ranks) else DONE
    # Others fail because the first did, within moments: give the cause time to be known, then choose.
    time.sleep(0.1)
    culprit = min((rank for rank in ranks if rank.failed()), key=_order_of_blame)
    _end(ranks, asked, grace)
    if asked.hard:
        return INTERRUPTED
    return _explain(culprit, ranks, asked)


def _order_of_blame(rank: _Rank) -> tuple[bool, int, float]:
    """A rank killed from outside first, then one that knows what is wrong, then the one that failed earliest."""
    try:
        at = rank.error.stat().st_mtime
    except OSError:
        at = float("inf")
    word = rank.word()
    kind = word[0] if word is not None else "crash"
    # Ranks that lost a partner say WorldError or crash in a collective; neither is the cause.
    return (rank.code() or 0) >= 0, {"WorldError": 1, "crash": 2}.get(kind, 0), at


def _end(ranks: Sequence[_Rank], asked: _Asked, grace: float) -> None:
    for rank in ranks:
        rank.send(signal.SIGTERM)
    until = time.monotonic() + grace
    while any(rank.code() is None for rank in ranks) and time.monotonic() < until and not asked.hard:
        time.sleep(0.05)
    for rank in ranks:
        _kill(rank)


def _kill(rank: _Rank) -> None:
    """Kill a rank that still runs, and the processes that it started."""
    if rank.code() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def _explain(culprit: _Rank, ranks: Sequence[_Rank], asked: _Asked) -> int:
    """Print the one message, and return the exit code."""
    code = culprit.code() or 0
    if code < 0 and -code in asked.numbers:  # asked to stop before it could listen: nothing had been learned yet
        sys.stderr.write("stopped before training began; run the same command again to continue\n")
        return STOPPED
    word = culprit.word()
    if word is not None and word[0] != "crash":
        sys.stderr.write(f"error: {word[1]}\n")
        return WRONG_CONFIG if code == WRONG_CONFIG else FAILED
    others = f"; the other {len(ranks) - 1} were stopped" if len(ranks) > 1 else ""
    sys.stderr.write(
        f"error: rank {culprit.number} {_ending(code)}{others}; "
        "run the same command again to continue from the last checkpoint\n"
    )
    tail = word[1].splitlines() if word is not None else _new_lines(culprit)
    if tail:
        source = f" (all in {culprit.log})" if culprit.number else ""
        sys.stderr.write("\n".join([f"last words of rank {culprit.number}{source}:", *tail[-_TAIL:], ""]))
    return FAILED


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", which the system does when memory runs out" if -code == signal.SIGKILL else ""
    with contextlib.suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"
    return f"was killed by signal {-code}"


def _new_lines(rank: _Rank) -> list[str]:
    """What a rank wrote since this start."""
    try:
        with rank.log.open("rb") as log:
            log.seek(rank.start)
            return log.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
