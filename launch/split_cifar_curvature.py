"""Diagonal against Kronecker curvature on Split-CIFAR: `ewc` and `ewc+fr+replay`, three seeds, the short recipe.

    python launch/split_cifar_curvature.py [--published CSV] [--jobs 2]

Needs the shards that README.md builds. A run that is done is not repeated and one that was killed continues, so start
it again at any time. Each seed's first task is trained once and shared. Weights of the terms are those of the published
configurations for the diagonal (Daxberger et al. 2023), the same for both kinds and not tuned here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

FOLDER = Path("runs/split_cifar_curvature")
SEEDS = (0, 1, 2)
METHODS = {
    "ewc": ["prior.quadratic.weight=10.0"],
    "ewc+fr+replay": [
        "memory.size=1000",
        "prior.temperature=2.0",
        "prior.weight=0.25",
        "prior.quadratic.weight=2.0",
    ],
}
KINDS: dict[str, list[str]] = {
    "diagonal": [],
    "kronecker": ["curvature.tasks.max_cost=5.0"],
}  # room for all five past tasks, exactly


def trainings() -> Iterator[Step]:
    """Those that train a first task before those that take it."""
    for seed in SEEDS:
        first = f"ewc-diagonal-{seed}"
        for method, settings in METHODS.items():
            for kind, more in KINDS.items():
                name = f"{method}-{kind}-{seed}"
                after = () if name == first else (first,)
                shared = [f"train.first_task_from={FOLDER}/{first}"] if after else []
                files = ["configs/split_cifar.yaml", f"configs/method/{method}.yaml"]
                measured = [f"curvature.kind={kind}", "curvature.fisher=ggn", "curvature.fraction=0.1", *more]
                names = [f"folder={FOLDER}/{name}", f"name={method}-{kind}", f"seed={seed}"]
                yield Step(name, ("train", *files, *measured, *settings, *shared, *names), after)


def campaign(published: Path | None) -> Campaign:
    """Twelve runs and the comparison."""
    steps = tuple(trainings())
    folders = [f"{FOLDER}/{step.name}" for step in steps]
    beside = [f"--compare={published}"] if published else []
    out = ["--out", "docs/results/split_cifar_curvature"]
    report = Step("report", ("report", *folders, *out, *beside), tuple(step.name for step in steps))
    return Campaign(FOLDER, (*steps, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--published", type=Path, help="CSV file of published values to put beside")
    chosen = parser.parse_args()
    sys.exit(carry_out(campaign(chosen.published), chosen))
