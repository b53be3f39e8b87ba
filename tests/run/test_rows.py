"""The methods that are made of rows, end to end: each file on the digits, stopped and continued to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import hpccl.report.write
from hpccl.config.load import dump, load
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError
from hpccl.folder import RunFolder
from hpccl.report.summary import summarise
from hpccl.tools.evaluate_run import evaluate_run
from hpccl.tools.export import export
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.run.command import events

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("model={kind: mlp, hidden: [24]}", "train.epochs=1", "train.batch_size=48", "train.clip_norm=5"),
    *("train.accumulate=2", "checkpoint.every=0", "log.every=5", "log.tensorboard=false"),
    *("log.reconstruction=0.1", "engine.device=cpu"),
)
CONVOLUTIONS = "{kind: timm, name: resnet10t, options: {stem_width: 4, channels: [8, 8, 16, 16]}}"
SETTINGS: dict[str, tuple[str, ...]] = {
    "lwf": ("train.head=own", "train.head_epochs=1"),
    "lwf.mc": (),
    "feature_extraction": ("train.ema=0.9", "optim.weight_decay=0.1"),
    "er": ("memory.total=60",),
    "er_ace": ("memory.total=60",),
    "der": ("memory.total=60",),
    "der++": ("memory.total=60", "train.head=own"),
    "gdumb": ("memory.total=60", "train.epochs=9"),
    "icarl": ("memory.total=60",),
    "bic": ("memory.total=120",),
    "online_ewc": (),
    "mas_local": (),
    "finetune_head": (f"model={CONVOLUTIONS}",),
    "joint": ("stream.tasks=2",),  # what it learned of all but the last task is forgotten
    "separate": (),
    "finetune": (),
}


class StopAt(Stop):
    """Asks to stop when it is asked for the n-th time: every five steps, and between phases."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.asked = number, 0

    def requested(self, comm: Comm) -> bool:
        """See Stop."""
        self.asked += 1
        if self.asked == self.number:
            self.request("test")
        return super().requested(comm)


def config_of(method: str, folder: Path, *arguments: str) -> RunConfig:
    files = [ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "method" / f"{method}.yaml"]
    return load(files, [*SMALL, *SETTINGS[method], *arguments, f"folder={folder}"])


def weights(folder: Path) -> str:
    return str(events(folder, "done")[-1]["weights_sha256"])


def finished(config: RunConfig, *, stops: tuple[int, ...] = ()) -> str:
    """Run to the end, stopping on the way."""
    RunFolder(Path(config.path)).create()
    RunFolder(Path(config.path)).config.write_text(dump(config))
    for number in stops:
        assert run(config, Comm.solo(), StopAt(number), quiet=True) == "stopped"
    assert run(config, Comm.solo(), Stop(), quiet=True) == "done"
    return weights(Path(config.path))


def test_gdumb_of_the_last_task_alone_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is chosen by labels, so that no network of an earlier task is asked; also where the run is stopped."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    whole = finished(config_of("gdumb", tmp_path / "whole"))
    for stops in ((), (1,), (2,)):
        folder = tmp_path / f"last-{sum(stops)}"
        assert finished(config_of("gdumb", folder, "train.only_last=true"), stops=stops) == whole
        assert {event["task"] for event in events(folder, "task")} == {4}


@pytest.mark.parametrize("number", ["total=9", "size=1", "fraction=0.003"])
def test_a_class_without_a_mean_is_refused_before_training(tmp_path: Path, number: str) -> None:
    settings = ("memory.total=0", f"memory.{number}")
    with pytest.raises(
        ConfigError,
        match=rf"memory.{number} .*(less|fewer) than \w+ \d+ classes( of all tasks)?, each of which needs an example",
    ):
        finished(config_of("icarl", tmp_path / "run", *settings))


def test_a_pattern_that_matches_nothing_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.frozen: 'nonsense\*' matches no parameter"):
        finished(config_of("feature_extraction", tmp_path / "run", "train.frozen=[nonsense*]"))
    assert not events(tmp_path / "run", "phase")


@pytest.mark.parametrize("method", SETTINGS)
def test_stopped_and_continued_to_the_same_weights(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the second task (of LwF, while its head learns alone), and of a later one."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)  # plots take longer than all else
    once = finished(config_of(method, tmp_path / "once"))
    again = finished(config_of(method, tmp_path / "again"), stops=(4, 3))
    assert again == once
    assert (1, "fit") in [(stop["task"], stop["phase"]) for stop in events(tmp_path / "again", "stop")]
    results = events(tmp_path / "once", "evaluate")[-1]["results"]
    assert events(tmp_path / "again", "evaluate")[-1]["results"] == results
    # What a checkpoint holds is tested as the run tested it: corrected, or by nearest means.
    assert evaluate_run(tmp_path / "once")["tasks"] == results
    report = summarise(tmp_path / "once")
    assert report.method == method
    assert report.average_accuracy is not None
    assert report.average_accuracy > 0.5


def test_er_ace_tells_new_classes_from_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the task just learned, which memory does not hold: rows of memory alone would push them down."""
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    finished(config_of("er_ace", tmp_path / "run", "stream.tasks=2", "train.epochs=8"))
    (old, new) = events(tmp_path / "run", "evaluate")[-1]["results"]
    assert old["class_incremental"]["accuracy"] > 0.6
    assert new["class_incremental"]["accuracy"] > 0.4


class StopWhenAsked(Stop):
    """Wants to stop as soon as a pass over images asks, in the task that is given."""

    def __init__(self, folder: Path, task: int) -> None:
        super().__init__()
        self.folder, self.task, self.polls = folder, task, 0

    def requested(self, comm: Comm) -> bool:
        """See Stop."""
        found = super().requested(comm)
        if len(events(self.folder, "task")) == self.task and not found and self._ended():
            self.request("test")  # heard by the next pass, which is that of the coming task
        return found

    def _ended(self) -> bool:
        return len(events(self.folder, "evaluate")) == self.task + 1


def test_stopped_while_the_old_network_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    once = finished(config_of("lwf", tmp_path / "once"))
    config = config_of("lwf", tmp_path / "again")
    RunFolder(Path(config.path)).create()
    RunFolder(Path(config.path)).config.write_text(dump(config))
    assert run(config, Comm.solo(), StopWhenAsked(Path(config.path), 1), quiet=True) == "stopped"
    (stop,) = events(Path(config.path), "stop")
    assert (stop["task"], stop["phase"], stop["step"]) == (1, "fit", 0)
    assert finished(config) == once


@pytest.mark.parametrize("method", ["icarl", pytest.param("bic", marks=pytest.mark.slow)])
def test_what_was_not_tested_is_not_exported(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpccl.report.write, "report_run", lambda folder: None)
    finished(config_of(method, tmp_path / "run", "stream.tasks=2", "train.epochs=1"))
    with pytest.raises(ConfigError, match="is not part of the network"):
        export(tmp_path / "run", tmp_path / "out")
