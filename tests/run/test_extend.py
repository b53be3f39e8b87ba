"""hpccl extend: a finished run learns further tasks, and what it knew stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from typer.testing import CliRunner

from hpccl.cli import app
from hpccl.cluster.prepare import prepare
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.data.shards.build import build
from hpccl.data.shards.encodings import Lossless
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.errors import FolderError, HpcclError
from hpccl.models.build import build_model
from hpccl.report.events import read_events
from hpccl.report.summary import summarise
from hpccl.tools.evaluate_run import evaluate_run, reopened
from hpccl.tools.extend import extend
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.dist.world import Result, run_in_world
from tests.run.method import AfterEvent, go_on, merged, weights

PARTS = {"low": (0, 1, 2, 3), "middle": (4, 5, 6), "high": (7, 8, 9)}
SECTIONS: dict[str, Any] = {
    "train": {"epochs": 10, "batch_size": 32, "head": "seen"},
    "optim": {"lr": 1e-2},
    "memory": {"size": 40},
}
METHODS: dict[str, dict[str, Any]] = {
    "er": {"prior": {"replay": 1.0}},
    "ewc": {
        "train": {"head": "own"},
        "memory": {"size": 0},
        "prior": {"quadratic": {"weight": 1.0}},
        "curvature": {"kind": "diagonal"},
    },
    "ewc+fr+replay": {"prior": {"replay": 0.5, "quadratic": {"weight": 1.0, "anchor": "each"}}},
}
DISTILL: dict[str, Any] = {"weight": 1.0, "images": "all", "view": "same"}
NO_PER_TASK: dict[str, Any] = {"size": 0, "selector": {"kind": "herding"}}
OTHERS: dict[str, dict[str, Any]] = {
    "lwf": {"train": {"head": "own"}, "memory": {"size": 0}, "prior": {"replay": 0.0, "distill": {"weight": 1.0}}},
    "icarl": {
        "train": {"loss": "sigmoid"},
        "optim": {"name": "sgd", "lr": 0.1},  # Adam makes large steps of gradients that are 0 but for rounding
        "memory": {**NO_PER_TASK, "total": 60},
        "prior": {"replay": 1.0, "distill": {**DISTILL, "temperature": 1.0}},
        "evaluate": {"classifier": "nearest_mean"},
    },
    "bic": {
        "memory": {**NO_PER_TASK, "total": 120},
        "prior": {"replay": 1.0, "distill": {**DISTILL, "balance": "classes"}, "correct": {"share": 0.1}},
    },
    "der++": {
        "train": {"head": "own"},
        "memory": {"size": 0, "total": 60, "selector": {"kind": "reservoir"}, "labels": "kept"},
        "prior": {"weight": 0.2, "label_weight": 0.5, "loss": "squared", "view": "recorded", "scale_to_new": True},
    },
    "si": {
        "memory": {"size": 0},
        "curvature": {"kind": "si"},
        "prior": {"replay": 0.0, "quadratic": {"weight": 0.1}},
        "train": {"head": "own", "ema": None},
    },
    "fromp": {
        "train": {"head": "own"},
        "memory": {"size": 12, "selector": {"kind": "gini"}},
        "curvature": {"kind": "diagonal"},
        "prior": {"replay": 0.0, "fromp": {"weight": 1.0}},
        "log": {"reconstruction": 0.0},
    },
    "topic": {
        "train": {"frozen": ["old_classes"], "norms": "running"},
        "memory": {"size": 0},
        "prior": {"replay": 0.0, "topology": {"nodes": 20}},
    },
}
QUICK: dict[str, Any] = {"train": {"epochs": 1}, "model": {"hidden": [4]}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets of digits: 40 training images a class, and tests."""
    folder = tmp_path_factory.mktemp("images")
    data, taken = load_digits(), dict.fromkeys(range(10), 0)
    for number, (picture, label) in enumerate(zip(data.images, data.target, strict=True)):
        taken[int(label)] += 1
        (part,) = (name for name, classes in PARTS.items() if int(label) in classes)
        split = "train" if taken[int(label)] <= 40 else "test"
        path = folder / part / split / f"digit_{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).convert("RGB").save(path)
    for name in PARTS:
        build(folder / name, folder / "shards" / name, encoding=Lossless(), workers=1)
    return folder / "shards"


def config_of(images: Path, folder: Path, *changes: dict[str, Any]) -> RunConfig:
    """A run on the first part in two tasks, and on the second."""
    parts = [{"path": str(images / "low"), "tasks": 2}, {"path": str(images / "middle")}]
    data = {"cache": str(images / "cache"), "storage": "decoded"}
    sections = {"stream": {"kind": "shards", "parts": parts}, "data": data}
    return merged(SECTIONS, sections, *changes).model_copy(update={"folder": str(folder)})


def finished(images: Path, folder: Path, *changes: dict[str, Any]) -> Path:
    assert go_on(config_of(images, folder, *changes)) == "done"
    return folder


def accuracies(folder: Path) -> list[float]:
    return [float(result["task_incremental"]["accuracy"]) for result in evaluate_run(folder)["tasks"]]


def weights_of(folder: Path) -> dict[str, Tensor]:
    with reopened(folder) as (state, _):
        return wholes(state.engine.gather())


def pull(folder: Path, moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The quadratic's gradient where the old weights are moved by `moved`, and new ones by 1."""
    with reopened(folder) as (state, world):
        at = {}
        for name, value in wholes(state.engine.gather()).items():
            at[name] = value + 1.0
            if name in moved:
                at[name][: len(moved[name])] = value[: len(moved[name])] + moved[name]
        quadratic = state.prior.quadratic
        assert quadratic is not None
        return wholes(quadratic.force({name: at[name] for name in state.engine.like}, world.comm))


@pytest.mark.parametrize("method", METHODS)
def test_new_tasks_are_learned_and_the_old_ones_stay(images: Path, tmp_path: Path, method: str) -> None:
    base = finished(images, tmp_path / "run", METHODS[method])
    known, before = evaluate_run(base), {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    done = extend(base, tmp_path / "out", parts=[str(images / "high")])
    assert (done.tasks, done.classes) == (1, 3)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    now = evaluate_run(tmp_path / "out")
    for old, new in zip(known["tasks"], now["tasks"], strict=False):
        assert new["task_incremental"] == pytest.approx(old["task_incremental"], rel=1e-5)
        assert new["class_incremental"] == pytest.approx(old["class_incremental"], rel=1e-5)
    assert now["average_accuracy"] == known["average_accuracy"]

    assert go_on(load_recorded(tmp_path / "out" / "config.yaml")) == "done"
    found = accuracies(tmp_path / "out")
    assert len(found) == 4
    assert min(found) > 0.85
    report = summarise(tmp_path / "out")
    assert report.complete
    assert report.num_tasks == report.tasks_learned == 4
    assert report.fwt is None  # the new task was not tested before it came
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "method",
    ["ewc", "ewc+fr+replay", "bic", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name != "bic")],
)
def test_the_result_is_that_of_a_run_that_knew_all_tasks_from_the_beginning(
    images: Path, tmp_path: Path, method: str
) -> None:
    """Both begin with the same weights: those of new rows are what they would have been."""
    changes = {**METHODS, **OTHERS}[method]
    narrow = config_of(images, tmp_path / "run", changes, QUICK)
    assert isinstance(narrow.stream, ShardStream)
    parts = (*narrow.stream.parts, Part(path=str(images / "high")))
    wide = narrow.model_copy(
        update={
            "stream": narrow.stream.model_copy(update={"parts": parts}),
            "folder": str(tmp_path / "wide"),
        }
    )
    assert go_on(wide) == "done"
    fresh = build_model(wide.model, image_shape=(3, 8, 8), num_classes=10, seed=wide.seed).state_dict()
    start = {name: value[:7].clone() if len(value) == 10 else value for name, value in fresh.items()}
    save_file(start, tmp_path / "start.safetensors")
    begun = {"model": {**QUICK["model"], "checkpoint": str(tmp_path / "start.safetensors")}}
    base = finished(images, tmp_path / "run", changes, QUICK, begun)
    assert go_on(extend(base, tmp_path / "out", parts=[str(images / "high")]).config) == "done"
    expected, found = weights_of(tmp_path / "wide"), weights_of(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert accuracies(tmp_path / "out") == pytest.approx(accuracies(tmp_path / "wide"), abs=1e-6)


@pytest.mark.parametrize(
    "curvature",
    [
        {"kind": "kronecker", "keep_trace": 0.9},
        {"kind": "ekfac"},
        {"kind": "diagonal"},
        pytest.param({"kind": "dense"}, marks=pytest.mark.slow),
    ],
    ids=lambda curvature: str(curvature["kind"]),
)
def test_the_quadratic_pulls_old_weights_as_before_and_new_ones_not_at_all(
    images: Path, tmp_path: Path, curvature: dict[str, Any]
) -> None:
    undamped = {"weight": 1.0, "anchor": "each", "damping": 0.0}
    quadratic = {"prior": {"quadratic": undamped}, "curvature": curvature}
    base = finished(images, tmp_path / "run", quadratic, QUICK, {"memory": {"size": 0}})
    extend(base, tmp_path / "out", parts=[str(images / "high")])
    generator = torch.Generator().manual_seed(0)
    moved = {name: torch.randn(value.shape, generator=generator) for name, value in weights_of(base).items()}
    before, after = pull(base, moved), pull(tmp_path / "out", moved)
    for name, value in before.items():
        assert float(value.norm()) > 0
        torch.testing.assert_close(after[name][: len(value)], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
        assert float(after[name][len(value) :].abs().sum()) <= 1e-6 * float(value.abs().sum())
    assert sum(len(after[name]) - len(value) for name, value in before.items()) == 2 * 3  # weight and bias


def test_stopped_in_a_new_task_and_again_gives_the_same_weights(images: Path, tmp_path: Path) -> None:
    base = finished(images, tmp_path / "run", METHODS["ewc+fr+replay"], QUICK)
    for name in ("whole", "out"):
        parts = [f"{{path: '{images / 'high'}', tasks: 3}}"]
        extend(base, tmp_path / name, parts=parts, settings=("train.epochs=[2, 3]",))
    assert go_on(load_recorded(tmp_path / "whole" / "config.yaml")) == "done"
    config = load_recorded(tmp_path / "out" / "config.yaml")
    assert config.train.epochs == (1, 1, 1, 2, 3)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 3})})
    assert run(config, Comm.solo(), AfterEvent(tmp_path / "out", "step"), quiet=True) == "stopped"
    assert go_on(config) == "done"
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert len(evaluate_run(tmp_path / "out")["tasks"]) == 6


def on_ranks(comm: Comm, folder: str) -> Result:
    """The run of the configuration in a folder."""
    config = load_recorded(Path(folder) / "config.yaml")
    return {"done": torch.tensor(run(config, comm, Stop(), quiet=True) == "done")}


@pytest.mark.slow
def test_what_two_processes_share_is_extended_by_one(images: Path, tmp_path: Path) -> None:
    """Weights are in shards, and curvature is where its layer is."""
    engine = {"engine": {"kind": "fsdp2"}}
    prepare(config_of(images, tmp_path / "two", METHODS["ewc+fr+replay"], QUICK, engine), [])
    assert all(rank["done"] for rank in run_in_world(on_ranks, 2, tmp_path / "first", str(tmp_path / "two")))
    base = finished(images, tmp_path / "one", METHODS["ewc+fr+replay"], QUICK)
    for folder in (tmp_path / "two", base):
        extend(folder, folder / "out", parts=[str(images / "high")])
    assert all(rank["done"] for rank in run_in_world(on_ranks, 2, tmp_path / "then", str(tmp_path / "two" / "out")))
    assert go_on(load_recorded(base / "out" / "config.yaml")) == "done"
    expected, found = weights_of(base / "out"), weights_of(tmp_path / "two" / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("scenario", "tasks", "classes"), [("domains", 1, 0), ("blurry", 2, 4)])
def test_an_extended_run_is_extended_again(
    images: Path, tmp_path: Path, scenario: str, tasks: int, classes: int
) -> None:
    part = {"path": str(images / "low"), "tasks": tasks}
    stream = {"kind": "shards", "scenario": {"kind": scenario}, "parts": [part] * 2}
    finished(images, tmp_path / "0", METHODS["er"], QUICK, {"stream": stream})
    for number in (1, 2):
        done = extend(tmp_path / f"{number - 1}", tmp_path / f"{number}", parts=[str(part)])
        assert (done.tasks, done.classes) == (tasks, classes)
        assert go_on(done.config) == "done"
    assert summarise(tmp_path / "2").tasks_learned == 4 * tasks


def test_the_command_writes_a_run_that_train_continues(images: Path, tmp_path: Path) -> None:
    base = finished(images, tmp_path / "run", METHODS["er"], QUICK, {"cluster": {"kind": "inline"}})
    out = tmp_path / "out"
    found = CliRunner().invoke(app, ["extend", str(base), "--out", str(out), "--part", str(images / "high")])
    assert found.exit_code == 0, found.output
    assert f"1 more task and 3 more classes; to learn them: hpccl train {out}/config.yaml" in found.output
    assert {path.name for path in out.iterdir()} > {"config.yaml", "code.txt", "env.txt", "events.jsonl"}
    assert summarise(out).status == "stopped"
    assert CliRunner().invoke(app, ["train", str(out / "config.yaml")]).exit_code == 0
    assert read_events(out / "events.jsonl")[-1]["event"] == "done"


def test_an_extended_run_of_slurm_is_to_be_submitted(images: Path, quick: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b"
    words = ["extend", str(quick), "--out", str(out), "--part", str(images / "high"), "cluster.kind=slurm"]
    found = CliRunner().invoke(app, words)
    assert f"to learn them: hpccl submit '{out}/config.yaml'" in found.output


@pytest.fixture(scope="module")
def quick(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(images, tmp_path_factory.mktemp("quick") / "run", METHODS["er"], QUICK)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("high train.head=own", "train.head=own: the tasks that are learned depend on train.head, which stays seen"),
        ("high engine.precision=bf16", "engine.precision=bf16: the tasks that are learned depend on"),
        ("high folder=runs/x", "--out sets the folder and the name of the extended run"),
        ("high train.epochs=0", "train.epochs"),
        (
            "high train.epochs.0=3",
            r"train.epochs of the learned tasks: \[3, 3, 3\]; they were trained with \[1, 1, 1\]",
        ),
        ("high stream.parts.0.tasks=4", "the run's parts stay, and --part adds to them"),
        ('high stream.parts=[{"path":"elsewhere"}]', "the run's parts stay, and --part adds to them"),
        ("{path:high, task: 2}", "stream.parts.2.task"),
        ("{path:high, tasks: 4}", "cannot be split into 4 tasks"),
        ("{path:high", "--part"),
        ("nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_added(images: Path, quick: Path, tmp_path: Path, added: str, message: str) -> None:
    part, *settings = added.split() if added[0] != "{" else [added]
    part = str(images / "high") if part == "high" else part.replace(":high", f": '{images}/high'")
    with pytest.raises(HpcclError, match=message):
        extend(quick, tmp_path / "out", parts=[part], settings=settings)
    assert not (tmp_path / "out").exists()


def test_settings_of_the_machine_may_change(images: Path, quick: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=0.02", "cluster.nproc=2", "engine.kind=fsdp2", "memory.keep=copy", "data.workers=0")
    config = extend(quick, tmp_path / "out", parts=[str(images / "high")], settings=settings).config
    assert config.optim.lr == (0.01, 0.01, 0.01, 0.02)
    assert (config.cluster.kind, config.engine.kind, config.memory.keep) == ("local", "fsdp2", "copy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"restart": True, "data": "seen"}, "memory": {"size": 0}}, "was trained with train.restart=true"),
        ({"prior": {"loss": "squared"}}, "lack the new ones"),
        ({"stream": {"kind": "digits", "tasks": 5}}, "allowed: runs with stream.kind=shards"),
        ({"stream": {"scenario": {"kind": "permuted"}}}, "permuted tasks use one"),
        ({}, "has no checkpoint yet, but only a finished run can be adapted or extended"),
    ],
)
def test_runs_that_cannot_be_extended(images: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = config_of(images, tmp_path / "run", QUICK)
    if "stream" in changes and "scenario" in changes["stream"]:
        changes = {"stream": {"parts": [{"path": str(images / "low"), "tasks": 2}], **changes["stream"]}}
    config = config_of(images, tmp_path / "run", QUICK, changes)
    prepare(config, [])
    with pytest.raises(HpcclError, match=message):
        extend(tmp_path / "run", tmp_path / "out", parts=[str(images / "high")])


def test_a_run_that_is_not_finished(images: Path, tmp_path: Path) -> None:
    assert go_on(config_of(images, tmp_path / "run", METHODS["er"], QUICK), 1) == "stopped"
    with pytest.raises(FolderError, match="has learned 1 of 3 tasks; continue it to its end first"):
        extend(tmp_path / "run", tmp_path / "out", parts=[str(images / "high")])


def test_a_folder_in_use_is_kept(images: Path, quick: Path) -> None:
    with pytest.raises(FolderError, match="exists; give a new folder"):
        extend(quick, quick, parts=[str(images / "high")])


def test_a_stream_with_more_parts_is_told_of_extend(images: Path, quick: Path) -> None:
    config = load_recorded(quick / "config.yaml")
    assert isinstance(config.stream, ShardStream)
    more = config.stream.model_copy(update={"parts": (*config.stream.parts, Part(path=str(images / "high")))})
    with pytest.raises(FolderError, match=rf"hpccl extend {quick} --out OUT --part {images / 'high'}"):
        prepare(config.model_copy(update={"stream": more}), [])
