"""Curves for TensorBoard, written from the same events as the report, without torch or TensorFlow."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from hpccl.errors import FolderError
from hpccl.folder import explain_os_error

__all__ = ["TensorBoardSink", "scalars"]


def scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of everything in an event that is shown as a curve."""
    match event["event"]:
        case "step":
            for key in ("loss", "lr", "gradient_norm", "images_per_second", "epoch"):
                yield from _scalar(f"train/{key}", event.get(key))
            for term, value in (event.get("terms") or {}).items():
                yield from _scalar(f"terms/{term}", value)
        case "evaluate":
            yield from _accuracies(event)
        case "phase":
            yield from _scalar(f"seconds/{event['phase']}", event.get("seconds"))
        case "memory":
            yield from _scalar("memory/examples", sum(event.get("per_task") or []))
            yield from _scalar("memory/bytes", event.get("bytes"))
        case "curvature":
            yield from _scalar("curvature/trace", event.get("trace"))
        case "reconstruction":
            for term, errors in event["terms"].items():
                for figure in ("cosine", "relative_error"):
                    yield from _scalar(f"reconstruction_{figure}/{term}", errors.get(figure))
        case _:
            pass


def _scalar(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if value is not None:
        yield tag, float(value)


def _accuracies(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for setting in ("task_incremental", "class_incremental"):
        seen = [r for r in event["results"] if r.get(setting) is not None and r["task"] <= event["task"]]
        for result in seen:
            yield from _scalar(f"accuracy_{setting}/task_{result['task']}", result[setting]["accuracy"])
        for figure in ("accuracy", "top5", "nll", "ece"):
            values = [float(r[setting][figure]) for r in seen if r[setting].get(figure) is not None]
            if values:
                yield f"average_{figure}/{setting}", sum(values) / len(values)


class TensorBoardSink:
    """A sink of EventLog that writes `events.out.tfevents.*` files.

    Steps are numbered from the start of the first task; the axis of everything else is the task. After a resume, a
    restart mark makes TensorBoard drop the steps that are repeated.

    Raises:
        FolderError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        # Only the record format is used: EventFileWriter would import TensorFlow where that is installed.
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder = folder
        self._num_steps: dict[int, int] = {}
        self._resumed = False
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / name).open("ab")
        except OSError as error:
            raise self._explain(error) from error
        self._writer = RecordWriter(file)
        self._record(Record(wall_time=time.time(), file_version="brain.Event:2"))

    def _explain(self, error: OSError) -> FolderError:
        return FolderError(
            f"'{self._folder}' cannot be written: {explain_os_error(error)}; "
            "log.tensorboard=false leaves these curves out"
        )

    def recall(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Read from the events of earlier processes how many steps past tasks had."""
        for event in events:
            if event["event"] == "step":
                self._num_steps[event["task"]] = event["num_steps"]
                self._resumed = True

    def write(self, event: Mapping[str, Any]) -> None:
        """Add the event's curves.

        Raises:
            FolderError: the disk is full or gone.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(event)]
        if not values:
            return
        step = self._axis(event)
        if self._resumed and event["event"] == "step":
            self._record(Record(wall_time=event["time"], step=step, session_log=SessionLog(status=SessionLog.START)))
            self._resumed = False
        self._record(Record(wall_time=event["time"], step=step, summary=Summary(value=values)))

    def _axis(self, event: Mapping[str, Any]) -> int:
        if event["event"] != "step":
            return int(event["task"])
        self._num_steps[event["task"]] = event["num_steps"]
        return int(event["step"]) + sum(n for task, n in self._num_steps.items() if task < event["task"])

    def _record(self, record: Record) -> None:
        try:
            self._writer.write(record.SerializeToString())
            self._writer.flush()
        except OSError as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
