"""`hpccl memory reconstruct` on whole runs of digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.cli import app
from hpccl.config.load import dump
from hpccl.errors import ConfigError, FolderError
from hpccl.report.reconstruction import FIGURES, Reconstruction, markdown
from hpccl.tools.memory_reconstruct import OWN, reconstruct_memory
from hpccl.train.fit import fit
from tests.run.command import events, trained
from tests.run.method import learn, make_world, merged

SETTINGS = ("train.epochs=3", "log.reconstruction=0.5", "cluster.threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a memory and a quadratic, and checkpoints within tasks."""
    return trained(tmp_path_factory.mktemp("run") / "one", *SETTINGS)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replay alone, everything counting once; no checkpoints within tasks."""
    settings = ("memory.size=40", "prior.replay=1.0", "prior.quadratic.weight=0", "prior.temperature=1.0")
    return trained(tmp_path_factory.mktemp("run") / "replay", *SETTINGS, *settings)


@pytest.mark.parametrize("task", [0, 1])
def test_the_runs_own_memory_has_the_error_that_training_wrote(run: Path, task: int) -> None:
    found = reconstruct_memory(run, sizes=[10], selectors=["uniform"], task=task, points=2)
    (event,) = [each for each in events(run, "reconstruction") if each["task"] == task + 1]
    end = next(row for row in found.rows if row["selector"] == OWN and row["share"] == 1)
    for name in ("cosine", "relative_error", "norm"):
        assert end[name] == pytest.approx(event["terms"]["total"][name], rel=1e-4)
    assert end["true_norm"] == pytest.approx(event["true_norm"], rel=1e-4)


def test_the_same_choice_has_the_same_error(run: Path) -> None:
    """Uniform at the run's size is what the run kept, but for the soft labels of its earlier tasks' networks."""
    found = reconstruct_memory(run, sizes=[30], selectors=["uniform"], task=1, points=1)
    own, anew = found.rows
    assert (own["selector"], anew["selector"]) == (OWN, "uniform")
    for name in FIGURES:
        assert anew[name] == pytest.approx(own[name], rel=1e-3)


def test_a_selector_of_the_runs_kind_has_the_runs_settings(tmp_path: Path) -> None:
    """The same choice; a variant says otherwise, and is another one."""
    kept = [f"memory.selector.{key}" for key in ("kind=reconstruction", "weights=fitted", "ridge=50", "probes=2")]
    run = trained(tmp_path / "one", *SETTINGS, "stream.tasks=5", "train.only_last=false", *kept)
    names = ["reconstruction+fitted", "reconstruction"]
    own, anew, equal = reconstruct_memory(run, sizes=[30], selectors=names, task=0, points=1).rows
    for name in FIGURES:
        assert anew[name] == pytest.approx(own[name], rel=1e-3)
    assert equal["relative_error"] != pytest.approx(own["relative_error"], rel=1e-2)


def test_all_examples_replayed_leave_no_error(replayed: Path, tmp_path: Path) -> None:
    smallest = 283  # of the digits' tasks, the last
    found = reconstruct_memory(replayed, sizes=[20, smallest], selectors=["uniform", "herding"], task=0, past=1.0)
    assert found.straight
    assert found.curvature == "none"
    whole = 288
    with pytest.raises(ConfigError, match="--sizes 289: the smallest task has 288 examples"):
        reconstruct_memory(replayed, sizes=[whole + 1], selectors=["uniform"], task=0)
    exact = reconstruct_memory(replayed, sizes=[whole], selectors=["uniform", "error"], task=0, past=1.0, points=3)
    for row in exact.rows:
        if row["selector"] != OWN:
            assert row["relative_error"] < 1e-4
            assert row["change_error"] < 1e-3
            assert row["cosine"] == pytest.approx(1)
    fewer, most = (row for row in found.means() if row["selector"] == "uniform")
    assert most["relative_error"] < fewer["relative_error"]


def test_curvature_may_be_measured_anew(run: Path) -> None:
    found = reconstruct_memory(run, sizes=[10], selectors=["gini+sampled"], task=0, points=1, fraction=0.5)
    assert found.curvature == "measured anew, fraction 0.5"
    assert found.rows[-1]["relative_error"] is not None


def test_points_are_checkpoints_where_they_were_kept(tmp_path: Path) -> None:
    """They are while a task is being learned."""
    config = merged({"memory": {"size": 20}, "checkpoint": {"every": 5, "keep": 9}})
    state, world = make_world(config, tmp_path)
    world.folder.config.write_text(dump(config))
    learn(state, world, 1)
    world.save(state, Mark.at(0, "done", 15))
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    found = reconstruct_memory(tmp_path, sizes=[5], selectors=["uniform"], points=3)
    assert not found.straight
    assert [row["step"] for row in found.rows if row["selector"] == "uniform"] == [5, 10, 15]
    assert found.rows[-1]["share"] == 1


def test_the_command_writes_files(run: Path, tmp_path: Path) -> None:
    arguments = ["memory", "reconstruct", str(run), "--sizes", "5,10", "--selectors", "uniform,gini", "--points", "1"]
    pictures = sorted(run.rglob("*.npz"))
    before = [path.read_bytes() for path in pictures]
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "| gini " in said.output
    page = (tmp_path / "reconstruction.html").read_text()
    assert page.count("<svg") == 1
    content = json.loads((tmp_path / "reconstruction.json").read_text())
    assert [(row["selector"], row["size"]) for row in content["means"]] == [
        ("run", 30),
        ("uniform", 5),
        ("uniform", 10),
        ("gini", 5),
        ("gini", 10),
    ]
    assert len((tmp_path / "reconstruction.csv").read_text().splitlines()) == 1 + 5
    assert (tmp_path / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path)]).output) == content
    assert [path.read_bytes() for path in pictures] == before  # nothing of the run was touched


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({OWN: 30, "uniform": 5}, "`run` is the memory that the run trained with"),
        ({OWN: 0, "uniform": 5}, "`run` is what the run trained with: its quadratic, without a memory"),
        ({"uniform": 5}, "The run trained without a memory and without a quadratic"),
    ],
)
def test_what_run_stands_for_is_told_as_it_is(sizes: dict[str, int], words: str) -> None:
    rows = [{"selector": name, "size": size, "point": 1, **dict.fromkeys(FIGURES)} for name, size in sizes.items()]
    said = markdown(Reconstruction("runs/a", task=0, past=1.0, curvature="none", straight=True, rows=rows))
    assert said.count("The run trained without") + said.count("`run` is") == 1
    assert words in said


def test_what_cannot_be_done_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is not a run folder"):
        reconstruct_memory(tmp_path)
    with pytest.raises(
        FolderError, match=r"no checkpoint both at the end of task 4 and later; --task may be 0, 1, 2, 3 "
    ):
        reconstruct_memory(run, task=4)
    with pytest.raises(ConfigError, match="--selectors 'best': give names separated by commas; allowed: uniform, gini"):
        reconstruct_memory(run, selectors=["best"])
    with pytest.raises(ConfigError, match="--sizes 0; allowed: one or more numbers, each at least 1"):
        reconstruct_memory(run, sizes=[0])
    said = CliRunner().invoke(app, ["memory", "reconstruct", str(run), "--sizes", "5;6"])
    assert isinstance(said.exception, ConfigError)


@pytest.mark.parametrize(
    ("changes", "arguments", "problem"),
    [
        ({"curvature": {"kind": "si"}}, {"selectors": ["reconstruction"]}, "use another selector"),
        ({"curvature": {"kind": "si"}}, {"fraction": 0.5}, "si makes no pass over examples"),
        ({"curvature": {"kind": "optimizer"}}, {}, "which the quadratic must not count"),
        (
            {"prior": {"quadratic": {"weight": 0.0}, "fromp": {"weight": 1.0}}, "memory": {"size": 20}},
            {},
            "this command does not support",
        ),
    ],
)
def test_runs_without_room_for_such_a_memory_say_why(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], problem: str
) -> None:
    config = merged({"train": {"epochs": 1}, "prior": {"quadratic": {"weight": 1.0}}}, changes)
    state, world = make_world(config, tmp_path)
    world.folder.config.write_text(dump(config))
    learn(state, world, 1)
    world.save(state, Mark.at(0, "done", 5))
    world.save(state, Mark.at(1, "fit", 1))
    with pytest.raises(ConfigError, match=problem):
        reconstruct_memory(tmp_path, **{"selectors": ["uniform"], "sizes": [5], "points": 1, **arguments})


def test_soft_labels_of_networks_that_are_gone_cannot_be_made_for_another_memory(tmp_path: Path) -> None:
    config = merged({"train": {"epochs": 1}, "memory": {"size": 20, "labels": "kept"}})
    state, world = make_world(config, tmp_path)
    world.folder.config.write_text(dump(config))
    learn(state, world, 2)
    world.save(state, Mark.at(1, "done", 5))
    world.save(state, Mark.at(2, "fit", 1))
    asked: dict[str, Any] = {"selectors": ["uniform"], "sizes": [5], "points": 1}
    with pytest.raises(ConfigError, match="which were not kept; set --task 0"):
        reconstruct_memory(tmp_path, **asked)
