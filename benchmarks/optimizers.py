"""The cost of an optimiser: a step's time over SGD's and AdamW's with equal batches, and bytes of state per weight.

Each optimiser trains a network of its own, in turns, through the trainer's own step in one process; images are in
memory already. AdamW and SGD are timm's, with fused kernels as in hpccl. `adamw_again` is AdamW against itself: the
noise of this measurement. Processor time is reported as well, which depends less on other load on the machine.
Aims: ivon at most 1.10 times AdamW (one draw), vogn at most 2 times a plain step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import interleaved, median_ratio, print_result
from benchmarks._steps import Steps, make_world, random_stream, usual_step
from hpccl.config.run import RunConfig
from hpccl.curvature.online import watch_squares
from hpccl.data.rows import Rows
from hpccl.dist.comm import Comm
from hpccl.engine.build import build_engine
from hpccl.engine.protocols import Engine
from hpccl.memory.store import Memory
from hpccl.models.build import build_model
from hpccl.prior.prior import Prior

CLASSES = 10
OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "adamw": {"name": "adamw"},
    "adamw_again": {"name": "adamw"},
    "ivon": {"kind": "ivon"},
    "sam": {"kind": "sam"},
    "bsam": {"kind": "bsam"},
    "vogn": {"kind": "vogn"},
    "soba": {"kind": "soba"},
    "lie_additive": {"kind": "lie", "group": {"kind": "additive"}},
    "lie_multiplicative": {"kind": "lie", "group": {"kind": "multiplicative"}},
    "lie_affine": {"kind": "lie", "group": {"kind": "affine"}},
}


@dataclass(frozen=True)
class Case:
    """A network and its batch; steps are taken one at a time, in `turns` turns."""

    name: str
    model: dict[str, Any]
    size: int
    batch: int
    turns: int


CASES = (
    Case("cifarnet", {"kind": "cifarnet"}, size=32, batch=256, turns=15),
    Case("resnet18", {"kind": "timm", "name": "resnet18"}, size=64, batch=64, turns=11),
)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, cifarnet only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [replace(CASES[0], batch=64, turns=5)] if options.quick else list(CASES)
    found = {case.name: measure(case, options.device, options.precision) for case in cases}
    report(found, device=options.device, precision=options.precision, quick=options.quick)


def report(found: dict[str, dict[str, Any]], **details: Any) -> None:
    """Print median ratios over turns, for each optimiser the worst over models."""
    over: dict[str, dict[str, dict[str, float]]] = {"sgd": {}, "adamw": {}}
    for model, measured in found.items():
        rates: dict[str, list[float]] = measured["rates"]
        for base, ratios in over.items():
            ratios[model] = {name: median_ratio(rates, base, name) for name in rates if name != base}
        for name, own in rates.items():
            print(
                f"{model:9} {name:18} {median(own):9.1f} images/s {over['sgd'][model].get(name, 1):7.3f} x sgd "
                f"{over['adamw'][model].get(name, 1):7.3f} x adamw {measured['bytes'][name]:6.2f} bytes a weight"
            )
    print_result(
        "optimizers",
        {
            "ivon_over_adamw": max(each["ivon"] for each in over["adamw"].values()),
            "vogn_over_sgd": max(each["vogn"] for each in over["sgd"].values()),
            "sam_over_sgd": max(each["sam"] for each in over["sgd"].values()),
        },
        time_over=over,
        processor_time_over_adamw={model: measured["cpu"] for model, measured in found.items()},
        state_bytes_per_weight={model: measured["bytes"] for model, measured in found.items()},
        **details,
    )


def measure(case: Case, device: str, precision: str) -> dict[str, Any]:
    """Return by optimiser: rates, images per second of every turn; cpu, processor time over AdamW's; bytes of state."""
    stream = random_stream(case.size, tasks=1, classes=CLASSES, train=case.batch)
    comm = Comm(0, 1, torch.device(device))
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        steps = {}
        for name, optim in OPTIMISERS.items():
            config = configuration(case, optim, device, precision)
            model = build_model(config.model, image_shape=stream.image_shape, num_classes=CLASSES, seed=0)
            engine = build_engine(config, model, comm)
            world = make_world(config, comm, stream, Path(folder) / name)
            take = watched_step if optim.get("kind") == "vogn" else synchronised_step
            steps[name] = Steps(world, engine, stream.tasks[0], Prior(Memory.empty()), 1, take)
            engine.start(num_steps=case.turns + 1, task=0, num_train=steps[name].plan.num_train)
        rates = interleaved(steps, case.turns)
        cpu = {name: torch.tensor(each.cpu[-case.turns :]) for name, each in steps.items()}
        return {
            "rates": rates,
            "cpu": {name: round(float((seconds / cpu["adamw"]).median()), 4) for name, seconds in cpu.items()},
            "bytes": {name: state_bytes(each.engine) for name, each in steps.items()},
        }


def configuration(case: Case, optim: dict[str, Any], device: str, precision: str) -> RunConfig:
    """Return the configuration of a run with an optimiser."""
    return RunConfig.model_validate(
        {
            "model": case.model,
            "train": {"batch_size": case.batch, "epochs": 1},
            "optim": {"lr": 1e-5, "schedule": "constant", **optim},
            "engine": {"kind": "ddp", "device": device, "precision": precision, "channels_last": True},
        }
    )


def synchronised_step(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
    """Take a step as in training, and wait for its end."""
    norm = usual_step(engine, batches, num_rows)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return norm


def watched_step(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
    """Take a step with per-example squares; in training, the hooks are set once per task."""
    stop = watch_squares(engine.module, engine.add_squares)
    try:
        return synchronised_step(engine, batches, num_rows)
    finally:
        stop()


def state_bytes(engine: Engine) -> float:
    """Return the bytes per weight that the optimiser keeps between steps."""
    moments = engine.state_dict()["optimizer"]["moments"]
    kept = sum(value.nbytes for each in moments.values() for value in each.values() if isinstance(value, Tensor))
    return float(kept / sum(value.numel() for value in engine.like.values()))


if __name__ == "__main__":
    main()
