"""Choose the weights of each method's terms on Split-CIFAR, on a validation split, with a seed that no table uses.

    python launch/tune.py [--methods ewc+fr+replay ewc] [--jobs 2] [--quick]

Every candidate of GRID is trained with a tenth of the training images held out (data.validation) at two sizes of
memory (`--sizes`); `hpccl choose` then takes the candidate with each method's best mean and writes
configs/split_cifar/chosen/METHOD.yaml, which launch/split_cifar.py, launch/methods.py (for MAS, local MAS and SI) and
launch/ablation.py (for one of its rows) read.
Needs the shards that README.md builds; `--quick` trains on scikit-learn's digits in a minute instead. Finished runs are
not repeated, so you can start it again at any time.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, at_least_one, carry_out, options

Grid = Mapping[str, Sequence[str]]

LAMBDA = "prior.quadratic.weight"
TAU = "prior.weight"
_STRENGTHS = ("1.0", "3.0", "10.0")
_MEMORY: Grid = {TAU: ("0.25", "1.0", "4.0")}
# The memory has the weight of its examples, as in the theory; the weight of the quadratic is tuned (1 in theory).
_BOTH: Grid = {TAU: ("1.0",), LAMBDA: ("0.3", "1.0", "3.0")}
# Equally many candidates for each method, so that none gains from a longer search.
GRID: dict[str, Grid] = {
    "ewc": {LAMBDA: _STRENGTHS},
    "replay": _MEMORY,
    "fr": _MEMORY,
    "fr+replay": _MEMORY,
    "ewc+fr": _BOTH,
    "ewc+replay": _BOTH,
    "ewc+fr+replay": _BOTH,
    "online_ewc": {LAMBDA: _STRENGTHS},
    "mas": {LAMBDA: ("0.001", "0.01", "0.1")},
    "mas_local": {LAMBDA: ("0.0001", "0.001", "0.01")},
    "si": {LAMBDA: ("0.1", "1.0", "10.0")},
}
ALONE = ("ewc", "online_ewc", "mas", "mas_local", "si")  # without a memory
OWN_FIRST = ("si",)  # needs the trajectory of the first task


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; out: folder of the chosen settings; base: configuration files and settings of every run;
    sizes: memory sizes, examples per task
    """

    folder: Path
    out: Path
    base: tuple[str, ...]
    sizes: tuple[int, ...]
    seed: int = 100


SPLIT_CIFAR = Setting(
    folder=Path("runs/tune"),
    out=Path("configs/split_cifar/chosen"),
    base=("configs/split_cifar.yaml",),
    sizes=(200, 1000),
)
DIGITS = Setting(
    folder=Path("runs/tune_quick"),
    out=Path("runs/tune_quick/chosen"),
    base=("configs/quickstart.yaml", "train.epochs=2", "stream.tasks=2"),
    sizes=(20,),
)


def candidates(grid: Grid) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a short name and the settings of each point of a grid."""
    for values in itertools.product(*grid.values()):
        yield "-".join(values), tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))


def trainings(setting: Setting, methods: Sequence[str]) -> Iterator[Step]:
    """Yield the run of the first task, then every candidate of every method, which take that task."""
    held = (*setting.base, "data.validation=0.1")
    seed = f"seed={setting.seed}"
    first = f"{setting.folder}/first"
    yield Step("first", ("train", *held, "configs/method/finetune.yaml", f"folder={first}", "name=first", seed))
    for method in methods:
        files = [f"configs/method/{method}.yaml"]
        for number in (0,) if method in ALONE else setting.sizes:
            for label, settings in candidates(GRID[method]):
                name = f"{method}-{number}-{label}" if number else f"{method}-{label}"
                memory = [f"memory.size={number}"] if number else []
                shared = () if method in OWN_FIRST else (f"train.first_task_from={first}",)
                own = [*shared, f"folder={setting.folder}/{name}", f"name={name}", seed]
                after = ("first",) if shared else ()
                yield Step(name, ("train", *held, *files, *memory, *settings, *own), after)


def campaign(setting: Setting, methods: Sequence[str]) -> Campaign:
    """Return all candidates, and the choice among them."""
    steps = tuple(trainings(setting, methods))
    tried = [step.name for step in steps if step.name != "first"]
    folders = [f"{setting.folder}/{name}" for name in tried]
    choice = Step("choose", ("choose", *folders, f"--out={setting.out}"), tuple(tried))
    return Campaign(setting.folder, (*steps, choice))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in a minute")
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID), metavar="METHOD", help="(all)")
    parser.add_argument(
        "--sizes", nargs="+", type=at_least_one, metavar="M", help="memory sizes, examples per task (200 1000)"
    )
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else SPLIT_CIFAR
    setting = replace(setting, sizes=tuple(chosen.sizes or setting.sizes))
    sys.exit(carry_out(lambda: campaign(setting, chosen.methods), chosen))
