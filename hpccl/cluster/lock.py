"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from hpccl.errors import FolderError
from hpccl.folder import RunFolder, explain_os_error

__all__ = ["holding"]


@contextlib.contextmanager
def holding(folder: RunFolder, *, patience: float = 15.0) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when this process ends in whatever way.

    A run that was just killed may need a moment to end, so wait `patience` seconds for it.

    Raises:
        FolderError: another process trains in this folder.
    """
    path = folder.path / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error
    try:
        until = time.monotonic() + patience
        while not _taken(handle):
            if time.monotonic() >= until:
                holder = os.pread(handle, 100, 0).decode(errors="replace").strip() or "another process"
                raise FolderError(
                    f"{holder} is training in run folder '{folder.path}'; wait for it, stop it, or set folder=..."
                )
            time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing can be said
    return True
