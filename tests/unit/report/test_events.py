from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.errors import FolderError
from hpccl.report.events import EventLog, latest, number, read_events, valid_json


class Listener:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.recalled: list[Mapping[str, Any]] = []
        self.heard: list[Mapping[str, Any]] = []
        self.closed = 0

    def recall(self, events: Sequence[Mapping[str, Any]]) -> None:
        self.recalled.extend(events)

    def write(self, event: Mapping[str, Any]) -> None:
        self.heard.append(event)

    def close(self) -> None:
        self.closed += 1


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    with EventLog(path, clock=lambda: 12.34567) as log:
        log.write("task", task=0, name="zwölf")
        assert len(path.read_text().splitlines()) == 1, "a line can be read as soon as it is written"
        log.write("done", images=3)
    assert read_events(path) == [
        {"event": "task", "time": 12.346, "task": 0, "name": "zwölf"},
        {"event": "done", "time": 12.346, "images": 3},
    ]


def test_a_disabled_log_does_nothing(tmp_path: Path) -> None:
    listener = Listener()
    with EventLog(tmp_path / "events.jsonl", enabled=False, sinks=[listener]) as log:
        log.write("done")
    assert not list(tmp_path.iterdir())
    assert not listener.heard


def test_what_is_not_finite_is_still_strict_json(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": [np.float32("inf"), -np.inf], "c": np.arange(2), "d": Path("x"), "e": (1, None)}
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("step", **values)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    event = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    del event["time"]
    assert event == {"event": "step", "a": "NaN", "b": ["Infinity", "-Infinity"], "c": [0, 1], "d": "x", "e": [1, None]}
    assert np.isnan(number(event["a"]) or 0.0)
    assert number("-Infinity") == -np.inf
    assert number(None) is None


@pytest.mark.parametrize("line", ['{"event": "step", "time": null}', '{"event": 3, "time": 1}', "[" * 100000, "[]"])
def test_a_line_that_is_no_event_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("run")
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(FolderError, match=r"line 1 of .* is not an event"):
        read_events(path)


@pytest.mark.parametrize("torn", ['{"event": "st', "{", '{"event": "step", "x": "\udcff', "\0\0\0", '"event"'])
def test_a_torn_last_line_is_ignored_and_then_removed(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("run")
    with path.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    assert [event["event"] for event in read_events(path)] == ["run"]
    with EventLog(path) as log:
        log.write("done")
    assert [event["event"] for event in read_events(path)] == ["run", "done"]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run", "time": 1}')
    with EventLog(path) as log:
        log.write("done")
    assert [event["event"] for event in read_events(path)] == ["run", "done"]


@given(cut=st.integers(0, 200))
def test_wherever_a_kill_cuts_the_lines_before_survive(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "events.jsonl"
    with EventLog(path, clock=lambda: 1.0) as log:
        for step in range(4):
            log.write("step", step=step)
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    with EventLog(path, clock=lambda: 1.0) as log:
        log.write("done")
    whole = [step for step in range(4) if len(b"".join(data.splitlines(keepends=True)[: step + 1])) - 1 <= cut]
    assert [event.get("step") for event in read_events(path)] == [*whole, None]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run", "time": 1}\nrubbish\n{"event": "done", "time": 2}\n')
    with pytest.raises(FolderError, match=r"line 2 of '.*events\.jsonl' is not an event: b'rubbish'"):
        read_events(path)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="cannot be read: No such file"):
        read_events(tmp_path / "events.jsonl")


def test_a_full_disk_is_an_error_that_leaves_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("run")
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The file system refuses to grow the file beyond the middle of the next line, as a full one would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, old[1]))
    try:
        with pytest.raises(FolderError, match=r"events\.jsonl' cannot be written"):
            log.write("step", loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    log.write("done")
    log.close()
    assert [event["event"] for event in read_events(path)] == ["run", "done"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_message_of_a_full_disk_says_what_to_do() -> None:
    log = EventLog(Path("/dev/null"))
    full = os.open("/dev/full", os.O_WRONLY)
    assert log._file is not None
    os.dup2(full, log._file)
    os.close(full)
    try:
        with pytest.raises(FolderError, match="the disk is full: free some space and run the same command again"):
            log.write("run")
    finally:
        log.close()


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot be opened for writing"):
        EventLog(tmp_path / "file" / "events.jsonl")


def test_sinks_learn_the_past_and_hear_the_present(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("run")
    listener = Listener()
    log = EventLog(path, sinks=[listener])
    log.write("step", loss=float("nan"))
    log.close()
    log.close()
    assert [event["event"] for event in listener.recalled] == ["run"]
    assert [event["loss"] for event in listener.heard] == ["NaN"]
    assert listener.closed == 1


def test_the_last_event_of_a_key_counts() -> None:
    events = [
        {"event": "step", "task": 1, "step": 0, "x": 0},
        {"event": "step", "task": 0, "step": 10, "x": 1},
        {"event": "step", "task": 0, "step": 2, "x": 2},
        {"event": "other", "task": 0, "step": 2, "x": 3},
        {"event": "step", "task": 0, "step": 10, "x": 4},
    ]
    assert [event["x"] for event in latest(events, "step", "task", "step")] == [2, 4, 0]


def test_valid_json_leaves_json_alone() -> None:
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": []}}
    assert valid_json(value) == value


def test_the_package_needs_neither_torch_nor_tensorflow() -> None:
    code = (
        "import sys, hpccl.report.write, hpccl.report.compare, hpccl.report.progress, hpccl.report.tensorboard as t;"
        "from pathlib import Path; import tempfile;"
        "t.TensorBoardSink(Path(tempfile.mkdtemp())).close();"
        "print([name for name in ('torch', 'tensorflow', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
