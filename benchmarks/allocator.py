"""The benefit of keeping the memory of freed tensors in a process (hpccl.dist.allocator), on a CPU.

Training steps and passes without gradients of the same network, with the C library's default settings and with hpccl's,
each in processes of their own, started in turns; one thread. Measured in processor time, which depends less on other
load.

    speedup_training    images per second with hpccl's settings over without, the least over networks
    speedup_inference   the same for passes without gradients
    peak_ratio          peak resident memory with hpccl's settings over without, the most over networks
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks._common import forget_peak, memory_status, print_result, spawn
from hpccl.compat import import_timm
from hpccl.dist.allocator import keep_freed_memory
from hpccl.models.small import cifarnet

HABITS = ("own", "kept")


@dataclass(frozen=True)
class Case:
    """A network, the side of its images in pixels, and the batch size."""

    network: str
    size: int
    batch: int

    def build(self) -> nn.Module:
        """Build the network with random weights."""
        if self.network == "cifarnet":
            return cifarnet((3, self.size, self.size), 60, dropout=False)
        more = {"img_size": self.size} if self.network.startswith("vit") else {}
        model: nn.Module = import_timm().create_model(self.network, num_classes=100, **more)
        return model


CASES = (
    Case("cifarnet", 32, 256),
    Case("resnet18", 64, 128),
    Case("resnet18", 224, 16),
    Case("vit_small_patch16_224", 224, 16),
)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="cifarnet, one turn")
    options = parser.parse_args()
    cases, turns = (CASES[:1], 1) if options.quick else (CASES, 3)
    details = {f"{case.network}@{case.size}": compare(case, turns) for case in cases}
    for name, found in details.items():
        print(name, *(f"{what} {value:.3f}" for what, value in found["ratio"].items()))
    ratios = [found["ratio"] for found in details.values()]
    headline = {
        "speedup_training": min(ratio["training"] for ratio in ratios),
        "speedup_inference": min(ratio["inference"] for ratio in ratios),
        "peak_ratio": max(ratio["peak"] for ratio in ratios),
    }
    print_result("allocator", headline, cases=details)


def compare(case: Case, turns: int) -> dict[str, Any]:
    """Return rates and peaks by allocator setting, medians over turns; ratio: hpccl's over the C library's default."""
    runs: dict[str, list[dict[str, float]]] = {habit: [] for habit in HABITS}
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        for _ in range(turns):
            for habit in HABITS:
                file = Path(folder) / "result.json"
                spawn(measure, (case, habit == "kept", str(file)))
                runs[habit].append(json.loads(file.read_text()))
    what = ("training", "inference", "peak")
    found = {habit: {key: median(run[key] for run in each) for key in what} for habit, each in runs.items()}
    return {**found, "ratio": {key: found["kept"][key] / found["own"][key] for key in what}}


def measure(_: int, case: Case, kept: bool, file: str) -> None:
    """Measure in one process images per second, by the median of some steps, and peak resident bytes."""
    torch.set_num_threads(1)
    if kept and not keep_freed_memory():
        raise RuntimeError("no glibc, or MALLOC_... is set in the environment")
    model = case.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in torch's stubs
    pixels = torch.randn(case.batch, 3, case.size, case.size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (case.batch,))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    forget_peak()
    found = {"training": case.batch / usual(train)}
    model.eval()
    with torch.no_grad():
        found["inference"] = case.batch / usual(lambda: model(pixels))
    Path(file).write_text(json.dumps({**found, "peak": memory_status()["VmHWM"]}))


def usual(work: Callable[[], object], count: int = 8) -> float:
    """Return the median processor seconds of `work`; the first call does not count."""
    seconds = []
    for _ in range(count + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds[1:])


if __name__ == "__main__":
    main()
