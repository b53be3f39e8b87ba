"""Kill at any moment, run the same command again: the same weights, bit for bit."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint.store import Mark, load, marks, open_shards
from hpccl.cluster.prepare import prepare
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.train.fit import fit
from hpccl.train.run import fresh_state, run, weights_sha256
from hpccl.train.state import RunState
from tests.run.command import events, finish, kill_tree, report, start, trained, wait_for_steps
from tests.run.method import AfterEvent, go_on, learn, make_world, merged, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    return trained(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two processes, which share the curvature of the first layer."""
    folder = tmp_path_factory.mktemp("two") / "run"
    continue_to_the_end(folder, "--nproc=2")
    return folder


def digest(state: RunState) -> str:
    return weights_sha256(sorted(wholes(state.engine.gather()).items()))


def continue_to_the_end(folder: Path, *arguments: str) -> None:
    code, output = finish(start(folder, *arguments))
    assert code == 0, output


@pytest.mark.parametrize("kills", [(3, 40), pytest.param((60, 150, 200), marks=pytest.mark.slow)])
def test_kill_9_and_again_gives_the_same_weights(undisturbed: Path, tmp_path: Path, kills: tuple[int, ...]) -> None:
    folder = tmp_path / "run"
    for steps in kills:  # in different tasks, before and after the first checkpoint
        process = start(folder)
        wait_for_steps(folder, process, steps)
        kill_tree(process)
    continue_to_the_end(folder)
    again, once = report(folder), report(undisturbed)
    assert again["weights_sha256"] == once["weights_sha256"]
    assert again["accuracy_matrix"] == once["accuracy_matrix"]
    assert images_trained(again) == images_trained(once)
    assert len(events(folder, "run")) == len(kills) + 1


def images_trained(found: dict[str, Any]) -> list[int]:
    """By task: each once, whatever was killed and done again."""
    return [phase["images"] for phase in found["phases"] if phase["phase"] == "fit"]


@pytest.mark.parametrize(
    "phase", ["curvature", *(pytest.param(name, marks=pytest.mark.slow) for name in ("select", "memory", "evaluate"))]
)
def test_kill_9_between_training_and_the_next_task(undisturbed: Path, tmp_path: Path, phase: str) -> None:
    """At each part of a task's end; what it wrote is repeated."""
    folder = tmp_path / "run"
    process = start(folder)
    kind = "phase" if phase in ("select", "curvature") else phase
    while not any(event.get("phase", phase) == phase and event["task"] >= 0 for event in events(folder, kind)):
        assert process.poll() is None
    kill_tree(process)
    continue_to_the_end(folder)
    assert report(folder)["weights_sha256"] == report(undisturbed)["weights_sha256"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(folder, process, 50)
    os.kill(process.pid, number)
    code, output = finish(process)
    assert code == 75, output
    assert "run the same command again to continue" in output
    (stop,) = events(folder, "stop")
    assert stop["reason"] == f"signal {number.name}"
    assert (folder / "checkpoints" / Mark.at(stop["task"], stop["phase"], stop["step"]).name).is_dir()
    continue_to_the_end(folder)
    assert report(folder)["weights_sha256"] == report(undisturbed)["weights_sha256"]


def test_a_stop_while_the_network_is_tested_is_heard_and_changes_nothing(tmp_path: Path) -> None:
    """A job that has little time left may be tested for longer."""
    changes = {
        "memory": {"size": 20},
        "prior": {"quadratic": {"weight": 1.0}},
        "stream": {"kind": "digits", "tasks": 2},
    }
    configs = [merged(changes, {"folder": str(tmp_path / name)}) for name in ("whole", "stopped")]
    assert go_on(configs[0]) == "done"
    folder = prepare(configs[1], []).path
    for event, place in (("run", (0, "fit")), ("memory", (0, "fitted"))):
        assert run(configs[1], Comm.solo(), AfterEvent(folder, event), quiet=True) == "stopped"
        (*_, stop) = events(folder, "stop")
        assert (stop["task"], stop["phase"], stop["reason"]) == (*place, "enough")
    tested = [event["task"] for event in events(folder, "evaluate")]
    assert tested == [-1]  # when the second start began, which was stopped after the first task's training
    assert go_on(configs[1]) == "done"
    assert weights(folder) == weights(tmp_path / "whole")
    assert report(folder)["accuracy_matrix"] == report(tmp_path / "whole")["accuracy_matrix"]


@pytest.mark.parametrize(
    "curvature",
    [{"kind": "kronecker"}, {"kind": "kronecker", "tasks": {"kind": "nearest"}}, {"kind": "dense"}],
    ids=["list", "nearest", "dense"],
)
def test_what_was_loaded_continues_to_the_last_bit(tmp_path: Path, curvature: dict[str, Any]) -> None:
    """Also where products of matrices are rounded by where in memory these begin."""
    config = merged({"curvature": curvature, "prior": {"quadratic": {"weight": 1.0}}, "model": {"hidden": [24]}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    mark = Mark.at(1, "done", 0)
    world.save(state, mark)
    other, checkpoints = fresh_state(config, world.stream, world.comm), world.folder.checkpoints
    other.load_state_dict(load(checkpoints, mark), mark, open_shards(checkpoints, mark), world.comm)
    for one in (state, other):
        one.mark = Mark.at(2, "fit", 0)
        assert fit(world.stream.tasks[2], one, world)
    assert digest(other) == digest(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"epochs": 1, "ema": 0.9}},
        {"curvature": {"kind": "si"}},
        {"curvature": {"kind": "optimizer"}, "optim": {"kind": "ivon", "curvature_decay": 0.999}},
    ],
    ids=["ema", "si", "optimizer"],
)
def test_a_task_that_is_done_leaves_no_optimiser_behind(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The next one begins with a new optimiser and, with SI, with a new path."""
    common = {"stream": {"kind": "digits", "tasks": 2}, "prior": {"quadratic": {"weight": 1.0}}, "memory": {"size": 0}}
    whole, cut = (merged(common, changes, {"folder": str(tmp_path / name)}) for name in ("whole", "cut"))
    assert go_on(whole) == "done"
    assert go_on(cut, 1) == "stopped"
    assert go_on(cut) == "done"
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    checkpoints = tmp_path / "cut" / "checkpoints"
    kept = {mark: load(checkpoints, mark)["engine"] for mark in marks(checkpoints)}
    assert {(mark.task, mark.phase) for mark in kept} == {(0, "fitted"), (0, "done"), (1, "done")}
    for mark, engine in kept.items():
        held = [engine["optimizer"], engine["average"], engine["credit"], engine["begun"]]
        assert any(held) == (mark.phase == "fitted"), mark


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["select", "curvature"])
def test_kill_9_of_two_processes_while_curvature_is_measured_and_after(
    undisturbed_two: Path, tmp_path: Path, phase: str
) -> None:
    """In the second task, where it is added to that of the first, which each process reads its share of."""
    folder = tmp_path / "run"
    process = start(folder, "--nproc=2")
    while not any(event["phase"] == phase and event["task"] == 1 for event in events(folder, "phase")):
        assert process.poll() is None
    kill_tree(process)
    continue_to_the_end(folder, "--nproc=2")
    assert report(folder)["weights_sha256"] == report(undisturbed_two)["weights_sha256"]


def test_a_run_that_is_done_is_left_as_it_is(tmp_path: Path) -> None:
    config = merged({"folder": str(tmp_path / "run"), "train": {"epochs": 1}})
    assert go_on(config) == "done"
    diary, once = tmp_path / "run" / "events.jsonl", report(tmp_path / "run")
    before = diary.read_bytes()
    assert go_on(config) == "done"
    assert diary.read_bytes() == before
    assert report(tmp_path / "run") == once
    newest = max((tmp_path / "run" / "checkpoints").glob("task-*-done-*"))
    newest.rename(tmp_path / "lost")
    assert go_on(config) == "done"  # from the checkpoint before
    assert len(diary.read_bytes()) > len(before)
    assert report(tmp_path / "run")["weights_sha256"] == once["weights_sha256"]


def test_two_processes_agree_with_one_and_resume_exactly(
    undisturbed: Path, undisturbed_two: Path, tmp_path: Path
) -> None:
    whole, killed = undisturbed_two, tmp_path / "killed"
    process = start(killed, "--nproc=2")
    wait_for_steps(killed, process, 45)
    kill_tree(process)
    continue_to_the_end(killed, "--nproc=2")
    assert report(killed)["weights_sha256"] == report(whole)["weights_sha256"]
    assert_same_result(whole, undisturbed)


def test_resume_on_another_number_of_processes(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "--nproc=2")
    wait_for_steps(folder, process, 60)
    kill_tree(process)
    continue_to_the_end(folder, "--nproc=1")
    assert [event["world_size"] for event in events(folder, "run")] == [2, 1]
    assert_same_result(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("curvature.kind=ekfac",),
        ("curvature.kind=dense",),
        ("curvature.kind=kronecker", "curvature.keep_trace=0.9"),
        ("curvature.kind=kronecker", "curvature.tasks.kind=nearest", "prior.quadratic.anchor=each"),
        ("curvature.kind=kronecker", "curvature.tasks.max_gib=1e-6", "curvature.tasks.tolerance=0.5"),
    ],
    ids=" ".join,
)
def test_every_kind_of_curvature_resumes(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Exactly on the same number of processes; on another as well as it goes, for rounding grows on the way."""
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    continue_to_the_end(whole, "--nproc=2", *settings)
    for folder, number in ((same, 2), (other, 3)):
        process = start(folder, "--nproc=2", *settings)
        wait_for_steps(folder, process, 100)
        kill_tree(process)
        continue_to_the_end(folder, f"--nproc={number}", *settings)
    assert report(same)["weights_sha256"] == report(whole)["weights_sha256"]
    assert report(other)["average_accuracy"] == pytest.approx(report(whole)["average_accuracy"], abs=0.03)


@pytest.mark.slow
def test_four_processes_resume_exactly(undisturbed: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    continue_to_the_end(whole, "--nproc=4")
    process = start(killed, "--nproc=4")
    wait_for_steps(killed, process, 45)
    kill_tree(process)
    continue_to_the_end(killed, "--nproc=4")
    assert report(killed)["weights_sha256"] == report(whole)["weights_sha256"]
    assert_same_result(whole, undisturbed)


def assert_same_result(folder: Path, other: Path) -> None:
    """The same memory, soft labels and weights to rounding, and the same sample order (by the losses of all steps)."""
    steps = max(int(path.name[-8:]) for path in (folder / "checkpoints").glob("task-004-done-*"))
    mark = Mark.at(4, "done", steps)
    ours, theirs = (load(path / "checkpoints", mark) for path in (folder, other))
    memory, memory_there = ours["prior"]["memory"], theirs["prior"]["memory"]
    for name in ("sample", "task", "label", "replay", "heads"):
        assert torch.equal(memory[name], memory_there[name]), name
    assert float((memory["soft"] - memory_there["soft"]).norm()) < 0.01 * float(memory_there["soft"].norm())
    # Adam divides by the gradient's size, so rounding grows where gradients vanish: compare lengths, not elements.
    for name, value in ours["engine"]["weights"].items():
        there = theirs["engine"]["weights"][name]
        assert float((value - there).norm()) < 0.03 * float(there.norm()), name
    losses, losses_there = (
        {(event["task"], event["step"]): event["loss"] for event in events(path, "step")} for path in (folder, other)
    )
    assert losses.keys() == losses_there.keys()
    for key, loss in losses.items():
        assert loss == pytest.approx(losses_there[key], rel=1e-2, abs=1e-3), key


def test_a_run_folder_that_was_copied_elsewhere_goes_on(tmp_path: Path) -> None:
    """What checkpoints name beside themselves, the soft labels of the memory, is in the folder."""
    sections = {"memory": {"size": 20}, "prior": {"replay": 0.5}, "stream": {"kind": "digits", "tasks": 2}}
    expected, begun, moved = (
        merged(sections, {"folder": str(tmp_path / name)}) for name in ("whole", "begun", "moved")
    )
    assert go_on(expected) == "done"
    assert go_on(begun, 1) == "stopped"
    Path(begun.path).rename(moved.path)
    assert go_on(moved) == "done"
    assert weights(tmp_path / "moved") == weights(tmp_path / "whole")
    assert [path.name[:8] for path in sorted((tmp_path / "moved" / "memory" / "soft").iterdir())] == [
        *("task-000", "task-001")
    ]
    for mark in marks(tmp_path / "moved" / "checkpoints"):
        load(tmp_path / "moved" / "checkpoints", mark)


def test_a_convolutional_network_goes_on_in_another_memory_layout(tmp_path: Path) -> None:
    """What is measured then is added to what was measured before: their factors have one order of inputs."""
    changes = {
        "model": {"kind": "timm", "name": "test_resnet"},
        "train": {"epochs": 1, "batch_size": 512},
        "curvature": {"kind": "kronecker", "fraction": 0.02},
        "prior": {"quadratic": {"weight": 1.0}},
    }

    def config(channels_last: bool) -> RunConfig:
        engine = {"engine": {"kind": "ddp", "channels_last": channels_last}}
        return merged(changes, engine).model_copy(update={"folder": str(tmp_path / "run")})

    def layouts() -> dict[bool, int]:
        checkpoints = tmp_path / "run" / "checkpoints"
        precision = load(checkpoints, marks(checkpoints)[-1])["prior"]["quadratic"]["precision"]
        return Counter(layout["channels_last"] for layout in precision["layouts"])

    assert go_on(config(True), 1) == "stopped"
    assert layouts()[True] > 0
    assert go_on(config(False), 2) == "stopped"
    assert layouts()[True] == 0
