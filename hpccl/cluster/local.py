"""Run on this machine: in this process, or in several ranks that end together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from hpccl.cluster.environment import from_slurm
from hpccl.cluster.outcome import ASKED_TO_STOP, DONE, FAILED, INTERRUPTED, STOPPED, WRONG_CONFIG, tell
from hpccl.cluster.prepare import prepare
from hpccl.cluster.signals import handled
from hpccl.cluster.step import in_step, refuse_standstill, run_step
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError, FolderError, HpcclError, WorldError
from hpccl.folder import RunFolder, explain_os_error
from hpccl.machine import SlurmJob, slurm_job, usable_cores, variable
from hpccl.output import say

__all__ = ["launch", "pick_port", "spawn"]

_GRACE = 20.0  # seconds in which ranks must end after another one died
_NOTICE = 5.0  # seconds until the cause is known, and all ranks that waited for the same one have timed out
_TAIL = 20  # lines of a failed rank's output that are shown


def launch(config: RunConfig, *, argv: Sequence[str]) -> int:
    """Prepare the run folder and run: in the processes that `cluster` configures, or as one task of a SLURM step.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong configuration, 75 stopped and saved (run again to continue), 130
        interrupted at once.
    """
    try:
        own = config.cluster.kind == "local" and config.cluster.nproc > 1 and not from_slurm()
        if in_step() and not own:  # a step's only task may spawn ranks itself
            return _as_task(config, argv)
        if config.cluster.kind == "slurm":
            raise ConfigError(
                "cluster.kind = slurm: `hpccl train` runs on this machine; queue it with `hpccl submit`, start it with "
                "srun, or set cluster.kind=local"
            )
        folder = prepare(config, argv)
        threads = _threads(config)
        if config.cluster.kind == "inline" or config.cluster.nproc == 1:
            return _inline(config, argv, threads)
        port = pick_port(config.cluster.port)
        command = [sys.executable, "-m", "hpccl.cluster.worker", str(folder.config), *argv]
        if in_step():
            refuse_standstill(folder, slurm_job() or SlurmJob("none", 0))
        # In a SLURM step, the job is started again.
        lost = STOPPED if in_step() else FAILED
        return spawn(command, folder, nproc=config.cluster.nproc, threads=threads, port=port, lost=lost)
    except HpcclError as error:
        return tell(error)


def _as_task(config: RunConfig, argv: Sequence[str]) -> int:
    """Run as one task of a SLURM step; the task of PROCID 0 makes the run folder.

    Raises:
        ConfigError: the configuration sets several processes.
        FolderError: the folder holds another run, or cannot be written.
    """
    if config.cluster.kind == "local" and config.cluster.nproc > 1:
        raise ConfigError(
            f"cluster.nproc = {config.cluster.nproc} inside a SLURM step: each task of the step is a process already; "
            "leave it out"
        )
    if os.environ.get("SLURM_PROCID") == "0":
        prepare(config, argv)
    return run_step(config, argv)


def _inline(config: RunConfig, argv: Sequence[str], threads: int) -> int:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported; decoding processes inherit it
    from hpccl.cluster import worker

    return worker.main(config, argv)


def _threads(config: RunConfig) -> int:
    """Return the threads of a process: as configured, or by OMP_NUM_THREADS, or an equal share of the cores."""
    return config.cluster.threads or variable("OMP_NUM_THREADS") or max(1, usable_cores() // config.cluster.nproc)


def pick_port(port: int) -> int:
    """Return `port` if it is free, or any free one for 0.

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


@dataclass(frozen=True)
class _Word:
    """An error that a rank reported: the name of its class (or `crash`), its message, and when it happened."""

    kind: str
    message: str
    at: float


@dataclass
class _Rank:
    """One process.

    start: size of its log before this start; resumed runs append to it
    line: read end of the pipe for its error; a pipe, since a file could not be written on a full disk
    """

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    start: int
    line: int
    word: _Word | None = None

    def code(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.process.returncode is None and _has_ended(self.process.pid):
            # End the processes that it started; before it is reaped, as its pid may be reused afterwards.
            _kill_group(self.process.pid)
            self.word = _read_word(self.line)
        return self.process.poll()

    def failed(self) -> bool:
        return self.code() not in (None, DONE, STOPPED)

    def held(self) -> bool:
        """Whether it is suspended (by SIGSTOP, a debugger or a scheduler) and cannot react to signals."""
        return self.process.returncode is None and _is_held(self.process.pid)

    def send(self, number: int) -> None:
        if self.code() is None:
            self.process.send_signal(number)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; does not reap it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _is_held(pid: int) -> bool:
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    return found is not None and found.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)


def _read_word(line: int) -> _Word | None:
    """Read a rank's error from its pipe, which holds nothing or all of it, as it was written at once."""
    try:
        word = json.loads(os.read(line, 1 << 16))
    except (OSError, ValueError):
        return None
    return _Word(str(word["kind"]), str(word["message"]), float(word["at"]))


@dataclass
class _Asked:
    """The signals that were passed on to the ranks."""

    numbers: list[int] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        """Whether there was a second Ctrl-C."""
        return self.numbers.count(signal.SIGINT) > 1


def spawn(
    command: Sequence[str],
    folder: RunFolder,
    *,
    nproc: int,
    threads: int,
    port: int,
    grace: float = _GRACE,
    lost: int = FAILED,
) -> int:
    """Run `command` as `nproc` ranks that end together; print at most one message and return the exit code.

    Rank 0 writes to this terminal, the others to `logs/rank-N.txt`. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are passed on.
    When a rank fails, the others get SIGTERM, and are killed after `grace` seconds. `lost` is the exit code if a rank
    was killed from outside, or did not answer.

    Raises:
        FolderError: a rank's log cannot be written.
    """
    ranks: list[_Rank] = []
    asked = _Asked()
    with _passing_on(asked, ranks):
        try:
            for number in range(nproc):
                rank = _start(command, folder, _variables(number, nproc, threads, port))
                ranks.append(rank)
            if asked.numbers:  # a signal came while ranks were being started: one may have missed it
                for rank in ranks:
                    rank.send(signal.SIGTERM)
            return _watch(ranks, asked, grace, lost)
        finally:
            for rank in ranks:
                _kill(rank)
                os.close(rank.line)


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
    log = folder.logs / f"rank-{number}.txt"
    line, end = os.pipe()
    os.set_blocking(line, False)
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            # Rank 0 shows progress in the user's terminal. All ranks have sessions of their own: Ctrl-C reaches only
            # this process, which passes it on once.
            target: IO[bytes] | None = None if number == 0 else output
            process = subprocess.Popen(
                command,
                env={**os.environ, **variables, "HPCCL_ERROR_PIPE": str(end)},
                pass_fds=(end,),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                start_new_session=True,
            )
    except OSError as error:
        os.close(line)
        raise FolderError(f"rank {number} cannot be started with '{log}': {explain_os_error(error)}") from error
    finally:
        os.close(end)
    return _Rank(number, process, log, start, line)


@contextlib.contextmanager
def _passing_on(asked: _Asked, ranks: Sequence[_Rank]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.numbers.append(number)
        for rank in ranks:
            rank.send(number)

    with handled(ASKED_TO_STOP, pass_on):
        yield


def _watch(ranks: Sequence[_Rank], asked: _Asked, grace: float, lost: int) -> int:
    """Wait until all ranks have ended well or one has failed; return the exit code."""
    while any(rank.code() is None for rank in ranks):
        if asked.hard:
            return INTERRUPTED
        if any(rank.failed() for rank in ranks):
            break
        time.sleep(0.05)
    if not any(rank.failed() for rank in ranks):
        return STOPPED if any(rank.code() == STOPPED for rank in ranks) else DONE
    culprit = _find_culprit(ranks, asked)
    waited = culprit.word is not None and culprit.word.kind == _WAITED
    silent = {rank.number: rank.held() for rank in ranks if rank.code() is None and (waited or rank.held())}
    _end(ranks, asked, grace)
    if asked.hard:
        return INTERRUPTED
    return _explain(culprit, ranks, asked, silent, lost)


_WAITED = "StragglerError"
_CONSEQUENCES = (_WAITED, "WorldError")  # errors of ranks that timed out on, or lost, another rank; never the cause


def _find_culprit(ranks: Sequence[_Rank], asked: _Asked) -> _Rank:
    """Return the rank to blame. Others soon fail as a consequence, so wait until the cause is known."""
    began = time.monotonic()
    while True:
        culprit = min((rank for rank in ranks if rank.failed()), key=_order_of_blame)
        consequence = culprit.word is not None and culprit.word.kind in _CONSEQUENCES
        ended = all(rank.code() is not None or rank.held() for rank in ranks)
        if ended or asked.hard or time.monotonic() - began > (_NOTICE if consequence else 0.1):
            return culprit
        time.sleep(0.02)


def _order_of_blame(rank: _Rank) -> tuple[bool, int, float]:
    """Sort key: ranks killed by a signal, then errors with a known cause, crashes, and consequences; earliest first."""
    kind, at = ("crash", float("inf")) if rank.word is None else (rank.word.kind, rank.word.at)
    return (rank.code() or 0) >= 0, {"crash": 1, _WAITED: 2, "WorldError": 3}.get(kind, 0), at


def _end(ranks: Sequence[_Rank], asked: _Asked, grace: float) -> None:
    for rank in ranks:
        rank.send(signal.SIGTERM)
    until = time.monotonic() + grace
    while any(rank.code() is None and not rank.held() for rank in ranks) and time.monotonic() < until:
        if asked.hard:
            break
        time.sleep(0.05)
    for rank in ranks:
        _kill(rank)


def _kill(rank: _Rank) -> None:
    """Kill a rank that is still running, and the processes that it started."""
    if rank.code() is None:
        _kill_group(rank.process.pid)
        rank.process.wait()


def _kill_group(pid: int) -> None:
    """Kill all processes of a rank's session; call it before the rank is reaped."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


_AGAIN = "run the same command again to continue from the last checkpoint"


def _explain(
    culprit: _Rank, ranks: Sequence[_Rank], asked: _Asked, silent: Mapping[int, bool], lost: int = FAILED
) -> int:
    """Print one message, and return the exit code; `lost` as in `spawn`."""
    code, word = culprit.code() or 0, culprit.word
    if code < 0 and -code in asked.numbers:  # stopped before its signal handlers were set: nothing had been learned yet
        say("stopped before training began; run the same command again to continue")
        return STOPPED
    if word is not None and word.kind == _WAITED:
        say(f"error: {word.message}; {_blame(silent, ranks)}; {_AGAIN}")
        return lost
    if word is not None and word.kind != "crash":
        say(f"error: {word.message}")
        if word.kind in _CONSEQUENCES:
            return lost
        return WRONG_CONFIG if code == WRONG_CONFIG else FAILED
    others = f"; {_blame(silent, ranks)}" if silent else ""
    others += {1: "", 2: "; the other one was stopped"}.get(len(ranks), f"; the other {len(ranks) - 1} were stopped")
    say(f"error: rank {culprit.number} {_ending(code)}{others}; {_AGAIN}")
    tail = word.message.splitlines() if word is not None else _new_lines(culprit)
    if tail:
        source = f" (all in {culprit.log})" if culprit.number else ""
        say("\n".join([f"last lines of rank {culprit.number}{source}:", *tail[-_TAIL:]]))
    return lost if code < 0 else FAILED


def _blame(silent: Mapping[int, bool], ranks: Sequence[_Rank]) -> str:
    """Describe which ranks did not answer, and what happened to them."""
    if silent:
        told = [f"rank {number} did not answer{' (it was held by SIGSTOP)' * held}" for number, held in silent.items()]
        return f"{', '.join(told)} and was ended"
    late = [f"rank {rank.number}" for rank in ranks if rank.word is not None and rank.word.kind == "WorldError"]
    return f"{' or '.join(late)} answered too late" if late else "every rank waited for another"


_HINTS: dict[int, str] = {
    signal.SIGKILL: ", which the system does when memory runs out",
    signal.SIGABRT: ", which NCCL does when another rank did not answer within cluster.timeout",
}


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = _HINTS.get(-code, "")
    with contextlib.suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"
    return f"was killed by signal {-code}"


def _new_lines(rank: _Rank) -> list[str]:
    """Return the lines that a rank wrote to its log since this start."""
    try:
        with rank.log.open("rb") as log:
            log.seek(rank.start)
            return log.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
