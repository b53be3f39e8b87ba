"""How far each policy for the sum over tasks is from the exact sum, on curvatures of a real run.

A network learns the digits in five tasks, one after the other, with the Kronecker quadratic. The curvature of each task
is measured at its end. For each policy and layer: the relative Frobenius error of the summed matrix, and the relative
error of its product with the displacement of the weights from the first task to the last, both against the dense sum.

    python benchmarks/task_sum.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import print_result
from hpccl.config.curvature import ListedTasks, NearestTasks, PooledTasks, RefitTasks, TasksConfig
from hpccl.config.run import RunConfig
from hpccl.curvature.blocks import Block
from hpccl.curvature.kronecker import Kronecker
from hpccl.data.build import open_stream
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.folder import RunFolder
from hpccl.kron.eigen import Eigen
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.report.events import EventLog
from hpccl.report.progress import make_progress
from hpccl.train.fit import fit
from hpccl.train.measure import measure
from hpccl.train.run import fresh_state
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop

SOLO = Comm.solo()


def configuration(epochs: int) -> RunConfig:
    """Return a configuration of five tasks of two classes; all seen classes compete, so that curvatures differ."""
    return RunConfig.model_validate(
        {
            "stream": {"kind": "digits", "tasks": 5},
            "model": {"kind": "mlp", "hidden": [48, 32]},
            "train": {"epochs": epochs, "batch_size": 64, "head": "seen"},
            "optim": {"name": "adamw", "lr": 3e-3, "schedule": "onecycle", "warmup": 0.3},
            "prior": {"quadratic": {"weight": 1.0}},
            "curvature": {"kind": "kronecker", "fisher": "ggn"},
            "log": {"tensorboard": False},
            "checkpoint": {"every": 0},
        }
    )


def learned(config: RunConfig, folder: Path) -> tuple[list[Kronecker], dict[str, Tensor]]:
    """Return each task's curvature, and the displacement of the weights from the first task's end to the last's."""
    run_folder = RunFolder(folder)
    run_folder.create()
    stream = open_stream(config.stream, config.data)
    log = EventLog(run_folder.events, enabled=False)
    world = World(config, SOLO, stream, run_folder, log, make_progress(False), Stop())
    state = fresh_state(config, stream, SOLO)
    found: list[Kronecker] = []
    first: dict[str, Tensor] = {}
    for task in stream.tasks:
        state.mark = type(state.mark).at(task.index, "fit", 0)
        fit(task, state, world)
        anchor = wholes(state.engine.gather())
        first = first or anchor
        alone = measure(task, Memory.empty(), anchor, RunState(state.engine, mark=state.mark), world)
        together = measure(task, Memory.empty(), anchor, state, world)
        assert alone is not None
        assert isinstance(alone.precision, Kronecker)
        found.append(alone.precision)
        state.prior = Prior(Memory.empty(), together, anchor)
    last = {name: value.detach() for name, value in trainable(state.engine.module).items()}
    return found, {name: value - first[name] for name, value in last.items()}


def dense(block: Block) -> Tensor:
    """Return the block as a dense matrix [o * d, o * d] float64."""
    total = torch.zeros(())
    for term in block.terms:
        if isinstance(term, Eigen):
            base = torch.kron(term.qb[0].double(), term.qa[0].double())
            total = total + (base * term.values.double().flatten()) @ base.T
        else:
            total = total + torch.kron(term.b.dense()[0].double(), term.a.dense()[0].double())
    return total


def errors(each: Sequence[Kronecker], way: dict[str, Tensor], tasks: TasksConfig) -> dict[str, dict[str, float]]:
    """Return by layer: Frobenius and product error, the number of terms left, and the stated bound."""
    own = [Kronecker(one.blocks, one.rest, one.num_examples, tasks, one.layouts) for one in each]
    whole = reduce(lambda total, new: total.plus(new, SOLO), own)
    found = {}
    for number, block in enumerate(whole.blocks):
        truth = torch.stack([dense(one.blocks[number]) for one in each]).sum(0)
        difference = dense(block) - truth
        direction = block.layout.matrix(way).double().flatten()
        found[block.layout.name] = {
            "frobenius": float(difference.norm() / truth.norm()),
            "product": float((difference @ direction).norm() / (truth @ direction).norm()),
            "terms": len(block.terms),
            "stated_bound": block.error(),
        }
    return found


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    quick: bool = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        each, way = learned(configuration(3 if quick else 20), Path(folder))
    policies: dict[str, TasksConfig] = {
        "list": ListedTasks(max_cost=100),
        "list, room for two": ListedTasks(max_cost=2, tolerance=0.1),
        "refit": RefitTasks(),
        "nearest": NearestTasks(),
        "pooled": PooledTasks(),
    }
    table: dict[str, dict[str, Any]] = {name: errors(each, way, tasks) for name, tasks in policies.items()}
    print(f"{'policy':20} {'layer':8} {'terms':>5} {'Frobenius':>10} {'product':>10} {'bound':>8}")
    for name, layers in table.items():
        for layer, row in layers.items():
            print(
                f"{name:20} {layer:8} {row['terms']:5} {row['frobenius']:10.4f} "
                f"{row['product']:10.4f} {row['stated_bound']:8.4f}"
            )
    headline = {
        f"largest_frobenius_{name.replace(', ', '_').replace(' ', '_')}": max(
            row["frobenius"] for row in layers.values()
        )
        for name, layers in table.items()
    }
    print_result("task_sum", headline, table=table, tasks=len(each))


if __name__ == "__main__":
    main()
