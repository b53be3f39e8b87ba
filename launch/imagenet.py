r"""Class-incremental ImageNet, from the archives to the report: shards, references, methods x memory sizes x seeds.

    python launch/imagenet.py --train ILSVRC2012_img_train.tar --test VALIDATION_FOLDER \
        --cluster slurm --with configs/cluster/slurm_gpu.yaml cluster.nodes=4 cluster.account=NAME

The validation set is sorted into one folder per class, named as in training, or comes with `--labels`, and `--synsets`
if need be: see docs/data.md. Everything is queued at once, as jobs that wait for each other; start it again to queue
the runs that are not done. Without --cluster slurm everything runs on this machine. `--with train.epochs=1
model.name=resnet18` and the like apply to every training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, at_least_one, carry_out, options

CONFIG = "configs/imagenet_10x100.yaml"
REFERENCES = ("finetune", "separate", "joint")
METHODS = ("replay", "fr+replay", "ewc+fr+replay")
WITHOUT_MEMORY = ("ewc",)


def shards(chosen: argparse.Namespace) -> list[Step]:
    """Return one step per split, which builds its shards; an interrupted build is continued."""
    shrink = ["--max-side", str(chosen.max_side), "--quality", "90"]
    labels = {"--labels": chosen.labels, "--synsets": chosen.synsets}
    told = [word for option, path in labels.items() if path is not None for word in (option, str(path))]
    sources = {"train": (chosen.train, []), "test": (chosen.test, told)}
    return [
        Step(f"shards-{split}", ("shards", "build", str(source), chosen.shards, "--split", split, *shrink, *more))
        for split, (source, more) in sources.items()
        if source is not None
    ]


def trainings(chosen: argparse.Namespace, after: tuple[str, ...]) -> Iterator[Step]:
    """Yield the runs of every seed; `finetune` trains the first task for all continual methods."""
    data = [f"stream.parts=[{{path: {json.dumps(chosen.shards)}, tasks: {chosen.tasks}}}]"]
    for seed in chosen.seeds:
        first = f"finetune-{seed}"
        for method in REFERENCES:
            yield _training(chosen, method, f"{method}-{seed}", [*data, f"seed={seed}"], after)
        shared = [*data, f"seed={seed}", f"train.first_task_from={json.dumps(f'{chosen.folder}/{first}')}"]
        for method in WITHOUT_MEMORY:
            yield _training(chosen, method, f"{method}-{seed}", shared, (first,))
        for method in METHODS:
            for size in chosen.sizes:
                yield _training(chosen, method, f"{method}-{size}-{seed}", [*shared, f"memory.size={size}"], (first,))


def _training(
    chosen: argparse.Namespace, method: str, name: str, settings: Sequence[str], after: tuple[str, ...]
) -> Step:
    files = [CONFIG, f"configs/method/{method}.yaml"]
    last = ["train.only_last=true"] if method == "joint" else []
    own = [f"name={method}", f"folder={json.dumps(f'{chosen.folder}/{name}')}"]
    return Step(name, ("train", *files, *settings, *last, *own), after)


def campaign(chosen: argparse.Namespace) -> Campaign:
    """Return the shards, all runs and their report."""
    built = shards(chosen)
    runs = tuple(trainings(chosen, tuple(step.name for step in built)))
    folders = [f"{chosen.folder}/{step.name}" for step in runs]
    report = Step("report", ("report", *folders, "--out", f"{chosen.folder}/report"), tuple(step.name for step in runs))
    return Campaign(Path(chosen.folder), (*built, *runs, report))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--train", type=Path, metavar="SOURCE", help="training images; leave out if their shards exist")
    parser.add_argument("--test", type=Path, metavar="SOURCE", help="validation images")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="classes of the validation images, if they have no class folders"
    )
    parser.add_argument(
        "--synsets", type=Path, metavar="FILE", help="for --labels of numbers: a file with one class per line"
    )
    parser.add_argument("--shards", default="shards/imagenet", help="folder of shards (shards/imagenet)")
    parser.add_argument(
        "--max-side", type=at_least_one, default=400, help="pixels of the longer side of stored images (400)"
    )
    parser.add_argument("--folder", default="runs/imagenet", help="folder of the runs (runs/imagenet)")
    parser.add_argument("--tasks", type=at_least_one, default=10, help="tasks of equally many classes (10)")
    parser.add_argument(
        "--sizes", type=at_least_one, nargs="+", default=[200, 1000, 5000], help="memory sizes, examples per task"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (0)")
    arguments = parser.parse_args()
    sys.exit(carry_out(lambda: campaign(arguments), arguments))
