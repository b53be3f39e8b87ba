"""The cost of the method on each engine, relative to plain training with as many rows per step on the same engine.

Every engine trains one network in gloo processes of one thread, 32 rows per process and step at 128 px, through the
trainer's own functions (Composer.rows, train_step, Quadratic.attach):

    finetune            new images only
    exact               ewc+fr+replay with Kronecker factors as measured; half of the rows are memory, half of which
                        have true labels, and soft labels are the old model's on the stored view (no teacher)
    truncated           the same with low-rank factors that keep a share of each layer's trace (0.99)
    again               finetune against itself: the noise of this measurement

Steps are taken in turns. The factors are those of a briefly trained network; they are measured once and placed anew for
each number of processes. For each engine and number of processes:

    time                a step's seconds over finetune's: by the clock, and processor seconds of all ranks
    pull_share          operations of the pull on the rank that has most, over those of forward + backward of its rows
                        (torch.utils.flop_counter)
    collective_bytes    of a step, all ranks together, by collective: counted where torch.distributed passes tensors to
                        its backend; a collective's bytes are those of the whole tensor
    peak_bytes          of the rank that needs most, each method in processes of its own: the highest resident memory
                        during steps (VmHWM, reset after the first step) above what the process had before the network
                        was built, everything imported; freed tensors go back to the system at once
    tensor_bytes        of that, what tensors hold after a step: weights, gradients (ddp, zero-0), optimiser state,
                        anchor, factors; zero-3 reserves a buffer of 2 GB for gradients (DeepSpeed's
                        reduce_bucket_size), of which only the part that is used is resident

    worst_overhead        by the clock, truncated over finetune, 2 processes, the worst engine and network
    worst_overhead_exact  the same for exact factors
    extra_bytes_per_step  largest difference that exact or truncated make to the bytes of collectives, over everything
    zero3_memory_falls    peak_bytes of 4 processes over those of 2, the worst network and method; also for fsdp2
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._common import (
    forget_peak,
    giving_back,
    interleaved,
    median_ratio,
    memory_status,
    print_result,
    spawn,
)
from benchmarks._factors import CLASSES, curvature, force, learn, most_held, placed, truncated
from benchmarks._pictures import Pictures
from benchmarks._steps import RandomImages, Steps, make_world, random_stream, traffic, usual_step
from hpccl.config.run import RunConfig
from hpccl.curvature.kronecker import Kronecker
from hpccl.data.rows import Rows
from hpccl.data.stream import ImageStream
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves
from hpccl.engine.build import build_engine
from hpccl.engine.protocols import Engine, trainable
from hpccl.memory.store import Memory
from hpccl.models.build import build_model
from hpccl.prior.prior import Prior
from hpccl.prior.quadratic import Quadratic
from hpccl.train.consolidate import select
from hpccl.train.soft_labels import relabel
from hpccl.train.state import RunState

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
}
METHODS = ("finetune", "exact", "truncated")
AGAIN = "again"
WEIGHT = 1e-6  # so weak that the weights stay where they are; the time is the same
PRIOR: dict[str, Any] = {"replay": 0.5, "quadratic": {"weight": WEIGHT}}
MIX = {"kind": "stratified", "share": 0.5}
PROCESSES = 2  # number of processes of the headlines
WARM = 2  # calls before the measured ones: one for warm-up, one whose operations are counted


@dataclass(frozen=True)
class Case:
    """A network, its side in pixels and its rows per process and step; steps are taken one at a time, in `turns`.

    measured: number of images on which the curvature is measured
    """

    name: str
    model: dict[str, Any]
    size: int
    batch: int
    measured: int
    turns: int


VIT = {"kind": "timm", "name": "vit_small_patch16_224", "options": {"img_size": 128}}
CASES = (
    Case("resnet18", {"kind": "timm", "name": "resnet18"}, size=128, batch=32, measured=64, turns=7),
    Case("vit_small_patch16_224", VIT, size=128, batch=32, measured=64, turns=7),
)
QUICK = Case("cifarnet", {"kind": "cifarnet"}, size=32, batch=32, measured=32, turns=5)


@dataclass(frozen=True)
class Run:
    """The parameters of a measurement; memory: the one method whose memory is measured; None: all are timed."""

    case: Case
    engine: str
    nproc: int
    precision: str
    per_class: int
    folder: Path
    memory: str | None = None


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="cifarnet at 32 px, ddp and fsdp2, 2 processes, few turns")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), help="only these")
    parser.add_argument("--model", nargs="+", choices=[case.name for case in (*CASES, QUICK)], help="only these")
    parser.add_argument("--nproc", type=int, nargs="+", help="processes of one thread each (default 2 4)")
    parser.add_argument("--turns", type=int, help="that count")
    parser.add_argument("--train-steps", type=int, default=20, help="before the curvature is measured")
    parser.add_argument("--away-steps", type=int, default=5, help="after it, towards the other task")
    parser.add_argument("--keep-trace", type=float, default=0.99)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    options = parser.parse_args()
    engines = options.engine or (["ddp", "fsdp2"] if options.quick else list(ENGINES))
    sizes = options.nproc or ([2] if options.quick else [2, 4])
    methods = ("truncated",) if options.quick else METHODS  # whose memory is measured
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        for case in cases(options):
            # A number with which an epoch consists of full batches for any number of processes.
            run = Run(case, "ddp", 1, options.precision, case.batch * math.lcm(*sizes), Path(folder))
            found[case.name] = {**prepare(run, options), "engines": {}}
            for nproc, engine in itertools.product(sizes, engines):
                measured = measure(replace(run, engine=engine, nproc=nproc), methods)
                found[case.name]["engines"].setdefault(engine, {})[nproc] = measured
                show(case.name, engine, {nproc: measured}, found[case.name])
                # After each case, so that results are not lost if the rest is cut short.
                report(found, quick=options.quick, precision=options.precision, keep_trace=options.keep_trace, mix=MIX)


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select."""
    names = options.model or ([QUICK.name] if options.quick else [case.name for case in CASES])
    chosen = [case for case in (*CASES, QUICK) if case.name in names]
    return [replace(case, turns=options.turns or case.turns) for case in chosen]


def configuration(run: Run, method: str) -> RunConfig:
    """Return the configuration of a method; the quadratic is made from saved factors."""
    plain = method == "finetune"
    rows = run.case.batch * run.nproc
    return RunConfig.model_validate(
        {
            "model": run.case.model,
            "train": {"batch_size": rows, "epochs": 1},
            "optim": {"name": "adamw", "lr": 1e-6, "schedule": "constant"},
            "memory": {} if plain else {"size": run.case.batch, "mix": MIX},
            "prior": {} if plain else PRIOR,
            "curvature": {"kind": "kronecker", "batch_size": 32},
            "engine": {**ENGINES[run.engine], "device": "cpu", "precision": run.precision, "channels_last": True},
        }
    )


def stream_of(run: Run) -> ImageStream:
    """Make two tasks of random images."""
    stream = random_stream(run.case.size, tasks=2, classes=CLASSES, train=run.per_class)
    return replace(stream, source=RandomImages.of(run.case.size, count=2 * run.case.batch))


def network(run: Run) -> nn.Module:
    """Build the network, the same on every rank."""
    size = run.case.size
    config = configuration(run, "finetune").model
    return build_model(config, image_shape=(3, size, size), num_classes=2 * CLASSES, seed=0)


# ---------------------------------------------------------------- preparation, done once


def prepare(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, choose memory, train on; save weights, anchor, memory and both forms of the factors."""
    start = time.perf_counter()
    case, config = run.case, configuration(run, "exact")
    images = Pictures.of(None, case.size, count=max(case.measured, 128), classes=2 * CLASSES)
    engine = build_engine(config, network(run), Comm.solo())
    learn(engine, images, range(CLASSES), options.train_steps, batch=case.batch, size=case.size)
    anchor = dict(engine.gather())
    exact = curvature(engine, config, images, case.measured)
    forms = {"exact": exact, "truncated": truncated(exact, options.keep_trace)}
    memory = memory_of(run, engine)
    learn(engine, images, range(CLASSES, 2 * CLASSES), options.away_steps, batch=case.batch, size=case.size)
    weights = {name: value.detach() for name, value in trainable(engine.module).items()}
    pulls = {form: force(factors, weights, anchor) for form, factors in forms.items()}
    states = {form: [factors.state_dict(), factors.shard_dict()] for form, factors in forms.items()}
    saved = {"weights": engine.gather(), "anchor": anchor, "memory": memory.tensors(), **states}
    torch.save(saved, run.folder / f"{case.name}.pt")
    return {
        "parameters": sum(value.numel() for value in weights.values()),
        "rows": case.batch,
        "size": case.size,
        "measured_images": case.measured,
        "relative_error": float((pulls["truncated"] - pulls["exact"]).norm() / pulls["exact"].norm()),
        "forward_backward_gflop": flops(engine.module, images.pixels[: case.batch]) / 1e9,
        "pull_gflop": {form: sum(block.flops for block in each.blocks) / 1e9 for form, each in forms.items()},
        "factor_bytes": {form: sum(block.num_bytes for block in each.blocks) for form, each in forms.items()},
        "seconds_of_preparation": round(time.perf_counter() - start, 1),
    }


def memory_of(run: Run, engine: Engine) -> Memory:
    """Make the memory as it is after the first task."""
    world = make_world(configuration(run, "exact"), Comm.solo(), stream_of(run), run.folder / run.case.name)
    task, state = world.stream.tasks[0], RunState(engine)
    return relabel(task, select(task, Memory.empty(), state, world), state, world)


def flops(model: nn.Module, pixels: Tensor) -> int:
    """Count the operations of forward + backward."""
    model.eval()  # so that nothing needs random numbers
    with FlopCounterMode(display=False) as counter:
        model(pixels).sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


# ---------------------------------------------------------------- processes


def measure(run: Run, methods: Sequence[str]) -> dict[str, Any]:
    """Measure the times of all methods and the memory of some."""
    found = in_processes(run)
    with giving_back():
        held = {method: in_processes(replace(run, memory=method)) for method in methods}
    keys = ("peak_bytes", "tensor_bytes")
    return found | {key: {method: each[key] for method, each in held.items()} for key in keys}


def in_processes(run: Run) -> dict[str, Any]:
    """Run the measurement in processes; return rank 0's result."""
    (run.folder / "meet").unlink(missing_ok=True)
    spawn(work, (run,), run.nproc)
    found: dict[str, Any] = json.loads((run.folder / "found.json").read_text())
    return found


def work(rank: int, run: Run) -> None:
    """Measure in one process; rank 0 writes the result."""
    torch.set_num_threads(1)
    # DeepSpeed calls torch's collectives by their old names, once a layer.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if run.nproc > 1:
        dist.init_process_group("gloo", init_method=f"file://{run.folder}/meet", rank=rank, world_size=run.nproc)
    comm = Comm(rank, run.nproc, torch.device("cpu"))
    try:
        found = timed(run, comm) if run.memory is None else held(run, run.memory, comm)
    finally:
        if run.nproc > 1:
            dist.destroy_process_group()
    if rank == 0:
        (run.folder / "found.json").write_text(json.dumps(found))


def steps_of(run: Run, methods: Sequence[str], comm: Comm, stream: ImageStream) -> tuple[Engine, dict[str, Steps]]:
    """Return an engine with the prepared weights, and the steps of each method."""
    engine = build_engine(configuration(run, methods[0]), network(run), comm)
    saved = torch.load(run.folder / f"{run.case.name}.pt", mmap=True)
    engine.put(saved["anchor"])
    anchor = engine.gather()
    engine.put(saved["weights"])
    steps = {}
    for method in methods:
        folder = run.folder / f"{run.case.name}-{run.engine}-{run.nproc}-{comm.rank}"
        world = make_world(configuration(run, method), comm, stream, folder)
        steps[method] = Steps(world, engine, stream.tasks[1], prior_of(method, saved, anchor, comm), count=1)
    return engine, steps


def prior_of(method: str, saved: Mapping[str, Any], anchor: Leaves, comm: Comm) -> Prior:
    """Make the prior of the first task from the saved state."""
    if method == "finetune":
        return Prior(Memory.empty())
    memory = Memory.from_state_dict({name: value.clone() for name, value in saved["memory"].items()})
    quadratic = Quadratic(placed(saved[method], comm), anchor, weight=WEIGHT, damping=1e-3)
    return Prior(memory, quadratic, anchor)


# ---------------------------------------------------------------- time and traffic


def timed(run: Run, comm: Comm) -> dict[str, Any]:
    """Return by turn the seconds per step, by the clock and in processor time of all ranks; bytes; operations."""
    turns = run.case.turns
    engine, steps = steps_of(run, METHODS, comm, stream_of(run))
    steps[AGAIN] = replace(steps["finetune"])
    factors = {name: factors_of(each) for name, each in steps.items() if name in METHODS[1:]}
    engine.start(num_steps=(turns + WARM) * len(steps), task=1)
    interleaved(steps, turns)
    rows = {len(each.plan.batch(step)) for each in steps.values() for step in range(each.plan.num_steps)}
    assert rows == {run.case.batch * run.nproc}, f"methods must have equal rows a step, not {rows}"
    cpu = {name: torch.tensor(each.cpu[-turns:], dtype=torch.float64) for name, each in steps.items()}
    comm.sum_(list(cpu.values()))
    sent = {name: traffic(each, comm) for name, each in steps.items() if name != AGAIN}
    return {
        "rates": {name: each.rates[-turns:] for name, each in steps.items()},
        "cpu": {name: seconds.tolist() for name, seconds in cpu.items()},
        "collective_bytes": sent,
        "pull_flops": {
            name: comm.max(int(sum(block.flops for block in each.blocks))) for name, each in factors.items()
        },
        "factor_bytes": {name: most_held(each, comm) for name, each in factors.items()},
    }


def factors_of(steps: Steps) -> Kronecker:
    """Return this rank's factors."""
    quadratic = steps.prior.quadratic
    assert quadratic is not None
    assert isinstance(quadratic.precision, Kronecker)
    return quadratic.precision


# ---------------------------------------------------------------- memory


def held(run: Run, method: str, comm: Comm) -> dict[str, Any]:
    """Return bytes above those before the network was built, with everything imported, of the rank that needs most."""
    stream = stream_of(run)
    warm_up(run, comm)
    gc.collect()
    before, tensors_before = memory_status()["VmRSS"], tensor_bytes()
    engine, steps = steps_of(run, [method], comm, stream)
    gc.collect()  # unmaps what was read from the file
    count = 3
    engine.start(num_steps=count, task=1)
    done: list[int] = []
    found: dict[str, int] = {}

    def take(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
        if len(done) == 1:  # the optimiser's state exists now
            forget_peak()
        norm = usual_step(engine, batches, num_rows)
        done.append(num_rows)
        if len(done) == count:
            found["peak_bytes"] = memory_status()["VmHWM"] - before
            found["tensor_bytes"] = tensor_bytes() - tensors_before
        return norm

    replace(steps[method], count=count, take=take)()
    return {key: comm.max(number) for key, number in found.items()}


def warm_up(run: Run, comm: Comm) -> None:
    """Load code: run a pass of the network, and an engine around something tiny."""
    network(run).eval()(torch.randn(2, 3, run.case.size, run.case.size)).sum().backward()
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    engine = build_engine(configuration(run, "finetune"), tiny, comm)
    engine.start(num_steps=1, task=0)
    logits = engine.forward(torch.randn(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64))
    engine.backward(logits.sum())
    engine.step()


def tensor_bytes() -> int:
    """Return the bytes of all tensor storages that Python can reach."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                # A DTensor's local part is another object.
                if tensor is not None and tensor.device.type == "cpu" and not hasattr(tensor, "to_local"):
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------- report


def show(name: str, engine: str, measured: Mapping[int, Any], case: Mapping[str, Any]) -> None:
    """Print one line per number of processes and method."""
    for nproc, found in measured.items():
        small = {each: f"{number / 2**20:.1f}" for each, number in sent_by_kind(found, nproc).items()}
        print(f"{name} {engine}, {nproc} processes: MiB of a rank's collectives {small}")
        for method in (*METHODS, AGAIN):
            seconds = case["rows"] * nproc / median(found["rates"][method])
            ratio, cpu = clock_ratio(found, method), processor_ratio(found, method)
            share = f"pull {pull_share(found, case, method):6.1%}" if method in found["pull_flops"] else " " * 11
            line = f"  {method:10} {seconds:7.3f} s/step {ratio:6.3f} clock {cpu:6.3f} processor  {share}"
            if method in found["peak_bytes"]:
                peak, tensors = (found[key][method] / 2**20 for key in ("peak_bytes", "tensor_bytes"))
                line += f"  {peak:7.0f} MiB peak {tensors:7.0f} MiB tensors"
            print(line, flush=True)


def clock_ratio(found: Mapping[str, Any], method: str) -> float:
    """Return the time of a step over finetune's."""
    return median_ratio(found["rates"], "finetune", method)


def processor_ratio(found: Mapping[str, Any], method: str) -> float:
    """Return the processor seconds of a step over finetune's."""
    return median_ratio(found["cpu"], method, "finetune")


def pull_share(found: Mapping[str, Any], case: Mapping[str, Any], method: str) -> float:
    """Return the operations of the pull over those of forward + backward, on the rank with the largest pull."""
    return float(found["pull_flops"][method] / 1e9 / case["forward_backward_gflop"])


def sent_by_kind(found: Mapping[str, Any], nproc: int) -> dict[str, float]:
    """Return the bytes that finetune sends per rank, by collective."""
    return {kind: number / nproc for kind, number in found["collective_bytes"]["finetune"].items()}


def report(found: Mapping[str, Mapping[str, Any]], **details: Any) -> None:
    """Print the machine-readable line."""
    each = [
        (name, engine, nproc, measured)
        for name, case in found.items()
        for engine, sizes in case["engines"].items()
        for nproc, measured in sizes.items()
    ]
    chosen = PROCESSES if any(nproc == PROCESSES for _, _, nproc, _ in each) else each[0][2]
    here = {(name, engine): measured for name, engine, nproc, measured in each if nproc == chosen}
    worst = {method: max(here, key=lambda key: clock_ratio(here[key], method)) for method in METHODS[1:]}
    print_result(
        "engines",
        {
            "worst_overhead": clock_ratio(here[worst["truncated"]], "truncated"),
            "worst_overhead_exact": clock_ratio(here[worst["exact"]], "exact"),
            "extra_bytes_per_step": max((extra(measured) for *_, measured in each), key=abs),
            **falls(found),
        },
        worst={method: {"model": name, "engine": engine} for method, (name, engine) in worst.items()},
        processes_of_the_headlines=chosen,
        cases={name: summary(case) for name, case in found.items()},
        **details,
    )


def extra(measured: Mapping[str, Any]) -> int:
    """Return the larger difference from finetune's bytes."""
    totals: dict[str, int] = {method: sum(sent.values()) for method, sent in measured["collective_bytes"].items()}
    return max((totals[method] - totals["finetune"] for method in METHODS[1:]), key=abs)


def falls(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the peak memory of 4 processes over that of 2, where both were measured."""
    headline: dict[str, float] = {}
    for key, engine in (("zero3_memory_falls", "zero-3"), ("fsdp2_memory_falls", "fsdp2")):
        sizes = [case["engines"].get(engine, {}) for case in found.values()]
        ratios = [
            each[4]["peak_bytes"][method] / each[2]["peak_bytes"][method]
            for each in sizes
            if 2 in each and 4 in each
            for method in each[2]["peak_bytes"]
        ]
        headline |= {key: max(ratios)} if ratios else {}
    return headline


def summary(case: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the values of every turn by medians."""

    def each(measured: Mapping[str, Any], nproc: int) -> dict[str, Any]:
        ratios: dict[str, Callable[[Mapping[str, Any], str], float]] = {
            "clock_ratio": clock_ratio,
            "processor_ratio": processor_ratio,
        }
        return {
            "seconds": {name: round(case["rows"] * nproc / median(of), 4) for name, of in measured["rates"].items()},
            "processor_seconds": {name: round(median(of), 4) for name, of in measured["cpu"].items()},
            **{key: {name: round(of(measured, name), 4) for name in measured["cpu"]} for key, of in ratios.items()},
            "pull_share": {name: round(pull_share(measured, case, name), 4) for name in measured["pull_flops"]},
            "extra_bytes": extra(measured),
            "bytes_over_parameters": {
                kind: round(number / (4 * case["parameters"]), 4)
                for kind, number in sent_by_kind(measured, nproc).items()
            },
            **{key: measured[key] for key in ("collective_bytes", "factor_bytes", "peak_bytes", "tensor_bytes")},
        }

    engines = {
        engine: {nproc: each(measured, nproc) for nproc, measured in sizes.items()}
        for engine, sizes in case["engines"].items()
    }
    return {**case, "engines": engines}


if __name__ == "__main__":
    main()
