"""Every training that the scripts of launch/ would start is a valid configuration."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpccl.cluster.campaign import Campaign, Step
from hpccl.config.first_task import first_task_identity
from hpccl.config.load import is_override, load, sweep
from hpccl.config.optim import TimmOptim
from hpccl.config.run import RunConfig
from hpccl.config.stream import ShardStream
from hpccl.errors import ConfigError
from hpccl.report.summary import summarise

ROOT = Path(__file__).parents[3]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def campaign_of(name: str, setting: str) -> Campaign:
    module = script(name)
    more: dict[str, Sequence[Any]] = {
        "split_cifar": [getattr(module, "METHODS", ()), None],
        "tune": [list(getattr(module, "GRID", {}))],
        "ablation": [module.available() if name == "ablation" else ()],
        "selection": [getattr(module, "COMPARED", ())],
        "optimizers": [getattr(module, "OPTIMIZERS", ())],
        "methods": [getattr(module, "METHODS", ())],
    }
    of = getattr(module, setting)
    of = replace(of, seeds=of.seeds[:1]) if name == "methods" else of  # other seeds are the same runs
    made = module.campaign(of, *more[name])
    assert isinstance(made, Campaign)
    return made


CAMPAIGNS = [
    *(
        (name, setting)
        for name in ("split_cifar", "tune", "ablation", "selection", "methods")
        for setting in ("SPLIT_CIFAR", "DIGITS")
    ),
    ("optimizers", "CIFAR10"),
    ("optimizers", "DIGITS"),
]


@pytest.mark.parametrize(("name", "setting"), CAMPAIGNS)
def test_every_training_is_valid(monkeypatch: pytest.MonkeyPatch, name: str, setting: str) -> None:
    monkeypatch.chdir(ROOT)
    folders = set()
    trainings = [step for step in campaign_of(name, setting).steps if step.arguments[0] == "train"]
    for step in trainings:
        (config,) = trained(step)
        folders.add(config.path)
        first = config.train.first_task_from
        assert (first is None) == (step.after == ())
        assert first is None or first in folders, "the run that has the first task comes before"
    assert len(folders) == len(trainings)


def test_each_run_of_a_sweep_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = script("sweep").campaign("s", ["configs/quickstart.yaml", "optim.lr=1e-3,1e-2", "seed=0,1"], together=False)
    *trainings, report = made.steps
    paths = [config.path for step in trainings for config in trained(step)]
    assert paths == [f"runs/s/optim.lr={lr},seed={seed}" for lr in ("1e-3", "1e-2") for seed in (0, 1)]
    assert list(report.arguments[1:5]) == paths
    with pytest.raises(ConfigError, match="name follow from the name of the sweep"):
        script("sweep").campaign("s", ["name=a,b"], together=False)


def test_imagenets_folders_may_have_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chosen = argparse.Namespace(shards="a,b", folder="c,d", tasks=10, seeds=(0,), sizes=(200,))
    for step in script("imagenet").trainings(chosen, ()):
        (config,) = trained(step)
        assert config.path == f"c,d/{step.name}"
        assert isinstance(config.stream, ShardStream)
        assert config.stream.parts[0].path == "a,b"


def test_split_cifar_has_eleven_methods_and_whole_seeds() -> None:
    steps = [step.name for step in campaign_of("split_cifar", "SPLIT_CIFAR").steps]
    assert len(steps) == 3 * (4 + 7 * 6) + 1
    seeds = [int(name.rsplit("-", 1)[1]) for name in steps[:-1]]
    assert seeds == sorted(seeds)
    assert steps[-1] == "report"


def test_optimisers_are_what_they_are_called_and_share_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module, found = script("optimizers"), {}
    for step in campaign_of("optimizers", "CIFAR10").steps[:-1]:
        model, optimizer, seed = step.name.split("-")
        files, settings = (list(group) for group in (step.arguments[1:3], step.arguments[3:]))
        (config,) = sweep([Path(file) for file in files], settings)
        assert config.optim.name == optimizer if isinstance(config.optim, TimmOptim) else config.optim.kind == optimizer
        found[model, optimizer, seed] = config.model_dump(exclude={"optim", "name", "folder", "seed", "model"})
        assert config.optim.schedule == "cosine"
        assert config.optim.warmup == 0.1
    assert set(found) == set(itertools.product(("cifarnet", "resnet18"), module.OPTIMIZERS, "012"))
    assert all(other == found["cifarnet", "sgd", "0"] for other in found.values())


@pytest.mark.slow
def test_optimizers_run(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, str(ROOT / "launch" / "optimizers.py"), "--quick"]
    done = subprocess.run([*command, "--optimizers", "sgd", "ivon"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs" / "optimizers_quick"
    assert {summarise(runs / f"mlp-{name}-0").status for name in ("sgd", "ivon")} == {"done"}
    table = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert "## Likelihood and calibration" in table
    assert "optim.kind=ivon" in table


def test_every_method_is_trained_in_both_ways_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = script("methods")
    files = {path.stem: load([path], []) for path in (ROOT / "configs" / "method").glob("*.yaml")}
    assert sorted(module.METHODS) == sorted(files)
    assert sorted(module.CLASSES) == sorted(name for name, file in files.items() if file.train.head == "seen")
    steps = campaign_of("methods", "SPLIT_CIFAR").steps
    names = [step.name for step in steps if step.arguments[0] == "train"]
    assert len(names) == 2 * len(files) - len(module.CLASSES)
    for step in steps[: len(names)]:
        (config,) = trained(step)
        method, head, _ = step.name.rsplit("-", 2)
        assert (config.method, config.train.head) == (method, head)
        if config.memory.kept and method != "fromp":
            assert config.memory.size or config.memory.total == 6000
            assert config.memory.size in (0, 1000)
    assert [step.name for step in steps[len(names) :]] == ["report-own", "report-seen"]
    assert sorted(name for step in steps[len(names) :] for name in step.after) == sorted(names)


@pytest.mark.parametrize("row", ["diagonal", "ekfac"])
def test_another_kind_of_curvature_is_the_only_change_of_its_row(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.chdir(ROOT)
    steps = {step.name: trained(step)[0] for step in campaign_of("ablation", "SPLIT_CIFAR").steps[:-1]}
    base, other = (steps[f"{name}-0"].curvature.model_dump() for name in ("base", row))
    shared = (base.keys() & other.keys()) - {"kind"}
    assert {"fisher", "fraction", "batch_size"} <= shared
    assert {key: other[key] for key in shared} == {key: base[key] for key in shared}


@pytest.mark.parametrize("name", ["split_cifar", "methods"])
def test_a_shared_first_task_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else the run that takes it would be refused, after others had run for hours."""
    monkeypatch.chdir(ROOT)
    known: dict[str, dict[str, Any]] = {}
    for step in campaign_of(name, "SPLIT_CIFAR").steps:
        if step.arguments[0] == "train":
            (config,) = trained(step)
            known[step.name] = first_task_identity(config)
            for other in step.after:
                assert known[step.name] == known[other], step.name
    assert len(known) > 50


def trained(step: Step) -> list[RunConfig]:
    given = step.arguments[1:]
    files = [Path(each) for each in given if not is_override(each)]
    return sweep(files, [each for each in given if is_override(each)])


@pytest.mark.slow
def test_methods_run(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, str(ROOT / "launch" / "methods.py"), "--quick", "--jobs", "2"]
    more = ["--methods", "er", "icarl", "fromp"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("task_incremental", "class_incremental"):
        folder = tmp_path / "runs" / "methods_quick" / "comparison" / kind
        table = (folder / "comparison.md").read_text(encoding="utf-8")
        assert ("icarl" in table) == (kind == "class_incremental")
        assert "fromp" in table


@pytest.mark.slow
def test_split_cifar_runs(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, str(ROOT / "launch" / "split_cifar.py"), "--quick", "--sizes", "20"]
    more = ["--methods", "ewc", "joint", "ewc+fr+replay", "--jobs", "2"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs" / "split_cifar_quick"
    names = {folder.name for folder in runs.iterdir() if (folder / "config.yaml").exists()}
    assert names == {"finetune-0", "ewc-0", "joint-0", "ewc+fr+replay-20-0"}
    assert {summarise(runs / name).status for name in names} == {"done"}
    table = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert "ewc+fr+replay" in table
