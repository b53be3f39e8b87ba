"""Split-CIFAR in full: eleven methods, six sizes of memory, three seeds, compared with the published table.

    python launch/split_cifar.py [--compare CSV] [--jobs 2]
    python launch/split_cifar.py --methods ewc+fr+replay joint --sizes 100 1000 --seeds 0
    python launch/split_cifar.py --cluster slurm --with configs/cluster/slurm_cpu.yaml cluster.partition=NAME
    python launch/split_cifar.py --quick

Needs the shards that README.md builds; `--quick` trains on scikit-learn's digits in a minute instead. Finished runs are
not repeated and killed ones continue, so you can start it again at any time. Seeds run one after the other, so that a
campaign that is cut short has complete tables of fewer seeds. A seed's first task is trained once, by finetune, and
shared: it does not depend on the method. Terms have weight 1, as in the theory, or the weights that launch/tune.py
chose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, at_least_one, carry_out, options

ALONE = ("finetune", "joint", "separate", "ewc")  # methods without a memory
METHODS = (*ALONE, "replay", "fr", "fr+replay", "ewc+fr", "ewc+replay", "ewc+fr+replay", "ewc+both")


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; out: folder of the comparison; base: configuration files and settings of every run; weights:
    folder of METHOD.yaml files that set the weights of the terms, or None; sizes: memory sizes, examples per task
    """

    folder: Path
    out: Path
    base: tuple[str, ...]
    weights: Path | None
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]


SPLIT_CIFAR = Setting(
    folder=Path("runs/split_cifar"),
    out=Path("docs/results/split_cifar"),
    base=("configs/split_cifar.yaml",),
    weights=Path("configs/split_cifar/chosen"),
    sizes=(100, 200, 500, 1000, 2000, 5000),
    seeds=(0, 1, 2),
)
DIGITS = Setting(
    folder=Path("runs/split_cifar_quick"),
    out=Path("runs/split_cifar_quick/comparison"),
    base=("configs/quickstart.yaml", "train.epochs=2", "stream.tasks=2"),
    weights=None,
    sizes=(10, 20),
    seeds=(0,),
)


def trainings(setting: Setting, methods: Sequence[str]) -> Iterator[Step]:
    """Yield all runs of a seed before those of the next; finetune comes first, as the others take its first task."""
    for seed in setting.seeds:
        first = f"finetune-{seed}"
        for method in ("finetune", *(method for method in methods if method != "finetune")):
            for number in (0,) if method in ALONE else setting.sizes:
                name = f"{method}-{number}-{seed}" if number else f"{method}-{seed}"
                yield _training(setting, method, number, seed, name=name, first=first)


def _training(setting: Setting, method: str, number: int, seed: int, *, name: str, first: str) -> Step:
    arguments = [*setting.base, f"configs/method/{method}.yaml"]
    own = setting.weights / f"{method}.yaml" if setting.weights else None
    arguments += [str(own)] if own and own.exists() else []
    arguments += [f"memory.size={number}"] if number else []
    arguments += ["train.only_last=true"] if method == "joint" else []  # earlier tasks do not change its last row
    shared = method not in ("finetune", "joint", "separate")
    arguments += [f"train.first_task_from={setting.folder}/{first}"] if shared else []
    label = f"{method}-{number}" if number else method
    arguments += [f"folder={setting.folder}/{name}", f"name={label}", f"seed={seed}"]
    return Step(name, ("train", *arguments), (first,) if shared else ())


def campaign(setting: Setting, methods: Sequence[str], published: Path | None) -> Campaign:
    """Return all runs and their comparison, which takes those that were begun."""
    steps = tuple(trainings(setting, methods))
    folders = [f"{setting.folder}/{step.name}" for step in steps]
    beside = [f"--compare={published}"] if published else []
    report = Step("report", ("report", *folders, f"--out={setting.out}", *beside), tuple(step.name for step in steps))
    return Campaign(setting.folder, (*steps, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in a minute")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="(all eleven)")
    parser.add_argument("--sizes", nargs="+", type=at_least_one, metavar="M", help="memory sizes, examples per task")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2)")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="file of published values to compare with")
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else SPLIT_CIFAR
    narrowed = {key: tuple(value) for key in ("sizes", "seeds") if (value := getattr(chosen, key))}
    setting = Setting(**{**vars(setting), **narrowed})
    sys.exit(carry_out(lambda: campaign(setting, chosen.methods, chosen.compare), chosen))
