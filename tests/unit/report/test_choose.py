from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpccl.cli import app
from hpccl.config.data import DataConfig
from hpccl.config.load import load
from hpccl.config.prior import PriorConfig, QuadraticConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.config.train import TrainConfig
from hpccl.errors import ConfigError
from hpccl.report.choose import Choice, choose_runs, write_choices
from hpccl.report.events import EventLog
from tests.unit.report import synthetic

HELD = DataConfig(validation=0.1)


def write(folder: Path, accuracy: float, *, seen: float | None = None, finished: bool = True, **settings: Any) -> Path:
    """A run whose average accuracy is higher by `accuracy` than others', class-incrementally by `seen`."""
    run = synthetic.config(name=folder.name, **{"data": HELD, **settings})
    synthetic.write_run(folder, run, finished=False)
    with EventLog(folder / "events.jsonl", clock=synthetic.Clock(1_000_020)) as log:
        found = synthetic.evaluation(2)
        for result in found["results"]:
            result["task_incremental"]["accuracy"] += accuracy
        for result in found["results"]:
            result["class_incremental"]["accuracy"] += accuracy if seen is None else seen
        log.write("evaluate", **found)
        if finished:
            log.write("done", weights_sha256=folder.name)
    return folder


def grid(folder: Path, accuracy: Mapping[tuple[float, int, int], float]) -> list[Path]:
    """Runs by (lambda, examples in memory, seed)."""
    return [
        write(folder / f"{weight:g}-{size}-{seed}", shift, quadratic=weight, size=size, seed=seed)
        for (weight, size, seed), shift in accuracy.items()
    ]


def test_the_highest_mean_over_sizes_and_seeds_is_chosen(tmp_path: Path) -> None:
    found = {
        (0.5, 10, 7): -0.02,
        (0.5, 20, 7): -0.02,
        (2.0, 10, 7): -0.09,  # worse here,
        (2.0, 20, 7): 0.10,  # but better on the whole
        (4.0, 10, 7): 0.0,
        (4.0, 20, 7): 0.0,
    }
    (choice,) = choose_runs(grid(tmp_path, found))
    assert choice.method == "ewc+fr+replay"
    assert choice.validation == 0.1
    assert [candidate.settings for candidate in choice.candidates] == [
        {"prior.quadratic.weight": 2.0},
        {"prior.quadratic.weight": 4.0},
        {"prior.quadratic.weight": 0.5},
    ]
    assert choice.lead == pytest.approx(0.005)
    # Differences to the next, size by size: -0.09 and 0.10.
    assert choice.lead_error == pytest.approx(0.19 / 2**0.5 / 2**0.5)


def test_runs_in_which_all_classes_compete_are_judged_by_that(tmp_path: Path) -> None:
    """Own classes alone are told apart best by the first, all classes by the second."""
    runs = []
    for name, own, seen in (("a", 0.1, -0.1), ("b", 0.0, 0.1)):
        weight = {"a": 1.0, "b": 2.0}[name]
        runs.append(write(tmp_path / name, own, seen=seen, quadratic=weight, train=TrainConfig(head="seen")))
    (choice,) = choose_runs(runs)
    assert choice.best.settings == {"prior.quadratic.weight": 2.0}
    assert choice.best.accuracy == pytest.approx(sum((0.25, 0.5, 0.875)) / 3 + 0.1)
    assert "# Class-incremental accuracy" in write_choices([choice], tmp_path / "out")[0].read_text()


def test_of_equals_the_first_given_is_chosen(tmp_path: Path) -> None:
    runs = grid(tmp_path, {(4.0, 10, 0): 0.0, (2.0, 10, 0): 0.0})
    assert choose_runs(runs)[0].best.settings == {"prior.quadratic.weight": 4.0}
    assert choose_runs(runs[::-1])[0].best.settings == {"prior.quadratic.weight": 2.0}


def test_each_method_has_its_own_choice_and_file(tmp_path: Path) -> None:
    runs = grid(tmp_path, {(1.0, 10, 0): 0.0, (3.0, 10, 0): 0.05})
    for number, weight in enumerate((0.25, 1.0)):
        prior = PriorConfig(quadratic=QuadraticConfig(weight=0.0), replay=0.5, weight=(weight, 1.0))
        folder = tmp_path / f"fr-{number}"
        run = synthetic.config(name=folder.name, data=HELD).model_copy(update={"prior": prior})
        synthetic.write_run(folder, run, finished=False)
        with EventLog(folder / "events.jsonl", clock=synthetic.Clock(1_000_020)) as log:
            log.write("evaluate", **synthetic.evaluation(2, shift=-0.1 * number))
            log.write("done", weights_sha256=folder.name)
        runs.append(folder)
    choices = choose_runs(runs)
    assert [choice.method for choice in choices] == ["ewc+fr+replay", "fr+replay"]
    paths = write_choices(choices, tmp_path / "chosen")
    # The files are read as configurations are.
    first = load([paths[0]], ["memory.size=10"])
    second = load([paths[1]], ["memory.size=10"])
    assert first.prior.quadratic.weight == 3.0
    assert second.prior.weight == (0.25, 1.0)
    assert (
        paths[0]
        .read_text(encoding="utf-8")
        .startswith("# ewc+fr+replay: chosen by `hpccl choose` on 10 % of the training images.\n")
    )


def test_runs_on_test_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run 'a' was measured on test images.*data.validation=0\.1"):
        choose_runs([write(tmp_path / "a", 0.0, data=DataConfig())])


def test_unfinished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'a' is not finished"):
        choose_runs([write(tmp_path / "a", 0.0, finished=False)])


def test_a_run_whose_last_evaluation_is_lost_is_refused(tmp_path: Path) -> None:
    """Its figures are those after fewer tasks, which are easier."""
    log = write(tmp_path / "a", 0.0) / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    left = [line for line in lines if not ('"evaluate"' in line and json.loads(line)["task"] == 2)]
    log.write_text("".join(left))
    with pytest.raises(ConfigError, match=r"run 'a': events.jsonl lacks the evaluation after tasks 2"):
        choose_runs([tmp_path / "a"])


@pytest.mark.parametrize("other", [(2.0, 20, 0), (2.0, 10, 1)])
def test_candidates_must_have_been_tried_at_the_same_places(tmp_path: Path, other: tuple[float, int, int]) -> None:
    with pytest.raises(ConfigError, match="not tried with the same sizes of memory and seeds"):
        choose_runs(grid(tmp_path, {(1.0, 10, 0): 0.0, other: 0.0}))


def test_runs_on_other_held_out_images_are_not_compared(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", 0.0), write(tmp_path / "b", 0.1, data=DataConfig(validation=0.2))]
    with pytest.raises(ConfigError, match=r"data.validation is 0.1 in run 'a' and 0.2 in 'b'\. Give runs") as caught:
        choose_runs(runs)
    assert str(caught.value).startswith("runs of 'ewc+fr+replay' were not tested on the same images and tasks")


def test_runs_on_other_streams_are_not_compared(tmp_path: Path) -> None:
    def parts(*paths: str) -> ShardStream:
        return ShardStream(parts=tuple(Part(path=path) for path in paths))

    first = write(tmp_path / "a", 0.0, stream=parts("one", "two"))
    with pytest.raises(
        ConfigError, match=r': stream.parts\[1\].path is "two" in run \'a\' and "three" in \'b\'\. Give'
    ):
        choose_runs([first, write(tmp_path / "b", 0.1, stream=parts("one", "three"))])
    with pytest.raises(
        ConfigError, match=r'stream.kind is "shards" in run \'a\' and "digits" in \'c\'; .*stream.tasks'
    ):
        choose_runs([first, write(tmp_path / "c", 0.1)])


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ConfigError, match="nothing to choose from"):
        choose_runs([])


def test_a_method_without_a_rival_writes_no_setting(tmp_path: Path) -> None:
    (choice,) = choose_runs([write(tmp_path / "a", 0.0)])
    assert isinstance(choice, Choice)
    assert choice.lead is None
    assert choice.best.settings == {}
    (path,) = write_choices([choice], tmp_path)
    assert "the only candidate" in path.read_text(encoding="utf-8")
    assert load([path], []).prior == PriorConfig()


def test_the_command_shows_all_and_marks_the_chosen(tmp_path: Path) -> None:
    runs = grid(tmp_path, {(1.0, 10, 0): 0.0, (3.0, 10, 0): 0.05})
    result = CliRunner().invoke(app, ["choose", *map(str, runs), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("* ")
    assert "prior.quadratic.weight=3.0" in lines[0]
    assert lines[1].startswith("  ")
    assert lines[2] == str(tmp_path / "out" / "ewc+fr+replay.yaml")
