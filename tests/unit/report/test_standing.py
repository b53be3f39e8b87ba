from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpccl.report import standing as module
from hpccl.report.events import Event, EventLog, read_events
from hpccl.report.standing import read_standing, standing_of
from tests.unit.report import synthetic


def event(word: str, at: float, **fields: Any) -> Event:
    return {"event": word, "time": at, **fields}


def begun(at: float = 0.0, **fields: Any) -> Event:
    return event("run", at, steps=[100, 200, 200], machine={"hostname": "n1"}, **fields)


def step(at: float, number: int, task: int = 0) -> Event:
    """Ten steps a second."""
    total = 100 if task == 0 else 200
    return event(
        "step", at, task=task, step=number, num_steps=total, epoch=number / 10, images_per_second=320.0,
        eta_seconds=(total - number) / 10,
    )  # fmt: skip


def test_a_run_that_trains() -> None:
    job = {"id": "12_3", "restart": 2}
    found = standing_of([begun(job=job), event("evaluate", 1, task=-1), event("task", 2, task=0), step(8, 60)])
    assert (found.turn, found.began, found.job, found.restart, found.host) == ("run", 0.0, "12_3", 2, "n1")
    assert (found.task, found.num_tasks, found.phase) == (0, 3, "fit")
    assert (found.step, found.num_steps, found.epoch, found.images_per_second) == (60, 100, 6.0, 320.0)
    assert found.time == 8
    assert found.left == 4 + 20 + 20


def test_time_left_counts_what_is_done_around_training() -> None:
    events = [begun(), step(8, 100), event("phase", 10, task=0, phase="fit", seconds=10.0)]
    assert (standing_of(events).phase, standing_of(events).left) == ("consolidate", None)  # the last step has no pace
    events = [begun(), step(7, 90), *events[1:]]
    assert standing_of(events).left == 40
    events += [
        event("phase", 12, task=0, phase="curvature", seconds=2.0),
        event("phase", 13, task=0, phase="evaluate", seconds=1.0),
    ]
    assert standing_of(events).left == 40 + 3 * 3
    events += [event("evaluate", 13, task=0), event("task", 13, task=1), step(14, 10, task=1)]
    assert standing_of(events).left == 19 + 20 + 2 * 3


def test_ends() -> None:
    start = [begun(), step(8, 60)]
    stopped = standing_of([*start, event("stop", 9, task=0, phase="fit", step=65, reason="signal SIGUSR2")])
    assert (stopped.turn, stopped.turn_time, stopped.message, stopped.step) == ("stop", 9, "signal SIGUSR2", 65)
    failed = standing_of([*start, event("error", 9, kind="DataError", message="no image")])
    assert (failed.turn, failed.error_kind, failed.message) == ("error", "DataError", "no image")
    done = standing_of([*start, event("done", 9)])
    assert (done.turn, done.left, done.phase) == ("done", None, None)


def test_a_start_takes_up_a_checkpoint() -> None:
    before = [begun(), step(8, 60), event("stop", 9, task=0, phase="fit", step=65, reason="x")]
    found = standing_of([*before, begun(20, resumed={"task": 0, "phase": "fit", "step": 65})])
    assert (found.turn, found.message, found.task, found.phase, found.step) == ("run", "", 0, "fit", 65)
    assert found.left == 3.5 + 40
    found = standing_of([*before, begun(20, resumed={"task": 0, "phase": "done", "step": 100})])
    assert (found.task, found.phase, found.step, found.num_steps) == (1, "fit", 0, 200)
    found = standing_of([*before, begun(20, resumed={"task": 1, "phase": "fitted", "step": 200})])
    assert (found.task, found.phase) == (1, "consolidate")


def test_what_goes_on_after_an_end_was_started_again() -> None:
    found = standing_of([begun(), event("error", 9, kind="DataError", message="no image"), step(30, 60)])
    assert (found.turn, found.turn_time, found.message) == ("run", 30, "")


def test_a_run_that_was_done_and_failed_when_it_was_started_again() -> None:
    again = begun(20, resumed={"task": 2, "phase": "done", "step": 200})
    found = standing_of(
        [begun(), step(8, 190, task=2), event("done", 9), again, event("error", 21, kind="X", message="")]
    )
    assert (found.turn, found.left) == ("error", None)


def test_a_run_of_an_earlier_version_tells_what_it_can() -> None:
    found = standing_of([event("run", 0), step(8, 60)])
    assert (found.turn, found.num_tasks, found.step, found.left) == ("run", None, 60, None)


def test_whole_runs_are_read(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "run")
    assert read_standing(run / "events.jsonl").turn == "done"


def test_files_that_are_absent_torn_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_standing(path) == module.Standing()
    path.write_bytes(b"")
    assert read_standing(path) == module.Standing()
    with EventLog(path) as log:
        log.write("run", steps=[10])
        log.write("task", task=0)
    path.write_bytes(path.read_bytes() + b'{"event": "step", "ti')
    assert (read_standing(path).turn, read_standing(path).task) == ("run", 0)
    path.write_bytes(b"\x00\x00\n\xff\xfe\n" + path.read_bytes())
    assert read_standing(path).turn == "run"
    path.write_bytes(b"\x00\x00\n\xff\xfe\n")
    assert read_standing(path).problem == "events.jsonl holds no event that can be read"
    path.write_text('{"event": "step", "time": 1, "task": "x"}\n')
    assert "does not understand" in read_standing(path).problem
    path.unlink()
    path.mkdir()
    assert read_standing(path).problem.startswith("events.jsonl cannot be read: Is a directory")


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First start, error, second start, thousands of steps: longer than what is read."""
    monkeypatch.setattr(module, "_HEAD", 1000)
    monkeypatch.setattr(module, "_TAIL", 2000)
    path = tmp_path / "events.jsonl"
    with EventLog(path, clock=synthetic.Clock()) as log:
        log.write("run", steps=[9000], job={"id": "1", "restart": 0})
        log.write("error", kind="DataError", message="no image")
        for number in range(50):
            log.write("step", task=0, step=number, num_steps=9000)
        log.write("run", steps=[9000], job={"id": "2", "restart": 0})
        for number in range(1000):
            log.write("step", task=0, step=number, num_steps=9000)
    return path


def test_the_middle_of_a_long_file_is_left_out(long_file: Path) -> None:
    found = read_standing(long_file)
    assert (found.turn, found.job, found.step, found.num_tasks) == ("run", "2", 999, 1)
    assert found.time == read_events(long_file)[-1]["time"]


def test_a_start_that_is_too_far_back_is_not_guessed(long_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACK", 1000)
    found = read_standing(long_file)
    assert (found.turn, found.job, found.began, found.step, found.num_tasks) == ("run", None, None, 999, 1)
