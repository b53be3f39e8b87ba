"""How well each selector's memory reconstructs the gradient of the past, on scikit-learn's digits.

A small network learns the first two of five tasks and keeps m = 20 examples of the first; at the end of the second, the
gradient of the prior is compared with the true gradient of the first task: |total - true| / |true|, the mean over
seeds. Either the whole memory has true labels and represents the whole task, or it represents only itself, next to a
quadratic (Kronecker) for the rest. The accuracy on the first task is reported as well.

    python -m benchmarks.memory_selectors            two minutes on one core
    python -m benchmarks.memory_selectors --quick    one seed, three selectors
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks._common import print_result
from benchmarks._steps import make_world
from hpccl.checkpoint.store import Mark
from hpccl.config.load import load
from hpccl.config.memory import NAMED_SELECTORS
from hpccl.data.build import open_stream
from hpccl.dist.comm import Comm
from hpccl.prior.reconstruct import compare_gradients
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.reconstruction import prior_gradients, true_gradient
from hpccl.train.run import fresh_state

HEADLINE = ("uniform", "reconstruction+fitted", "reconstruction")
SELECTORS = ("uniform", "herding", "sensitivity+sampled", "sensitivity", "reconstruction+fitted", "reconstruction")
PRIORS = {
    "replay": ("prior.replay=1.0", "prior.scale_to_task=true"),
    "replay + quadratic": ("prior.replay=1.0", "prior.quadratic.weight=1.0"),
}
SETTINGS = (
    "model={kind: mlp, hidden: [16]}",
    "train={epochs: 3, batch_size: 64}",
    "optim={name: adamw, lr: 0.003}",
    "memory.size=20",
    "log.tensorboard=false",
    "checkpoint.every=0",
)


def learned(prior: Sequence[str], selector: str, seed: int, folder: Path) -> tuple[float, float]:
    """Return (error of the prior's gradient, accuracy on the first task) at the end of the second task."""
    chosen = [f"memory.selector.{key}={str(value).lower()}" for key, value in NAMED_SELECTORS[selector].items()]
    config = load([], [*SETTINGS, *prior, *chosen, f"seed={seed}"])
    comm = Comm.solo()
    stream = open_stream(config.stream, config.data)
    world, state = make_world(config, comm, stream, folder), fresh_state(config, stream, comm)
    first, second = stream.tasks[:2]
    for task in (first, second):
        state.mark = Mark.at(task.index, "fit", 0)
        fit(task, state, world)
        if task is first:
            consolidate(task, state, world)
    true = true_gradient(second, 1.0, state, world)
    errors, _ = compare_gradients(true, {"total": prior_gradients(second, state.prior, state, world)["total"]}, comm)
    return errors["total"]["relative_error"], evaluate_all(state, world, last=1)[0]["task_incremental"]["accuracy"]


def main(*, quick: bool) -> None:
    """Train all combinations and print the result."""
    seeds, selectors = (range(1), HEADLINE) if quick else (range(4), SELECTORS)
    rows: list[dict[str, Any]] = []
    for prior, settings in PRIORS.items():
        for selector in selectors:
            with tempfile.TemporaryDirectory() as scratch:
                found = [learned(settings, selector, seed, Path(scratch) / str(seed)) for seed in seeds]
            errors, accuracies = zip(*found, strict=True)
            rows.append({"prior": prior, "selector": selector, "errors": errors, "accuracies": accuracies})
            print(f"{prior}, {selector}: {mean(errors):.2f}", flush=True)
    best = {
        f"{prior.replace(' + ', '_')}_{selector}": mean(row["errors"])
        for prior in PRIORS
        for selector in HEADLINE
        for row in rows
        if (row["prior"], row["selector"]) == (prior, selector)
    }
    print_result("memory_selectors", best, seeds=len(seeds), size=20, rows=rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some seconds")
    main(quick=parser.parse_args().quick)
