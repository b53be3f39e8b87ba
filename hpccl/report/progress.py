"""Display of training progress: a live line on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from hpccl.output import discard, say

__all__ = ["LiveDisplay", "PlainDisplay", "Progress", "QuietDisplay", "Reading", "duration", "make_progress"]


def duration(seconds: float | None) -> str:
    """`1:02:03` or `2:03`; `-` if not known.

    >>> duration(3723), duration(123.4), duration(None)
    ('1:02:03', '2:03', '-')
    """
    if seconds is None or not 0 <= seconds < 1e9:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class Reading:
    """How far a phase is.

    step: steps done; epoch: epochs done
    terms: nats per training example by name, one of which may be `loss`
    images_per_second: since the last reading; eta_seconds: time left
    """

    step: int
    epoch: float
    terms: Mapping[str, float]
    images_per_second: float
    eta_seconds: float


class Progress(Protocol):
    """A display of a run's progress. A context manager; every method is cheap enough to be called at every step."""

    def begin(self, task_name: str, phase: str, total_steps: int, start: int = 0) -> None:
        """Begin a phase of a task, or continue it at step `start` after a resume."""

    def update(self, reading: Reading) -> None:
        """Show how far the phase is."""

    def message(self, text: str) -> None:
        """Print a line that stays."""

    def __enter__(self) -> Self:
        """Start the display."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the terminal."""


def make_progress(enabled: bool = True, stream: TextIO | None = None, *, interval: float = 10.0) -> Progress:
    """Return the display that fits the stream: nothing if not enabled, live on a terminal, else a line at intervals.

    Args:
        enabled: False on ranks other than 0, or where nothing is to be shown.
        stream: None for standard error, which keeps standard output for results.
        interval: seconds between two plain lines.
    """
    target = sys.stderr if stream is None else stream
    if not enabled:
        return QuietDisplay()
    if target.isatty():
        return LiveDisplay(Console(file=target))
    return PlainDisplay(target, interval=interval)


class QuietDisplay:
    """Shows nothing."""

    def begin(self, task_name: str, phase: str, total_steps: int, start: int = 0) -> None:
        """See Progress."""

    def update(self, reading: Reading) -> None:
        """See Progress."""

    def message(self, text: str) -> None:
        """See Progress."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class PlainDisplay:
    """A line of `key=value` pairs every `interval` seconds and at both ends of a phase, for log files and programs.

    A line that cannot be written (a full disk, a closed pipe) is dropped; training goes on.
    """

    def __init__(self, stream: TextIO, *, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._place = ""
        self._total = 0
        self._last = -float("inf")

    def begin(self, task_name: str, phase: str, total_steps: int, start: int = 0) -> None:
        """See Progress."""
        self._place, self._total = f"task={_word(task_name)} phase={_word(phase)}", total_steps
        self._last = self._clock()
        self._print(f"{self._place} step={start}/{total_steps}")

    def update(self, reading: Reading) -> None:
        """See Progress."""
        now = self._clock()
        if now - self._last < self._interval and reading.step < self._total:
            return
        self._last = now
        parts = [f"{self._place} step={reading.step}/{self._total} epoch={reading.epoch:.2f}"]
        parts += [f"{name}={value:.4g}" for name, value in reading.terms.items()]
        parts += [f"images_per_second={reading.images_per_second:.0f} eta={duration(reading.eta_seconds)}"]
        self._print(" ".join(parts))

    def message(self, text: str) -> None:
        """See Progress."""
        self._print(text)

    def _print(self, line: str) -> None:
        say(line, self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


def _word(text: str) -> str:
    return text.replace(" ", "_")


class LiveDisplay:
    """A bar with task, phase, epoch, loss terms, images/s and time left; redrawn at most ten times a second.

    If the terminal is closed, training goes on without it.
    """

    _REDRAW = 0.1

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -float("inf")
        self._total = 0
        self._bar: TaskID | None = None
        self._progress = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            refresh_per_second=1 / self._REDRAW,
            transient=True,
        )

    def begin(self, task_name: str, phase: str, total_steps: int, start: int = 0) -> None:
        """See Progress."""
        if self._bar is not None:
            self._progress.remove_task(self._bar)
        name = f"{escape(task_name)} · {escape(phase)}"
        self._total, self._last = total_steps, -float("inf")
        self._bar = self._progress.add_task(name, total=total_steps or None, completed=start, detail="")

    def update(self, reading: Reading) -> None:
        """See Progress."""
        now = self._clock()
        if self._bar is None or (now - self._last < self._REDRAW and reading.step < self._total):
            return
        self._last = now
        # The most important comes first: a narrow terminal cuts off the end.
        parts = [f"{duration(reading.eta_seconds)} left", f"epoch {reading.epoch:.2f}"]
        parts += [f"{reading.images_per_second:,.0f} images/s"]
        parts += [f"{escape(name)} {value:.3f}" for name, value in reading.terms.items()]
        self._progress.update(self._bar, completed=reading.step, detail="  ".join(parts))

    def message(self, text: str) -> None:
        """See Progress."""
        with contextlib.suppress(OSError):
            self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._progress.stop()
        except OSError:  # the terminal was closed
            discard(self._progress.console.file)
