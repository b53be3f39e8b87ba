from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hpccl.errors import FolderError
from hpccl.report.events import EventLog
from hpccl.report.pictures import memory_grids
from hpccl.report.plots import reliability
from hpccl.report.write import report_run, write_text
from tests.unit.report import synthetic

GOLDEN = Path(__file__).with_name("golden_report.md")


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page refers to."""

    _VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value for name, value in attrs if name in {"src", "href", "xlink:href"} and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_markdown_report_is_the_golden_one(tmp_path: Path) -> None:
    report_run(synthetic.write_run(tmp_path))
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    if os.environ.get("HPCCL_WRITE_GOLDEN"):
        GOLDEN.write_text(written, encoding="utf-8")
    assert written == GOLDEN.read_text(encoding="utf-8")


def test_the_three_files_say_the_same(tmp_path: Path) -> None:
    content = report_run(synthetic.write_run(tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == content
    promised = (
        "average_accuracy average_accuracy_class_incremental forgetting bwt fwt learning_accuracy accuracy_matrix "
        "accuracy_matrix_class_incremental nll ece weights_sha256 images_per_second wall_seconds phases memory "
        "checkpoints reconstruction curvature skipped status commit command machine versions name method seed"
    )
    assert set(promised.split()) <= set(content)
    page = Page((tmp_path / "report.html").read_text())
    assert "79.2 %" in page.text
    assert "79.2 %" in (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "report"))) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    report_run(synthetic.write_run(tmp_path))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert not re.findall(r"url\((?!#)|@import|<script", text)
    assert text.count("<svg") == 5
    assert "prefers-color-scheme: dark" in text


def test_a_report_is_the_same_every_time(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    report_run(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    report_run(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize("tasks", [0, 1])
def test_a_run_under_way_has_a_report(tmp_path: Path, tasks: int) -> None:
    content = report_run(synthetic.write_run(tmp_path, tasks=tasks, finished=False))
    assert content["tasks_learned"] == tasks
    assert Page((tmp_path / "report.html").read_text()).open == []
    assert "running" in (tmp_path / "report.md").read_text()


def test_a_run_of_the_last_task_only_has_a_report(tmp_path: Path) -> None:
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        for event, fields in synthetic.task_events(2):
            log.write(event, **fields)
    content = report_run(tmp_path)
    assert content["average_accuracy"] == pytest.approx(2.375 / 3)
    assert content["forgetting"] is None


def test_names_from_outside_cannot_write_html(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, finished=False)
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        log.write("skipped", split="train", sample=1, name="<script>alert(1)</script>|x", reason="bad")
    report_run(tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert r"\|x" in (tmp_path / "report.md").read_text()


def test_a_name_that_is_not_utf8_does_not_stop_the_report(tmp_path: Path) -> None:
    """A class of shards that were built before such names were refused."""
    write_text(tmp_path / "report.md", f"class {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "report.md").read_text() == "class caf\\udce9"


def test_a_loss_that_is_not_finite_does_not_stop_the_report(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, tasks=1, finished=False)
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        terms = {"new": float("nan"), "soft": float("inf")}
        log.write("step", **{**synthetic.step_fields(1, 10), "loss": float("nan"), "terms": terms})
        log.write("error", kind="DivergedError", message="the loss is nan at step 10 of task 1")
    assert report_run(tmp_path)["status"] == "failed"
    assert "the loss is nan" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("channels", "side", "kind"), [(1, 8, "png"), (3, 32, "png"), (3, 200, "webp")])
def test_pictures_of_the_memory_are_shown(tmp_path: Path, channels: int, side: int, kind: str) -> None:
    synthetic.write_memory(tmp_path, channels=channels, side=side)
    grids = memory_grids(tmp_path)
    assert [grid.task for grid in grids] == [0, 1, 2]
    assert all(grid.data.startswith(f"data:image/{kind};base64,") for grid in grids)
    assert all((grid.shown, grid.stored) == (20, 20) for grid in grids)
    assert grids[0].width == 20 * (min(side, 64) + 1) - 1


def test_every_class_of_a_large_memory_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    labels = np.repeat(np.arange(10), 100)
    images = np.broadcast_to((labels * 25).astype(np.uint8)[:, None, None, None], (1000, 2, 2, 1))
    np.savez(folder / "task-0.npz", images=images, labels=labels)
    (grid,) = memory_grids(tmp_path)
    assert (grid.shown, grid.stored) == (60, 1000)


def test_a_damaged_picture_file_is_named_and_the_report_goes_on(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    path = tmp_path / "memory" / "task-1.npz"
    path.write_bytes(path.read_bytes()[:200])
    np.savez(tmp_path / "memory" / "task-2.npz", images=np.zeros((2, 3)), labels=np.zeros(2))
    # An array of objects would have to be unpickled.
    np.savez(tmp_path / "memory" / "task-0.npz", images=np.array([{}], dtype=object), labels=np.zeros(1))
    report_run(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert all(f"task-{task}.npz cannot be shown" in text for task in range(3))


def test_no_run_and_a_run_that_has_not_started_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is not the folder of a run"):
        report_run(tmp_path)
    synthetic.write_config(tmp_path, synthetic.config())
    with pytest.raises(FolderError, match="has not started"):
        report_run(tmp_path)


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    (tmp_path / "report.md").mkdir()
    with pytest.raises(FolderError, match=r"report\.md' cannot be written"):
        report_run(tmp_path)


def test_calibration_of_the_last_network_is_drawn(tmp_path: Path) -> None:
    content = report_run(synthetic.write_run(tmp_path))
    assert content["calibration"] == synthetic.CALIBRATION
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Calibration</h2>" in page
    assert 'aria-label="accuracy by confidence, in both settings"' in page


def test_a_run_without_it_has_no_such_section(tmp_path: Path) -> None:
    """Written before calibration was, or with a network for each task."""
    folder = synthetic.write_run(tmp_path)
    events = folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    events.write_text("".join(json.dumps({**line, "calibration": {}}) + "\n" for line in lines))
    assert report_run(folder)["calibration"] == {}
    assert "Calibration" not in (tmp_path / "report.html").read_text()


def test_points_of_a_reliability_diagram() -> None:
    (panel,) = reliability({"task_incremental": {"": np.array(synthetic.BINS)}}).axes
    np.testing.assert_allclose(np.asarray(panel.lines[1].get_xydata()), np.array([[0.5, 0.4], [0.9, 1.0]]))


def test_runs_in_a_folder_that_others_own_are_compared(tmp_path: Path) -> None:
    """The file system is read-only, which binds root, too."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here (no user namespaces)")
    for seed in (0, 1):
        synthetic.write_run(tmp_path / "runs" / str(seed), synthetic.config(seed=seed))
    script = f"""
mount --bind runs runs && mount -o remount,bind,ro runs || exit 77
{sys.executable} -m hpccl.cli report runs/0 runs/1 --out there; echo "with: $?"
{sys.executable} -m hpccl.cli report runs/0; echo "without: $?"
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [unshare, "-rm", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("nothing can be mounted here")
    assert "with: 0\n" in done.stdout, done.stderr
    assert "without: 1\n" in done.stdout
    first, second, third = done.stderr.splitlines()
    assert first == "runs/0: Read-only file system: no report is written there, but the run is compared"
    assert second == first.replace("runs/0", "runs/1")
    assert third.startswith("error: no report can be written into 'runs/0': Read-only file system; give --out FOLDER")
    assert [run["seed"] for run in json.loads((tmp_path / "there" / "comparison.json").read_text())["runs"]] == [0, 1]
    assert not list((tmp_path / "runs").rglob("report.*"))
