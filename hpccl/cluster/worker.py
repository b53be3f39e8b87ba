"""One process of a run: handle signals, join the process group, train, and return an exit code.

`python -m hpccl.cluster.worker CONFIG COMMAND...` is one rank of several, started by `hpccl.cluster.local`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from hpccl.cluster.lock import holding
from hpccl.cluster.outcome import ASKED_TO_STOP, DONE, INTERRUPTED, STOPPED, code_of, tell
from hpccl.cluster.prepare import refuse_any_other
from hpccl.cluster.signals import handled
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.errors import HpcclError
from hpccl.folder import RunFolder
from hpccl.machine import slurm_job, variable
from hpccl.output import flush, say

if TYPE_CHECKING:
    from hpccl.train.stop import Stop

__all__ = ["die_with_parent", "main"]


def main(
    config: RunConfig, argv: Sequence[str], *, report: Callable[[HpcclError], int] = tell, deaf_afterwards: bool = False
) -> int:
    """Train in this process as the rank that the environment gives (alone, if it gives none).

    SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 save and stop; a second SIGINT stops at once.

    Args:
        config: the run.
        argv: the command, for the record.
        report: reports an error that a user can fix; returns the exit code.
        deaf_afterwards: leave SIGTERM ignored, so that nothing but the exit code tells how the run ended.

    Returns:
        0 done, 1 failed, 2 wrong configuration, 75 stopped and saved, 130 interrupted at once.
    """
    from hpccl.train.stop import Stop  # torch from here on

    stop = Stop()
    try:
        with _listening(stop, deaf_afterwards=deaf_afterwards):
            return _train(config, argv, stop, report)
    except HpcclError as error:  # before the process group was joined
        return report(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _train(config: RunConfig, argv: Sequence[str], stop: Stop, report: Callable[[HpcclError], int]) -> int:
    import torch

    from hpccl.dist.lost import lost_partner
    from hpccl.dist.mesh import join, leave
    from hpccl.train.run import run

    threads = config.cluster.threads or variable("OMP_NUM_THREADS")
    if threads > 0:
        torch.set_num_threads(threads)
    leader = os.environ.get("RANK", "0") == "0"
    patience = max(15.0, min(_LEASE, config.cluster.timeout / 2)) if slurm_job() else 15.0
    lock = holding(RunFolder(Path(config.path)), patience=patience, asked=lambda: stop.reason is not None)
    with lock if leader else contextlib.nullcontext():
        comm = join(config.engine.device, timeout=timedelta(seconds=config.cluster.timeout))
        try:
            refuse_any_other(config)  # the leader holds the lock, so all ranks find the same
            outcome = run(config, comm, stop, command=argv, quiet=config.log.quiet)
        except HpcclError as error:
            code, failed = report(error), True  # before leaving: the others fail when this rank's connections close
        except RuntimeError as error:
            lost = lost_partner(error, comm, config.cluster.timeout)
            if lost is None:
                raise
            code, failed = report(lost), True
        else:
            code, failed = STOPPED if outcome == "stopped" else DONE, False
        leave(failed=failed)
        return code


@contextlib.contextmanager
def _listening(stop: Stop, *, deaf_afterwards: bool = False) -> Iterator[None]:
    """Pass signals on to `stop`; restore the former handlers at the end, or ignore SIGTERM from there on."""

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.reason is not None:
            signal.default_int_handler(number, frame)
        stop.on_signal(number, frame)

    with handled(ASKED_TO_STOP, ask) as afterwards:
        if deaf_afterwards:
            afterwards[signal.SIGTERM] = signal.SIG_IGN
        with _hearing(signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(ASKED_TO_STOP), stop):
            yield


@contextlib.contextmanager
def _hearing(blocked: Set[int], stop: Stop) -> Iterator[None]:
    """Handle, in a thread, signals that were blocked when this process started.

    They stay blocked: a scheduler sends them to all processes of a job, and children, which inherit the mask, must
    survive them. A signal that arrived earlier is pending, and handled now.
    """
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set():
            found = signal.sigtimedwait(blocked, 0.1)
            if found is not None:
                stop.on_signal(found.si_signo)

    thread = threading.Thread(target=listen, name="hpccl-signals", daemon=True)
    if blocked:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if blocked:
            thread.join()


# ---------------------------------------------------------------- one rank of several


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent dies, so that it is not left behind (Linux only).

    A rank gets SIGKILL: its launcher may be started again at once, and two runs must not write in one folder.
    """
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, number)
    if os.getppid() != parent:  # the parent died before the call above
        os.kill(os.getpid(), number)


_LEASE = 180.0  # seconds after which servers of shared file systems drop the locks of a client that has crashed
_LONGEST = 8000  # characters of an error; a pipe holds more than that, encoded


def _leave_word(kind: str, message: str) -> None:
    """Send an error to the launcher, which prints one of all ranks' errors."""
    pipe = os.environ.get("HPCCL_ERROR_PIPE")
    if pipe is None:
        say(message)
        return
    shown = message if len(message) <= _LONGEST else f"... {message[-_LONGEST:]}"
    with contextlib.suppress(OSError):  # the launcher has gone, and this process will be killed
        os.write(int(pipe), json.dumps({"kind": kind, "message": shown, "at": time.time()}).encode())


def _on_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _leave_word("crash", "".join(traceback.format_exception(kind, error, trace)))


def _on_error(error: HpcclError) -> int:
    _leave_word(type(error).__name__, str(error))
    return code_of(error)


def _entry(arguments: Sequence[str]) -> int:
    parent = os.environ.get("HPCCL_PARENT")
    if parent is not None:
        die_with_parent(int(parent))
    sys.excepthook = _on_crash
    path, *command = arguments
    try:
        config = load_recorded(Path(path))
    except HpcclError as error:
        return _on_error(error)
    return main(config, command, report=_on_error)


if __name__ == "__main__":
    code = _entry(sys.argv[1:])
    flush()
    # Everything is saved and the process group left. Skip the interpreter's teardown: communication threads of a rank
    # that ends before the others may abort there, which the launcher would take for a failure.
    os._exit(code)
