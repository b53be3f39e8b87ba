"""Optimisers that learn a distribution over weights or seek flat minima, compared with SGD and AdamW, on CIFAR-10.

    python launch/optimizers.py [--jobs 2]
    python launch/optimizers.py --optimizers sgd ivon --models cifarnet --seeds 0
    python launch/optimizers.py --with train.epochs=40
    python launch/optimizers.py --quick

CIFAR-10 is the first task of Split-CIFAR; CifarNet and timm's ResNet-18 learn it in ten epochs (configs/cifar10.yaml),
every optimiser with the settings of configs/cifar10/OPTIMIZER.yaml. Needs the shards that README.md builds; `--quick`
trains on scikit-learn's digits in a minute instead. Finished runs are not repeated and killed ones continue, so you can
start it again at any time. There are three seeds, one after the other. At the end, all runs are compared, including
likelihood and calibration of the networks at the mean of the learned distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

OPTIMIZERS = ("sgd", "adamw", "ivon", "vogn", "bsam", "sam")
MODELS: dict[str, tuple[str, ...]] = {
    "cifarnet": ("model.kind=cifarnet",),
    "resnet18": ("model.kind=timm", "model.name=resnet18"),
    "mlp": ("model.kind=mlp", "model.hidden=[32]"),
}


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; out: folder of the comparison; base: configuration files and settings of every run; files:
    folder with one file per optimiser; models: keys of MODELS
    """

    folder: Path
    out: Path
    base: tuple[str, ...]
    files: Path
    models: tuple[str, ...]
    seeds: tuple[int, ...]


CIFAR10 = Setting(
    folder=Path("runs/optimizers"),
    out=Path("docs/results/optimizers"),
    base=("configs/cifar10.yaml",),
    files=Path("configs/cifar10"),
    models=("cifarnet", "resnet18"),
    seeds=(0, 1, 2),
)
DIGITS = Setting(
    folder=Path("runs/optimizers_quick"),
    out=Path("runs/optimizers_quick/comparison"),
    base=("configs/quickstart.yaml", "stream.tasks=1", "train.epochs=5"),
    files=Path("configs/optim"),
    models=("mlp",),
    seeds=(0,),
)


def trainings(setting: Setting, optimizers: Sequence[str]) -> Iterator[Step]:
    """Yield all runs of a seed before those of the next."""
    for seed in setting.seeds:
        for model in setting.models:
            for optimizer in optimizers:
                name = f"{model}-{optimizer}"
                given = [*setting.base, f"{setting.files / optimizer}.yaml", *MODELS[model]]
                given += [f"folder={setting.folder}/{name}-{seed}", f"name={name}", f"seed={seed}"]
                yield Step(f"{name}-{seed}", ("train", *given))


def campaign(setting: Setting, optimizers: Sequence[str]) -> Campaign:
    """Return all runs and their comparison."""
    steps = tuple(trainings(setting, optimizers))
    folders = [f"{setting.folder}/{step.name}" for step in steps]
    report = Step("report", ("report", *folders, f"--out={setting.out}"), tuple(step.name for step in steps))
    return Campaign(setting.folder, (*steps, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in a minute")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, metavar="KIND", help="(all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="(cifarnet resnet18; quick: mlp)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2)")
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else CIFAR10
    models, seeds = chosen.models or setting.models, chosen.seeds or setting.seeds
    sys.exit(
        carry_out(
            lambda: campaign(replace(setting, models=tuple(models), seeds=tuple(seeds)), chosen.optimizers), chosen
        )
    )
