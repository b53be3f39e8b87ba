"""Split-CIFAR with the short recipe of configs/split_cifar.yaml: six methods at 1,000 memory examples a task.

    python launch/split_cifar.py [PUBLISHED_CSV]

Needs the shards that README.md builds. A run that is done is not repeated and one that was killed continues, so start
it again at any time. The first task is trained once, by finetune, and shared: it does not depend on the method. Weights
of the terms are those of the published configurations (Daxberger et al. 2023), not tuned here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HPCCL = [sys.executable, "-m", "hpccl.cli"]
FOLDER = "runs/split_cifar"
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


def main(published: list[str]) -> int:
    """Run all, then write the comparison; the exit code of the first command that fails."""
    for method, settings in RUNS.items():
        files = ["configs/split_cifar.yaml", f"configs/method/{method}.yaml"]
        command = [*HPCCL, "train", *files, *settings, f"folder={FOLDER}/{method}", f"name={method}"]
        print("+ hpccl", *command[len(HPCCL) :], flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    folders = [f"{FOLDER}/{method}" for method in RUNS]
    beside = [f"--published={Path(path).resolve()}" for path in published]
    command = [*HPCCL, "report", *folders, "--out", "docs/results/split_cifar", *beside]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
