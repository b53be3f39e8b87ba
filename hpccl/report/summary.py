"""From the folder of a run to its results; an unfinished run reports those that it has."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder
from hpccl.report import metrics
from hpccl.report.events import Event, latest, number, phase_parts, read_events, valid_json

__all__ = ["PhaseCost", "RunReport", "Status", "phase_totals", "read_config", "summarise", "summarise_events"]

Status: TypeAlias = Literal["running", "done", "stopped", "failed"]
Matrix: TypeAlias = list[list[float | None]]
_STATUS: dict[str, Status] = {"run": "running", "stop": "stopped", "done": "done", "error": "failed"}


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase of one task; the parts of an interrupted phase are added."""

    task: int
    phase: str
    seconds: float
    images: int
    images_per_second: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The results of a run. None stands for what was not measured (yet).

    Accuracies and transfers are shares in [0, 1], NLL is nats per example. Figures without a suffix are
    task-incremental (only a task's own classes compete), `_class_incremental` lets all seen classes compete.
    `average_accuracy`, `nll` and `ece` are means over the tasks learned so far, by the network after the last of them.
    `union_accuracy` is, after each task, the accuracy among all seen classes on all their test examples pooled;
    `final_union_accuracy` is its last value, `average_union_accuracy` its mean, `_later` without the first task,
    `performance_drop` its first minus its last value.
    `calibration`: by setting, [3, 15] counts, sums of confidence and numbers of correct predictions per confidence bin,
    of the last network on the tasks it has learned; empty if every task has its own network.
    `message`: why the run ended; for a run that is done, which evaluations its events lack.
    `validation`: the share of the training images on which all of this is measured; None: it is on test images.
    """

    format: int = 1
    name: str
    method: str
    seed: int
    status: Status
    message: str | None
    validation: float | None
    num_tasks: int
    tasks_learned: int
    average_accuracy: float | None
    average_accuracy_class_incremental: float | None
    average_incremental_accuracy: float | None
    average_incremental_accuracy_class_incremental: float | None
    final_union_accuracy: float | None
    average_union_accuracy: float | None
    average_union_accuracy_later: float | None
    performance_drop: float | None
    forgetting: float | None
    forgetting_class_incremental: float | None
    bwt: float | None
    bwt_class_incremental: float | None
    fwt: float | None
    learning_accuracy: float | None
    learning_accuracy_class_incremental: float | None
    top5: float | None
    top5_class_incremental: float | None
    nll: float | None
    nll_class_incremental: float | None
    ece: float | None
    ece_class_incremental: float | None
    accuracy_matrix: Matrix
    accuracy_matrix_class_incremental: Matrix
    union_accuracy: list[float | None]
    accuracy_untrained: list[float | None]
    calibration: dict[str, list[list[float]]]
    weights_sha256: str | None
    images_per_second: float | None
    wall_seconds: float
    segments: int
    tasks: list[dict[str, Any]]
    phases: list[PhaseCost]
    memory: list[dict[str, Any]]
    memory_bytes: int | None
    checkpoints: list[dict[str, Any]]
    checkpoint_bytes: int | None
    curvature: list[dict[str, Any]]
    reconstruction: list[dict[str, Any]]
    skipped: int
    skipped_examples: list[dict[str, Any]]
    commit: str | None
    command: list[str]
    world_size: int | None
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether the run is done and no evaluation is lost, so that its figures are those after the last task."""
        return self.status == "done" and self.message is None

    def to_dict(self) -> dict[str, Any]:
        """The report as strict JSON types."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["phases"] = [vars(phase) for phase in self.phases]
        return dict(valid_json(found))


def read_config(folder: Path) -> RunConfig:
    """Read the resolved configuration of a run.

    Raises:
        FolderError: there is none, or this version cannot read it.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        below = len(list(folder.glob("*/config.yaml")))
        advice = f"It holds {below} runs: give {folder}/*" if below else "Give runs/<name>"
        raise FolderError(f"'{folder}' is not the folder of a run: it has no config.yaml. {advice}")
    try:
        return load_recorded(path)
    except ConfigError as error:
        raise FolderError(
            f"{error}\n'{path}' does not fit this version of hpccl: code.txt names the version that wrote it"
        ) from error


def summarise(folder: Path) -> RunReport:
    """Report on a run folder, from config.yaml and events.jsonl alone.

    Raises:
        FolderError: it is not a run folder, or one of the two files is damaged.
    """
    return summarise_events(read_config(folder), read_events(RunFolder(folder).events))


def summarise_events(config: RunConfig, events: Sequence[Event]) -> RunReport:
    """Report on a run, from its configuration and events."""
    events = _to_the_end(events)
    tasks = [_plain(event) for event in latest(events, "task", "task")]
    memory = [_plain(event) for event in latest(events, "memory", "task")]
    saved = sorted(latest(events, "checkpoint", "task", "step", "phase"), key=_moment)
    checkpoints = [_plain(event) for event in saved]
    run = next((event for event in reversed(events) if event["event"] == "run"), {})
    done = next((event for event in reversed(events) if event["event"] == "done"), {})
    skipped = [_plain(event) for event in latest(events, "skipped", "split", "sample")]
    phases = _phases(events)
    status, message = _status(events)
    accuracies = _accuracies(events, len(tasks))
    if status == "done":
        message = _lost(accuracies["accuracy_matrix"], config)
    return RunReport(
        name=config.name,
        method=config.method,
        seed=config.seed,
        status=status,
        message=message,
        validation=config.data.validation,
        **accuracies,
        # An earlier `done` does not hold for a run that was started again since.
        weights_sha256=done.get("weights_sha256") if status == "done" else None,
        images_per_second=_training_rate(events, phases, done),
        **_segments(events),
        tasks=tasks,
        phases=phases,
        memory=memory,
        memory_bytes=int(memory[-1].get("bytes") or 0) if memory else None,
        checkpoints=checkpoints,
        checkpoint_bytes=checkpoints[-1].get("bytes") if checkpoints else None,
        curvature=[_plain(event) for event in latest(events, "curvature", "task")],
        reconstruction=[_plain(event) for event in latest(events, "reconstruction", "task")],
        skipped=len(skipped),
        skipped_examples=skipped[:20],
        commit=run.get("commit"),
        command=list(run.get("command") or []),
        world_size=run.get("world_size"),
        machine=dict(run.get("machine") or {}),
        versions=dict(run.get("versions") or {}),
    )


_ENDS = ("done", "error", "stop")
_IDLE = ("run", "start", "done", "error", "stop")  # events of a start that finds nothing left to learn


def _to_the_end(events: Sequence[Event]) -> Sequence[Event]:
    """Drop later starts of a finished run that learned nothing, since they changed nothing."""
    learned = max((index for index, event in enumerate(events) if event["event"] not in _IDLE), default=-1)
    ends = (index for index in range(learned + 1, len(events)) if events[index]["event"] == "done")
    return events[: next(ends, len(events)) + 1]


def _moment(checkpoint: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a checkpoint's place in a run: at one step, `fitted` precedes memory and curvature, `done` follows."""
    phases = ("fit", "fitted", "done")
    phase = checkpoint.get("phase")
    return checkpoint.get("task") or 0, checkpoint.get("step") or 0, phases.index(phase) if phase in phases else 0


def _plain(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("event", "time")}


# ---------------------------------------------------------------- accuracy


def _accuracies(events: Sequence[Event], num_announced: int) -> dict[str, Any]:
    """Return every field of RunReport that comes from `evaluate` events."""
    evaluations = latest(events, "evaluate", "task")
    mentioned = [result["task"] + 1 for event in evaluations for result in event["results"]]
    num_tasks = max([num_announced, *mentioned])
    own = metrics.accuracy_matrix(evaluations, num_tasks, "task_incremental")
    seen = metrics.accuracy_matrix(evaluations, num_tasks, "class_incremental")
    before = metrics.untrained(evaluations, num_tasks)
    union = metrics.union_accuracy(seen, metrics.num_tested(evaluations, num_tasks))
    found: dict[str, Any] = {
        "num_tasks": num_tasks,
        "tasks_learned": metrics.last_task(own) + 1,
        "fwt": _known(metrics.forward_transfer(own, before)),
        "accuracy_matrix": _rows(own),
        "accuracy_matrix_class_incremental": _rows(seen),
        "union_accuracy": [_known(value) for value in union],
        "final_union_accuracy": _known(metrics.last_of_curve(union)),
        "average_union_accuracy": _known(metrics.average_of_curve(union)),
        "average_union_accuracy_later": _known(metrics.average_of_curve(union, include_first=False)),
        "performance_drop": _known(metrics.performance_drop(union)),
        "accuracy_untrained": [_known(value) for value in before],
        "calibration": dict(evaluations[-1].get("calibration") or {}) if evaluations else {},
    }
    for suffix, a in (("", own), ("_class_incremental", seen)):
        found[f"average_accuracy{suffix}"] = _known(metrics.average_accuracy(a))
        found[f"average_incremental_accuracy{suffix}"] = _known(metrics.average_incremental_accuracy(a))
        found[f"forgetting{suffix}"] = _known(metrics.forgetting(a))
        found[f"bwt{suffix}"] = _known(metrics.backward_transfer(a))
        found[f"learning_accuracy{suffix}"] = _known(metrics.learning_accuracy(a))
    settings: tuple[tuple[str, metrics.Setting, metrics.Floats], ...] = (
        ("", "task_incremental", own),
        ("_class_incremental", "class_incremental", seen),
    )
    for (suffix, setting, a), figure in itertools.product(settings, ("top5", "nll", "ece")):
        values = metrics.matrix(evaluations, num_tasks, setting=setting, figure=figure)
        found[f"{figure}{suffix}"] = _known(metrics.average_accuracy(values, after=metrics.last_task(a)))
    return found


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _rows(values: metrics.Floats) -> Matrix:
    return [[_known(value) for value in row] for row in values]


# ---------------------------------------------------------------- cost


def _phases(events: Sequence[Event]) -> list[PhaseCost]:
    """Return one entry per task and phase; parts are added."""
    parts: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for part in phase_parts(events):
        parts.setdefault((part["task"], part["phase"]), []).append(part)
    return [_phase(task, phase, found) for (task, phase), found in parts.items()]


def _phase(task: int, phase: str, parts: Sequence[Mapping[str, Any]]) -> PhaseCost:
    seconds = sum(number(part.get("seconds")) or 0.0 for part in parts)
    images = sum(int(part.get("images") or 0) for part in parts)
    rate = images / seconds if images and seconds > 0 else None
    peak = max((int(part.get("peak_memory_bytes") or 0) for part in parts), default=0)
    return PhaseCost(task, phase, seconds, images, rate, peak or None)


def _training_rate(events: Sequence[Event], phases: Sequence[PhaseCost], done: Mapping[str, Any]) -> float | None:
    """Return images per second while fitting; in an unfinished first task, those of its last `step` event."""
    fits = [phase for phase in phases if phase.phase == "fit"]
    seconds = sum(phase.seconds for phase in fits)
    if seconds > 0:
        return sum(phase.images for phase in fits) / seconds
    step = next((event for event in reversed(events) if event["event"] == "step"), {})
    return number(done.get("images_per_second", step.get("images_per_second")))


def _segments(events: Sequence[Event]) -> dict[str, Any]:
    """Return wall time, from each start of a process to its last event, added over resumes without the pauses."""
    segments: list[list[float]] = []
    before = ""
    for event in events:
        kind = event["event"]
        # An error right after an end, or without a `run` event, comes from a start that failed at once.
        at_once = kind == "error" and (before in _ENDS or event.get("begun") is False)
        if kind == "run" or at_once or not segments:
            segments.append([])
        segments[-1].append(event["time"])
        before = kind
    return {"wall_seconds": sum(max(times) - times[0] for times in segments), "segments": len(segments)}


# ---------------------------------------------------------------- status


def _status(events: Sequence[Event]) -> tuple[Status, str | None]:
    """Return status and message; the last start or end decides, and a killed run still counts as running."""
    last = next((event for event in reversed(events) if event["event"] in _STATUS), {"event": "run"})
    match last["event"]:
        case "error":
            return "failed", f"{last.get('kind')}: {last.get('message')}"
        case "stop":
            place = f"task {last.get('task')}, {last.get('phase')}, step {last.get('step')}"
            return "stopped", f"{last.get('reason')} at {place}"
        case other:
            return _STATUS[other], None


def _lost(matrix: Matrix, config: RunConfig) -> str | None:
    """Describe the evaluations that the events of a finished run lack; runs of the last task alone have no others."""
    told = [any(value is not None for value in row) for row in matrix]
    last = config.train.only_last or isinstance(config.adapt, AnyAdaptation)
    first = told.index(True) if last and True in told else 0
    lost = [str(task) for task in range(first, len(told)) if not told[task]]
    if told and not lost:
        return None
    which = f"tasks {', '.join(lost)} (counted from 0)" if True in told else "any task"
    return (
        f"events.jsonl lacks the evaluation after {which}, "
        "so that figures are missing or those of an earlier task; `hpccl evaluate RUN --task N` measures them again"
    )


def phase_totals(phases: Sequence[PhaseCost]) -> list[PhaseCost]:
    """Add costs over tasks, by phase in order of first appearance; `task` is -1."""
    return [
        _total(name, [phase for phase in phases if phase.phase == name])
        for name in dict.fromkeys(p.phase for p in phases)
    ]


def _total(name: str, phases: Sequence[PhaseCost]) -> PhaseCost:
    seconds, images = sum(phase.seconds for phase in phases), sum(phase.images for phase in phases)
    peak = max(phase.peak_memory_bytes or 0 for phase in phases)
    return PhaseCost(-1, name, seconds, images, images / seconds if images and seconds > 0 else None, peak or None)
