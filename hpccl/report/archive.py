"""Runs without their folders: configuration and events of many in one small file, to report them again at any time.

The file is JSON lines, one per run, compressed with xz. All events are kept except for steps, of which there are
thousands: a report without curves reads only the last one, and the last one before each pause. Numbers have six digits;
more are noise, and would be a third of the file. The names of the cluster and of its machines are left out.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from hpccl.config.run import RunConfig
from hpccl.errors import FolderError
from hpccl.folder import RunFolder, explain_os_error, replacing
from hpccl.report.events import Event, read_events, valid_json
from hpccl.report.summary import RunReport, read_config, summarise_events

__all__ = ["NAME", "Recorded", "read_runs", "write_archive"]

NAME = "runs.jsonl.xz"
_FORMAT = 1
_DIGITS = 6  # significant digits of a number
_LONGEST = 1 << 26  # bytes of a run's text
_LARGEST = 1 << 30  # bytes of an archive's text: a small file could be decompressed to more than the memory holds

Key: TypeAlias = tuple[float, str]


@dataclass(frozen=True)
class Recorded:
    """The configuration of a run and its events."""

    config: RunConfig
    events: tuple[Event, ...]

    @property
    def key(self) -> Key:
        """Start time and the settings that decide the result: the same for a run wherever it is read from.

        Settings that may change in its folder, such as the engine or how often it logs, are no part of it.
        """
        decided = valid_json({"name": self.config.name, **self.config.identity()})
        return self.events[0]["time"], json.dumps(decided, sort_keys=True)

    def report(self) -> RunReport:
        """Summarise the run."""
        return summarise_events(self.config, self.events)


def read_runs(paths: Iterable[Path]) -> list[Recorded]:
    """Read the runs of folders, and of archives that `write_archive` wrote, in order.

    A run that is in several of them, such as an archive and its own folder, is returned once, with the latest events.

    Raises:
        FolderError: a path is neither, or cannot be read.
    """
    found: dict[Key, Recorded] = {}
    for path in paths:
        for run in _read_archive(path) if path.is_file() else [_read_folder(path)]:
            known = found.get(run.key)
            if known is None or run.events[-1]["time"] > known.events[-1]["time"]:
                found[run.key] = run
    return list(found.values())


def write_archive(path: Path, runs: Sequence[Recorded]) -> None:
    """Write what a comparison needs of the runs; the same runs give the same bytes.

    Raises:
        FolderError: it cannot be written.
    """
    lines = [json.dumps(_record(run), allow_nan=False) for run in runs]
    with replacing(path) as beside:
        beside.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9))


# ---------------------------------------------------------------- one run


def _read_folder(folder: Path) -> Recorded:
    config, events = read_config(folder), read_events(RunFolder(folder).events)
    if not events:
        raise FolderError(f"run '{folder}' has not started: its events.jsonl is empty. Continue it, or leave it out")
    return Recorded(config, tuple(map(_rounded, _kept(events))))


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings except those of the cluster."""
    found: dict[str, Any] = valid_json(config.model_dump(mode="json", exclude={"cluster"}))
    return found


def _record(run: Recorded) -> dict[str, Any]:
    events = [_nameless(event) for event in run.events]
    return {"format": _FORMAT, "config": _settings(run.config), "events": events}


def _kept(events: Sequence[Event]) -> list[Event]:
    """Drop steps, except for the last one, and the last one before each start, which ends the time of a killed process.

    A start that fails at once has only an error.
    """
    last = max((number for number, event in enumerate(events) if event["event"] == "step"), default=-1)
    before = {number - 1 for number, event in enumerate(events) if event["event"] in ("run", "error")} | {last}
    return [event for number, event in enumerate(events) if event["event"] != "step" or number in before]


def _rounded(event: Event) -> Event:
    """Round the numbers of an event wherever it is read from, so that a comparison does not depend on that."""
    return {key: value if key == "time" else _short(value) for key, value in event.items()}


def _short(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}")
        case dict():
            return {key: _short(each) for key, each in value.items()}
        case list():
            return [_short(each) for each in value]
        case _:
            return value


def _nameless(event: Mapping[str, Any]) -> Event:
    if event["event"] != "run" or "hostname" not in (event.get("machine") or {}):
        return dict(event)
    return {**event, "machine": {key: value for key, value in event["machine"].items() if key != "hostname"}}


# ---------------------------------------------------------------- reading


def _read_archive(path: Path) -> list[Recorded]:
    found: list[Recorded] = []
    size = 0
    try:
        with lzma.open(path) as file:
            while line := file.readline(_LONGEST + 1):
                size += len(line)
                if len(line) > _LONGEST or size > _LARGEST:
                    raise FolderError(
                        f"'{path}' holds more than a {NAME} does: at most {_LONGEST >> 20} MiB a run, {_LARGEST >> 20} "
                        "MiB in all; give another file"
                    )
                found.append(_recorded(path, len(found) + 1, line))
    except OSError as error:
        raise FolderError(f"'{path}' cannot be read: {explain_os_error(error)}") from error
    except (lzma.LZMAError, EOFError) as error:
        raise FolderError(
            f"'{path}' is neither a run's folder nor a complete {NAME} of `hpccl report --out`: {error}. Give "
            "runs/<name>, or fetch the file anew"
        ) from error
    return found


def _recorded(path: Path, number: int, line: bytes) -> Recorded:
    try:
        found = json.loads(line)
        if found["format"] != _FORMAT:
            raise FolderError(f"'{path}' is of format {found['format']}, this version reads {_FORMAT}; update hpccl")
        run = Recorded(RunConfig.model_validate(found["config"]), tuple(map(_checked, found["events"])))
        if not run.events:
            raise ValueError("it has no events")
        run.report()  # fails for incomplete events here, where the run can still be named
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise FolderError(
            f"run {number} of '{path}' does not fit this version of hpccl: {mistakes}. Report it with the version that "
            "wrote it, or give the folders of the other runs"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"line {number} of '{path}' is not a run ({error!r}); fetch the file anew") from error
    return run


def _checked(event: Any) -> Event:
    if not isinstance(event["event"], str) or not math.isfinite(event["time"]):
        raise ValueError(f"an event is called {event['event']!r} at {event['time']!r}")
    return _rounded(event)
