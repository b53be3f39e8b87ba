"""Runs without their folders: configuration and events of many in one small file, to report them again at any time.

The file is JSON lines, a run each, compressed with xz. Of the events all are kept but the steps, of which there are
thousands: a comparison reads only the last one before a pause. The names of machines are left out.
"""

from __future__ import annotations

import json
import lzma
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
_LARGEST = 1 << 30  # bytes of an archive's text; a small file could hold as much as fills the memory

Key: TypeAlias = tuple[float, str, int]


@dataclass(frozen=True)
class Recorded:
    """The configuration of a run and what happened in it."""

    config: RunConfig
    events: tuple[Event, ...]

    @property
    def key(self) -> Key:
        """When it began, its name and seed: the same run, however often and from wherever it was read."""
        return self.events[0]["time"], self.config.name, self.config.seed

    def report(self) -> RunReport:
        """Its figures."""
        return summarise_events(self.config, self.events)


def read_runs(paths: Iterable[Path]) -> list[Recorded]:
    """The runs of folders, and of files that `write_archive` wrote, in the order in which they come.

    A run that is in several of them, as in an archive and in its own folder, is taken once: that with the latest event.

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
    """Write what a comparison reads of the runs; the same runs make the same bytes.

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
    return Recorded(config, tuple(events))


def _record(run: Recorded) -> dict[str, Any]:
    config = valid_json(run.config.model_dump(mode="json"))
    return {"format": _FORMAT, "config": config, "events": [_nameless(event) for event in _kept(run.events)]}


def _kept(events: Sequence[Event]) -> list[Event]:
    """All but steps; of these the last before a start, which ends a stretch of time that was killed, and the last."""
    ends = [*(event["event"] == "run" for event in events[1:]), True]
    return [event for event, end in zip(events, ends, strict=True) if end or event["event"] != "step"]


def _nameless(event: Mapping[str, Any]) -> Event:
    if event["event"] != "run" or "hostname" not in (event.get("machine") or {}):
        return dict(event)
    return {**event, "machine": {key: value for key, value in event["machine"].items() if key != "hostname"}}


# ---------------------------------------------------------------- reading


def _read_archive(path: Path) -> list[Recorded]:
    try:
        with lzma.open(path) as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise FolderError(f"'{path}' cannot be read: {explain_os_error(error)}") from error
    except (lzma.LZMAError, EOFError) as error:
        raise FolderError(
            f"'{path}' is neither a run's folder nor a whole {NAME} of `hpccl report --out`: {error}. Give "
            "runs/<name>, or fetch the file anew"
        ) from error
    if len(data) > _LARGEST:
        raise FolderError(f"'{path}' holds more than {_LARGEST >> 30} GiB of text, which no {NAME} does; give another")
    return [_recorded(path, number, line) for number, line in enumerate(data.splitlines(), start=1)]


def _recorded(path: Path, number: int, line: bytes) -> Recorded:
    try:
        found = json.loads(line)
        if found["format"] != _FORMAT:
            raise FolderError(f"'{path}' is of format {found['format']}, this version reads {_FORMAT}; update hpccl")
        events = tuple(found["events"])
        if not all(isinstance(event, dict) and {"event", "time"} <= event.keys() for event in events) or not events:
            raise ValueError("events are missing")
        return Recorded(RunConfig.model_validate(found["config"]), events)
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise FolderError(f"run {number} of '{path}' does not fit this version of hpccl: {mistakes}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"line {number} of '{path}' is not a run ({error!r}); fetch the file anew") from error
