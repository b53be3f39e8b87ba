"""Every method of configs/method on Split-CIFAR, task- and class-incremental, m = 1000, three seeds.

    python launch/methods.py [--jobs 2]
    python launch/methods.py --methods ewc mas si lwf --heads own --seeds 0
    python launch/methods.py --cluster slurm --with configs/cluster/slurm_cpu.yaml cluster.partition=NAME
    python launch/methods.py --quick

Task-incremental is train.head=own, class-incremental train.head=seen; methods whose file sets `seen` run
class-incrementally only. m is the number of examples per task; a method with one budget for all tasks gets m times
their number, so that all methods hold equally many in the end. FROMP, which would recall all of its memory in every
step, holds a fifth and recalls 50 of each task; its strengths are the published ones
(configs/preset/authors/fromp.yaml). The strengths of MAS, local MAS and SI were chosen by launch/tune.py,
task-incrementally, and are used class-incrementally, too; all others are those of configs/method, which are not tuned
for this comparison. GDumb trains one network on the memory alone, for so many epochs that it sees fewer than half of
the images that the other methods see (on the digits about as many).

Needs the shards that README.md builds; `--quick` trains on scikit-learn's digits in minutes instead. Finished runs are
not repeated and killed ones continue, so you can start it again at any time. Seeds run one after the other. A seed's
first task is trained once for each kind of head, by finetune, and shared with all methods whose first task is the same.
An exact curvature costs a backward pass per competing class: class-incremental runs, and FROMP, measure it on a fifth
of a later task's images, other task-incremental runs on all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

HEADS = {"own": "task_incremental", "seen": "class_incremental"}
CLASSES = ("icarl", "bic", "er_ace", "lwf.mc", "topic", "prototypes")  # their files set train.head=seen
# memory.size examples a task
SIZED = ("replay", "fr", "fr+replay", "ewc+fr", "ewc+replay", "ewc+fr+replay", "ewc+both", "kpriors")
BUDGET = ("er", "er_ace", "der", "der++", "gdumb", "icarl", "bic")  # memory.total examples of all tasks
WITHOUT = (
    *("finetune", "joint", "separate", "feature_extraction", "finetune_head", "ewc", "online_ewc", "mas", "mas_local"),
    *("si", "lwf", "lwf.mc", "topic", "prototypes"),
)
METHODS = (*WITHOUT, *SIZED, "fromp", *BUDGET)
CURVED = ("ewc", "online_ewc", "ewc+fr", "ewc+replay", "ewc+fr+replay", "ewc+both")  # use the base's curvature
FROMP = ("prior.fromp.weight=50000", "prior.fromp.precision=1e-4", "prior.fromp.jitter=1e-6")
NO_NATS = ("mas", "mas_local", "si")  # their importances are not in nats, so that their weight is tuned
# Their first task differs from finetune's, or they need its trajectory (si).
OWN_FIRST = ("finetune", "joint", "separate", "gdumb", "si", "kpriors", "icarl", "lwf.mc", "bic")


@dataclass(frozen=True)
class Setting:
    """The runs of a campaign.

    folder: of the runs; out: folder of the comparisons; base: configuration files and settings of every run; weights:
    folder of METHOD.yaml files that set the weights of NO_NATS, or None; size: memory size, examples per task; tasks:
    number of tasks of the stream; gdumb: epochs for which GDumb trains its network; curved: settings of FROMP, and of
    class-incremental runs of CURVED
    """

    folder: Path
    out: Path
    base: tuple[str, ...]
    weights: Path | None
    size: int
    tasks: int
    gdumb: int
    seeds: tuple[int, ...]
    curved: tuple[str, ...] = ()
    heads: tuple[str, ...] = tuple(HEADS)


SPLIT_CIFAR = Setting(
    folder=Path("runs/methods"),
    out=Path("docs/results/methods"),
    base=("configs/split_cifar.yaml", "log.reconstruction=0"),
    weights=Path("configs/split_cifar/chosen"),
    size=1000,
    tasks=6,
    gdumb=80,
    seeds=(0, 1, 2),
    curved=("curvature.fraction=[0.1, 0.2]",),
)
DIGITS = Setting(
    folder=Path("runs/methods_quick"),
    out=Path("runs/methods_quick/comparison"),
    base=("configs/quickstart.yaml", "train.epochs=2", "stream.tasks=2", "log.reconstruction=0"),
    weights=None,
    size=50,
    tasks=2,
    gdumb=10,
    seeds=(0,),
)


def trainings(setting: Setting, methods: Sequence[str]) -> Iterator[Step]:
    """Yield all runs of a seed before those of the next; for each head finetune first, whose first task others take."""
    for seed in setting.seeds:
        for head in setting.heads:
            for method in ("finetune", *(method for method in methods if method != "finetune")):
                if head == "seen" or method not in CLASSES:
                    yield _training(setting, method, head, seed)


def _training(setting: Setting, method: str, head: str, seed: int) -> Step:
    first, name = _name("finetune", head, seed), _name(method, head, seed)
    arguments = [*setting.base, f"configs/method/{method}.yaml"]
    own = setting.weights / f"{method}.yaml" if setting.weights and method in NO_NATS else None
    arguments += [str(own)] if own and own.exists() else []
    arguments += [f"train.head={head}", *_memory(setting, method)]
    exact = method == "fromp" or (head == "seen" and method in CURVED)
    arguments += setting.curved if exact else ()
    alone = method in ("joint", "gdumb")  # earlier tasks do not change their last row
    arguments += ["train.only_last=true"] if alone else []
    arguments += [f"train.epochs={setting.gdumb}"] if method == "gdumb" else []
    shared = method not in OWN_FIRST
    arguments += [f"train.first_task_from={setting.folder}/{first}"] if shared else []
    arguments += [f"folder={setting.folder}/{name}", f"name={method}-{head}", f"seed={seed}"]
    return Step(name, ("train", *arguments), (first,) if shared else ())


def _name(method: str, head: str, seed: int) -> str:
    return f"{method}-{head}-{seed}"


def _memory(setting: Setting, method: str) -> list[str]:
    if method in SIZED:
        return [f"memory.size={setting.size}"]
    if method in BUDGET:
        return [f"memory.total={setting.size * setting.tasks}"]
    if method == "fromp":
        held = (f"memory.size={setting.size // 5}", f"prior.fromp.block={min(50, setting.size // 5)}")
        return [*held, *FROMP]
    return []


def campaign(setting: Setting, methods: Sequence[str]) -> Campaign:
    """Return all runs, and a comparison for each kind of head."""
    steps = tuple(trainings(setting, methods))
    reports = []
    for head in setting.heads:
        names = [step.name for step in steps if f"train.head={head}" in step.arguments]
        folders = [f"{setting.folder}/{name}" for name in names]
        out = f"--out={setting.out}/{HEADS[head]}"
        reports.append(Step(f"report-{head}", ("report", *folders, out), tuple(names)))
    return Campaign(setting.folder, (*steps, *reports))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="train on the digits instead, in minutes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="(all)")
    parser.add_argument(
        "--heads", nargs="+", choices=list(HEADS), help="own (task-incremental), seen (class-incremental)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2)")
    chosen = parser.parse_args()
    setting = DIGITS if chosen.quick else SPLIT_CIFAR
    narrowed = {key: tuple(value) for key in ("heads", "seeds") if (value := getattr(chosen, key))}
    sys.exit(carry_out(lambda: campaign(Setting(**{**vars(setting), **narrowed}), chosen.methods), chosen))
