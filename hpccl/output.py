"""Standard output and error may be gone: whoever read them left, or they go to a file on a full disk.

What is said on the way is then lost, and nothing else: a run goes on and ends with its own exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from hpccl.errors import FolderError
from hpccl.folder import explain_os_error

__all__ = ["Told", "discard", "flush", "say"]


class Told:
    """Standard output for results, of which a loss must be told.

    Raises:
        FolderError: from `write` and `flush`: the disk is full, say. A reader that left is no error of the command's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See TextIO."""
        with self._telling():
            return self._stream.write(text)

    def flush(self) -> None:
        """See TextIO."""
        with self._telling():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise FolderError(f"the output cannot be written: {explain_os_error(error)}") from error


def say(line: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """A line on a stream, standard error if none is given; lost if it cannot be written."""
    with contextlib.suppress(OSError):
        print(line, end=end, file=stream or sys.stderr, flush=True)


def flush() -> None:
    """Before the process ends: what cannot be written is discarded."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)


def discard(stream: TextIO) -> None:
    """Let go of what cannot be written: the interpreter would try again when it ends, and change the exit code."""
    with contextlib.suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
