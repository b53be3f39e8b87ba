"""Which examples are worth keeping: selectors on Split-CIFAR with `ewc+fr+replay`, m = 100 and 500, three seeds.

    python launch/selection.py [--jobs 2] [--quick]
    python launch/selection.py --selectors uniform herding --sizes 100 --seeds 0

Needs the shards that README.md builds; `--quick` trains on scikit-learn's digits in a minute instead. Finished runs are
not repeated and killed ones continue, so you can start it again at any time. Each seed's first task is trained once and
shared. At the end, all runs are compared, and so is how well each selector reconstructs the gradient of the past along
the trajectory of each seed's uniform run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, at_least_one, carry_out, options
from hpccl.config.memory import NAMED_SELECTORS, SELECTORS

COMPARED = (*SELECTORS, "reconstruction+fitted")


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; out: folder of the comparison; sizes: memory sizes, examples per task; arguments:
    configuration files and settings of every run
    """

    folder: Path
    out: Path
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    arguments: tuple[str, ...]


SPLIT_CIFAR = Setting(
    folder=Path("runs/selection"),
    out=Path("docs/results/selection"),
    sizes=(100, 500),
    seeds=(0, 1, 2),
    arguments=(
        "configs/split_cifar.yaml",
        "configs/method/ewc+fr+replay.yaml",
        "curvature.tasks.max_cost=5.0",
        "prior.temperature=2.0",
        "prior.weight=1.0",  # this and the next: chosen on a validation split, docs/results.md
        "prior.quadratic.weight=2.0",
    ),
)
DIGITS = Setting(
    folder=Path("runs/selection_quick"),
    out=Path("runs/selection_quick/comparison"),
    sizes=(20,),
    seeds=(0,),
    arguments=("configs/quickstart.yaml", "configs/method/ewc+fr+replay.yaml", "train.epochs=3", "stream.tasks=5"),
)


def trainings(setting: Setting, selectors: Sequence[str]) -> Iterator[Step]:
    """Yield all runs of a seed before those of the next, and before the others the one that trains the first task."""
    for seed in setting.seeds:
        first = f"uniform-{setting.sizes[0]}-{seed}"
        for number in setting.sizes:
            for selector in ("uniform", *(selector for selector in selectors if selector != "uniform")):
                name = f"{selector}-{number}-{seed}"
                after = () if name == first else (first,)
                shared = [f"train.first_task_from={setting.folder}/{first}"] if after else []
                names = [f"folder={setting.folder}/{name}", f"name={selector}-{number}", f"seed={seed}"]
                kept = [f"memory.size={number}"]
                kept += [f"memory.selector.{key}={value}" for key, value in NAMED_SELECTORS[selector].items()]
                yield Step(name, ("train", *setting.arguments, *kept, *shared, *names), after)


def campaign(setting: Setting, selectors: Sequence[str]) -> Campaign:
    """Return all runs, their comparison, and the reconstruction along each seed's trajectory."""
    steps = tuple(trainings(setting, selectors))
    folders = [f"{setting.folder}/{step.name}" for step in steps]
    report = Step("report", ("report", *folders, f"--out={setting.out}"), tuple(step.name for step in steps))
    sizes = ",".join(map(str, setting.sizes))
    along = []
    for seed in setting.seeds:
        run = f"uniform-{setting.sizes[0]}-{seed}"
        command = ("memory", "reconstruct", f"{setting.folder}/{run}", "--sizes", sizes, "--past", "0.1")
        names = ",".join(dict.fromkeys(("uniform", *selectors)))
        out = ("--selectors", names, "--points", "5", "--out", f"{setting.out}/reconstruction-{seed}")
        along.append(Step(f"reconstruct-{seed}", (*command, *out), (run,)))
    return Campaign(setting.folder, (*steps, *along, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in a minute")
    parser.add_argument(
        "--selectors", nargs="+", choices=NAMED_SELECTORS, default=COMPARED, metavar="NAME", help="(all)"
    )
    parser.add_argument("--sizes", nargs="+", type=at_least_one, metavar="M", help="memory sizes, examples per task")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2)")
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else SPLIT_CIFAR
    narrowed = {key: tuple(value) for key in ("sizes", "seeds") if (value := getattr(chosen, key))}
    sys.exit(carry_out(lambda: campaign(Setting(**{**vars(setting), **narrowed}), chosen.selectors), chosen))
