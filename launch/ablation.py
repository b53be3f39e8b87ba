"""What each part of the method contributes: `ewc+fr+replay` on Split-CIFAR, each row one change from the first.

In the first row all terms have weight 1, as in the theory; `published` has the paper's weights, `tuned` the ones that
launch/tune.py chose, if it has run.

    python launch/ablation.py [--rows base diagonal ekfac] [--seeds 0 1 2] [--jobs 2] [--quick]

Needs the shards that README.md builds; `--quick` trains on scikit-learn's digits in a minute instead. Finished runs are
not repeated and killed ones continue, so you can start it again at any time. Seeds run one after the other; the first
task of each is that of finetune in launch/split_cifar.py, which is trained if it has not been.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

METHOD = "ewc+fr+replay"
SHARE = "curvature.fraction=[0.1, 1.0]"
PUBLISHED, CHOSEN = "configs/split_cifar/published", "configs/split_cifar/chosen"
ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    # Another kind has its own settings, so the recipe's settings for all kinds are repeated.
    "diagonal": ("curvature.kind=diagonal", "curvature.fisher=ggn", SHARE),
    "ekfac": ("curvature.kind=ekfac", "curvature.fisher=ggn", "curvature.precision=bf16", SHARE),
    "teacher": ("prior.view=teacher",),
    "stratified": ("memory.mix.kind=stratified",),
    "reconstruction": ("memory.selector.kind=reconstruction",),
    "leverage": ("memory.selector.kind=leverage",),
    "pooled": ("curvature.tasks.kind=pooled",),
    "nearest": ("curvature.tasks.kind=nearest",),
    "own_anchors": ("prior.quadratic.anchor=each",),
    "published": (f"{PUBLISHED}/{METHOD}.yaml",),
    "tuned": (f"{CHOSEN}/{METHOD}.yaml",),
    "ewc": ("memory.size=0", "prior.replay=0.0", "prior.weight=1.0", "prior.temperature=1.0"),
}


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; first: folder of the finetune runs; out: folder of the comparison; base: configuration files
    and settings of every run; size: memory size, examples per task
    """

    folder: Path
    first: Path
    out: Path
    base: tuple[str, ...]
    size: int
    seeds: tuple[int, ...]


SPLIT_CIFAR = Setting(
    folder=Path("runs/ablation"),
    first=Path("runs/split_cifar"),
    out=Path("docs/results/ablation"),
    base=("configs/split_cifar.yaml",),
    size=1000,
    seeds=(0, 1, 2),
)
DIGITS = Setting(
    folder=Path("runs/ablation_quick"),
    first=Path("runs/split_cifar_quick"),
    out=Path("runs/ablation_quick/comparison"),
    base=("configs/quickstart.yaml", "train.epochs=2", "stream.tasks=2"),
    size=20,
    seeds=(0,),
)


def trainings(setting: Setting, rows: Sequence[str]) -> Iterator[Step]:
    """Yield all rows of a seed before those of the next, after the finetune run whose first task they take."""
    files = (*setting.base, f"configs/method/{METHOD}.yaml", f"memory.size={setting.size}")
    for seed in setting.seeds:
        first, path = f"finetune-{seed}", f"{setting.first}/finetune-{seed}"
        told = (f"folder={path}", "name=finetune", f"seed={seed}")
        yield Step(first, ("train", *setting.base, "configs/method/finetune.yaml", *told))
        for row in ("base", *(row for row in rows if row != "base")):
            name = f"{row}-{seed}"
            own = (f"train.first_task_from={path}", f"folder={setting.folder}/{name}", f"name={row}", f"seed={seed}")
            yield Step(name, ("train", *files, *ROWS[row], *own), (first,))


def available() -> list[str]:
    """Return all rows, `tuned` only if weights were chosen."""
    return [row for row in ROWS if row != "tuned" or Path(CHOSEN, f"{METHOD}.yaml").exists()]


def campaign(setting: Setting, rows: Sequence[str]) -> Campaign:
    """Return all runs and their comparison."""
    steps = tuple(trainings(setting, rows))
    names = [step.name for step in steps if step.after]
    folders = [f"{setting.folder}/{name}" for name in names]
    report = Step("report", ("report", *folders, f"--out={setting.out}"), tuple(names))
    return Campaign(setting.folder, (*steps, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in a minute")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=available(), metavar="ROW", help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2)")
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else SPLIT_CIFAR
    setting = Setting(**{**vars(setting), "seeds": tuple(chosen.seeds or setting.seeds)})
    sys.exit(carry_out(lambda: campaign(setting, chosen.rows), chosen))
