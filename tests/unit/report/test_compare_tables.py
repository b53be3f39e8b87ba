"""Cost, accuracy of each task and gradient reconstruction, by group; all figures from the events by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hpccl.config.train import EvaluateConfig
from hpccl.report.compare import Comparison, compare_runs, mean_reconstruction
from hpccl.report.compare_files import write_comparison
from hpccl.report.compare_latex import render_latex
from hpccl.report.compare_tables import (
    behind_best,
    calibration,
    cost,
    paired,
    rank_correlation,
    reconstruction,
    tables,
    task_accuracy,
)
from hpccl.report.events import EventLog
from tests.unit.report import synthetic

PUBLISHED = """dataset,method,memory_per_task,row,last_task_trained,final_avg_acc_pct,bwt_pct,forgetting_max_pct,\
acc_task1_pct,acc_task2_pct,acc_task3_pct,train_min_total
Toy,ewc+fr+replay,20,mean(n=2),3,71.5,-1.5,2.5,60,70,80,12.5
Toy,ewc+fr+replay,20,"std(n=2,ddof=1)",,0.5,0.25,0.125,1,2,3,0.5
"""


def write(
    folder: Path,
    *,
    cosines: list[float] | None = None,
    fit: float = 4.0,
    shift: float = 0.0,
    calibrated: bool = True,
    **more: Any,
) -> Path:
    """A run of three tasks, with measured errors where cosines are given.

    `shift` is added to every accuracy, NLL and calibration error; if not `calibrated`, only accuracies are known.
    """
    run = synthetic.config(name=folder.name, **more)
    synthetic.write_config(folder, run)
    with EventLog(folder / "events.jsonl", clock=synthetic.Clock()) as log:
        log.write("run", **synthetic.run_fields())
        for task in range(synthetic.NUM_TASKS):
            for event, fields in synthetic.task_events(task):
                if event == "phase" and fields["phase"] == "fit":
                    log.write(event, **synthetic.phase("fit", task, seconds=fit, images=1600))
                elif event == "reconstruction":
                    if cosines:
                        log.write(event, **errors(task, cosines[task - 1]))
                elif event == "evaluate":
                    log.write(event, **evaluation(task, shift, calibrated=calibrated))
                else:
                    log.write(event, **fields)
        log.write("done", weights_sha256=folder.name, images_per_second=100.0)
    return folder


def test_differences_are_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    """Shifts by hand: of the seeds 1 and 2 the second group is 1/32 and 3/32 better; seeds 0 and 3 have no partner."""
    first = [write(tmp_path / f"a{seed}", seed=seed, shift=shift) for seed, shift in ((0, 0.0), (1, 0.0), (2, 0.03125))]
    second = [
        write(tmp_path / f"b{seed}", seed=seed, quadratic=2.0, shift=shift)
        for seed, shift in ((1, 0.03125), (2, 0.125), (3, 0.25))
    ]
    alone = write(tmp_path / "c", seed=1, quadratic=3.0)
    found = paired(compare_runs([*first, *second, alone]))
    (row,) = found.rows
    mean, error = 100 * 2 / 32, 100 * 1 / 32  # half the range, over root 2, times root 2 of the deviation
    assert row[-6:] == ["2", f"{mean:.1f} ± {error:.1f}", f"{mean:.1f} ± {error:.1f}", *row[-3:-1], "2 of 2"]
    assert found.notes[0].startswith("Less ewc+fr+replay m=20 ")
    assert not paired(compare_runs(first)).rows
    again = write(tmp_path / "again", seed=1, quadratic=2.0, shift=-0.03125)
    (row,) = paired(compare_runs([*first, *second, again])).rows
    mean = 100 * (0.0 + 3 / 32) / 2  # of seed 1, the mean of both runs
    assert row[-5] == f"{mean:.1f} ± {mean:.1f}"


def test_each_size_of_memory_has_its_own_best(tmp_path: Path) -> None:
    """Shifts by hand: with 20 examples replay=0.5 is best, with 40 replay=0 is; seed 2 of one has no partner."""
    shifts = {
        (0.5, 20, 0): 0.125,
        (0.5, 20, 1): 0.125,
        (0.5, 40, 0): 0.0,
        (0.0, 20, 0): 0.0,
        (0.0, 20, 1): 0.0625,
        (0.0, 20, 2): 0.0625,
        (0.0, 40, 0): 0.0625,
        (0.0, 80, 0): 0.5,  # alone
        (1.0, 20, 1): 0.0625,
    }
    runs = [
        write(tmp_path / f"{replay}-{size}-{seed}", replay=replay, size=size, seed=seed, shift=shift)
        for (replay, size, seed), shift in shifts.items()
    ]
    found = behind_best(compare_runs(runs))
    assert found.header == ["method", "m = 20", "m = 40"]
    # Behind by 1/8 and 1/16 in the seeds that both have: 3/32 on average, and half of their difference is the error.
    assert found.rows == [
        ["ewc+fr+replay", "best", "−6.2"],
        ["ewc+fr", f"−{100 * 3 / 32:.1f} ± {100 / 32:.1f}", "best"],
        ["ewc+replay", "−6.2", "–"],
    ]
    assert not behind_best(compare_runs([run for run in runs if "-40-" not in run.name])).rows
    assert not behind_best(compare_runs(runs[:3])).rows  # one method


def test_a_run_that_is_not_finished_is_not_the_best(tmp_path: Path) -> None:
    """After one task of three its accuracy is high."""
    runs = [synthetic.write_run(tmp_path / f"a{size}", synthetic.config(size=size)) for size in (20, 40)]
    half = [
        synthetic.write_run(tmp_path / f"b{size}", synthetic.config(size=size, replay=0.0), tasks=1, finished=False)
        for size in (20, 40)
    ]
    comparison = compare_runs([*runs, *half])
    assert not behind_best(comparison).rows
    text = render_latex(comparison)
    assert text.split(r"\begin{table}")[1].count(r"\mathbf") == 2, "of the finished method alone, one a column"
    assert "Not finished, and not competing: ewc+fr m=20, ewc+fr m=40" in text
    pairs = [tmp_path / "pair", tmp_path / "half"]
    synthetic.write_run(pairs[0], synthetic.config(seed=1))
    synthetic.write_run(pairs[1], synthetic.config(seed=1, replay=0.0), tasks=1, finished=False)
    assert not paired(compare_runs([runs[0], half[0], *pairs])).rows
    assert rank_correlation(compare_runs([*runs, *half, *pairs]), lambda run: float(run.num_tasks)) is None


def evaluation(task: int, shift: float, *, calibrated: bool) -> dict[str, Any]:
    fields = synthetic.evaluation(task, shift=shift)
    for result in fields["results"]:
        for setting in ("task_incremental", "class_incremental"):
            for figure in ("nll", "ece"):
                if result[setting] is not None:
                    result[setting][figure] = result[setting][figure] + shift if calibrated else None
    return fields


def errors(task: int, cosine: float) -> dict[str, Any]:
    fields = synthetic.reconstruction(task)
    fields["terms"]["total"] = {"cosine": cosine, "relative_error": 1 / cosine, "norm": 3.0}
    return fields


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    published = tmp_path / "published.csv"
    published.write_text(PUBLISHED)
    runs = [
        write(tmp_path / "a", seed=0, cosines=[0.5, 0.25], fit=60.0),
        write(tmp_path / "b", seed=1, cosines=[0.5, 0.75], fit=120.0, shift=0.03125),
        write(tmp_path / "ewc", size=0, replay=0.0),
    ]
    return compare_runs(runs, published)


def test_cost_is_mean_and_deviation_of_the_runs(comparison: Comparison) -> None:
    found = cost(comparison)
    kept, ewc = (dict(zip(found.header, row, strict=True)) for row in found.rows)
    # Three tasks of one and of two minutes: 3 and 6, mean 4.5, deviation 3 / sqrt(2).
    assert kept["training, minutes"] == "4.5 ± 2.1"
    assert kept["training, minutes, published"] == "12.5 ± 0.5"
    assert kept["images trained"] == "4,800"
    assert kept["images/s while training"] == "20 ± 9"  # 4800 / 180 s and 4800 / 360 s
    assert kept["tasks trained"] == "3"
    assert ewc["training, minutes, published"] == "–"
    assert ewc["training, minutes"] == "0.2"


def test_likelihood_and_calibration_are_means_of_the_learned_tasks(comparison: Comparison) -> None:
    found = calibration(comparison)
    settings = (
        ("average accuracy", "NLL", "ECE"),
        ("class-incremental", "class-incremental NLL", "class-incremental ECE"),
    )
    assert found.header == ["method", "m", "seeds", *settings[0], *settings[1]]
    kept, ewc = found.rows
    # 0.5 nats and 6.25 %, 1.5 nats and 12.5 %; the second run's are 1/32 more: means + 1/64, deviation 1/32 / sqrt(2).
    own = ["80.7 ± 2.2", "0.516 ± 0.022", "7.8 ± 2.2"]
    assert kept == ["ewc+fr+replay", "20", "2", *own, "55.7 ± 2.2", "1.516 ± 0.022", "14.1 ± 2.2"]
    assert ewc == ["ewc", "–", "1", "79.2", "0.500", "6.2", "54.2", "1.500", "12.5"]


def test_calibration_stands_where_it_was_measured(tmp_path: Path) -> None:
    blind = write(tmp_path / "blind", calibrated=False)
    assert "Likelihood and calibration" not in [table.title for table in tables(compare_runs([blind]))]
    both = compare_runs([blind, write(tmp_path / "ewc", size=0, replay=0.0)])
    assert [row[0] for row in calibration(both).rows] == ["ewc"]


def test_top_5_has_a_column_where_it_was_measured(tmp_path: Path) -> None:
    folder = write(tmp_path / "large")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        for result in event.get("results", ()):
            if result["class_incremental"] is not None:
                result["class_incremental"]["top5"] = 0.875
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    found = calibration(compare_runs([folder]))
    assert "top-5" not in found.header
    assert found.rows[0][found.header.index("class-incremental top-5")] == "87.5"


def test_distances_are_said_to_be_no_probabilities(tmp_path: Path) -> None:
    means = write(tmp_path / "means", evaluate=EvaluateConfig(classifier="nearest_mean"))
    assert calibration(compare_runs([means])).notes[1:] == [
        "From distances to class means, which are not probabilities: ewc+fr+replay m=20."
    ]
    assert len(calibration(compare_runs([write(tmp_path / "head")])).notes) == 1


def test_tasks_that_another_run_trained_are_not_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    lines = (folder / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if not ('"fit"' in line and '"task": 0' in line)]
    (folder / "events.jsonl").write_text("\n".join(kept) + "\n")
    (row,) = cost(compare_runs([folder])).rows
    assert row[-2:] == ["3,200", "2"]


def test_accuracy_of_each_task_is_the_last_row(comparison: Comparison) -> None:
    found = task_accuracy(comparison)
    assert found.header == ["method", "m", "of", "t1", "t2", "t3"]
    kept, published, ewc = found.rows
    # OWN's last row and the same + 1/32: means + 1/64, deviation 1/32 / sqrt(2) = 2.2 points.
    assert kept == ["ewc+fr+replay", "20", "here", "64.1 ± 2.2", "76.6 ± 2.2", "101.6 ± 2.2"]
    assert published == ["ewc+fr+replay", "20", "published", "60.0 ± 1.0", "70.0 ± 2.0", "80.0 ± 3.0"]
    assert ewc == ["ewc", "–", "here", "62.5", "75.0", "100.0"]


def test_a_run_under_way_has_the_tasks_that_it_learned(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path / "late", tasks=2, finished=False)
    whole = write(tmp_path / "whole", size=0, replay=0.0)
    assert task_accuracy(compare_runs([tmp_path / "late", whole])).rows[0][2:] == ["75.0", "87.5", "–"]


def test_reconstruction_by_term_and_task(comparison: Comparison) -> None:
    found = reconstruction(comparison, "cosine")
    assert found.header == ["method", "m", "term", "after t2", "after t3", "mean"]
    rows = {row[2]: row[3:] for row in found.rows}
    assert list(rows) == ["soft", "replay", "total"], "the quadratic's gradient is zero"
    assert rows["soft"] == ["0.50 ± 0.00", "0.50 ± 0.00", "0.50 ± 0.00"]
    # After the third task 0.25 and 0.75; means over tasks 0.375 and 0.625.
    assert rows["total"] == ["0.50 ± 0.00", "0.50 ± 0.35", "0.50 ± 0.18"]
    error = {row[2]: row[3:] for row in reconstruction(comparison, "relative_error").rows}
    assert error["total"] == ["2.000 ± 0.000", "2.667 ± 1.886", "2.333 ± 0.943"]


def test_without_measurements_there_is_no_table_of_them(tmp_path: Path) -> None:
    found = tables(compare_runs([write(tmp_path / "ewc", size=0, replay=0.0)]))
    titles = ["Likelihood and calibration", "Wall-clock and images", "Accuracy of each task after the last one"]
    assert [table.title for table in found] == titles


def test_rank_correlation_is_spearmans(tmp_path: Path) -> None:
    cosines, shifts = [0.5, 0.25, 0.75, 0.125], [0.0, 0.03125, 0.0625, -0.03125]
    runs = [
        write(tmp_path / str(seed), seed=seed, cosines=[cosine, cosine], shift=shift)
        for seed, (cosine, shift) in enumerate(zip(cosines, shifts, strict=True))
    ]
    comparison = compare_runs(runs)
    found = rank_correlation(comparison, lambda run: mean_reconstruction(run, "cosine"))
    # Ranks 3 2 4 1 and 2 3 4 1: 1 - 6 (1 + 1) / (4 (16 - 1)).
    assert found is not None
    assert found[0] == pytest.approx(0.8)
    assert found[1] == 4
    assert "0.80 over 4 runs" in reconstruction(comparison, "cosine").notes[-1]
    assert "−0.80 over 4 runs" in reconstruction(comparison, "relative_error").notes[-1]
    assert rank_correlation(compare_runs(runs[:2]), lambda run: mean_reconstruction(run, "cosine")) is None
    assert rank_correlation(comparison, lambda _: 1.0) is None


def test_files_have_the_same_figures(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path / "out")
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        first, _ = csv.DictReader(file)
    assert float(first["training_seconds_mean"]) == 270.0
    assert float(first["reconstruction_cosine_mean"]) == 0.5
    assert float(first["nll_mean"]) == 0.515625
    assert float(first["ece_class_incremental_std"]) == pytest.approx(0.03125 / 2**0.5)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [content["runs"][member]["name"] for member in content["groups"][0]["members"]] == ["a", "b"]
    assert content["runs"][1]["reconstruction"]["total"]["cosine"] == 0.625
    assert content["runs"][0]["accuracy_after_last"] == [0.625, 0.75, 1.0]
    assert (content["runs"][1]["nll"], content["runs"][1]["ece_class_incremental"]) == (0.53125, 0.15625)
    markdown = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    html = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    for text in (markdown, html):
        assert "Wall-clock and images" in text
        assert "2.667 ± 1.886" in text
        assert "0.516 ± 0.022" in text
        assert "101.6 ± 2.2" in text
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line.rpartition("(")[2].rstrip(")")).exists()
