"""Streams whose tasks share classes, or have few images: heads, memory, curvature, resuming, other methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import hpccl.report.write
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.data.rows import Request
from hpccl.errors import ConfigError
from hpccl.report.summary import summarise
from hpccl.tools.evaluate_run import evaluate_run
from hpccl.tools.export import export
from hpccl.tools.memory_map.build import map_memory
from hpccl.train.compose import Composer
from hpccl.train.distill import old_heads
from hpccl.train.evaluate import evaluate_all
from hpccl.train.state import World
from tests.run.command import events
from tests.run.method import learn, make_world
from tests.run.test_rows import finished

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("model.hidden=[16]", "checkpoint.every=0", "log.every=5", "log.tensorboard=false"),
    *("engine.device=cpu", "curvature.kind=diagonal", "log.reconstruction=0.02"),
)
SCENARIOS = {
    "permuted": ("stream.tasks=3", "stream.scenario.kind=permuted", "train.epochs=1"),
    "rotated": ("stream.tasks=2", "stream.scenario={kind: rotated, degrees: 90, angles: even}", "train.epochs=1"),
    "blurry": ("stream.tasks=2", "stream.scenario={kind: blurry, blur: 0.2, disjoint: 0.5}", "train.epochs=4"),
    "few_shot": ("stream.tasks=3", "stream.scenario={kind: few_shot, base: 5, way: 2, shots: 5}", "train.epochs=4"),
}


def config_of(scenario: str, *arguments: str, method: str = "ewc+fr+replay") -> RunConfig:
    files = [ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "method" / f"{method}.yaml"]
    return load(files, [*SMALL, *SCENARIOS[scenario], *arguments])


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("permuted", "rotated") else []) for name in SCENARIOS],
)
def test_stopped_and_continued_to_the_same_weights(
    tmp_path: Path, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory of both kinds and curvature; stopped twice on the way."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)

    def config(name: str) -> RunConfig:
        return config_of(scenario, "memory.size=40", f"folder={tmp_path / name}")

    once, again = finished(config("once")), finished(config("again"), stops=(4, 2))
    assert again == once
    results = events(tmp_path / "once", "evaluate")[-1]["results"]
    assert events(tmp_path / "again", "evaluate")[-1]["results"] == results
    report = summarise(tmp_path / "once")
    right = sum(result["num"] * result["class_incremental"]["accuracy"] for result in results)
    assert report.union_accuracy[-1] == pytest.approx(right / sum(result["num"] for result in results))
    assert right / sum(result["num"] for result in results) > 1.5 / 10  # it learns, whatever is shared
    sizes = {"permuted": 1438, "rotated": 1438, "blurry": None, "few_shot": 10}[scenario]
    assert sizes is None or report.tasks[1]["num_train"] == sizes


def test_a_step_may_recall_predictions_and_show_the_images_of_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FROMP beside TOPIC in few-shot sessions, whose memory is all of a session."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)

    def config(name: str) -> RunConfig:
        words = ("prior.topology.nodes=20", "train.norms=running", "log.reconstruction=0", "log.every=1")
        return config_of("few_shot", *words, f"folder={tmp_path / name}", method="fromp")

    once, again = finished(config("once")), finished(config("again"), stops=(4, 2))
    assert again == once
    assert summarise(tmp_path / "once").method == "topic+fromp"
    steps = [event["terms"] for event in events(tmp_path / "once", "step") if event["task"] > 0]
    for name in ("functional", "anchor", "minmax"):
        assert max(terms[name] for terms in steps) > 0


@pytest.mark.parametrize("head", ["own", "seen"])
def test_all_classes_compete_where_all_are_shared(tmp_path: Path, head: str) -> None:
    config = config_of("permuted", f"train.head={head}", method="finetune")
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    composer = Composer.build(
        config, world.stream, world.stream.tasks[1], state.prior.memory, teacher=None, device=state.engine.device
    )
    target, competing = composer.hard_targets(torch.arange(1430, 1450))
    assert bool(competing.all())
    np.testing.assert_array_equal(target.argmax(dim=1), world.stream.labels("train")[1430:1450])
    for result in evaluate_all(state, world, last=1)[:2]:
        assert result["class_incremental"] == result["task_incremental"]


def test_a_soft_label_names_a_class_once_where_tasks_share_them(tmp_path: Path) -> None:
    config = config_of("permuted", "train.head=seen", "memory.size=5", "memory.total=0", "prior.replay=0", method="fr")
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    memory = state.prior.memory
    target, competing = memory.soft_targets(torch.arange(len(memory)), temperature=1.0, num_classes=10)
    assert bool(competing.all())
    torch.testing.assert_close(target.sum(dim=1), torch.ones(10))
    assert memory.soft.shape == (10, 10)


@pytest.mark.slow
def test_the_map_of_tasks_that_share_all_classes_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    maps = []
    for head in ("own", "seen"):
        folder = tmp_path / head
        finished(config_of("rotated", f"train.head={head}", f"folder={folder}", method="finetune"))
        maps.append(map_memory(folder, prior_precision=1.0))
    assert [(row["task"], row["examples"]) for row in maps[0].tasks] == [(0, 1438), (1, 1438)]
    assert len(maps[0].classes) == 10
    for own, seen in zip(maps[0].classes, maps[1].classes, strict=True):
        assert own == pytest.approx(seen)


def test_the_own_head_of_an_image_is_that_of_the_task_it_comes_with(tmp_path: Path) -> None:
    """A class may be in several tasks, so that its name alone does not say which classes compete."""
    config = config_of("blurry", "train.head=own", "stream.tasks=5", method="finetune")
    state, world = make_world(config, tmp_path)
    tasks, labels = world.stream.tasks, world.stream.labels("train")
    assert len({task.classes for task in tasks}) == 5
    composer = Composer.build(
        config, world.stream, tasks[2], state.prior.memory, teacher=None, device=state.engine.device
    )
    _, competing = composer.hard_targets(torch.arange(len(labels)))
    for task in tasks:
        here = competing[task.samples("train").start : task.samples("train").stop]
        expected = torch.zeros(len(world.stream.class_names), dtype=torch.bool)
        expected[list(task.classes)] = True
        assert bool((here == expected).all())
    # In a test, too: the accuracy among the own head is that of the classes of the image's task.
    logits = torch.cat([state.engine.predict(images.pixels) for images in world.stream.load(requests(world), "test")])
    for task, result in zip(tasks, evaluate_all(state, world, last=1), strict=True):
        span = slice(task.samples("test").start, task.samples("test").stop)
        masked = torch.full_like(logits[span], -torch.inf)
        masked[:, list(task.classes)] = logits[span][:, list(task.classes)]
        right = masked.argmax(dim=1).numpy() == world.stream.labels("test")[span]
        assert result["task_incremental"]["accuracy"] == pytest.approx(right.mean())


def requests(world: World) -> Iterator[Request]:
    count = world.stream.tasks[-1].samples("test").stop
    yield Request(np.arange(count), np.zeros(count, dtype=np.uint64))


def test_the_old_network_says_one_thing_of_a_head_that_tasks_share(tmp_path: Path) -> None:
    config = config_of("permuted", "train.head=own", "prior.distill.weight=1", method="finetune")
    _, world = make_world(config, tmp_path)
    heads = old_heads(config, world.stream, world.stream.tasks[2])
    assert heads.shape == (1, 10)
    assert bool(heads.all())


def curve(folder: Path) -> list[float]:
    """Accuracy on all test images seen, after each task."""
    return [value for value in summarise(folder).union_accuracy if value is not None]


TOPIC = {
    "topic": (
        *("train.epochs=[8,12]", "prior.topology.nodes=40", "train.accumulate=2", "checkpoint.every=3"),
        *("prior.topology.new_nodes=2", "memory.size=0"),
    ),
    "prototypes": ("train.epochs=[8,12]",),
}


@pytest.mark.parametrize("method", TOPIC)
def test_few_shot_methods_stop_and_continue_within_a_session(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)

    def config(name: str) -> RunConfig:
        return config_of("few_shot", *TOPIC[method], f"folder={tmp_path / name}", method=method)

    # A task has 2 (of the first: 19) questions within it, one after training and one after all else.
    once, again = finished(config("once")), finished(config("again"), stops=(23, 5))
    stops = [(event["task"], event["phase"], event["step"]) for event in events(tmp_path / "again", "stop")]
    assert stops[0][:2] == (1, "fit")
    assert 0 < stops[0][2] < 12
    assert stops[1][0] == 2
    assert again == once
    results = events(tmp_path / "once", "evaluate")[-1]["results"]
    assert events(tmp_path / "again", "evaluate")[-1]["results"] == results
    assert evaluate_run(tmp_path / "once")["tasks"] == results  # with the classifier that the run was tested with
    report = summarise(tmp_path / "once")
    assert report.method == method
    union = curve(tmp_path / "once")
    assert report.performance_drop == pytest.approx(union[0] - union[2])
    if method == "topic":
        nodes = {event["task"]: event["nodes"] for event in events(tmp_path / "again", "topology")}
        assert nodes == {0: 40, 1: 44, 2: 48}
        steps = [event for event in events(tmp_path / "once", "step") if event["task"] == 1]
        assert all(event["terms"]["anchor"] > 0 and event["terms"]["minmax"] > 0 for event in steps)


def test_prototypes_on_frozen_features_beat_learning_from_a_few_shots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base network is good, and sessions cannot undo it."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    found = {}
    for method in ("prototypes", "finetune"):
        folder = tmp_path / method
        finished(config_of("few_shot", "train.epochs=[12,20]", f"folder={folder}", method=method))
        found[method] = curve(folder)
    assert found["prototypes"][-1] > 0.6
    assert found["prototypes"][-1] > found["finetune"][-1] + 0.2


def test_a_network_tested_by_prototypes_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    finished(config_of("few_shot", "train.epochs=1", f"folder={tmp_path / 'run'}", method="prototypes"))
    with pytest.raises(ConfigError, match="is not part of the network"):
        export(tmp_path / "run", tmp_path / "out")


def test_more_nodes_than_examples_are_refused(tmp_path: Path) -> None:
    config = config_of("few_shot", "prior.topology.nodes=722", f"folder={tmp_path / 'run'}", method="topic")
    with pytest.raises(ConfigError, match=r"prior\.topology\.nodes=722 is more than the 721 training examples"):
        finished(config)


def test_memory_keeps_all_of_a_session_that_is_smaller(tmp_path: Path) -> None:
    config = config_of("few_shot", "memory.size=40", method="replay")
    state, world = make_world(config, tmp_path)
    learn(state, world, 3)
    assert state.prior.memory.per_task(3) == [40, 10, 10]


@pytest.mark.parametrize(
    ("scenario", "method", "settings"),
    [
        ("permuted", "gdumb", ("memory.total=60", "train.epochs=60")),
        pytest.param("blurry", "gdumb", ("memory.total=60", "train.epochs=60"), marks=pytest.mark.slow),
        pytest.param("rotated", "lwf", ("train.head_epochs=0", "train.epochs=3"), marks=pytest.mark.slow),
        pytest.param("blurry", "der++", ("memory.total=60",), marks=pytest.mark.slow),
        ("few_shot", "bic", ("memory.total=100",)),
        pytest.param("few_shot", "icarl", ("memory.total=60",), marks=pytest.mark.slow),
        pytest.param(
            "permuted", "joint", ("train.only_last=false", "train.epochs=3", "stream.tasks=2"), marks=pytest.mark.slow
        ),
    ],
)
def test_other_methods_learn_on_shared_classes(
    tmp_path: Path, scenario: str, method: str, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    finished(config_of(scenario, *settings, f"folder={tmp_path / 'run'}", method=method))
    union = curve(tmp_path / "run")
    assert union[0] > 0.5
    assert union[-1] > 0.15
