"""Diagonal against Kronecker curvature on Split-CIFAR: `ewc` and `ewc+fr+replay`, three seeds, the short recipe.

    python launch/split_cifar_curvature.py [PUBLISHED_CSV]

Needs the shards that README.md builds. A run that is done is not repeated and one that was killed continues, so start
it again at any time. Each seed's first task is trained once and shared. Weights of the terms are those of the published
configurations for the diagonal (Daxberger et al. 2023), the same for both kinds and not tuned here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HPCCL = [sys.executable, "-m", "hpccl.cli"]
FOLDER = "runs/split_cifar_curvature"
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


def runs() -> Iterator[tuple[str, list[str]]]:
    """(folder, arguments of `hpccl train`), the ones that train a first task before those that take it."""
    for seed in SEEDS:
        first = f"{FOLDER}/ewc-diagonal-{seed}"
        for method, settings in METHODS.items():
            for kind, more in KINDS.items():
                folder = f"{FOLDER}/{method}-{kind}-{seed}"
                shared = [] if folder == first else [f"train.first_task_from={first}"]
                files = ["configs/split_cifar.yaml", f"configs/method/{method}.yaml"]
                measured = [f"curvature.kind={kind}", "curvature.fisher=ggn", "curvature.fraction=0.1", *more]
                names = [f"folder={folder}", f"name={method}-{kind}", f"seed={seed}"]
                yield folder, [*files, *measured, *settings, *shared, *names]


def main(published: list[str]) -> int:
    """Run all, then write the comparison; the exit code of the first command that fails."""
    folders = []
    for folder, arguments in runs():
        print("+ hpccl train", *arguments, flush=True)
        code = subprocess.run([*HPCCL, "train", *arguments], cwd=ROOT, check=False).returncode
        if code:
            return code
        folders.append(folder)
    beside = [f"--published={Path(path).resolve()}" for path in published]
    command = [*HPCCL, "report", *folders, "--out", "docs/results/split_cifar_curvature", *beside]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
