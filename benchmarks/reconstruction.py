"""How well priors reconstruct the gradient of the past along one real training trajectory.

A network learns the tasks of a configuration, as set there (such as by finetuning, or with a quadratic); its weights
are kept at intervals during training. Every prior is made at the end of each task from the weights of the trajectory:
none, diagonal, Kronecker or EKFAC curvature of the examples that are not in memory, each with m soft-labelled memory
examples per task, the same ones for all. Then, at all kept weights, the gradient of the prior is compared with the true
gradient of all past tasks (on a share of their examples):

    cosine, relative_error      of soft + quadratic against the true gradient, over all parameters
    change_cosine, change_error against the change of the true gradient since the end of the last task, where every
                                prior's gradient is zero by construction and the true one is not

    kronecker_beats_diagonal  share of (weights, m) at which Kronecker has the smaller relative error
    ... _by_cosine            and the larger cosine
    cosine_PRIOR, error_PRIOR medians over (weights, m)

Every memory example and the quadratic have weight 1, as in the sum over the past; so the cosine of a total also depends
on which of its terms is larger.

Without arguments, a small network learns small images that come with the package. For Split-CIFAR:

    python benchmarks/reconstruction.py configs/split_cifar.yaml configs/method/ewc.yaml prior.quadratic.weight=10
        --first-task runs/split_cifar/finetune --memory 0 100 1000 --out docs/results
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks._common import print_result
from benchmarks._steps import make_world
from hpccl.checkpoint.store import Mark, load, marks
from hpccl.config.load import is_override
from hpccl.config.load import load as load_config
from hpccl.config.run import RunConfig
from hpccl.data.build import open_stream
from hpccl.data.order import subset
from hpccl.data.protocols import Task
from hpccl.data.rows import Request
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.folder import RunFolder
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.prior.quadratic import Quadratic
from hpccl.prior.reconstruct import Losses, compare_gradients, summed_gradients
from hpccl.train.compose import Composer
from hpccl.train.consolidate import consolidate, select
from hpccl.train.fit import fit
from hpccl.train.loss import row_nats
from hpccl.train.measure import measure
from hpccl.train.run import fresh_state
from hpccl.train.soft_labels import relabel
from hpccl.train.state import RunState, World

MEASURES = ("cosine", "relative_error", "change_cosine", "change_error", "norm")
KINDS = ("none", "diagonal", "kronecker", "ekfac")
Gradient = dict[str, Tensor]

# A trajectory that takes a minute.
DIGITS: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 5},
    "model": {"kind": "mlp", "hidden": [64]},
    "train": {"epochs": 8, "batch_size": 32},
    "optim": {"name": "adam", "lr": 2e-3, "schedule": "onecycle", "warmup": 0.25},
}


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="files and key=value, as of `hpccl train`")
    parser.add_argument("--quick", action="store_true", help="fewer tasks and weights")
    parser.add_argument("--first-task", type=Path, help="run folder whose weights after its first task are taken")
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 20, 40], help="examples kept a task")
    parser.add_argument("--tasks", type=int, help="learn only so many")
    parser.add_argument("--snapshots", type=int, default=6, help="weights kept of the second task")
    parser.add_argument("--later", type=int, default=3, help="weights kept of each later task")
    parser.add_argument("--past", type=float, default=0.1, help="share of the past that the true gradient is taken of")
    parser.add_argument("--fisher", choices=("ggn", "mc", "empirical"), default="mc")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of a task whose curvature is measured")
    parser.add_argument("--sharing", choices=("expand", "reduce"), default="expand", help="of Kronecker and EKFAC")
    parser.add_argument("--damping", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="folder for reconstruction.csv and reconstruction.png")
    options = parser.parse_args()
    if not options.config:
        options.past = options.fraction = 1.0
    if options.quick:
        options.tasks, options.snapshots, options.later = options.tasks or 3, 3, 1
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        trajectory = Trajectory.train(configuration(options, folder), options, Path(folder))
        trained = time.perf_counter()
        rows = list(compare(trajectory, options))
    if options.out:
        write(rows, options.out)
    report(rows, options, trained - start, time.perf_counter() - trained, trajectory)


def configuration(options: argparse.Namespace, folder: str) -> RunConfig:
    """Return the configuration of the trajectory."""
    files = [Path(text) for text in options.config if not is_override(text)]
    overrides = [text for text in options.config if is_override(text)]
    config = load_config(files, overrides) if options.config else RunConfig.model_validate(DIGITS)
    return changed(config, folder=folder, train={"first_task_from": None}, log={"reconstruction": 0.0})


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """Replace some values of a configuration; a section with a `kind` is replaced as a whole."""
    tree = config.model_dump()
    for name, value in sections.items():
        whole = not isinstance(value, dict) or "kind" in value
        tree[name] = value if whole else {**tree[name], **value}
    return RunConfig.model_validate(tree)


# ---------------------------------------------------------------- the trajectory


@dataclass(frozen=True)
class Trajectory:
    """Weights along the training on a stream.

    ends: by task, the weights and buffers after it
    kept: (task, step within it, weights) of later tasks, in training order
    """

    world: World
    state: RunState
    ends: Sequence[Gradient]
    kept: Sequence[tuple[Task, int, Gradient]]

    @classmethod
    def train(cls, config: RunConfig, options: argparse.Namespace, folder: Path) -> Trajectory:
        """Train on the tasks through the library."""
        torch.manual_seed(config.seed)
        comm = Comm.solo()
        stream = open_stream(config.stream, config.data)
        world = make_world(config, comm, stream, folder)
        state = fresh_state(config, stream, comm)
        ends: list[Gradient] = []
        kept: list[tuple[Task, int, Gradient]] = []
        for task in stream.tasks[: options.tasks]:
            state.mark = Mark.at(task.index, "fit", 0)
            if task.index == 0 and options.first_task:
                state.engine.put(first_weights(options.first_task))
            else:
                count = options.snapshots if task.index == 1 else options.later
                kept += learn(task, state, world, count if task.index else 0)
            consolidate(task, state, world)
            ends.append(copied(wholes(state.engine.gather())))
            print(f"learned {task.name}", flush=True)
        return cls(world, state, ends, kept)


def first_weights(run: Path) -> Gradient:
    """Return the weights after the first task of a run."""
    checkpoints = RunFolder(run).checkpoints
    (mark,) = [mark for mark in marks(checkpoints) if (mark.task, mark.phase) == (0, "fitted")]
    weights: Gradient = load(checkpoints, mark)["engine"]["weights"]
    return weights


def learn(task: Task, state: RunState, world: World, count: int) -> list[tuple[Task, int, Gradient]]:
    """Train on a task; return the weights at about `count` steps, denser at the beginning, including the last one."""
    batch, epochs = world.config.train.batch_size, world.config.train.epochs
    num_rows = len(task.samples("train")) + len(state.prior.memory)
    num_steps = -(-num_rows // batch) * epochs[min(task.index, len(epochs) - 1)]
    # Denser where the distance from the anchor grows fastest.
    wanted = {round(num_steps ** ((number + 1) / count)) for number in range(count)} if count > 1 else {num_steps}
    every = max(1, num_steps // 48) if count else 0
    fit(task, state, replace(world, config=changed(world.config, checkpoint={"every": every, "keep": 10_000})))
    checkpoints = world.folder.checkpoints
    found = {mark.step: mark for mark in marks(checkpoints) if mark.task == task.index and mark.phase != "done"}
    chosen = sorted({min(found, key=lambda step: abs(step - one)) for one in wanted}) if count else []
    kept = [(task, step, load(checkpoints, found[step])["engine"]["weights"]) for step in chosen]
    for mark in found.values():
        shutil.rmtree(checkpoints / mark.name)
    return kept


def copied(weights: Mapping[str, Tensor]) -> Gradient:
    """Copy weights, so that training does not change them."""
    return {name: value.detach().clone() for name, value in weights.items()}


# ---------------------------------------------------------------- priors


@dataclass
class Priors:
    """The priors: for each m, one memory, and a quadratic for each kind of curvature.

    worlds: by (kind, m)
    """

    state: RunState
    worlds: Mapping[tuple[str, int], World]
    memories: dict[int, Memory] = field(default_factory=dict)
    quadratics: dict[tuple[str, int], Quadratic | None] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory, options: argparse.Namespace) -> Priors:
        """Make the priors before the first task."""
        world = trajectory.world
        worlds = {}
        for kind in KINDS:
            quadratic = {
                **world.config.prior.quadratic.model_dump(),
                "weight": 0.0 if kind == "none" else 1.0,
                "damping": options.damping,
            }
            prior = {"quadratic": quadratic, "weight": (1.0,), "scale_to_task": False, "replay": 0.0}
            curvature = {
                "kind": "diagonal" if kind == "none" else kind,
                "fisher": options.fisher,
                "fraction": options.fraction,
                **({"sharing": options.sharing} if kind in {"kronecker", "ekfac"} else {}),
            }
            for m in options.memory:
                config = changed(
                    world.config,
                    memory={"size": m},
                    prior={**prior, "temperature": 1.0, "view": "stored"},
                    curvature=curvature,
                )
                worlds[kind, m] = replace(world, config=config)
        return cls(trajectory.state, worlds)

    def consolidate(self, task: Task, weights: Gradient) -> None:
        """Consolidate a task at the weights after it."""
        self.state.engine.put(weights)
        for m in {m for _, m in self.worlds}:
            world = self.worlds["none", m]
            memory = select(task, self.memories.get(m, Memory.empty()), self.state, world)
            for kind in KINDS:
                self.state.prior = Prior(memory, self.quadratics.get((kind, m)))
                self.quadratics[kind, m] = measure(task, memory, weights, self.state, self.worlds[kind, m])
            self.memories[m] = relabel(task, memory, self.state, world)
        print(f"priors of {task.name}", flush=True)


# ---------------------------------------------------------------- the comparison


def compare(trajectory: Trajectory, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per kept weights, kind of curvature and m."""
    priors = Priors.of(trajectory, options)
    engine, comm = trajectory.state.engine, trajectory.world.comm
    learned = 0
    at_anchor: Gradient = {}
    for number, (task, step, kept) in enumerate(trajectory.kept):
        while learned < task.index:
            priors.consolidate(trajectory.world.stream.tasks[learned], trajectory.ends[learned])
            learned += 1
            at_anchor = true_gradient(task, trajectory, options.past)
        engine.put(kept)
        weights = {name: value.detach() for name, value in trainable(engine.module).items()}
        true = true_gradient(task, trajectory, options.past)
        memory = {m: memory_gradient(task, priors.memories[m], priors, m) for m in options.memory}
        for (kind, m), quadratic in priors.quadratics.items():
            found = memory[m]
            if quadratic is not None:
                force = wholes(quadratic.force(weights, comm))
                found = {name: value + force[name] for name, value in found.items()}
            errors, _ = compare_gradients(true, {"total": found}, comm)
            change = {name: value - at_anchor[name] for name, value in true.items()}
            of_change, _ = compare_gradients(change, {"total": found}, comm)
            yield {
                "snapshot": number,
                "task": task.index + 1,
                "step": step,
                "prior": kind,
                "m": m,
                **errors["total"],
                "change_cosine": of_change["total"]["cosine"],
                "change_error": of_change["total"]["relative_error"],
            }


def true_gradient(task: Task, trajectory: Trajectory, share: float) -> Gradient:
    """Return the gradient on all earlier tasks, from a share of their examples that is fixed within a task."""
    world = trajectory.world
    composer = Composer.build(world.config, world.stream, task, Memory.empty(), teacher=None, device=world.comm.device)
    past = np.arange(task.samples("train").start)
    count = max(1, round(share * len(past)))
    used = subset(past, count, world.config.seed, task.index)

    def batches() -> Iterator[tuple[Tensor, Losses]]:
        for samples, pixels in loaded(used, world):
            target, head = composer.hard_targets(torch.from_numpy(samples))
            yield pixels, nats(target, head)

    (found,) = summed_gradients(trajectory.state.engine.module, batches(), world.comm, num_terms=1)
    return {name: value * (len(past) / count) for name, value in found.items()}


def memory_gradient(task: Task, memory: Memory, priors: Priors, m: int) -> Gradient:
    """Return the gradient of the cross-entropy with the memory's soft labels, each example with weight 1."""
    world = priors.worlds["none", m]
    num_classes = len(world.stream.class_names)

    def batches() -> Iterator[tuple[Tensor, Losses]]:
        start = 0
        for samples, pixels in loaded(memory.sample.numpy(), world):
            slots = torch.arange(start, start + len(samples))
            start += len(samples)
            yield pixels, nats(*memory.soft_targets(slots, temperature=1.0, num_classes=num_classes))

    (found,) = summed_gradients(priors.state.engine.module, batches(), world.comm, num_terms=1)
    return found


def nats(target: Tensor, head: Tensor) -> Losses:
    """Return a loss in nats, summed over examples."""
    return lambda logits: [row_nats(logits, target, head).sum()]


def loaded(samples: npt.NDArray[np.int64], world: World) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
    """Yield samples and their pixels in the evaluation view."""
    size = world.stream_batch
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    requests = (Request(part, np.zeros(len(part), dtype=np.uint64)) for part in parts)
    for part, images in zip(parts, world.stream.load(requests), strict=True):
        yield part, images.pixels


# ---------------------------------------------------------------- report


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write a table and a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "reconstruction.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: shortened(value) for key, value in row.items()} for row in rows)
    draw(rows, folder / "reconstruction.png")


def shortened(value: Any) -> Any:
    """Round a number to four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot cosine and relative error along the trajectory, one column per m."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["m"] for row in rows})
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(3.6 * len(sizes), 5.4), sharex=True, sharey="row", squeeze=False
    )
    places = {row["snapshot"]: f"{row['task']}:{row['step']}" for row in rows}
    starts = [number for number in places if number and places[number][0] != places[number - 1][0]]
    for column, m in enumerate(sizes):
        for line, key in enumerate(("cosine", "relative_error")):
            axis = axes[line, column]
            for kind in KINDS:
                if kind == "none" and m == 0:
                    continue
                values = [row[key] for row in rows if (row["prior"], row["m"]) == (kind, m)]
                color = f"C{KINDS.index(kind)}"
                axis.plot(values, color=color, marker="o", markersize=3, linewidth=1.2, label=kind)
            for start in starts:
                axis.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)
        axes[0, column].set_title(f"{m} memory examples a task", fontsize=10)
        axes[1, column].set_yscale("log")
        axes[1, column].axhline(1, color="0.6", linewidth=0.8, linestyle=":")
        shown = list(places)[:: max(1, len(places) // 8)]
        axes[1, column].set_xticks(shown, [places[number] for number in shown], fontsize=7, rotation=45)
    axes[0, 0].set_ylabel("cosine with the true gradient")
    axes[1, 0].set_ylabel("relative error")
    axes[1, 0].set_xlabel("task : step", fontsize=8)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def report(
    rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, training: float, comparing: float, where: Trajectory
) -> None:
    """Print medians, and the machine-readable line."""
    by_key = {(row["snapshot"], row["m"], row["prior"]): row for row in rows}
    pairs = [
        (by_key[snapshot, m, "kronecker"], by_key[snapshot, m, "diagonal"])
        for snapshot, m in dict.fromkeys((row["snapshot"], row["m"]) for row in rows)
    ]
    medians: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        for m in options.memory:
            mine = [row for row in rows if (row["prior"], row["m"]) == (kind, m)]
            medians[f"{kind}/{m}"] = {key: round(median(row[key] for row in mine), 4) for key in MEASURES}
            print(f"{kind:10} m={m:<5}", medians[f"{kind}/{m}"])

    def over_all(kind: str, key: str) -> float:
        return float(median(row[key] for row in rows if row["prior"] == kind))

    print_result(
        "reconstruction",
        {
            "kronecker_beats_diagonal": share(
                [one["relative_error"] < other["relative_error"] for one, other in pairs]
            ),
            "kronecker_beats_diagonal_by_cosine": share([one["cosine"] > other["cosine"] for one, other in pairs]),
            "kronecker_beats_diagonal_in_change": share(
                [one["change_error"] < other["change_error"] for one, other in pairs]
            ),
            "kronecker_beats_diagonal_in_change_by_cosine": share(
                [one["change_cosine"] > other["change_cosine"] for one, other in pairs]
            ),
            **{f"cosine_{kind}": over_all(kind, "cosine") for kind in KINDS},
            **{f"error_{kind}": over_all(kind, "relative_error") for kind in KINDS},
        },
        medians=medians,
        rows=[
            {key: float(shortened(value)) if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        ],
        options={
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key != "config"
        },
        method=where.world.config.method,
        stream=where.world.config.stream.kind,
        model=where.world.config.model.kind,
        seconds={"training": round(training, 1), "comparing": round(comparing, 1)},
    )


def share(wins: Sequence[bool]) -> float:
    """Return the share of cases that were won."""
    return sum(wins) / len(wins)


if __name__ == "__main__":
    main()
