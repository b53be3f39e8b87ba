from __future__ import annotations

import io
import os

import pytest

from hpccl.report.progress import LiveDisplay, PlainDisplay, Progress, QuietDisplay, Reading, make_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Seconds:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, steps: int) -> None:
    with progress:
        progress.begin("digits [0]", "fit", steps, 0)
        for step in range(1, steps + 1):
            progress.update(Reading(step, step / 10, {"loss": 0.5, "new": 0.25}, 1234.5, 75.0))
        progress.message("task 1 of 2 is learned [ok]")


def test_the_display_fits_the_stream() -> None:
    assert isinstance(make_progress(enabled=False, stream=Terminal()), QuietDisplay)
    assert isinstance(make_progress(stream=Terminal()), LiveDisplay)
    assert isinstance(make_progress(stream=io.StringIO()), PlainDisplay)


def test_nothing_is_shown_where_nothing_shall_be(capfd: pytest.CaptureFixture[str]) -> None:
    run(make_progress(enabled=False), 3)
    assert capfd.readouterr() == ("", "")


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Seconds()
    display = PlainDisplay(stream, interval=10, clock=clock)
    display.begin("my task", "fit", 100, 20)
    for step in range(21, 101):
        clock.now += 0.25
        display.update(Reading(step, step / 50, {"loss": 1.25}, 400.0, (100 - step) / 4))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "task=my_task phase=fit step=20/100",
        "task=my_task phase=fit step=60/100 epoch=1.20 loss=1.25 images_per_second=400 eta=0:10",
        "task=my_task phase=fit step=100/100 epoch=2.00 loss=1.25 images_per_second=400 eta=0:00",
    ]


def test_a_plain_line_is_key_value_pairs() -> None:
    stream = io.StringIO()
    run(make_progress(stream=stream, interval=0), 1)
    pairs = dict(pair.split("=") for pair in stream.getvalue().splitlines()[1].split())
    assert pairs["task"] == "digits_[0]"
    assert float(pairs["new"]) == 0.25


def test_a_terminal_shows_everything_and_messages_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    run(make_progress(stream=stream), 30)
    shown = stream.getvalue()
    for part in ("digits [0]", "fit", "30/30", "epoch 3.00", "loss 0.500", "new 0.250", "1,234 images/s", "1:15 left"):
        assert part in shown, part
    assert "task 1 of 2 is learned [ok]" in shown


def test_a_terminal_may_be_closed() -> None:
    """As it is when a connection breaks: what is shown is lost, nothing else."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        display = make_progress(stream=terminal)
        assert isinstance(display, LiveDisplay)
        with display:
            display.begin("a", "fit", 10)
            os.close(master)
            display.update(Reading(10, 1.0, {}, 100.0, 0.0))
            display.message("task 1 of 2 is learned")
        terminal.write("into nothing")


def test_a_phase_follows_another() -> None:
    stream = Terminal()
    with make_progress(stream=stream) as progress:
        progress.begin("a", "fit", 10)
        progress.begin("a", "evaluate", 0)
        progress.update(Reading(1, 0.5, {}, 100.0, 10.0))
    assert "evaluate" in stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_few_updates_are_shown(stream: io.StringIO) -> None:
    """Steps may take microseconds; a terminal or a log is told now and then."""
    with make_progress(stream=stream) as progress:
        progress.begin("a", "fit", 10**9)
        for step in range(20_000):
            progress.update(Reading(step, 0.1, {"loss": 0.5}, 100.0, 10.0))
    assert stream.getvalue().count("loss") < 1000
