"""The state of a run, from both ends of its events.jsonl: fast for a file of any length, robust to a damaged one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hpccl.folder import explain_os_error
from hpccl.report.events import Event, number

__all__ = ["Standing", "read_standing", "standing_of"]

Turn: TypeAlias = Literal["run", "stop", "done", "error"]
Phase: TypeAlias = Literal["start", "fit", "consolidate", "evaluate"]

_HEAD, _TAIL = 1 << 16, 3 << 16  # bytes that are read of a long file
_BACK = 8 << 20  # bytes in which the last start is searched for
_START = b'{"event": "run", '
_GAP = b'{"event": "gap", "time": 0}'  # marks where events, possibly starts among them, were left out


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The state of a run according to its events; None where it is unknown.

    problem: why the events cannot be read; empty if they can be read, or if there are none yet
    turn, turn_time: kind and time of the last start or end of a process
    message: that of the last error, or the reason of the last stop
    error_kind: the class of the last error
    began: time of the last known start
    host, job, restart: of that start: the machine of rank 0, the SLURM job and how often it was restarted
    time: of the last event, seconds since 1970
    plan: steps of each task, 0 for tasks that are not trained
    task: counted from 0, with `step` of `num_steps` steps done and `epoch` epochs
    left: seconds until the run is done, at the time of the last event
    """

    problem: str = ""
    turn: Turn | None = None
    turn_time: float = 0.0
    message: str = ""
    error_kind: str = ""
    began: float | None = None
    host: str = ""
    job: str | None = None
    restart: int = 0
    time: float | None = None
    task: int | None = None
    plan: tuple[int, ...] | None = None
    phase: Phase | None = None
    step: int | None = None
    num_steps: int | None = None
    epoch: float | None = None
    images_per_second: float | None = None
    left: float | None = None

    @property
    def num_tasks(self) -> int | None:
        """Number of tasks of the stream."""
        return None if self.plan is None else len(self.plan)

    def at_task(self, task: int, phase: Phase, step: int) -> Standing:
        """Return the same state at another task, phase and step."""
        num_steps = self.plan[task] if self.plan is not None and task < len(self.plan) else None
        return replace(self, task=task, phase=phase, step=step, num_steps=num_steps, epoch=None)


def read_standing(path: Path) -> Standing:
    """Read the state from an events.jsonl that may be absent, half written, damaged or very long; never raises."""
    try:
        lines = _lines(path)
    except (FileNotFoundError, NotADirectoryError):
        return Standing()
    except OSError as error:
        return Standing(problem=f"{path.name} cannot be read: {explain_os_error(error)}")
    events = [event for event in map(_parse, lines) if event is not None]
    if not events and len(lines) > 1:
        return Standing(problem=f"{path.name} holds no event that can be read")
    try:
        return standing_of(events)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Standing(problem=f"{path.name} has events that this version does not understand ({error!r})")


def _lines(path: Path) -> list[bytes]:
    """Return all lines; of a long file the first ones, the last start before the tail, and the last ones."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _HEAD + _TAIL:
            return file.read().splitlines()
        head = file.read(_HEAD).splitlines()[:-1]
        file.seek(size - _TAIL)
        tail = file.read().splitlines()[1:]
        if any(line.startswith(_START) for line in tail):
            return head + tail
        first = max(_HEAD, size - _TAIL - _BACK)
        file.seek(first)
        middle = file.read(size - _TAIL - first)
        found = middle.rfind(b"\n" + _START)
        if found < 0:
            return [*head, _GAP, *tail]
        return [*head, middle[found + 1 :].split(b"\n", 1)[0], *tail]


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event and "time" in event else None


def standing_of(events: Sequence[Event]) -> Standing:
    """Return the state after a sequence of events; some may be missing in the middle."""
    standing = Standing()
    for event in events:
        if event["event"] == "gap":
            standing = replace(standing, turn=None, began=None, host="", job=None)
            continue
        moment = float(event["time"])
        if standing.turn != "run":  # events follow an end, so the run was started again
            standing = replace(standing, turn="run", turn_time=moment, message="", error_kind="")
        standing = replace(_after(standing, event), time=moment)
    return replace(standing, left=_left(standing, events))


def _after(standing: Standing, event: Mapping[str, Any]) -> Standing:
    match event["event"]:
        case "run":
            return _begun(event)
        case "evaluate":
            learned = int(event["task"])
            return (
                replace(standing, phase="fit", task=0, step=0) if learned < 0 else replace(standing, phase="evaluate")
            )
        case "task":
            return standing.at_task(int(event["task"]), "fit", 0)
        case "step":
            return replace(
                standing,
                task=int(event["task"]),
                phase="fit",
                step=int(event["step"]),
                num_steps=int(event["num_steps"]),
                epoch=number(event.get("epoch")),
                images_per_second=number(event.get("images_per_second")),
            )
        case "phase":
            ended: Phase = "evaluate" if event["phase"] == "evaluate" else "consolidate"
            return replace(standing, task=int(event["task"]), phase=ended)
        case "stop" | "done" | "error":
            return _ended(standing, event)
        case _:
            return standing


def _begun(event: Mapping[str, Any]) -> Standing:
    """Return the state after a start of a process, which resets everything."""
    job, mark = event.get("job") or {}, event.get("resumed")
    steps = event.get("steps")
    begun = Standing(
        turn="run",
        turn_time=float(event["time"]),
        began=float(event["time"]),
        host=str((event.get("machine") or {}).get("hostname") or ""),
        job=job.get("id"),
        restart=int(job.get("restart") or 0),
        plan=None if steps is None else tuple(int(each) for each in steps),
        phase="start",
        task=0,
    )
    return begun if mark is None else _at(begun, mark)


def _at(standing: Standing, mark: Mapping[str, Any]) -> Standing:
    """Return the state at a checkpoint."""
    task, phase, step = int(mark["task"]), mark["phase"], int(mark["step"])
    if phase == "done":
        return standing.at_task(task + 1, "fit", 0)
    return standing.at_task(task, "fit" if phase == "fit" else "consolidate", step)


def _ended(standing: Standing, event: Mapping[str, Any]) -> Standing:
    turn: Turn = event["event"]
    ended = replace(standing, turn=turn, turn_time=float(event["time"]))
    match turn:
        case "error":
            return replace(ended, message=str(event.get("message")), error_kind=str(event.get("kind")))
        case "stop":
            return replace(_at(ended, event), message=str(event.get("reason")))
        case _:
            return replace(ended, phase=None)


# ---------------------------------------------------------------- time left


def _left(standing: Standing, events: Sequence[Event]) -> float | None:
    """Estimate the seconds left: all steps at the pace of the last ones, other phases as in the last task."""
    plan = standing.plan
    paces = (_seconds_a_step(event) for event in reversed(events) if event["event"] == "step")
    pace = next((each for each in paces if each is not None), None)
    if plan is None or pace is None or standing.task is None or standing.task >= len(plan) or standing.turn == "done":
        return None
    ahead = plan[standing.task + 1 :]
    here = plan[standing.task] - (standing.step or 0) if standing.phase in ("start", "fit") else 0
    return pace * (max(here, 0) + sum(ahead)) + _around(events) * (1 + len(ahead))


def _seconds_a_step(step: Mapping[str, Any]) -> float | None:
    """Return the pace at a step; None for the last step of a task."""
    rest, left = int(step["num_steps"]) - int(step["step"]), number(step.get("eta_seconds"))
    return left / rest if rest > 0 and left is not None else None


def _around(events: Sequence[Event]) -> float:
    """Return the seconds of all phases except `fit` in the last task that has been evaluated."""
    spent: dict[int, dict[str, float]] = {}
    for event in events:
        if event["event"] == "phase" and event["phase"] != "fit":
            spent.setdefault(int(event["task"]), {})[event["phase"]] = float(event["seconds"])
    whole = [task for task, phases in spent.items() if "evaluate" in phases and task >= 0]
    return sum(spent[max(whole)].values()) if whole else 0.0
