"""Growth with the number of tasks: step time, resident memory and checkpoints at task 20 compared with task 2.

Each method learns 20 tasks of random images in a process of its own, through the trainer's own functions (fit,
consolidate, evaluate, save). Steps are timed afterwards: the priors of both tasks are read back from their checkpoints
and train in turns, with the same number of rows per step, so that other load on the machine affects both alike.

    step_time_ratio          time of a step on task 20 over one on task 2
    resident_ratio           resident memory after task 20 over after task 2, once the allocator released free memory
                             (what it keeps follows the largest batch: up to 500 memory examples are labelled at a time)
    checkpoint_bytes_growth  bytes of the checkpoint at the end of task 20 minus those of task 2
    memory_bytes_growth      the same of the memory's tensors in it: the intended part of the growth
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks._common import interleaved, median_ratio, print_result, spawn
from benchmarks._steps import Steps, make_world, random_stream
from hpccl.checkpoint.store import Mark, load, marks, open_shards
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.engine.build import build_engine
from hpccl.models.build import build_model
from hpccl.prior.prior import Prior
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import evaluate
from hpccl.train.fit import fit
from hpccl.train.state import RunState, World

TASKS, CLASSES = 20, 10
EARLY, LATE = 1, TASKS - 1  # tasks 2 and 20, counted from 0
METHODS: dict[str, dict[str, Any]] = {
    "ewc": {"quadratic": {"weight": 1.0}},
    "fr": {"replay": 0.0},
    "ewc+fr+replay": {"quadratic": {"weight": 1.0}, "replay": 0.5},
}


@dataclass(frozen=True)
class Size:
    """Pixels a side; training images per class; examples kept per task; steps per timing; turns.

    10 * train is a multiple of the batch of 2 * keep rows, so that all steps have equally many rows.
    """

    pixels: int
    train: int
    keep: int
    steps: int
    turns: int


FULL = Size(pixels=32, train=16, keep=40, steps=4, turns=11)
QUICK = Size(pixels=16, train=8, keep=20, steps=10, turns=7)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer images, fewer turns")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        for method in METHODS:
            # A process per method, so that memory left by one method is not counted for the next.
            spawn(work, (method, size, folder))
            found[method] = json.loads((Path(folder) / f"{method}.json").read_text())
    report(found, quick=options.quick, **vars(size))


def report(found: Mapping[str, Mapping[str, Any]], **details: Any) -> None:
    """Print one line per method, and the result."""
    headline: dict[str, float] = {}
    for method, measured in found.items():
        early, late = measured["early"], measured["late"]
        values = {
            "step_time_ratio": median_ratio(measured["rates"], "early", "late"),
            "resident_ratio": late["resident"] / early["resident"],
            "checkpoint_bytes_growth": late["checkpoint"] - early["checkpoint"],
            "memory_bytes_growth": late["memory"] - early["memory"],
        }
        headline |= {f"{method}/{name}": value for name, value in values.items()}
        print(f"{method:14}", "  ".join(f"{name} {value:,.3f}" for name, value in values.items()))
    print_result(
        "task_growth",
        headline,
        bytes={method: {when: measured[when] for when in ("early", "late")} for method, measured in found.items()},
        processor_time_ratio={method: round(measured["cpu"], 4) for method, measured in found.items()},
        early_over_itself={
            method: round(median_ratio(measured["rates"], "early", "again"), 4) for method, measured in found.items()
        },
        tasks=[EARLY + 1, LATE + 1],
        **details,
    )


def work(_: int, method: str, size: Size, folder: str) -> None:
    """Measure one method in a process of its own."""
    torch.set_num_threads(1)
    world, state = begin(method, size, Path(folder) / method)
    measured: dict[str, Any] = {}
    for task in world.stream.tasks:
        state.mark = Mark.at(task.index, "fit", 0)
        fit(task, state, world)
        consolidate(task, state, world)
        evaluate(task, state, world)
        world.save(state, Mark.at(task.index, "done", state.mark.step))
        if task.index in {EARLY, LATE}:
            measured["early" if task.index == EARLY else "late"] = held(state, world)
    rates, cpu = timed(state, world, size)
    (Path(folder) / f"{method}.json").write_text(json.dumps({**measured, "rates": rates, "cpu": cpu}))


def begin(method: str, size: Size, folder: Path) -> tuple[World, RunState]:
    """Return a run before its first task."""
    memory = {} if method == "ewc" else {"size": size.keep, "mix": {"kind": "stratified", "share": 0.5}}
    config = RunConfig.model_validate(
        {
            "model": {"kind": "cifarnet"},
            "train": {"batch_size": 2 * size.keep, "epochs": 2},
            "optim": {"name": "adamw", "lr": 1e-4},
            "memory": memory,
            "prior": METHODS[method],
            "curvature": {"kind": "diagonal", "batch_size": 64},
            "engine": {"kind": "ddp", "device": "cpu"},
            "checkpoint": {"every": 0},
        }
    )
    stream = random_stream(size.pixels, tasks=TASKS, classes=CLASSES, train=size.train)
    model = build_model(config.model, image_shape=stream.image_shape, num_classes=TASKS * CLASSES, seed=0)
    comm = Comm.solo()
    return make_world(config, comm, stream, folder), RunState(build_engine(config, model, comm))


def held(state: RunState, world: World) -> dict[str, int]:
    """Return the bytes of the process, of the newest checkpoint, and of its parts."""
    gc.collect()
    untrimmed = psutil.Process().memory_info().rss
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
    checkpoint = world.folder.checkpoints / state.mark.name
    quadratic = state.prior.quadratic
    return {
        "resident": psutil.Process().memory_info().rss,
        "resident_with_free": untrimmed,
        "checkpoint": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "memory": state.prior.memory.num_bytes,
        "curvature": quadratic.precision.totals(world.comm).num_bytes if quadratic else 0,
        # The table of accuracies, and the names and numbers stored with the tensors.
        "text": (checkpoint / "state.json").stat().st_size,
    }


def timed(state: RunState, world: World, size: Size) -> tuple[dict[str, list[float]], float]:
    """Return rows per second of every turn on both tasks, and the ratio of processor times, late over early."""

    def steps(index: int) -> Steps:
        """Return steps on task `index`, under the prior after the preceding task."""
        checkpoints = world.folder.checkpoints
        before = next(mark for mark in marks(checkpoints) if (mark.task, mark.phase) == (index - 1, "done"))
        saved, shards = load(checkpoints, before)["prior"], open_shards(checkpoints, before)
        prior = Prior.from_state_dict(saved, shards, world.comm, state.engine.place, state.engine.like)
        return Steps(world, state.engine, world.stream.tasks[index], prior, size.steps)

    runs = {"early": steps(EARLY), "late": steps(LATE), "again": steps(EARLY)}
    state.engine.start(num_steps=3 * size.steps * (size.turns + 1), task=LATE)
    interleaved(runs, size.turns)
    rates = {when: each.rates[-size.turns :] for when, each in runs.items()}
    early, late = (torch.tensor(runs[when].cpu[-size.turns :]) for when in ("early", "late"))
    return rates, float((late / early).median())


if __name__ == "__main__":
    main()
