"""`hpccl gp fit` on whole runs of digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.checkpoint.tree import read_tree
from hpccl.cli import app
from hpccl.config.load import dump
from hpccl.errors import ConfigError, FolderError
from hpccl.gp.likelihood import Softmax
from hpccl.gp.state import Settings, State
from hpccl.tools.gp_fit import fit_gp
from hpccl.train.evaluate import evaluate
from tests.run.method import learn, make_world, merged


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), {"train": {"epochs": 5, "batch_size": 64, "head": "seen"}}, tasks=3)


def trained(folder: Path, *changes: dict[str, Any], tasks: int) -> Path:
    """Of a network that forgets: it has no prior."""
    config = merged({"model": {"kind": "mlp", "hidden": [32]}}, *changes)
    state, world = make_world(config, folder)
    learn(state, world, tasks)
    evaluate(world.stream.tasks[tasks - 1], state, world)
    world.save(state, Mark.at(tasks - 1, "done", 9))
    (folder / "config.yaml").write_text(dump(config))
    return folder


def test_the_process_remembers_what_its_network_forgot(run: Path, tmp_path: Path) -> None:
    """What is written is read again."""
    out = tmp_path / "out"
    arguments = [
        "gp",
        "fit",
        str(run),
        "--inducing",
        "40",
        "--keep",
        "20",
        "--steps",
        "10",
        "--variance",
        "30",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = json.loads((out / "gp.json").read_text())
    assert (said["inducing"], said["memory"], said["features"]) == (40, 60, 32)
    assert [len(rows) for rows in said["after"]] == [1, 2, 3]
    assert said["average_accuracy"] > 0.85
    network = sum(row["accuracy"] for row in said["network"]) / 3
    assert network < 0.5 < said["average_accuracy"]
    assert said["names"] == ["digits[1/5]", "digits[2/5]", "digits[3/5]"]
    for number, name in enumerate(said["names"], 1):
        assert f"| {number} | {name} |" in re.sub(" +", " ", result.output)
    assert result.output.rstrip().endswith(str(out))
    state = State.from_state_dict(read_tree(out)[1])
    assert state.num_seen == said["num_seen"]
    assert bool(state.predict(torch.zeros(2, 32))[0].isfinite().all())
    bare = fit_gp(run, settings=Settings(inducing=40, memory=0, steps=10), variance=30.0)
    assert bare.state.memory is None
    assert bare.as_dict()["average_accuracy"] < said["average_accuracy"]


def test_arguments_that_are_out_of_range(run: Path) -> None:
    with pytest.raises(ConfigError, match="Gaussian process: inducing=0"):
        fit_gp(run, settings=Settings(inducing=0))
    for lengthscale in (-1.0, 0.0):
        with pytest.raises(ConfigError, match=rf"kernel: lengthscale={lengthscale}"):
            fit_gp(run, settings=Settings(), lengthscale=lengthscale)


def test_only_the_files_of_an_earlier_fit_are_replaced(run: Path, tmp_path: Path) -> None:
    arguments = ["gp", "fit", str(run), "--inducing=20", "--steps=2", "--keep=5", f"--out={tmp_path / 'out'}"]
    for _ in range(2):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(FolderError, match=r"contains files that are not from an earlier fit \(notes.txt\)"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (tmp_path / "out" / "notes.txt").exists()


def test_networks_of_their_own_are_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "separate", {"train": {"epochs": 1, "restart": True}}, tasks=1)
    with pytest.raises(ConfigError, match="separate network for each task"):
        fit_gp(folder, settings=Settings())


def test_a_class_of_several_tasks_is_one_function(tmp_path: Path) -> None:
    """Tasks of rotated digits have all classes."""
    rotated = {"stream": {"kind": "digits", "tasks": 2, "scenario": {"kind": "rotated"}}}
    run = trained(tmp_path, rotated, {"train": {"epochs": 1, "batch_size": 64, "head": "seen"}}, tasks=2)
    found = fit_gp(run, settings=Settings(inducing=20, steps=3, memory=5))
    assert isinstance(found.state.likelihood, Softmax)
    assert found.state.likelihood.num_latent == 10
    assert found.after[-1][0]["accuracy"] > 0.3  # by chance 0.1
