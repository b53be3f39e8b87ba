from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report.archive import read_runs
from hpccl.report.compare import _notes, compare_runs
from hpccl.report.events import EventLog
from hpccl.report.summary import PhaseCost, phase_totals, read_config, summarise
from tests.unit.report import synthetic


def test_a_finished_run(tmp_path: Path) -> None:
    report = summarise(synthetic.write_run(tmp_path / "run"))
    assert (report.name, report.method, report.seed, report.status) == ("toy", "ewc+fr+replay", 0, "done")
    assert report.num_tasks == report.tasks_learned == 3
    assert report.average_accuracy == pytest.approx((0.625 + 0.75 + 1.0) / 3)
    assert report.average_accuracy_class_incremental == pytest.approx((0.25 + 0.5 + 0.875) / 3)
    assert report.forgetting == pytest.approx(((0.875 - 0.625) + (0.875 - 0.75)) / 2)
    assert report.bwt == -0.1875
    assert report.fwt == 0.0
    assert report.learning_accuracy == pytest.approx((0.875 + 0.875 + 1.0) / 3)
    # Of 100 test images each: the means over the tasks seen.
    union = [sum(value or 0.0 for value in synthetic.SEEN[t][: t + 1]) / (t + 1) for t in range(3)]
    assert report.union_accuracy == pytest.approx(union)
    assert report.performance_drop == pytest.approx(union[0] - union[2])
    assert report.average_union_accuracy == pytest.approx(sum(union) / 3)
    assert report.average_union_accuracy_later == pytest.approx((union[1] + union[2]) / 2)
    assert report.forgetting_class_incremental == pytest.approx(((0.875 - 0.25) + (0.75 - 0.5)) / 2)
    assert (report.nll, report.ece, report.nll_class_incremental) == (0.5, 0.0625, 1.5)
    assert report.accuracy_matrix == synthetic.OWN
    assert report.accuracy_matrix_class_incremental == synthetic.SEEN
    assert report.weights_sha256 == "f" * 64
    assert report.images_per_second == 400.0
    assert report.memory_bytes == 1280
    assert report.checkpoint_bytes == 3 * 2**20
    assert report.machine["cpu"] == "Imaginary 3000"
    assert report.skipped == 0


def test_the_report_is_strict_json(tmp_path: Path) -> None:
    content = summarise(synthetic.write_run(tmp_path / "run")).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["reconstruction"][0]["terms"]["quadratic"]["cosine"] == "NaN"


def test_a_run_under_way_reports_what_is_there(tmp_path: Path) -> None:
    report = summarise(synthetic.write_run(tmp_path / "run", tasks=2, finished=False))
    assert (report.status, report.tasks_learned, report.num_tasks) == ("running", 2, 3)
    assert report.average_accuracy == pytest.approx((0.75 + 0.875) / 2)
    assert report.accuracy_matrix[2] == [None, None, None]
    assert report.weights_sha256 is None


@pytest.mark.parametrize(
    ("cut", "named"),
    [([2], "tasks 2"), ([0, 2], "tasks 0, 2"), ([0], "tasks 0"), ([1], "tasks 1"), ([0, 1, 2], "any task")],
)
def test_lost_evaluations_of_a_run_that_is_done_are_told_of(tmp_path: Path, cut: list[int], named: str) -> None:
    path = synthetic.write_run(tmp_path / "run") / "events.jsonl"
    lost = {f'"task": {task}, "results"' for task in cut}
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"evaluate"' in line and any(each in line for each in lost))]
    assert len(kept) == len(lines) - len(cut)
    path.write_text("".join(kept))
    report = summarise(path.parent)
    assert report.status == "done"
    assert f"lacks the evaluation after {named}" in (report.message or "")
    assert f"{report.name}: {report.message}." in "\n".join(_notes(compare_runs([path.parent])))


def test_a_likelihood_that_is_not_finite_is_not_that_of_an_earlier_task(tmp_path: Path) -> None:
    path = synthetic.write_run(tmp_path / "run") / "events.jsonl"
    (last,) = [line for line in path.read_text().splitlines() if '"task": 2, "results"' in line]
    path.write_text(path.read_text().replace(last, last.replace('"nll": 0.5', '"nll": "NaN"')))
    report = summarise(path.parent)
    assert report.average_accuracy == pytest.approx(2.375 / 3)
    assert report.nll is None
    assert report.nll_class_incremental is not None


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        log.write("step", **synthetic.step_fields(0, 10))
    report = summarise(tmp_path)
    assert (report.status, report.tasks_learned, report.average_accuracy) == ("running", 0, None)
    assert report.images_per_second == 400.0


def test_a_killed_and_resumed_run_counts_its_work_once_and_its_time_twice(tmp_path: Path) -> None:
    synthetic.write_config(tmp_path, synthetic.config())
    clock = synthetic.Clock()
    path = RunFolder(tmp_path).events
    with EventLog(path, clock=clock) as log:
        log.write("run", **synthetic.run_fields())  # time .25
        log.write("phase", **synthetic.phase("fit", 0, seconds=2.0, images=100))
        log.write("evaluate", **synthetic.evaluation(0, shift=-0.25))
        log.write("phase", **synthetic.phase("fit", 1, seconds=1.0, images=40, part=0))
        log.write("stop", task=1, phase="fit", step=20, reason="SIGTERM")  # 1.0 s after the start
    clock.now += 3600
    with EventLog(path, clock=clock) as log:
        log.write("run", **synthetic.run_fields())
        log.write("evaluate", **synthetic.evaluation(0))
        log.write("phase", **synthetic.phase("fit", 1, seconds=3.0, images=160, part=20))
        log.write("phase", **synthetic.phase("fit", 1, seconds=2.0, images=160, part=20))  # the one that counts
        log.write("done", weights_sha256="a" * 64)  # 1.0 s
    report = summarise(tmp_path)
    assert report.status == "done"
    assert report.segments == 2
    assert report.wall_seconds == pytest.approx(2.0)
    assert report.accuracy_matrix[0] == synthetic.OWN[0]
    assert report.phases[1] == PhaseCost(1, "fit", 3.0, 200, 200 / 3.0, 64 * 2**20)
    assert report.images_per_second == pytest.approx(300 / 5)
    assert phase_totals(report.phases) == [PhaseCost(-1, "fit", 5.0, 300, 60.0, 64 * 2**20)]


@pytest.mark.parametrize(
    ("event", "fields", "status", "message"),
    [
        (
            "stop",
            {"task": 1, "phase": "fit", "step": 7, "reason": "SIGTERM"},
            "stopped",
            "SIGTERM at task 1, fit, step 7",
        ),
        ("error", {"kind": "DivergedError", "message": "loss is NaN"}, "failed", "DivergedError: loss is NaN"),
        ("run", {}, "running", None),
    ],
)
def test_the_last_word_decides_the_status(
    tmp_path: Path, event: str, fields: dict[str, object], status: str, message: str | None
) -> None:
    synthetic.write_run(tmp_path, finished=False)
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        log.write(event, **fields)
    report = summarise(tmp_path)
    assert (report.status, report.message, report.weights_sha256) == (status, message, None)


@pytest.mark.parametrize(("end", "fields"), [("done", {"weights_sha256": "a" * 64}), ("error", {"kind": "DataError"})])
def test_a_finished_run_that_was_started_again_is_what_it_was(
    tmp_path: Path, end: str, fields: dict[str, object]
) -> None:
    before = summarise(synthetic.write_run(tmp_path))
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        log.write("run", **synthetic.run_fields())
        log.write(end, **fields)
    assert summarise(tmp_path) == before


def test_a_finished_run_that_lost_its_end_and_learns_again(tmp_path: Path) -> None:
    before = summarise(synthetic.write_run(tmp_path))
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        log.write("run", **synthetic.run_fields())
        log.write("step", **synthetic.step_fields(2, 10))
    report = summarise(tmp_path)
    assert (report.status, report.segments) == ("running", before.segments + 1)


def test_an_image_skipped_again_after_a_resume_is_one_image(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    with EventLog(tmp_path / "events.jsonl", clock=synthetic.Clock(2e6)) as log:
        for sample in (5, 9, 5):
            log.write("skipped", split="train", sample=sample, name=f"digits/{sample}", reason="truncated")
    report = summarise(tmp_path)
    assert report.skipped == 2
    assert [skipped["sample"] for skipped in report.skipped_examples] == [5, 9]


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"is not the folder of a run: it has no config\.yaml"):
        read_config(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    with pytest.raises(FolderError, match=f"It holds 1 runs: give {tmp_path}/\\*"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("nmae: x\ncluster: {kind: local}", "nmae = x: no such key; did you mean 'name'"),
        ("name: x", "is empty or cut off .*'cluster' is missing"),
        ("- 1", "holds a list"),
        ("", "is empty or cut off"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_why(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FolderError, match=words):
        read_config(tmp_path)


def test_the_configuration_that_training_writes_is_read_back(tmp_path: Path) -> None:
    from hpccl.config.load import dump

    run = synthetic.config(name="a", seed=3)
    (tmp_path / "config.yaml").write_text(dump(run))
    assert read_config(tmp_path) == run


def test_the_last_checkpoint_of_a_task_is_the_one_that_ended_it(tmp_path: Path) -> None:
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(RunFolder(tmp_path).events, clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        for phase, step, num_bytes in (("fit", 10, 1), ("fitted", 20, 2), ("done", 20, 3)):
            log.write("checkpoint", task=0, phase=phase, step=step, bytes=num_bytes, seconds=0.1)
    report = summarise(tmp_path)
    assert report.checkpoint_bytes == 3
    assert [checkpoint["phase"] for checkpoint in report.checkpoints] == ["fit", "fitted", "done"]


@pytest.mark.parametrize("last", ["stop", "step"])
def test_a_start_that_fails_at_once_does_not_count_the_pause_before_it(tmp_path: Path, last: str) -> None:
    """Whether the process before it had a last word or was killed."""
    synthetic.write_config(tmp_path, synthetic.config())
    clock = synthetic.Clock()
    with EventLog(RunFolder(tmp_path).events, clock=clock) as log:
        log.write("run", **synthetic.run_fields())
        clock.now += 100
        log.write(last, task=0, phase="fit", step=10)
        clock.now += 3 * 86400
        log.write("error", kind="DataError", message="no shards", begun=False)
        clock.now += 10
        log.write("run", **synthetic.run_fields())
        clock.now += 100
        log.write("done", weights_sha256="a" * 64)
    assert summarise(tmp_path).wall_seconds == pytest.approx(200.5)
    (run,) = read_runs([tmp_path])  # without its steps, but for those that this needs
    assert run.report().wall_seconds == pytest.approx(200.5)


@pytest.mark.parametrize("saved", [True, False], ids=["killed on the way", "killed before the end was saved"])
def test_the_work_of_a_killed_part_counts_up_to_where_the_next_one_began(tmp_path: Path, saved: bool) -> None:
    """By hand: 900 steps of 1 s and 128 images in the first part, the last 100 in the second."""
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(RunFolder(tmp_path).events, clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        for step in (450, 900):
            log.write("spent", **synthetic.phase("fit", 0, seconds=step, images=128 * step, part=0), step=step)
        if not saved:  # it ended, but the checkpoint of its end was not written
            log.write("phase", **synthetic.phase("fit", 0, seconds=1000, images=128_000, part=0))
        log.write("run", **synthetic.run_fields())
        log.write("phase", **synthetic.phase("fit", 0, seconds=100, images=12_800, part=900))
    (fit,) = summarise(tmp_path).phases
    assert (fit.seconds, fit.images) == (1000, 128_000)


def test_parts_whose_checkpoints_are_gone_do_not_count(tmp_path: Path) -> None:
    """Killed at 400 after a start at 300; the two newest checkpoints were deleted, and it began at 200 once more."""
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(RunFolder(tmp_path).events, clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        for step, part in ((100, 0), (200, 0), (300, 0), (400, 300)):
            cost = synthetic.phase("fit", 0, seconds=step - part, images=10 * (step - part), part=part)
            log.write("spent", **cost, step=step)
        log.write("run", **synthetic.run_fields())
        log.write("phase", **synthetic.phase("fit", 0, seconds=800, images=8000, part=200))
    assert [(fit.seconds, fit.images) for fit in summarise(tmp_path).phases] == [(1000, 10_000)]


def test_the_work_of_a_part_that_goes_on_counts_as_far_as_it_is_known(tmp_path: Path) -> None:
    synthetic.write_config(tmp_path, synthetic.config())
    with EventLog(RunFolder(tmp_path).events, clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        log.write("spent", **synthetic.phase("fit", 0, seconds=3, images=300, part=0), step=30)
    assert [(fit.seconds, fit.images) for fit in summarise(tmp_path).phases] == [(3, 300)]
