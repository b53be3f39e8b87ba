"""The event log of a run: one JSON object per line, appended, readable at any moment and after any kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from hpccl.errors import FolderError
from hpccl.folder import explain_os_error

__all__ = ["Event", "EventLog", "Sink", "json_text", "latest", "number", "phase_parts", "read_events", "valid_json"]

Event: TypeAlias = dict[str, Any]


class Sink(Protocol):
    """A further receiver of every event, such as TensorBoard."""

    def recall(self, events: Sequence[Event]) -> None:
        """Process the events of earlier processes of this run; called once, before the first `write`."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Process one event."""

    def close(self) -> None:
        """Close files."""


def valid_json(value: Any) -> Any:
    """Convert a value to types of strict JSON.

    NaN and infinities become the strings "NaN", "Infinity" and "-Infinity", which `float` reads back; numpy numbers and
    arrays become numbers and lists; paths become strings.
    """
    if isinstance(value, Mapping):
        return {str(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return valid_json(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [valid_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def json_text(value: Any) -> str:
    """Return `valid_json` of a value as indented text."""
    return json.dumps(valid_json(value), indent=2, allow_nan=False)


def number(value: Any) -> float | None:
    """Convert a number as `valid_json` wrote it; None stays None."""
    return None if value is None else float(value)


class EventLog:
    """Appends events to a file; on ranks other than 0 it is disabled and does nothing.

    A line is passed to the operating system in one write, so a killed process leaves at most one torn line, at the end;
    the next process that opens the file removes it.

    Raises:
        FolderError: the file cannot be opened or written (disk full, no permission), or is damaged before its end.
    """

    def __init__(
        self,
        path: Path,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.time,
        sinks: Iterable[Sink] = (),
    ) -> None:
        self._path = path
        self._clock = clock
        self._sinks: tuple[Sink, ...] = tuple(sinks) if enabled else ()
        self._lock = threading.Lock()
        self._file: int | None = None
        self.kinds: set[str] = set()  # kinds of the events that this process wrote
        if enabled:
            self._open()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            _repair(self._path, self._file)
        except OSError as error:
            self.close()
            raise FolderError(f"'{self._path}' cannot be opened for writing: {explain_os_error(error)}") from error
        if self._sinks:
            history = read_events(self._path)
            for sink in self._sinks:
                sink.recall(history)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event, with the time, and flush it.

        Raises:
            FolderError: it cannot be written.
        """
        if self._file is None:
            return
        line: Event = valid_json({"event": event, "time": round(self._clock(), 3), **fields})
        data = json.dumps(line, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        with self._lock:
            self._append(data)
            self.kinds.add(event)
            for sink in self._sinks:
                sink.write(line)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)  # a full disk may have taken half a line
            raise FolderError(f"'{self._path}' cannot be written: {explain_os_error(error)}") from error

    def close(self) -> None:
        """Close the file and the sinks; may be called twice."""
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes) -> Event | None:
    """Return the event in a line; None if the line is torn or not an event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # also an undecodable byte
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if isinstance(event.get("time"), (int, float)) else None


def _repair(path: Path, file: int) -> None:
    """Remove a torn last line; complete one that only lacks its newline."""
    data = path.read_bytes()
    if not data:
        return
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    if _parse(data[start:]) is None:
        os.ftruncate(file, start)
    elif not data.endswith(b"\n"):
        os.write(file, b"\n")


def read_events(path: Path) -> list[Event]:
    """Return all events of a file, in order; a torn last line is ignored.

    Raises:
        FolderError: the file is absent, unreadable, or damaged before its last line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FolderError(f"'{path}' cannot be read: {explain_os_error(error)}") from error
    numbered = [(position, line) for position, line in enumerate(lines, start=1) if line.strip()]
    events = []
    for position, line in numbered:
        event = _parse(line)
        if event is not None:
            events.append(event)
        elif position != numbered[-1][0]:
            raise FolderError(
                f"line {position} of '{path}' is not an event: {line[:60]!r}; only the last line of a run that was "
                "killed may be incomplete. Restore the file, or delete that line to continue without it"
            )
    return events


def latest(events: Iterable[Mapping[str, Any]], kind: str, *keys: str) -> list[Mapping[str, Any]]:
    """Return the events of one kind, sorted by key, only the last one per key: a resumed run repeats lines."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == kind:
            found[tuple(event.get(key) or 0 for key in keys)] = event
    return [found[key] for key in sorted(found, key=lambda values: tuple((str(type(v)), v) for v in values))]


def phase_parts(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cost events of those parts of each phase whose work the run still contains.

    A phase is entered again, as a new part, at the step where a run is resumed. Its end writes `phase`; checkpoints
    before that write `spent`, because a killed process writes nothing more. Of a part that was followed by another one,
    only what was spent up to that one's first step counts; parts that began at later steps were discarded on resuming.
    """
    found: dict[tuple[int, str], dict[int, list[Mapping[str, Any]]]] = {}
    for event in events:
        if event["event"] in ("phase", "spent"):
            parts, part = found.setdefault((event["task"], event["phase"]), {}), event.get("part") or 0
            for gone in [later for later in parts if later > part]:
                del parts[gone]
            parts.setdefault(part, []).append(event)
    return [
        lines[-1] if following is None else _until(following, lines)
        for parts in found.values()
        for lines, following in zip((parts[part] for part in sorted(parts)), [*sorted(parts)[1:], None], strict=True)
    ]


def _until(step: int, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the last event up to a step; in logs of versions that wrote no `spent`, the last one."""
    return next((line for line in reversed(lines) if line["event"] == "spent" and line["step"] <= step), lines[-1])
