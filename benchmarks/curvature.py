"""The cost of Kronecker factors: hpccl's measuring pass compared with other libraries and with forward plus backward.

All measure the input and gradient factors of every nn.Linear and nn.Conv2d of one timm model, or of CifarNet (the rest
is frozen), on the same images, on one thread, in turns; results are the least processor time of all turns. Libraries
that are not installed are reported as absent:

    curvlinops  curvlinops-for-pytorch 3.0.1, KFACLinearOperator
    asdl        asdfghjkl 0.1a5, FisherMaker
    nngeometry  nngeometry 0.4, FIM_MonteCarlo with PMatKFAC (no empirical Fisher; not for tokens)

`peak_bytes` is what a run needs beyond the model and its images, each in a process of its own that has everything
imported: the highest resident memory (VmHWM) above that before; freed tensors go back to the system at once.

    mc, empirical      one label per sample, drawn from the model or the true one; every position counts (expand)
    everything         hpccl alone: norms, embeddings and free parameters trainable too, with their exact diagonal
    forward_backward   loss.backward() of the same batches, gradients of the same parameters

`agreement` is the largest difference of a factor from curvlinops' in the empirical case, relative to its norm.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._common import forget_peak, giving_back, memory_status, print_result, spawn
from hpccl.compat import import_timm
from hpccl.curvature.columns import Fisher
from hpccl.curvature.factors import KroneckerPass, Measured
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.models.small import cifarnet

CLASSES = 10
PEERS = {"curvlinops": "curvlinops", "asdl": "asdl", "nngeometry": "nngeometry"}  # name -> what is imported
HEADLINE = "resnet18@64"


@dataclass(frozen=True)
class Case:
    """A timm model, or the paper's CifarNet, and its images; `turns` are measured after one for warm-up."""

    model: str
    pixels: int
    batch: int
    batches: int
    turns: int

    @property
    def name(self) -> str:
        """The name, such as resnet18@64."""
        return f"{self.model}@{self.pixels}"


CASES = (
    Case("cifarnet", 32, batch=128, batches=4, turns=3),
    Case("resnet18", 64, batch=64, batches=8, turns=3),
    Case("resnet18", 224, batch=16, batches=2, turns=2),
    Case("resnet50", 224, batch=8, batches=4, turns=2),
    Case("vit_small_patch16_224", 224, batch=8, batches=4, turns=2),
)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer batches and turns; without --cases, resnet18@64 only"
    )
    parser.add_argument("--cases", nargs="*", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--turns", type=int, help="timed turns after the one that warms up, instead of each case's own")
    parser.add_argument("--batches", type=int, help="batches, instead of each case's own number")
    options = parser.parse_args()
    names = options.cases or ([HEADLINE] if options.quick else [case.name for case in CASES])
    cases = [case for case in CASES if case.name in names]
    cases = [replace(case, batches=2, turns=1) for case in cases] if options.quick else cases
    given = {name: value for name in ("turns", "batches") if (value := getattr(options, name)) is not None}
    cases = [replace(case, **given) for case in cases]
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        found[case.name] = measure(case)
        show(case, found[case.name])
    headline = summary(found[HEADLINE]) if HEADLINE in found else {}
    absent = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    print_result(
        "curvature",
        headline,
        processor_seconds={name: each["seconds"] for name, each in found.items()},
        over_forward_backward={name: ratios(each["seconds"]) for name, each in found.items()},
        speedup_over_fastest_peer={name: speedups(each["seconds"]) for name, each in found.items()},
        peak_bytes={name: each["peak_bytes"] for name, each in found.items()},
        agreement={name: each["agreement"] for name, each in found.items()},
        errors={name: each["errors"] for name, each in found.items()},
        peers={name: "absent" if name in absent else "present" for name in PEERS},
        quick=options.quick,
        cases=[vars(case) for case in cases],
    )


# ---------------------------------------------------------------- the runs


def model_of(case: Case, *, everything: bool = False) -> nn.Module:
    """Build the model in evaluation mode; only linear layers and convolutions are trainable unless `everything` is."""
    torch.manual_seed(0)
    model = network(case).eval()
    for module in model.modules():
        if not everything and not isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model


def network(case: Case) -> nn.Module:
    """Build the case's network."""
    if case.model == "cifarnet":
        return cifarnet((3, case.pixels, case.pixels), CLASSES, dropout=False)
    made: nn.Module = import_timm().create_model(case.model, num_classes=CLASSES)
    return made


def data_of(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return batches of random images and labels."""
    noise = torch.Generator().manual_seed(1)
    shape = (case.batch, 3, case.pixels, case.pixels)
    labels = torch.arange(case.batch) % CLASSES
    return [(torch.randn(shape, generator=noise), labels) for _ in range(case.batches)]


def runs_of(case: Case) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return by name functions that set up the runs that are possible here, each of which returns the timed work.

    Each has a model of its own, because a library that fails half-way leaves its hooks on the modules.
    """
    runs: dict[str, Callable[[], Callable[[], Any]]] = {"forward_backward": partial(_made, case, forward_backward)}
    fishers: tuple[Fisher, ...] = ("mc", "empirical")
    for fisher in fishers:
        runs[f"hpccl/{fisher}"] = partial(_made, case, hpccl, fisher)
        for peer, run in (("curvlinops", curvlinops), ("asdl", asdl), ("nngeometry", nngeometry)):
            if importlib.util.find_spec(PEERS[peer]) is not None and (peer, fisher) != ("nngeometry", "empirical"):
                runs[f"{peer}/{fisher}"] = partial(_made, case, run, fisher)
    runs["hpccl/everything"] = partial(_made, case, hpccl, "mc", everything=True)
    runs["forward_backward/everything"] = partial(_made, case, forward_backward, everything=True)
    return runs


def _made(case: Case, run: Callable[..., Any], *arguments: Any, everything: bool = False) -> Callable[[], Any]:
    return partial(run, model_of(case, everything=everything), data_of(case), *arguments)


def forward_backward(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """Compute the gradients of the mean loss of each batch."""
    for pixels, labels in data:
        model.zero_grad()
        functional.cross_entropy(model(pixels), labels).backward()
    model.zero_grad()


def hpccl(model: nn.Module, data: list[tuple[Tensor, Tensor]], fisher: Fisher) -> Measured:
    """Measure by hpccl, including its check of every route."""
    head = torch.ones(CLASSES, dtype=torch.bool)
    batches = [
        Examples(pixels, labels, head, torch.arange(len(labels)) + len(labels) * number, torch.ones(len(labels)))
        for number, (pixels, labels) in enumerate(data)
    ]
    return KroneckerPass(fisher).run(model, batches, Comm.solo())


def curvlinops(model: nn.Module, data: list[tuple[Tensor, Tensor]], fisher: Fisher) -> Any:
    """Measure by curvlinops, without its determinism tests and counting passes, which are not part of the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from curvlinops import FisherType, KFACLinearOperator
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        data,
        fisher_type=FisherType.MC if fisher == "mc" else FisherType.EMPIRICAL,
        kfac_approx="expand",
        check_deterministic=False,
        num_data=sum(len(labels) for _, labels in data),
        num_per_example_loss_terms=1,
        separate_weight_and_bias=False,
    )
    operator.compute_kronecker_factors()
    return operator


def asdl(model: nn.Module, data: list[tuple[Tensor, Tensor]], fisher: Fisher) -> None:
    """Measure by asdl, on a copy of the model, because it modifies the modules."""
    library = importlib.import_module("asdl")
    config = library.FisherConfig(
        fisher_type=library.FISHER_MC if fisher == "mc" else library.FISHER_EMP,
        fisher_shapes=[library.SHAPE_KRON],
        loss_type=library.LOSS_CROSS_ENTROPY,
        data_size=sum(len(labels) for _, labels in data),
        ignore_modules=[nn.BatchNorm2d, nn.LayerNorm],
    )
    copied = copy.deepcopy(model)
    maker = library.get_fisher_maker(copied, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its kind of hooks once per layer
        for number, (pixels, labels) in enumerate(data):
            logits = maker.setup_model_call(copied, pixels)
            maker.setup_loss_call(functional.cross_entropy, logits, labels)
            maker.forward_and_backward(accumulate=number > 0)


def nngeometry(model: nn.Module, data: list[tuple[Tensor, Tensor]], fisher: Fisher) -> None:
    """Measure by nngeometry, with one draw per sample."""
    metrics, objects = importlib.import_module("nngeometry.metrics"), importlib.import_module("nngeometry.object")
    assert fisher == "mc", "it has no empirical Fisher"
    layers = importlib.import_module("nngeometry.layercollection").LayerCollection()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            layers.add_layer_from_model(model, module)
    pixels, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    images = torch.utils.data.TensorDataset(pixels, labels)
    loader = torch.utils.data.DataLoader(images, batch_size=len(data[0][0]))
    metrics.FIM_MonteCarlo(model, loader, objects.PMatKFAC, trials=1, layer_collection=layers)


# ---------------------------------------------------------------- measuring


def measure(case: Case) -> dict[str, Any]:
    """Return seconds, the least of all turns; peak_bytes beyond model and images, in a process per run; and errors."""
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        file = Path(folder) / "found.json"
        spawn(_time, (case, str(file)))
        found: dict[str, Any] = json.loads(file.read_text())
        found["peak_bytes"] = {}
        with giving_back():
            for name in (name for name in found["seconds"] if not name.endswith("/empirical")):
                spawn(_peak, (case, name, str(file)))
                found["peak_bytes"][name] = json.loads(file.read_text())
    return found


def _time(_: int, case: Case, file: str) -> None:
    torch.set_num_threads(1)
    runs, errors = {name: made() for name, made in runs_of(case).items()}, {}
    seconds: dict[str, float] = {}
    for turn in range(case.turns + 1):
        for name in list(runs):
            start = time.process_time()
            try:
                runs[name]()
            except Exception as error:  # noqa: BLE001 (what another library cannot do is a result)
                errors[name] = _said(error)
                seconds.pop(name, None)
                del runs[name]
                continue
            if turn:
                seconds[name] = min(seconds.get(name, float("inf")), time.process_time() - start)
    result = {"seconds": seconds, "errors": errors, "agreement": _agreement(case)}
    Path(file).write_text(json.dumps(result))


def _peak(_: int, case: Case, name: str, file: str) -> None:
    torch.set_num_threads(1)
    tiny = replace(case, batch=2, batches=1)
    runs_of(tiny)[name]()()  # loads code
    run = runs_of(case)[name]()
    gc.collect()
    before = memory_status()["VmRSS"]
    forget_peak()
    run()
    Path(file).write_text(json.dumps(memory_status()["VmHWM"] - before))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _agreement(case: Case) -> float | str:
    if importlib.util.find_spec(PEERS["curvlinops"]) is None:
        return "absent"
    data = data_of(case)[:1]
    found = hpccl(model_of(case), data, "empirical")
    try:
        other = curvlinops(model_of(case), data, "empirical")
    except Exception as error:  # noqa: BLE001 (the same)
        return _said(error)
    worst = 0.0
    for name, block in found.blocks.items():
        pairs = ((block.a, other._input_covariances[name]), (block.b, other._gradient_covariances[name]))
        for mine, theirs in pairs:
            worst = max(worst, float((mine[0] / case.batch - theirs).norm() / theirs.norm()))
    return worst


# ---------------------------------------------------------------- figures


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each run's time over forward plus backward of the same parameters."""
    found = {}
    for name, value in seconds.items():
        base = seconds["forward_backward/everything" if name.endswith("everything") else "forward_backward"]
        found[name] = round(value / base, 3)
    return found


def speedups(seconds: Mapping[str, float]) -> dict[str, float | str]:
    """Return by kind of Fisher the fastest other library's time over ours."""
    found: dict[str, float | str] = {}
    for fisher in ("mc", "empirical"):
        others = [seconds[f"{peer}/{fisher}"] for peer in PEERS if f"{peer}/{fisher}" in seconds]
        found[fisher] = round(min(others) / seconds[f"hpccl/{fisher}"], 3) if others else "absent"
    return found


def summary(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the headline figures, each the worse of the two kinds of Fisher."""
    over = ratios(found["seconds"])
    headline = {"over_forward_backward": max(over["hpccl/mc"], over["hpccl/empirical"])}
    fastest = [value for value in speedups(found["seconds"]).values() if isinstance(value, float)]
    return headline | ({"speedup_over_fastest_peer": min(fastest)} if fastest else {})


def show(case: Case, found: Mapping[str, Any]) -> None:
    """Print one line per run."""
    over = ratios(found["seconds"])
    for name, seconds in found["seconds"].items():
        peak = f"{found['peak_bytes'][name] / 2**20:8.0f} MiB" if name in found["peak_bytes"] else ""
        print(f"{case.name:28} {name:28} {seconds:8.3f} s {over[name]:7.2f} x forward+backward {peak}", flush=True)
    for name, error in found["errors"].items():
        print(f"{case.name:28} {name:28} {error}")


if __name__ == "__main__":
    main()
