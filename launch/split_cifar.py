"""Split-CIFAR with the short recipe of configs/split_cifar.yaml: six methods at 1,000 memory examples a task.

    python launch/split_cifar.py [--published CSV] [--jobs 2]
    python launch/split_cifar.py --cluster slurm --with configs/cluster/slurm_cpu.yaml cluster.partition=NAME

Needs the shards that README.md builds. A run that is done is not repeated and one that was killed continues, so start
it again at any time. The first task is trained once, by finetune, and shared: it does not depend on the method. Weights
of the terms are those of the published configurations (Daxberger et al. 2023), not tuned here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

FOLDER = Path("runs/split_cifar")
SHARED = f"train.first_task_from={FOLDER}/finetune"
SOFT = ["memory.size=1000", "prior.temperature=2.0"]
DIAGONAL = "curvature.kind=diagonal"  # as published; launch/split_cifar_curvature.py compares
RUNS: dict[str, list[str]] = {
    "finetune": [],
    "fr+replay": [SHARED, *SOFT, "prior.weight=[0.1, 1.0]"],
    "ewc+fr+replay": [SHARED, DIAGONAL, *SOFT, "prior.weight=0.25", "prior.quadratic.weight=2.0"],
    "ewc": [SHARED, DIAGONAL, "prior.quadratic.weight=10.0"],
    "fr": [SHARED, *SOFT, "prior.weight=[0.1, 1.0]"],
    "joint": ["train.only_last=true"],
}


def campaign(published: Path | None) -> Campaign:
    """Six runs and the comparison."""
    steps = []
    for method, settings in RUNS.items():
        files = ["configs/split_cifar.yaml", f"configs/method/{method}.yaml"]
        names = [f"folder={FOLDER}/{method}", f"name={method}"]
        after = ("finetune",) if SHARED in settings else ()
        steps.append(Step(method, ("train", *files, *settings, *names), after))
    folders = [f"{FOLDER}/{method}" for method in RUNS]
    beside = [f"--compare={published}"] if published else []
    report = Step("report", ("report", *folders, "--out", "docs/results/split_cifar", *beside), tuple(RUNS))
    return Campaign(FOLDER, (*steps, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--published", type=Path, help="CSV file of published values to put beside")
    chosen = parser.parse_args()
    sys.exit(carry_out(campaign(chosen.published), chosen))
