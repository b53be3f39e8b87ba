"""The cost of Kronecker-factored curvature in a training step, relative to the same step without it.

A network is trained for a few steps on a task, its factors are measured, and it is trained on towards another task, so
that w - a is a real displacement. Then steps are taken in turns in one group of gloo processes, through the trainer's
own functions (train_step, Quadratic.attach, DdpEngine), with each world size's own placement of the same factors:

    plain      no quadratic
    exact      dense factors
    truncated  low-rank factors that keep a share of each layer's trace (0.99)
    again      plain against itself: the noise of this measurement

    step_ratio                    exact over plain, resnet18 at 224 px, 32 images per process, 2 processes
    step_ratio_truncated          truncated over plain, resnet18 at 64 px, 64 images per process, 2 processes
    relative_error                |F_truncated (w - a) - F (w - a)| / |F (w - a)| there, over all parameters, including
                                  rounding by --products bf16
    extra_bytes_per_step          largest difference over all cases in the bytes of a step's collectives, exact or
                                  truncated against plain (counted where torch.distributed passes them to its backend)
    factor_bytes_N                of the rank that holds most, exact, resnet18 at 224 px, N processes

Without --small and --large, images are noise with the spectrum of photographs and a pattern for each class. The time of
a step is by the clock; processor_time has the seconds of all processes, which depend less on other load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._common import interleaved, median_ratio, print_result, spawn
from benchmarks._factors import CLASSES, curvature, force, learn, most_held, placed, truncated
from benchmarks._pictures import Pictures
from benchmarks._steps import RandomImages, Steps, make_world, random_stream, traffic
from hpccl.config.run import RunConfig
from hpccl.curvature.kronecker import Kronecker
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, wholes
from hpccl.engine.build import build_engine
from hpccl.engine.protocols import Engine, trainable
from hpccl.kron.factor import LowRank
from hpccl.kron.pair import Pair
from hpccl.memory.store import Memory
from hpccl.models.build import build_model
from hpccl.prior.prior import Prior
from hpccl.prior.quadratic import Quadratic

SMALL = 64  # pixels a side up to which images come from --small; training before the measurement uses at most these
FORMS = ("exact", "truncated")


@dataclass(frozen=True)
class Case:
    """A network and its images per process and step; steps are taken `steps` at a time, in `turns` turns.

    measured: number of images on which the curvature is measured
    """

    name: str
    model: dict[str, Any]
    size: int
    batch: int
    measured: int
    steps: int
    turns: int

    @property
    def title(self) -> str:
        """The name, such as resnet18@64."""
        return f"{self.name}@{self.size}"


RESNET18 = {"kind": "timm", "name": "resnet18"}
RESNET50 = {"kind": "timm", "name": "resnet50"}
CASES = (
    Case("cifarnet", {"kind": "cifarnet"}, size=32, batch=256, measured=1024, steps=2, turns=11),
    Case("resnet18", RESNET18, size=64, batch=64, measured=512, steps=2, turns=9),
    Case("resnet18", RESNET18, size=224, batch=32, measured=128, steps=1, turns=7),
    Case("resnet50", RESNET50, size=64, batch=64, measured=256, steps=1, turns=7),
    Case("resnet50", RESNET50, size=224, batch=16, measured=64, steps=1, turns=5),
)
EXACT, TRUNCATED, PROCESSES = "resnet18@224", "resnet18@64", 2  # of the headlines


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, cifarnet only, 1 and 2 processes")
    parser.add_argument("--case", action="append", choices=[case.title for case in CASES], help="only these")
    parser.add_argument("--nproc", type=int, nargs="+", help="processes of one thread each (default 1 2 4)")
    parser.add_argument("--small", type=Path, help=f"folder, zip or tar of class folders, for sizes up to {SMALL}")
    parser.add_argument("--large", type=Path, help="the same for larger sizes")
    parser.add_argument("--train-steps", type=int, default=60, help="before the curvature is measured")
    parser.add_argument("--away-steps", type=int, default=20, help="after it, towards the other task")
    parser.add_argument("--keep-trace", type=float, nargs="+", default=[0.99], help="a line of its own for each")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="of the network's passes")
    parser.add_argument("--products", choices=("bf16", "fp32"), default="fp32", help="prior.quadratic.products")
    options = parser.parse_args()
    found: dict[float, dict[str, dict[str, Any]]] = {keep: {} for keep in options.keep_trace}
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        for case in cases(options):
            trained = train(case, options)
            for keep, results in found.items():
                prepared = prepare(case, trained, keep, options.products, Path(folder))
                results[case.title] = {**prepared, "processes": {}}
                for nproc in processes(options):
                    results[case.title]["processes"][nproc] = measure(case, nproc, options, Path(folder))
                    show(case.title, results[case.title])
                    # After each case, so that results are not lost if the rest is cut short.
                    kinds = {name: getattr(options, name) for name in ("quick", "precision", "products")}
                    report(results, **kinds, keep_trace=keep)


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select."""
    if options.quick and not options.case:
        return [replace(CASES[0], measured=128, steps=1, turns=5)]
    chosen = [case for case in CASES if not options.case or case.title in options.case]
    return [replace(case, measured=32, steps=1, turns=3) for case in chosen] if options.quick else chosen


def processes(options: argparse.Namespace) -> list[int]:
    """Return the world sizes that the options select."""
    return options.nproc or ([1, 2] if options.quick else [1, 2, 4])


# ---------------------------------------------------------------- the measured network and its factors


@dataclass(frozen=True)
class Trained:
    """A network some steps after its curvature was measured; said: a description of its training."""

    engine: Engine
    anchor: Leaves
    exact: Kronecker
    said: dict[str, Any]


def train(case: Case, options: argparse.Namespace) -> Trained:
    """Train, measure, train on."""
    start = time.perf_counter()
    config = configuration(case, options.precision, case.batch)
    source = options.small if case.size <= SMALL else options.large
    images = Pictures.of(source, case.size, count=max(case.measured, 256), classes=2 * CLASSES)
    model = build_model(config.model, image_shape=(3, case.size, case.size), num_classes=2 * CLASSES, seed=0)
    engine = build_engine(config, model, Comm.solo())
    steps = 3 if options.quick else options.train_steps, 3 if options.quick else options.away_steps
    batch, size = min(case.batch, 64), min(case.size, SMALL)
    train_nats = learn(engine, images, range(CLASSES), steps[0], batch=batch, size=size)
    anchor = wholes(engine.gather())
    trained = time.perf_counter()
    exact = curvature(engine, config, images, case.measured)
    measured = time.perf_counter()
    away_nats = learn(engine, images, range(CLASSES, 2 * CLASSES), steps[1], batch=batch, size=size)
    said = {
        "images": images.source,
        "measured_images": case.measured,
        "steps_before": steps[0],
        "steps_after": steps[1],
        "nats_before": train_nats,
        "nats_after": away_nats,
        "seconds": {"training": trained - start, "curvature": measured - trained},
    }
    return Trained(engine, anchor, exact, said)


def prepare(case: Case, trained: Trained, keep_trace: float, products: str, folder: Path) -> dict[str, Any]:
    """Save weights, anchor and both forms of the factors in `folder`."""
    start = time.perf_counter()
    engine, anchor = trained.engine, trained.anchor
    forms = {"exact": trained.exact, "truncated": truncated(trained.exact, keep_trace)}
    cut = time.perf_counter() - start
    weights = {name: value.detach() for name, value in trainable(engine.module).items()}
    true = force(trained.exact, weights, anchor)
    used = {form: each.rounded() if products == "bf16" else each for form, each in forms.items()}
    errors = {form: float((force(each, weights, anchor) - true).norm() / true.norm()) for form, each in used.items()}
    states = {form: [precision.state_dict(), precision.shard_dict()] for form, precision in forms.items()}
    torch.save({"weights": engine.gather(), "anchor": anchor, **states}, folder / f"{case.title}.pt")
    return {
        **trained.said,
        "relative_error": errors["truncated"],
        "relative_error_exact": errors["exact"],  # the error of rounding alone
        "gflop": {form: sum(block.flops for block in each.blocks) / 1e9 for form, each in forms.items()},
        "factor_bytes": {form: sum(block.num_bytes for block in each.blocks) for form, each in forms.items()},
        "ranks_kept": ranks_kept(forms["truncated"]),
        "seconds": {**trained.said["seconds"], "truncation": cut},
    }


def configuration(case: Case, precision: str, batch: int) -> RunConfig:
    """Return the configuration of a run; the prior's quadratic is made separately."""
    return RunConfig.model_validate(
        {
            "model": case.model,
            "train": {"batch_size": batch, "epochs": 1},
            "optim": {"name": "sgd", "lr": 1e-6, "schedule": "constant"},
            "curvature": {"kind": "kronecker", "batch_size": 64},
            "engine": {"kind": "ddp", "device": "cpu", "precision": precision, "channels_last": True},
        }
    )


def ranks_kept(precision: Kronecker) -> dict[str, list[int]]:
    """Return by layer the outputs, the inputs, and how many eigenvectors of each factor were kept."""
    found = {}
    for block in precision.blocks:
        (term,) = block.terms
        assert isinstance(term, Pair), "measured by KroneckerEstimator"
        ranks = [factor.values.shape[1] if isinstance(factor, LowRank) else factor.size for factor in (term.b, term.a)]
        found[block.layout.name] = [*block.layout.shape[1:], *ranks]
    return found


# ---------------------------------------------------------------- steps


def measure(case: Case, nproc: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure in `nproc` processes; return rank 0's result."""
    (folder / "meet").unlink(missing_ok=True)
    spawn(work, (case, nproc, options, folder), nproc)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def work(rank: int, case: Case, nproc: int, options: argparse.Namespace, folder: Path) -> None:
    """Measure in one process; rank 0 writes the result."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if nproc > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=nproc)
    try:
        found = timed(case, options, Comm(rank, nproc, torch.device("cpu")), folder)
    finally:
        if nproc > 1:
            dist.destroy_process_group()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def timed(case: Case, options: argparse.Namespace, comm: Comm, folder: Path) -> dict[str, Any]:
    """Return by turn seconds per step and processor seconds of all ranks; bytes of a step's collectives, of factors."""
    config = configuration(case, options.precision, case.batch * comm.size)
    stream = replace(
        random_stream(case.size, tasks=2, classes=CLASSES, train=case.batch * comm.size),
        source=RandomImages.of(case.size, count=min(2 * case.batch, 128)),
    )
    world = make_world(config, comm, stream, folder / f"{case.title}-{comm.size}-{comm.rank}")
    model = build_model(config.model, image_shape=stream.image_shape, num_classes=2 * CLASSES, seed=0)
    engine = build_engine(config, model, comm)
    saved = torch.load(folder / f"{case.title}.pt", mmap=True)
    engine.put(saved["weights"])
    forms = {form: placed(saved[form], comm) for form in FORMS}
    plain = Steps(world, engine, stream.tasks[1], Prior(Memory.empty()), case.steps)
    steps = {"plain": plain}
    for form, factors in forms.items():
        # So weak that the weights hardly move; the time is the same.
        quadratic = Quadratic(factors, saved["anchor"], weight=1e-6, damping=1e-3, products=options.products)
        steps[form] = replace(plain, prior=Prior(Memory.empty(), quadratic, saved["anchor"]))
    steps["again"] = replace(plain)
    engine.start(num_steps=case.steps * (case.turns + 3) * len(steps), task=1)
    interleaved(steps, case.turns)
    cpu = {name: torch.tensor(each.cpu[-case.turns :], dtype=torch.float64) for name, each in steps.items()}
    comm.sum_(list(cpu.values()))
    return {
        "rates": {name: each.rates[-case.turns :] for name, each in steps.items()},
        "cpu": {name: (seconds / case.steps).tolist() for name, seconds in cpu.items()},
        "collective_bytes": {name: sum(traffic(each, comm).values()) for name, each in steps.items()},
        "factor_bytes": {form: most_held(factors, comm) for form, factors in forms.items()},
    }


# ---------------------------------------------------------------- report


def ratio(measured: Mapping[str, Any], form: str) -> float:
    """Return the time of a step over the plain step's."""
    return median_ratio(measured["rates"], "plain", form)


def show(title: str, found: Mapping[str, Any]) -> None:
    """Print one line per world size."""
    print(f"{title}: relative error of the truncated pull {found['relative_error']:.2e}; Gflop", found["gflop"])
    for nproc, measured in found["processes"].items():
        seconds = median(measured["cpu"]["plain"]) / nproc
        ratios = "  ".join(f"{form} {ratio(measured, form):.3f}" for form in (*FORMS, "again"))
        print(f"  {nproc} processes: {ratios}  plain {seconds:.3f} s/step  MiB a rank", end=" ")
        print({form: round(each / 2**20, 1) for form, each in measured["factor_bytes"].items()}, flush=True)


def report(found: Mapping[str, Mapping[str, Any]], **details: Any) -> None:
    """Print the machine-readable line; headlines of cases that were not run come from the first one that was."""
    everything = [measured for case in found.values() for measured in case["processes"].values()]
    titles = [title if title in found else next(iter(found)) for title in (EXACT, TRUNCATED)]
    exact, truncated = (found[title] for title in titles)
    sizes = exact["processes"]
    common = [nproc for nproc in sizes if nproc in truncated["processes"]]
    chosen = PROCESSES if PROCESSES in common else common[0]
    extra = [
        measured["collective_bytes"][form] - measured["collective_bytes"]["plain"]
        for measured, form in itertools.product(everything, FORMS)
    ]
    print_result(
        "pull",
        {
            "step_ratio": ratio(sizes[chosen], "exact"),
            "step_ratio_truncated": ratio(truncated["processes"][chosen], "truncated"),
            "relative_error": truncated["relative_error"],
            "extra_bytes_per_step": max(extra, key=abs),
            **{f"factor_bytes_{nproc}": measured["factor_bytes"]["exact"] for nproc, measured in sizes.items()},
        },
        headline_of={"exact": titles[0], "truncated": titles[1], "processes": chosen},
        cases={title: summary(case) for title, case in found.items()},
        **details,
    )


def summary(case: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the values of every turn by medians."""
    sizes = {
        nproc: {
            "step_ratio": {form: round(ratio(measured, form), 4) for form in (*FORMS, "again")},
            "processor_time_ratio": {form: round(time_ratio(measured["cpu"], form), 4) for form in (*FORMS, "again")},
            "plain_processor_seconds": round(median(measured["cpu"]["plain"]), 4),
            "collective_bytes": measured["collective_bytes"],
            "factor_bytes_per_rank": measured["factor_bytes"],
        }
        for nproc, measured in case["processes"].items()
    }
    return {**case, "processes": sizes}


def time_ratio(cpu: Mapping[str, Sequence[float]], form: str) -> float:
    """Return the median over turns of processor time over the plain step's."""
    return median(float(one) / float(other) for one, other in zip(cpu[form], cpu["plain"], strict=True))


if __name__ == "__main__":
    main()
