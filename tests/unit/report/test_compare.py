from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpccl.config.data import DataConfig
from hpccl.config.load import dump
from hpccl.config.memory import MemoryConfig, StratifiedMix
from hpccl.config.optim import TimmOptim
from hpccl.config.run import RunConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.config.train import TrainConfig
from hpccl.errors import ConfigError, FolderError
from hpccl.report.compare import Comparison, _Settings, compare_runs, group_table, print_comparison
from hpccl.report.compare_files import write_comparison
from hpccl.report.compare_latex import render_latex
from hpccl.report.compare_tables import calibration
from hpccl.report.events import EventLog
from hpccl.report.write import report_run
from tests.unit.report import synthetic

PUBLISHED = """dataset,method,memory_per_task,row,last_task_trained,final_avg_acc_pct,bwt_pct,forgetting_max_pct
Toy,ewc+fr+replay,20,seed0,3,70,-1,2
Toy,ewc+fr+replay,20,mean(n=2),3,71.5,-1.5,2.5
Toy,ewc+fr+replay,20,"std(n=2,ddof=1)",,0.5,0.25,0.125
Toy,ewc+fr+replay,50,mean(n=2),3,99,99,99
Toy,ewc,,mean(n=1),2,55,,
Toy,batch-joint,,mean(n=1),3,82.25,,0.5
Other,ewc+fr+replay,20,mean(n=1),5,10,,
"""


def write(folder: Path, *, shift: float = 0.0, finished: bool = True, **settings: object) -> Path:
    """A run whose last row is shifted."""
    run = synthetic.config(name=folder.name, **settings)  # type: ignore[arg-type]
    synthetic.write_run(folder, run, finished=False)
    with EventLog(folder / "events.jsonl", clock=synthetic.Clock(1_000_020)) as log:
        log.write("evaluate", **synthetic.evaluation(2, shift=shift))
        if finished:
            log.write("done", weights_sha256=folder.name)
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a", seed=0), write(tmp_path / "b", seed=1, shift=0.03125)]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    return path


def printed(comparison: Comparison, width: int = 200) -> str:
    buffer = io.StringIO()
    print_comparison(comparison, Console(file=buffer, width=width))
    return buffer.getvalue()


def test_seeds_of_one_configuration_are_one_line(seeds: list[Path]) -> None:
    (group,) = compare_runs(seeds).groups
    assert (group.method, group.memory_size, group.seeds, group.settings) == ("ewc+fr+replay", 20, [0, 1], "")
    accuracy = group.statistics["average_accuracy"]
    assert accuracy.mean == pytest.approx(2.375 / 3 + 0.03125 / 2)
    assert accuracy.std == pytest.approx(0.03125 / 2**0.5), "the sample standard deviation"
    assert accuracy.n == 2
    assert group.statistics["forgetting"].mean == pytest.approx(0.1875 - 0.03125 / 2)


def test_runs_on_a_validation_split_are_named(seeds: list[Path], tmp_path: Path) -> None:
    held = write(tmp_path / "held", data=DataConfig(validation=0.1))
    comparison = compare_runs([*seeds, held])
    assert [group.settings for group in comparison.groups] == ["data.validation=None", "data.validation=0.1"]
    assert "Not on test images but on held-out training images (data.validation): held." in printed(comparison, 300)
    assert "held-out" not in printed(compare_runs(seeds), 300)
    report_run(held)
    for name in ("report.md", "report.html"):
        assert "measured on 10 % of the training images, held out" in (held / name).read_text(encoding="utf-8")
    assert json.loads((held / "report.json").read_text(encoding="utf-8"))["validation"] == 0.1


def test_groups_say_how_much_memory_they_have_in_words(tmp_path: Path, published: Path) -> None:
    """Published values are of so many examples a task, and stand beside nothing else."""
    budgets: dict[str, dict[str, Any]] = {
        "a": {"size": 20},
        "b": {"total": 60},
        "c": {"total": 60},
        "d": {"total": 90},
        "e": {"fraction": 0.125},
    }
    folders = []
    for number, (name, budget) in enumerate(budgets.items()):
        folders.append(write(tmp_path / name))
        run = synthetic.config(name=name, seed=number).model_copy(update={"memory": MemoryConfig(**budget)})
        (tmp_path / name / "config.yaml").write_text(dump(run))
    found = compare_runs(folders, published=published, dataset="Toy")
    assert [(group.memory, group.settings, group.runs) for group in found.groups] == [
        ("20", "", ["a"]),
        ("60 in all", "", ["b", "c"]),
        ("90 in all", "", ["d"]),
        ("12.5 % of each task", "", ["e"]),
    ]
    assert [group.published is None for group in found.groups] == [False, True, True, True]
    assert [group.label for group in found.groups][1:3] == ["ewc+fr+replay m=60 in all", "ewc+fr+replay m=90 in all"]
    assert "12.5 % of each task" in printed(found)
    assert "method & 12.5 \\% of each task & 60 in all & 90 in all & $m = 20$" in render_latex(found)


def test_tasks_of_different_size_have_a_pooled_accuracy(seeds: list[Path], tmp_path: Path) -> None:
    """Where each task has as many test images, it is the mean over tasks, and no column repeats that."""
    assert "pooled" not in printed(compare_runs(seeds), 300)
    unequal = []
    for number, folder in enumerate(seeds):
        lines = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        for result in (result for event in lines if event["event"] == "evaluate" for result in event["results"]):
            result["num"] = 800 if result["task"] == 0 else 100
        copied = write(tmp_path / f"unequal-{number}", seed=number)
        (copied / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        unequal.append(copied)
    found = compare_runs(unequal)
    (group,) = found.groups
    expected = [(8 * 0.25 + 0.5 + 0.875) / 10 + shift for shift in (0.0, 0.03125)]
    pooled = group.statistics["final_union_accuracy"]
    assert pooled.mean == pytest.approx(sum(expected) / 2)
    assert group.statistics["average_accuracy_class_incremental"].mean == pytest.approx(1.625 / 3 + 0.03125 / 2)
    assert "class-incremental, pooled" in group_table(found).markdown()
    assert "Pooled: of all test images" in printed(found, 300)
    assert "on the test images of all tasks together" in render_latex(found)
    assert found.to_dict()["runs"][0]["final_union_accuracy"] == pytest.approx(expected[0])
    assert found.to_dict()["runs"][0]["performance_drop"] == pytest.approx(0.875 - expected[0])


def test_published_values_may_come_from_a_spreadsheet(seeds: list[Path], published: Path) -> None:
    """Which writes a byte order mark before the first heading."""
    published.write_text(PUBLISHED, encoding="utf-8-sig")
    (group,) = compare_runs(seeds, published=published, dataset="Toy").groups
    assert group.published is not None
    assert group.published.figures["average_accuracy"][0] == 0.715


def test_one_run_has_no_deviation_and_counts_once(seeds: list[Path]) -> None:
    (group,) = compare_runs([seeds[0], seeds[0]]).groups
    assert group.statistics["average_accuracy"].std is None
    assert len(group.runs) == 1


def test_groups_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "slow", optim=TimmOptim(lr=(1e-3,))),
        write(tmp_path / "fast", optim=TimmOptim(lr=(1e-2,)), seed=4),
        write(tmp_path / "none", size=0, replay=0.0),
    ]
    comparison = compare_runs(runs)
    assert [group.settings for group in comparison.groups] == ["optim.lr=0.001", "optim.lr=0.01", ""]
    assert [group.method for group in comparison.groups] == ["ewc+fr+replay", "ewc+fr+replay", "ewc"]
    assert "optim.lr=0.01" in printed(comparison)


def test_a_section_that_some_lack_tells_them_apart(tmp_path: Path) -> None:
    """Its key is then null, and those within are absent."""
    changes = [(lr, grown) for grown in (None, {"first": 32}) for lr in (1e-3, 1e-2)]
    runs = []
    for number, (lr, grown) in enumerate(changes):
        sections = synthetic.config().model_dump(mode="json")
        sections["stream"] = {"kind": "shards", "parts": [{"path": "x", "tasks": 3}]}
        sections["model"] = {"kind": "timm", "name": "resnet18"}
        sections["data"] |= {"image_size": 64, "progressive": grown}
        sections["optim"]["lr"] = lr
        runs.append(synthetic.write_run(tmp_path / str(number), RunConfig.model_validate(sections)))
    comparison = compare_runs(runs)
    settings = [group.settings for group in comparison.groups]
    assert len(set(settings)) == len(runs)
    assert "data.progressive.first=32" in settings[2]
    assert render_latex(comparison).split(r"\begin{table}")[1].count("ewc+fr+replay") == len(runs)


def test_settings_are_told_apart_over_all_sizes_of_memory(tmp_path: Path) -> None:
    """Or two settings would be one method that memory makes better."""
    runs = [write(tmp_path / f"{size}", size=size, optim=TimmOptim(lr=(1e-4 * size,))) for size in (20, 40)]
    groups = compare_runs(runs).groups
    assert [group.settings for group in groups] == ["optim.lr=0.002", "optim.lr=0.004"]
    assert len({group.series for group in groups}) == 2


def test_many_settings_are_told_against_the_first_group(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "fast": {"optim": TimmOptim(lr=(1e-2,))},
        "long": {"train": TrainConfig(epochs=(7,))},
        "weak": {"quadratic": 0.5},
    }
    runs = [write(tmp_path / f"{name}-{seed}", seed=seed, **more) for name, more in changes.items() for seed in (0, 1)]
    for folder in runs:  # as campaigns name them
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace(f"name: {folder.name}", f"name: {folder.name[:-2]}"))
    groups = compare_runs(runs).groups
    base, *others = [group.settings for group in groups]
    assert {text.partition("=")[0] for text in base.split()} == {"optim.lr", "train.epochs", "prior.quadratic.weight"}
    assert others == ["optim.lr=0.01", "train.epochs=7", "prior.quadratic.weight=0.5"]
    assert [group.variant for group in groups] == list(changes)
    comparison = compare_runs(runs)
    assert [row[2] for row in group_table(comparison).rows][1:] == [
        f"{row.variant}: {row.settings}" for row in groups[1:]
    ]
    assert [row[2] for row in calibration(comparison).rows] == list(changes), "the name alone, beyond the first table"
    nameless = compare_runs(runs[::2]).groups[:1] + compare_runs([runs[0], runs[2]]).groups
    assert [group.variant for group in nameless] == ["base", "optim.lr=0.001", "optim.lr=0.01"]


def test_sections_of_different_kinds_are_told_apart(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain")
    other = tmp_path / "other"
    run = synthetic.config(name="other").model_copy(update={"memory": MemoryConfig(size=20, mix=StratifiedMix())})
    synthetic.write_run(other, run)
    settings = [group.settings for group in compare_runs([plain, other]).groups]
    assert settings == ["memory.mix.kind=natural", "memory.mix.kind=stratified"]


def test_what_only_saves_time_does_not_part_seeds(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", seed=0, data=DataConfig(workers=0)),
        write(tmp_path / "b", seed=1, train=TrainConfig(first_task_from="runs/x")),
    ]
    assert len(compare_runs(runs).groups) == 1


def test_an_unfinished_run_does_not_enter_a_mean(seeds: list[Path], tmp_path: Path) -> None:
    late = write(tmp_path / "late", seed=2, shift=-0.5, finished=False)
    comparison = compare_runs([*seeds, late])
    assert comparison.groups[0].seeds == [0, 1]
    assert comparison.groups[0].left_out == ["late (running)"]
    assert "left out: late (running)" in printed(comparison)
    alone = compare_runs([late])
    assert alone.groups[0].seeds == [2]
    assert "shown as they stand: late" in printed(alone)
    assert "1, after 3 of 3 tasks" in printed(alone), "a number of an unfinished run is marked where it stands"
    namesake = synthetic.config(name="late", seed=2, replay=0.0)
    synthetic.write_run(tmp_path / "namesake", namesake, tasks=1, finished=False)
    text = " ".join(printed(compare_runs([*seeds, late, tmp_path / "namesake"])).split())
    assert "left out: late (running)" in text
    assert "shown as they stand: late" in text


def test_methods_that_were_trained_differently_are_told(seeds: list[Path], tmp_path: Path) -> None:
    """Settings that distinguish methods are not, nor those that distinguish groups of each method alike."""
    longer: dict[str, Any] = {"train": TrainConfig(epochs=(9,)), "replay": 0.0}
    others = [write(tmp_path / "er", quadratic=0.0), write(tmp_path / "ewc", **longer)]
    assert "Not the same" not in printed(compare_runs([*seeds, others[0]]), 400)
    assert "Not the same for all methods: train.epochs (comparison.json" in printed(
        compare_runs([*seeds, *others]), 400
    )
    both = write(tmp_path / "longer", train=TrainConfig(epochs=(9,)))
    plain = write(tmp_path / "plain", replay=0.0)
    assert "Not the same" not in printed(compare_runs([*seeds, *others[1:], both, plain]), 400)


def test_figures_of_fewer_runs_are_told(seeds: list[Path]) -> None:
    events = seeds[0] / "events.jsonl"
    lines = [line for line in events.read_text().splitlines(keepends=True) if '"task": 0, "results"' not in line]
    events.write_text("".join(lines))
    comparison = compare_runs(seeds)
    assert comparison.groups[0].left_out == ["a (done)"], "it lost an evaluation"
    alone = printed(compare_runs([seeds[0]]), 400)
    assert "lacks the evaluation after tasks 0" in alone


def test_infinite_figures_and_odd_names_are_written(seeds: list[Path], tmp_path: Path) -> None:
    """Of a path with markup, and an infinite likelihood."""
    events = seeds[0] / "events.jsonl"
    events.write_text(events.read_text().replace('"nll": 0.5', '"nll": "Infinity"'))
    streams = [ShardStream(parts=(Part(path=path),)) for path in ("$a$ [/new]", "$b$ [/old]")]
    odd = [write(tmp_path / name, stream=stream) for name, stream in zip("xy", streams, strict=True)]
    comparison = compare_runs([*seeds, *odd])
    printed(comparison)
    write_comparison(comparison, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert found["runs"][0]["nll"] == "Infinity"


def test_published_values_stand_beside(seeds: list[Path], tmp_path: Path, published: Path) -> None:
    joint = write(tmp_path / "joint", size=0, replay=0.0, quadratic=0.0, train=TrainConfig(data="seen", restart=True))
    comparison = compare_runs([*seeds, joint], published=published)
    assert comparison.dataset == "Toy"
    beside = [group.published.figures if group.published else None for group in comparison.groups]
    assert beside[0] == {"average_accuracy": (0.715, 0.005), "forgetting": (0.025, 0.00125), "bwt": (-0.015, 0.0025)}
    assert beside[1] == {"average_accuracy": (0.8225, None), "forgetting": (0.005, None), "bwt": (None, None)}
    given_up = write(tmp_path / "ewc", size=0, replay=0.0)
    assert compare_runs([given_up], published=published).groups[0].published is None
    text = printed(comparison)
    assert "71.5 ± 0.5" in text
    assert "82.2" in text


@pytest.mark.parametrize(
    ("text", "dataset", "words"),
    [
        (PUBLISHED, "Nothing", r"no data set 'Nothing'; there are: Toy \(3 tasks\), Other \(5 tasks\)"),
        (PUBLISHED.replace("Other,ewc+fr+replay,20,mean(n=1),5", "Other,ewc,,mean(n=1),3"), None, "several data sets"),
        (PUBLISHED.replace(",3,", ",4,"), None, "no data set with 3 tasks"),
        (PUBLISHED.replace("71.5", "good"), None, "not a number"),
        (PUBLISHED.replace("replay,20,", "replay,inf,"), None, "not a number"),
        ("dataset,method\nToy,ewc\n", None, "lack the columns memory_per_task, row"),
    ],
)
def test_published_values_that_do_not_fit_are_an_error(
    seeds: list[Path], published: Path, text: str, dataset: str | None, words: str
) -> None:
    published.write_text(text)
    with pytest.raises(ConfigError, match=words):
        compare_runs(seeds, published=published, dataset=dataset)


def test_a_short_line_of_published_values_says_nothing_of_what_it_lacks(seeds: list[Path], published: Path) -> None:
    """A mean without its figures, and a line that ends before it says what it is."""
    published.write_text(f"{PUBLISHED}Toy,ewc,20,mean(n=1)\nToy,ewc\n")
    (group,) = compare_runs(seeds, published=published).groups
    assert group.published is not None
    assert group.published.figures["average_accuracy"][0] == pytest.approx(0.715)


def test_published_values_that_are_not_finite_were_not_measured(
    seeds: list[Path], tmp_path: Path, published: Path
) -> None:
    published.write_text(PUBLISHED.replace("71.5,-1.5,2.5", "71.5,nan,inf"))
    comparison = compare_runs(seeds, published=published)
    assert comparison.groups[0].published is not None
    figures = comparison.groups[0].published.figures
    assert (figures["average_accuracy"][0], figures["bwt"][0], figures["forgetting"][0]) == (0.715, None, None)
    write_comparison(comparison, tmp_path / "out")


def test_published_values_that_are_absent_are_an_error(seeds: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="cannot be read"):
        compare_runs(seeds, published=tmp_path / "absent.csv")


def test_the_files(seeds: list[Path], tmp_path: Path, published: Path) -> None:
    out = tmp_path / "new" / "out"
    comparison = compare_runs(seeds, published)
    assert write_comparison(comparison, out) == out / "comparison.html"
    # Of one size of memory there is only a plot beside published values, and class-incremental ones are not published.
    plots = [f"comparison_{name}" for name in ("accuracy", "configurations", "forgetting", "reconstruction")]
    expected = ["runs.jsonl.xz", *(f"comparison.{suffix}" for suffix in ("csv", "html", "json", "md", "tex"))]
    expected += [f"{name}.{suffix}" for name in plots for suffix in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    content = json.loads((out / "comparison.json").read_text())
    assert content == json.loads(json.dumps(comparison.to_dict()))
    assert content["runs"][1]["name"] == "b"
    (row,) = csv.DictReader(io.StringIO((out / "comparison.csv").read_text()))
    assert float(row["average_accuracy_mean"]) == comparison.groups[0].statistics["average_accuracy"].mean
    assert row["published_average_accuracy_mean"] == "0.715"
    assert row["seeds"] == "0 1"
    markdown = (out / "comparison.md").read_text()
    assert "80.7 ± 2.2" in markdown
    assert "published" in markdown
    html = (out / "comparison.html").read_text()
    assert html.count("<svg") == 4
    assert "80.7 ± 2.2" in html


def test_configurations_are_kept_once(seeds: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", optim=TimmOptim(lr=(5e-3,)))
    content = compare_runs([*seeds, other]).to_dict()
    assert content["configuration"]["memory.size"] == 20
    assert [group["configuration"] for group in content["groups"]] == [{"optim.lr": [1e-3]}, {"optim.lr": [5e-3]}]
    assert "seed" not in content["configuration"]
    (alone,) = compare_runs(seeds).to_dict()["groups"]
    assert alone["configuration"] == {}


def test_a_narrow_terminal_keeps_the_method_whole(seeds: list[Path]) -> None:
    assert "ewc+fr+replay" in printed(compare_runs(seeds), width=80)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_runs([])


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is not the folder of a run"):
        compare_runs([tmp_path])


def test_settings_that_come_with_a_kind_are_not_told_beside_it() -> None:
    kronecker = {"curvature.kind": "kronecker", "curvature.sharing": "expand", "curvature.fraction": 0.1}
    diagonal = {"curvature.kind": "diagonal", "curvature.fraction": 0.2}
    two = _Settings.of([kronecker, diagonal])
    assert two.of_group(kronecker) == "curvature.kind=kronecker curvature.fraction=0.1"
    assert two.of_group(diagonal) == "curvature.kind=diagonal curvature.fraction=0.2"
    reduced = {**kronecker, "curvature.sharing": "reduce"}
    assert _Settings.of([kronecker, reduced]).of_group(reduced) == "curvature.sharing=reduce"
    three = [kronecker, reduced, diagonal]
    assert len({_Settings.of(three).of_group(one) for one in three}) == 3
