"""Writes a run folder as training would, with made-up numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from hpccl.config.memory import MemoryConfig
from hpccl.config.prior import PriorConfig, QuadraticConfig
from hpccl.config.run import RunConfig
from hpccl.folder import RunFolder
from hpccl.report.events import EventLog, Sink

NUM_TASKS = 3
NUM_STEPS = 40
# Rows after each task; columns: tasks. Exact in binary, so that figures are exact.
OWN = [[0.875, 0.5, 0.25], [0.75, 0.875, 0.5], [0.625, 0.75, 1.0]]
SEEN: list[list[float | None]] = [[0.875, None, None], [0.5, 0.75, None], [0.25, 0.5, 0.875]]
UNTRAINED = [0.5, 0.5, 0.5]


class Clock:
    """Seconds that pass by themselves: a quarter a look."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


# Ten predictions of a confidence of 1/2, four of them right, and ten of 0.9, all right.
BINS = [[10.0 * (m in (7, 13)) for m in range(15)], [5.0 * (m == 7) + 9.0 * (m == 13) for m in range(15)]]
BINS.append([4.0 * (m == 7) + 10.0 * (m == 13) for m in range(15)])
CALIBRATION = {"task_incremental": BINS, "class_incremental": BINS}


def config(
    *, name: str = "toy", seed: int = 0, quadratic: float = 1.0, size: int = 20, replay: float = 0.5, **more: Any
) -> RunConfig:
    """A run of ewc+fr+replay on the digits, unless told otherwise."""
    return RunConfig(
        name=name,
        seed=seed,
        memory=MemoryConfig(size=size),
        prior=PriorConfig(quadratic=QuadraticConfig(weight=quadratic), replay=replay),
        **more,
    )


def write_config(folder: Path, run: RunConfig) -> None:
    """config.yaml as training writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).config.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(run.model_dump(mode="json"), file)


def evaluation(task: int, *, shift: float = 0.0) -> dict[str, Any]:
    """The fields of an `evaluate` event; `shift` is added to every accuracy."""
    own = UNTRAINED if task < 0 else OWN[task]
    seen: list[float | None] = [None] * NUM_TASKS if task < 0 else SEEN[task]
    results = []
    for other in range(NUM_TASKS):
        value = seen[other]
        whole = None if value is None else {"accuracy": value + shift, "nll": 1.5, "ece": 0.125}
        mine = {"accuracy": own[other] + shift, "nll": 0.5, "ece": 0.0625}
        results.append({"task": other, "num": 100, "task_incremental": mine, "class_incremental": whole})
    return {"task": task, "results": results, "calibration": CALIBRATION if task >= 0 else {}}


def run_fields() -> dict[str, Any]:
    """The fields of a `run` event."""
    return {
        "format": 1,
        "commit": "0123abc",
        "command": ["hpccl", "train", "configs/quickstart.yaml"],
        "machine": {"cpu": "Imaginary 3000", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None, "hostname": "node1"},
        "versions": {"python": "3.11.2", "torch": "2.7.0"},
        "world_size": 2,
        "resumed": None,
    }


def step_fields(task: int, step: int) -> dict[str, Any]:
    """The fields of a `step` event."""
    new = 0.5 + 2 ** (-step / 10)
    terms = {
        "new": new,
        "soft": 0.25 * (task > 0),
        "replay": 0.125 * (task > 0),
        "quadratic": 0.001 * step * (task > 0),
    }
    return {
        "task": task,
        "step": step,
        "num_steps": NUM_STEPS,
        "epoch": step / 10,
        "loss": sum(terms.values()),
        "terms": terms,
        "lr": 0.001,
        "gradient_norm": 1.5,
        "images_per_second": 400.0,
        "eta_seconds": 12.0,
    }


def task_events(task: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that is written while one task is learned."""
    names = [f"digit {2 * task}", f"digit {2 * task + 1}"]
    yield (
        "task",
        {
            "task": task,
            "name": f"digits-{task}",
            "classes": [2 * task, 2 * task + 1],
            "class_names": names,
            "num_train": 300,
            "num_test": 100,
        },
    )
    for step in range(0, NUM_STEPS + 1, 10):
        yield "step", step_fields(task, step)
    yield "phase", phase("fit", task, seconds=4.0, images=1600)
    sizes = [20] * (task + 1)
    agreement = [0.95, 0.9][:task]
    yield (
        "memory",
        {"task": task, "size": 20, "per_task": sizes, "bytes": 1280, "soft_bytes": 800, "agreement": agreement},
    )
    yield "phase", phase("curvature", task, seconds=0.5, images=280)
    yield (
        "curvature",
        {
            "task": task,
            "kind": "kronecker",
            "trace": 1234.5,
            "num_examples": 280,
            "bytes": 4096,
            "rank_bytes": 3072,
            "terms": min(task + 1, 2),
            "error": 0.0123 if task > 1 else 0.0,
            "parameters": 1024,
        },
    )
    if task:
        yield "reconstruction", reconstruction(task)
    yield "evaluate", evaluation(task)
    yield "phase", phase("evaluate", task, seconds=0.25, images=300)
    yield "checkpoint", {"task": task, "step": NUM_STEPS, "phase": "done", "bytes": 3 * 2**20, "seconds": 0.125}


def phase(name: str, task: int, *, seconds: float, images: int, **more: Any) -> dict[str, Any]:
    """The fields of a `phase` event."""
    rate = images / seconds
    fields = {"task": task, "phase": name, "seconds": seconds, "images": images, "images_per_second": rate}
    return {**fields, "peak_memory_bytes": 64 * 2**20, **more}


def reconstruction(task: int) -> dict[str, Any]:
    """The fields of a `reconstruction` event."""
    terms = {
        "soft": {"cosine": 0.5, "relative_error": 0.875, "norm": 2.0},
        "replay": {"cosine": 0.25, "relative_error": 0.9375, "norm": 1.0},
        "quadratic": {"cosine": float("nan"), "relative_error": 1.0, "norm": 0.0},
        "total": {"cosine": 0.75, "relative_error": 0.5, "norm": 3.0},
    }
    return {"task": task, "past_tasks": list(range(task)), "terms": terms, "true_norm": 4.0}


def write_memory(folder: Path, *, channels: int = 1, side: int = 8) -> None:
    """memory/task-*.npz with noise in it."""
    RunFolder(folder).memory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for task in range(NUM_TASKS):
        images = generator.integers(0, 256, (20, side, side, channels), dtype=np.uint8)
        names = np.array([f"digits/{task}-{index}" for index in range(20)])
        path = RunFolder(folder).memory / f"task-{task}.npz"
        np.savez(path, images=images, labels=np.arange(20) % 2 + 2 * task, names=names, task=np.array(task))


def write_run(
    folder: Path,
    run: RunConfig | None = None,
    *,
    tasks: int = NUM_TASKS,
    finished: bool = True,
    sinks: list[Sink] | None = None,
) -> Path:
    """A run that learned so many tasks."""
    write_config(folder, run or config())
    write_memory(folder)
    with EventLog(RunFolder(folder).events, clock=Clock(), sinks=sinks or []) as log:
        log.write("run", **run_fields())
        log.write("evaluate", **evaluation(-1))
        for task in range(tasks):
            for event, fields in task_events(task):
                log.write(event, **fields)
        if finished:
            log.write("done", weights_sha256="f" * 64, wall_seconds=15.0, images=4800, images_per_second=320.0)
    return folder
