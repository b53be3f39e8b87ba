"""The lock of a run folder: one process trains in it at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpccl.errors import FolderError, WorldError
from hpccl.folder import RunFolder, explain_os_error
from hpccl.output import say

__all__ = ["Holder", "holder", "holding"]


@contextlib.contextmanager
def holding(folder: RunFolder, *, patience: float = 15.0, asked: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process ends, however it ends.

    A run that was just killed may need a moment to end, so wait up to `patience` seconds. On shared file systems, the
    lock of a machine that has crashed ends with its lease only.

    Raises:
        FolderError: another process trains in this folder, or it cannot be written.
        WorldError: `asked` to stop meanwhile.
    """
    path = folder.path / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error
    try:
        until, told = time.monotonic() + patience, False
        while not _taken(handle):
            holder = os.pread(handle, 100, 0).decode(errors="replace").strip() or "another process"
            if not told:
                say(f"{holder} is training in '{folder.path}'; waiting up to {patience:g} s for it to end")
                told = True
            if asked():
                raise WorldError(f"asked to stop while {holder} was training in run folder '{folder.path}'")
            if time.monotonic() >= until:
                raise FolderError(
                    f"{holder} is training in run folder '{folder.path}'; wait for it, stop it, or use another folder "
                    f"(folder=..., or --out of hpccl adapt). If its machine has crashed, delete '{path}'"
                )
            time.sleep(0.1)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        except OSError as error:
            raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks on this file system: proceed
    return True


@dataclass(frozen=True)
class Holder:
    """A process that trains in a folder: its pid, the host that it wrote down, and when it took the lock."""

    pid: int
    host: str
    since: float


def holder(folder: RunFolder) -> Holder | None:
    """Return who holds the folder's lock, if that is known on this machine (Linux only), without taking it.

    Must not be called by the process that holds the lock: closing the file would release it.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        handle = os.open(folder.path / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, question))
        words = os.pread(handle, 100, 0).decode(errors="replace").split()
        since = os.fstat(handle).st_mtime
    except OSError:
        return None  # no locks on this file system: unknown
    finally:
        os.close(handle)
    return None if kind == fcntl.F_UNLCK else Holder(pid, words[-1] if words else "", since)


_FLOCK = "hhqqi"  # struct flock of <fcntl.h> where files have 64-bit sizes
