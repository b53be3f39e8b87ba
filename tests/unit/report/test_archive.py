"""Archives of runs: reported again, they give what their folders gave."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from hpccl.config.data import DataConfig
from hpccl.config.machine import LogConfig
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report.archive import NAME, read_runs, write_archive
from hpccl.report.choose import choose_runs
from hpccl.report.compare import compare_runs, group_table
from hpccl.report.compare_files import write_comparison
from hpccl.report.events import EventLog, read_events
from tests.unit.report import synthetic


def write(folder: Path, *, start: float = 1_000_000.0, **settings: object) -> Path:
    run = synthetic.config(name=folder.name, **settings)  # type: ignore[arg-type]
    events = RunFolder(folder).events
    synthetic.write_run(folder, run)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    moved = [{**line, "time": line["time"] - lines[0]["time"] + start} for line in lines]
    events.write_text("".join(f"{json.dumps(line)}\n" for line in moved))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a", seed=0), write(tmp_path / "b", seed=1), write(tmp_path / "c", size=0, replay=0.0)]


def test_an_archive_gives_the_same_comparison_as_the_folders(runs: list[Path], tmp_path: Path) -> None:
    first = compare_runs(runs)
    write_comparison(first, tmp_path / "out")
    again = compare_runs([tmp_path / "out" / NAME])
    assert again.groups == first.groups
    hidden = [{**run.to_dict(), "machine": None} for run in first.runs]
    assert [{**run.to_dict(), "machine": None} for run in again.runs] == hidden
    write_comparison(again, tmp_path / "again")
    for name in (NAME, "comparison.md", "comparison.csv", "comparison.json", "comparison.tex"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_figures_have_six_digits_and_moments_all_of_theirs(tmp_path: Path) -> None:
    """In an archive of an earlier version, too."""
    folder, third, moment = write(tmp_path / "a", start=1_234_567.125), 0.123456789, 1_234_567.125
    path = RunFolder(folder).events
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(
        json.dumps({**json.loads(first), "time": moment, "more": {"list": [third, 7, True]}}) + "\n" + "".join(rest)
    )
    write_archive(tmp_path / NAME, read_runs([folder]))
    line = json.loads(lzma.decompress((tmp_path / NAME).read_bytes()))
    line["events"][0]["more"]["list"][0] = third
    (tmp_path / "earlier.xz").write_bytes(lzma.compress(json.dumps(line).encode()))
    for path in (folder, tmp_path / NAME, tmp_path / "earlier.xz"):
        event = read_runs([path])[0].events[0]
        assert (event["time"], event["more"]) == (moment, {"list": [0.123457, 7, True]})


def test_runs_are_added_to_those_of_an_archive(runs: list[Path], tmp_path: Path) -> None:
    write_archive(tmp_path / "old.xz", read_runs(runs[:1]))
    comparison = compare_runs([tmp_path / "old.xz", *runs])
    assert [run.name for run in comparison.runs] == ["a", "b", "c"], "that of the archive is not counted twice"
    assert [group.seeds for group in comparison.groups] == [[0, 1], [0]]


def test_a_run_that_went_on_is_taken_as_it_is_now(runs: list[Path], tmp_path: Path) -> None:
    write_archive(tmp_path / "old.xz", read_runs(runs[:1]))
    now = read_events(RunFolder(runs[0]).events)[-1]["time"] + 5
    with EventLog(RunFolder(runs[0]).events, clock=lambda: now) as log:
        log.write("run", **synthetic.run_fields())
        log.write("step", **synthetic.step_fields(2, 10))
        log.write("error", kind="DivergedError", message="the loss is NaN")
    for paths in ([tmp_path / "old.xz", runs[0]], [runs[0], tmp_path / "old.xz"]):
        (run,) = read_runs(paths)
        assert run.report().status == "failed"


def test_a_run_whose_folder_changed_what_it_may_is_the_same_run(tmp_path: Path) -> None:
    """How often it logs, say, as a later start may."""
    folder = synthetic.write_run(tmp_path / "a", synthetic.config(name="a"))
    write_archive(tmp_path / "old.xz", read_runs([folder]))
    synthetic.write_config(folder, synthetic.config(name="a", log=LogConfig(every=7)))
    assert len(read_runs([tmp_path / "old.xz", folder])) == 1
    synthetic.write_config(folder, synthetic.config(name="a", quadratic=3.0))
    assert len(read_runs([tmp_path / "old.xz", folder])) == 2


def test_time_of_a_killed_part_is_kept_and_steps_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    synthetic.write_run(folder, synthetic.config(name="killed"), finished=False)
    times = iter(range(2_000_000, 3_000_000, 100))
    with EventLog(RunFolder(folder).events, clock=lambda: float(next(times))) as log:
        for _ in range(3):
            log.write("run", machine={"hostname": "node-7", "cpu": "x"})
            for step in range(5):
                log.write("step", task=0, step=step)
        log.write("done", weights_sha256="0")
    (before,) = read_runs([folder])
    write_archive(tmp_path / "old.xz", [before])
    (after,) = read_runs([tmp_path / "old.xz"])
    assert after.report().wall_seconds == before.report().wall_seconds > 1500
    steps = [(event["step"], event["time"]) for event in after.events if event["event"] == "step"][-3:]
    assert steps == [(4, 2_000_500.0), (4, 2_001_100.0), (4, 2_001_700.0)], "the last before a start, and the last"
    assert b"node-7" not in lzma.decompress((tmp_path / "old.xz").read_bytes())


def test_a_choice_can_be_made_from_an_archive(tmp_path: Path) -> None:
    held = [write(tmp_path / name, data=DataConfig(validation=0.1)) for name in ("a", "b")]
    write_archive(tmp_path / "old.xz", read_runs(held))
    assert choose_runs([tmp_path / "old.xz"]) == choose_runs(held)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no xz", "neither a run's folder nor a complete runs.jsonl.xz"),
        (lzma.compress(b'{"format": 1}\n' * 3)[:24], "neither a run's folder nor a complete runs.jsonl.xz"),
        (lzma.compress(b"{}\n"), "line 1 of .* is not a run"),
        (lzma.compress(b"\n" * (1 << 20)), "line 1 of .* is not a run"),
        (lzma.compress(b"[" * 100_000 + b"\n"), "line 1 of .* is not a run"),
        (lzma.compress(b'{"format": 2}\n'), "of format 2, this version reads 1; update hpccl"),
        (lzma.compress(b'{"format": 1, "config": {}, "events": []}\n'), "line 1 of .* is not a run"),
        (
            lzma.compress(b'{"format": 1, "config": {"sede": 3}, "events": [{"event": "run", "time": 1}]}\n'),
            "run 1 of .* does not fit this version of hpccl: .*sede",
        ),
    ],
)
def test_a_damaged_archive_is_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(FolderError, match=message):
        compare_runs([path])


@pytest.mark.parametrize(
    "event",
    [
        {"event": "phase", "time": 3.0},
        {"event": "evaluate", "time": 3.0, "task": 0},
        {"event": "run", "time": "soon"},
        {"event": "run", "time": float("nan")},
        {"event": 3, "time": 3.0},
        {"time": 3.0},
    ],
)
def test_an_event_that_lacks_something_is_one_clear_error(event: dict[str, object], runs: list[Path]) -> None:
    path = runs[0].parent / NAME
    write_archive(path, read_runs(runs[:1]))
    whole = json.loads(lzma.decompress(path.read_bytes()))
    path.write_bytes(lzma.compress(json.dumps({**whole, "events": [*whole["events"], event]}).encode()))
    with pytest.raises(FolderError, match=r"line 1 of .* is not a run"):
        read_runs([path])


def test_several_runs_of_one_seed_are_told(tmp_path: Path) -> None:
    again = [write(tmp_path / name / "a", start=start, seed=0) for name, start in (("one", 1e6), ("two", 2e6))]
    (twice, once) = (group_table(compare_runs(runs)).notes for runs in (again, again[:1]))
    assert "Several runs of one seed, each of which counts: ewc+fr+replay m=20." in twice
    assert not any("one seed" in note for note in once)
