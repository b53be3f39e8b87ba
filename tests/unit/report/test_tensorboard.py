from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpccl.errors import FolderError
from hpccl.report.events import EventLog
from hpccl.report.tensorboard import TensorBoardSink, scalars
from tests.unit.report import synthetic


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(s.step, s.value) for s in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, sinks=[TensorBoardSink(tmp_path / "tensorboard")])
    found = curves(tmp_path / "tensorboard")
    steps = [step for step, _ in found["train/loss"]]
    assert steps == [*range(0, 41, 10), *range(40, 81, 10), *range(80, 121, 10)]
    assert found["terms/replay"][-1] == (120, 0.125)
    assert found["accuracy_task_incremental/task_0"] == [(0, 0.875), (1, 0.75), (2, 0.625)]
    assert found["accuracy_class_incremental/task_1"] == [(1, 0.75), (2, 0.5)]
    assert found["average_accuracy/task_incremental"][1] == (1, 0.8125)
    assert found["memory/examples"] == [(0, 20.0), (1, 40.0), (2, 60.0)]
    assert found["reconstruction_cosine/total"] == [(1, 0.75), (2, 0.75)]


def test_after_a_resume_the_repeated_steps_are_dropped(tmp_path: Path) -> None:
    path, folder = tmp_path / "events.jsonl", tmp_path / "tensorboard"
    with EventLog(path, sinks=[TensorBoardSink(folder)]) as log:
        for task, step in ((0, 20), (0, 40), (1, 10), (1, 20), (1, 30)):
            log.write("step", **synthetic.step_fields(task, step))
    (first,) = folder.iterdir()
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))  # as if it were older than a second
    with EventLog(path, sinks=[TensorBoardSink(folder)]) as log:
        for task, step in ((1, 20), (1, 25)):
            log.write("step", **synthetic.step_fields(task, step))
    assert [step for step, _ in curves(folder)["train/loss"]] == [20, 40, 50, 60, 65]


def test_a_value_that_is_not_finite_or_not_there_is_no_trouble() -> None:
    event = {"event": "step", "loss": "NaN", "lr": None, "terms": {"new": "Infinity"}}
    found = dict(scalars(event))
    assert str(found["train/loss"]) == "nan"
    assert found["terms/new"] == float("inf")
    assert "train/lr" not in found


@pytest.mark.parametrize("event", ["run", "task", "stop", "done", "error", "skipped", "checkpoint"])
def test_other_events_make_no_curve(event: str) -> None:
    assert not list(scalars({"event": event, "time": 0.0}))


def test_before_training_no_task_is_seen() -> None:
    assert not list(scalars({"event": "evaluate", **synthetic.evaluation(-1)}))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"log\.tensorboard=false"):
        TensorBoardSink(tmp_path / "file" / "tensorboard")
