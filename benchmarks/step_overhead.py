"""The cost of a method in a training step: its time over finetune's, with the same number of rows per step.

All methods train one network in one group of gloo processes, in turns, through the trainer's own functions
(Composer.rows, train_step, Quadratic.attach, DdpEngine); images are in memory already. Half of the rows are memory,
half of the memory has true labels, and soft labels are the old model's on the stored view.

    +teacher            the old model labels the student's view instead: one more forward pass of half of the memory
    ewc_penalty_in_loss the usual way, for comparison: 1/2 sum((F + damping)(w - a)^2), one term for any number of
                        tasks, added to every rank's loss before the backward pass (as in Avalanche's online EWC)
    finetune_again      finetune against itself: the noise of this measurement

Memory is half of every step's rows, far more than usual, so that the cost of memory rows is visible.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks._common import interleaved, median_ratio, print_result, spawn
from benchmarks._steps import Steps, make_world, random_stream
from hpccl.config.run import RunConfig
from hpccl.curvature.diagonal import Diagonal
from hpccl.data.rows import Rows
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.build import build_engine
from hpccl.engine.protocols import Engine
from hpccl.models.build import build_model
from hpccl.prior.quadratic import Quadratic
from hpccl.train.consolidate import consolidate
from hpccl.train.loss import weighted_nats
from hpccl.train.state import RunState, World

TASKS, CLASSES = 10, 10
EWC = {"quadratic": {"weight": 1.0}}
MEMORY = {"mix": {"kind": "stratified", "share": 0.5}}
# Prior section of each method; all but the first two have a memory.
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "ewc": EWC,
    "replay": {"replay": 1.0},
    "fr": {"replay": 0.0},
    "fr+replay": {"replay": 0.5},
    "ewc+fr": {**EWC, "replay": 0.0},
    "ewc+replay": {**EWC, "replay": 1.0},
    "ewc+fr+replay": {**EWC, "replay": 0.5},
    "ewc+fr+replay+teacher": {**EWC, "replay": 0.5, "view": "teacher"},
}
PENALTY, AGAIN = "ewc_penalty_in_loss", "finetune_again"


@dataclass(frozen=True)
class Case:
    """A network and its batch; steps are taken `steps` at a time, in `turns` turns."""

    name: str
    model: dict[str, Any]
    size: int
    batch: int
    steps: int
    turns: int


CASES = (
    Case("cifarnet", {"kind": "cifarnet"}, size=32, batch=256, steps=2, turns=15),
    Case("resnet18", {"kind": "timm", "name": "resnet18"}, size=64, batch=64, steps=2, turns=11),
)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, cifarnet only")
    parser.add_argument("--nproc", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    cases = [replace(CASES[0], steps=1, turns=7)] if options.quick else list(CASES)
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        arguments = (options.nproc, folder, cases, options.precision)
        spawn(work, arguments, options.nproc)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    report(found, nproc=options.nproc, precision=options.precision, quick=options.quick)


def report(found: dict[str, dict[str, Any]], **details: Any) -> None:
    """Print median ratios over turns, for each method the worst over models; found: results of `measure`, by model."""
    ratios: dict[str, dict[str, float]] = {}
    for model, measured in found.items():
        rates: dict[str, list[float]] = measured["rates"]
        ratios[model] = {name: median_ratio(rates, "finetune", name) for name in rates if name != "finetune"}
        for name, ratio in ratios[model].items():
            print(f"{model:9} {name:22} {median(rates[name]):9.1f} images/s {ratio:7.3f}")
    noise = {model: round(each.pop(AGAIN), 4) for model, each in ratios.items()}
    names = next(iter(ratios.values()))
    print_result(
        "step_overhead",
        {name: max(each[name] for each in ratios.values()) for name in names},
        time_over_finetune=ratios,
        images_per_second={
            model: {name: round(median(each), 1) for name, each in measured["rates"].items()}
            for model, measured in found.items()
        },
        processor_time_over_finetune={model: measured["cpu"] for model, measured in found.items()},
        finetune_over_itself=noise,
        memory_share=MEMORY["mix"]["share"],
        **details,
    )


def work(rank: int, nproc: int, folder: str, cases: Sequence[Case], precision: str) -> None:
    """Measure every case in one process; rank 0 writes the results."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=nproc)
    try:
        comm = Comm(rank, nproc, torch.device("cpu"))
        found = {case.name: measure(case, precision, comm, Path(folder) / f"{case.name}-{rank}") for case in cases}
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def measure(case: Case, precision: str, comm: Comm, folder: Path) -> dict[str, Any]:
    """Return by method: rates, images per second of every turn; cpu, processor time of all ranks over finetune's."""
    stream = random_stream(case.size, tasks=TASKS, classes=CLASSES, train=case.batch)
    plain = configuration(case, precision, "finetune")
    model = build_model(plain.model, image_shape=stream.image_shape, num_classes=TASKS * CLASSES, seed=0)
    engine = build_engine(plain, model, comm)
    steps: dict[str, Steps] = {}
    for method in METHODS:
        world = make_world(configuration(case, precision, method), comm, stream, folder)
        steps[method] = second_task(world, engine, case.steps)
    steps[PENALTY] = with_penalty(steps["ewc"])
    steps[AGAIN] = replace(steps["finetune"])
    engine.start(num_steps=case.steps * case.turns * len(steps), task=1)
    check_equal(engine, steps["ewc"], steps[PENALTY])
    interleaved(steps, case.turns)
    rates = {name: each.rates[-case.turns :] for name, each in steps.items()}
    cpu = {name: torch.tensor(each.cpu[-case.turns :], dtype=torch.float64) for name, each in steps.items()}
    comm.sum_(list(cpu.values()))
    ratios = {name: round(float((seconds / cpu["finetune"]).median()), 4) for name, seconds in cpu.items()}
    return {"rates": rates, "cpu": ratios}


def configuration(case: Case, precision: str, method: str) -> RunConfig:
    """Return the configuration of a method."""
    memory = {} if method in {"finetune", "ewc"} else {"size": case.batch, **MEMORY}
    return RunConfig.model_validate(
        {
            "model": case.model,
            "train": {"batch_size": case.batch, "epochs": 1},
            "optim": {"name": "adamw", "lr": 1e-5, "schedule": "constant"},
            "memory": memory,
            "prior": METHODS[method],
            # The magnitude of the curvature does not matter here.
            "curvature": {"kind": "diagonal", "fisher": "mc", "fraction": 0.1},
            "engine": {"kind": "ddp", "device": "cpu", "precision": precision, "channels_last": True},
        }
    )


def second_task(world: World, engine: Engine, count: int) -> Steps:
    """Return steps on the second task, after the first one was consolidated."""
    state = RunState(engine)
    if world.config.method != "finetune":
        consolidate(world.stream.tasks[0], state, world)
    return Steps(world, engine, world.stream.tasks[1], state.prior, count)


# ---------------------------------------------------------------- the usual way


def with_penalty(ewc: Steps) -> Steps:
    """Return the same steps with the quadratic in the loss instead of in hooks."""
    quadratic = ewc.prior.quadratic
    assert quadratic is not None, "ewc has a quadratic"
    penalty = Penalty.of(quadratic, ewc.engine.module, divisor=ewc.plan.num_train * ewc.world.comm.size)

    def take(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
        for number, rows in enumerate(batches, start=1):
            last = number == len(batches)
            loss = weighted_nats(engine.forward(rows.pixels, rows.noise, last=last), rows).sum() / num_rows
            engine.backward(loss + penalty(engine.module) if last else loss)
        return engine.step()

    return replace(ewc, prior=replace(ewc.prior, quadratic=None), take=take)


@dataclass(frozen=True)
class Penalty:
    """scale / 2 * sum(strength * (w - anchor)^2) over all parameters, in fp32."""

    strength: dict[str, Tensor]
    anchor: dict[str, Tensor]
    scale: float

    @classmethod
    def of(cls, quadratic: Quadratic, module: nn.Module, *, divisor: int) -> Penalty:
        """Make the penalty of a diagonal quadratic, in the memory layout of the weights, which is the fastest."""
        assert isinstance(quadratic.precision, Diagonal)
        strength = {}
        for name, weight in module.named_parameters():
            strength[name] = torch.empty_like(weight, requires_grad=False)
            strength[name].copy_(quadratic.precision.values[name] + quadratic.damping)
        return cls(strength, wholes(quadratic.anchor), quadratic.weight / divisor)

    def __call__(self, module: nn.Module) -> Tensor:
        """Return the penalty in nats, []."""
        terms = [
            (self.strength[name] * (weight - self.anchor[name]).pow(2)).sum()
            for name, weight in module.named_parameters()
        ]
        return 0.5 * self.scale * torch.stack(terms).sum()


def check_equal(engine: Engine, ewc: Steps, penalty: Steps) -> None:
    """Check that both ways give the same gradient; otherwise the comparison is meaningless."""
    start = engine.gather()
    noise = torch.Generator().manual_seed(0)
    parameters = {name: value.detach() for name, value in engine.module.named_parameters()}
    away = {name: value + 0.3 * torch.randn(value.shape, generator=noise) for name, value in parameters.items()}
    norms = []
    for steps in (ewc, penalty):
        engine.put({**start, **away})
        norms.append(one_norm(steps))
    engine.put(start)
    assert abs(norms[0] / norms[1] - 1) < 1e-2, f"gradient norms differ: {norms}"


def one_norm(steps: Steps) -> float:
    """Return the gradient's norm in one step."""
    taken: list[Tensor] = []

    def take(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
        taken.append(steps.take(engine, batches, num_rows))
        return taken[0]

    replace(steps, count=1, take=take)()
    return float(taken[0])


if __name__ == "__main__":
    main()
