"""Printing where standard output or error may fail: a pipe whose reader has gone, or a file on a full disk.

Progress messages are then lost and nothing else: the run continues and ends with its own exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TextIO

from hpccl.errors import FolderError
from hpccl.folder import explain_os_error

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Told", "console", "discard", "flush", "say"]


class Told:
    """Standard output for results, whose loss is an error.

    Raises:
        FolderError: `write` or `flush` failed, because the disk is full, say. BrokenPipeError (the reader has gone)
            stays as it is.
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
    """Print a line on a stream, by default standard error; it is lost if it cannot be written."""
    with contextlib.suppress(OSError):
        print(line, end=end, file=stream or sys.stderr, flush=True)


def console(columns: int = 200) -> Console:
    """Return standard output for tables: as wide as the terminal, or `columns` wide if it is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else columns)


def flush() -> None:
    """Flush standard output and error before the process ends; discard what cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)


def discard(stream: IO[str]) -> None:
    """Redirect a stream to /dev/null: at exit the interpreter would try to write again and change the exit code."""
    with contextlib.suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
