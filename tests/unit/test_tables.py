"""The tables of figures in the documentation are those of the files that benchmarks left, figures of prose in them."""

from __future__ import annotations

import json
import re
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from benchmarks._tables import FOLDER, PAGES, filled

RESULTS = FOLDER.parents[1] / "results.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_as_the_files_are(page: Path) -> None:
    assert filled(page.read_text(), FOLDER) == page.read_text(), "run: python -m benchmarks._tables"


def table(name: str, folder: Path) -> list[list[str]]:
    """The cells below the head."""
    page = filled(f"before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n", folder)
    found = re.fullmatch(rf"before\n<!-- table: {name} -->\n(.*)<!-- end -->\nafter\n", page, re.DOTALL)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


MACHINE = {"cpu": "Abacus", "cores": 2}


def curvature(case: str, seconds: dict[str, float], peaks: dict[str, int]) -> str:
    base = seconds["forward_backward"]
    details: dict[str, Any] = {
        "processor_seconds": {case: seconds},
        "over_forward_backward": {case: {name: value / base for name, value in seconds.items()}},
        "peak_bytes": {case: peaks},
        "cases": [{"model": case.partition("@")[0], "pixels": case.partition("@")[2], "batch": 8, "batches": 2}],
    }
    return json.dumps({"name": "curvature", "machine": MACHINE, "details": details})


def test_curvature_of_whichever_files_there_are(tmp_path: Path) -> None:
    assert table("curvature", tmp_path) == []  # the page's own row stays
    all_runs = {"forward_backward": 2.0, "hpccl/mc": 3.0, "hpccl/empirical": 2.5, "hpccl/everything": 4.0}
    (tmp_path / "curvature_b.json").write_text(curvature("b@64", all_runs, {"hpccl/mc": 5 << 20}))
    few = {"forward_backward": 1.0, "hpccl/mc": 1.5, "hpccl/empirical": 1.5, "peer/mc": 6.0}
    (tmp_path / "curvature_a.json").write_text(curvature("a@224", few, {}))
    assert table("curvature", tmp_path) == [
        ["a@224, 16 images, Abacus", "forward + backward", "1.00", "1.00", "1.00", "–", "0.67", "–"],
        ["a@224, 16 images, Abacus", "hpccl", "1.50", "1.50", "1.50", "–", "1.00", "–"],
        ["a@224, 16 images, Abacus", "peer", "6.00", "–", "6.00", "–", "4.00", "–"],
        ["b@64, 16 images, Abacus", "forward + backward", "2.00", "2.00", "1.00", "–", "0.67", "–"],
        ["b@64, 16 images, Abacus", "hpccl", "3.00", "2.50", "1.50", "5", "1.00", "1.00"],
        ["b@64, 16 images, Abacus", "hpccl, norms too", "4.00", "–", "2.00", "–", "1.33", "–"],
    ]


def test_reconstruction_of_several_runs(tmp_path: Path) -> None:
    name = "selection/reconstruction"
    assert table(name, tmp_path / "benchmarks") == []
    figures = {"cosine": 0.5, "relative_error": 0.75, "change_cosine": None, "change_error": 2.0}
    for seed, better in enumerate((0.0, 0.25)):
        folder = tmp_path / "selection" / f"reconstruction-{seed}"
        folder.mkdir(parents=True)
        means = [
            {"selector": "uniform", "size": 500, **figures},
            {"selector": "gini", "size": 100, **figures, "cosine": 0.5 + better, "change_cosine": better or None},
        ]
        (folder / "reconstruction.json").write_text(json.dumps({"means": means}))
    assert table(name, tmp_path / "benchmarks") == [
        ["gini", "100", "2", "0.625 ± 0.177", "0.750 ± 0.000", "0.250", "2.000 ± 0.000"],
        ["uniform", "500", "2", "0.500 ± 0.000", "0.750 ± 0.000", "–", "2.000 ± 0.000"],
    ]


def test_engines_of_several_files(tmp_path: Path) -> None:
    methods = {"finetune": 1.0, "exact": 1.5, "truncated": 1.25, "again": 1.01}
    measured = {
        "seconds": {"finetune": 0.5},
        "clock_ratio": methods,
        "processor_ratio": methods,
        "pull_share": {"exact": 0.2, "truncated": 0.05},
        "bytes_over_parameters": {"allgather_base": 2.0, "reduce_scatter_base": 1.0},
        "extra_bytes": 1234,
        "peak_bytes": {"finetune": 3 << 20, "exact": 5 << 20, "truncated": 4 << 20},
        "tensor_bytes": {"truncated": 2 << 20},
    }
    few = {**measured, "extra_bytes": 0, "peak_bytes": {"truncated": 7 << 20}, "tensor_bytes": {}}
    for number, engines in enumerate(({"fsdp2": {"2": measured}}, {"zero-3": {"4": few}}, {"fsdp2": {"4": few}})):
        cases = {"net": {"size": 128, "engines": engines}}
        result = {"machine": MACHINE, "details": {"cases": cases}}
        (tmp_path / f"engines_{number}.json").write_text(json.dumps(result))
    ratios = ["0.50", "1.500", "1.250", "1.010", "1.250", "20.0%", "5.0%", "3.00"]
    assert table("engines", tmp_path) == [
        ["net@128", "fsdp2", "Abacus", "2", *ratios, "1,234", "3", "5", "4", "2"],
        ["net@128", "fsdp2", "Abacus", "4", *ratios, "0", "–", "–", "7", "–"],
        ["net@128", "zero-3", "Abacus", "4", *ratios, "0", "–", "–", "7", "–"],
    ]
    assert table("engines_worst", tmp_path) == [
        ["truncated, by the clock, 2 processes", "1.250", "net@128, fsdp2"],
        ["truncated, by processor time, 2 processes", "1.250", "net@128, fsdp2"],
        ["exact, by the clock, 2 processes", "1.500", "net@128, fsdp2"],
        ["exact, by processor time, 2 processes", "1.500", "net@128, fsdp2"],
        ["extra bytes", "1,234", "net@128, fsdp2"],
        ["peak memory, 4 processes over 2", "1.750", "net@128, fsdp2, truncated"],
    ]
    louder = {**measured, "clock_ratio": {**methods, "truncated": 3.0, "again": 0.9}}
    cases = {"net": {"size": 128, "engines": {"fsdp2": {"2": louder}}}}
    (tmp_path / "engines_9.json").write_text(json.dumps({"machine": MACHINE, "details": {"cases": cases}}))
    assert table("engines_worst", tmp_path)[0][1] == "1.250"  # the figure beside the least noise


@pytest.mark.parametrize("name", ["task_sum", "pull"])
def test_another_figure_changes_the_table(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "files"
    shutil.copytree(FOLDER, folder)
    before = table(name, folder)
    file = min(folder.glob(f"{name}*.json"))
    result = json.loads(file.read_text())
    if name == "task_sum":
        result["details"]["table"]["refit"]["1"]["frobenius"] = 0.98765
    else:
        next(iter(result["details"]["cases"].values()))["processes"]["2"]["step_ratio"]["exact"] = 0.98765
    file.write_text(json.dumps(result))
    changed = [
        new
        for old, others in zip(before, table(name, folder), strict=True)
        for cell, new in zip(old, others, strict=True)
        if cell != new
    ]
    assert changed == ["0.988"]


COMPARISON = """# Comparison of 2 runs

| method | m |
| ------ | - |
| ewc    | – |

A note.

## Wall-clock and images

| method | minutes |
| ------ | ------: |
| ewc    |     3.0 |
| fr     |     4.5 |

## Runs

| run |
| --- |
| a   |
"""


def test_tables_of_a_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    assert table("cifar/wall-clock-and-images", folder) == []  # the page's own row stays
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "comparison.md").write_text(COMPARISON, encoding="utf-8")
    assert table("cifar/wall-clock-and-images", folder) == [["ewc", "3.0"], ["fr", "4.5"]]
    assert table("cifar/wall-clock-and-images=fr", folder) == [["fr", "4.5"]]
    assert table("cifar/runs", folder) == [["a"]]
    assert table("cifar/accuracy-and-forgetting", folder) == [["ewc", "–"]]  # without a title, as it once was
    titled = COMPARISON.replace("| method | m |", "## Accuracy and forgetting\n\n| method | m |").replace("–", "20")
    (tmp_path / "cifar" / "comparison.md").write_text(titled, encoding="utf-8")
    assert table("cifar/accuracy-and-forgetting", folder) == [["ewc", "20"]]
    with pytest.raises(ValueError, match=r"unknown table 'cifar/runes'; of .* allowed: .*wall-clock-and-images, runs"):
        table("cifar/runes", folder)


def test_mistakes_in_a_page() -> None:
    with pytest.raises(ValueError, match="unknown table 'pul'; allowed: curvature, pull"):
        filled("<!-- table: pul -->\n<!-- end -->\n", FOLDER)
    with pytest.raises(ValueError, match="has no '<!-- end -->'"):
        filled("<!-- table: pull -->\n", FOLDER)


def test_optimizers_and_methods_beside_what_they_are_compared_with(tmp_path: Path) -> None:
    names = {"sgd": 0.0, "adamw": 8.0, "ivon": 8.0}
    details: dict[str, Any] = {
        "time_over": {"sgd": {"a": {"adamw": 1.1, "ivon": 1.5}}, "adamw": {"a": {"sgd": 0.9, "ivon": 1.4}}},
        "processor_time_over_adamw": {"a": {"sgd": 0.8, "ivon": 1.3}},
        "state_bytes_per_weight": {"a": names},
    }
    (tmp_path / "optimizers.json").write_text(json.dumps({"details": details}))
    assert table("optimizers", tmp_path) == [
        ["a", "sgd", "1.00", "0.90", "0.80", "0.0"],
        ["a", "adamw", "1.10", "1.00", "1.00", "8.0"],
        ["a", "ivon", "1.50", "1.40", "1.30", "8.0"],
    ]
    details = {
        "processor_seconds": {"finetune": 0.1, "ewc": 0.12, "avalanche ewc": 0.15},
        "time_over_finetune": {"ewc": 1.2, "avalanche ewc": 1.5},
        "time_over_peer": {"avalanche ewc": 0.8},
        "peer_of": {"avalanche ewc": "ewc diagonal"},
        "peak_bytes": {"finetune": 1 << 20, "ewc": 3 << 20},
    }
    (tmp_path / "methods.json").write_text(json.dumps({"details": details}))
    assert table("methods", tmp_path) == [
        ["finetune", "100", "1.00", "–", "1"],
        ["ewc", "120", "1.20", "–", "3"],
        ["avalanche ewc", "150", "1.50", "0.80 (ewc diagonal)", "–"],
    ]


SETTINGS = {  # figures in the prose of docs/results.md that say how something was run, by the section's title
    "## Split-CIFAR": {"99"},
    "### The weight of memory": {"4.5", "0.25"},
    "### `benchmarks/reconstruction.py`": {"6", "4"},
    "### `benchmarks/selection.py`": {"1.28"},
}
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?!\w)")
_FIGURE = re.compile(r"(?<![\w.,-])(?P<value>\d+\.\d+(?:e-\d+)?|\d+(?= ?%| points))(?!\w)(?P<percent> ?%)?")


def unsupported(section: str) -> set[str]:
    """Decimal fractions and percentages of the prose that no cell of the section's tables rounds to."""
    text = re.sub(r"^```.*?^```", "", section, flags=re.DOTALL | re.MULTILINE)
    cells = " ".join(line for line in text.splitlines() if line.startswith("|"))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "    ")))
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|\d+\.\d+\.\d+", "", prose)  # nor versions
    values = [Decimal(number.replace(",", "")) for number in _NUMBER.findall(cells)]
    figures = [figure for figure in _FIGURE.finditer(prose) if not any(_rounds_to(value, figure) for value in values)]
    return {figure["value"] for figure in figures}


def _rounds_to(value: Decimal, figure: re.Match[str]) -> bool:
    said = Decimal(figure["value"])
    near = Decimal("0.5").scaleb(said.as_tuple().exponent)  # type: ignore[arg-type]  # of a number it is an int
    scales = (1, 100) if figure["percent"] and value < 1 else (1,)
    return any(abs(value * scale - said) <= near for scale in scales)


def sections(page: Path) -> dict[str, str]:
    return {part.partition("\n")[0]: part for part in re.split(r"^(?=##+ )", page.read_text(), flags=re.MULTILINE)}


@pytest.mark.parametrize("title", sections(RESULTS))
def test_figures_in_the_prose_are_in_the_tables(title: str) -> None:
    found = unsupported(sections(RESULTS)[title])
    assert found == SETTINGS.get(title, set()), f"{title}: no cell of its tables rounds to {found}"


def test_a_figure_that_no_table_has_is_found() -> None:
    table = "| a | b |\n| --- | --- |\n| x | 82.54 ± 0.3 |\n| y | 0.0041 |\n"
    assert unsupported(f"## Title\n\n82.5 with `0.7`, an error of 0.4 %, torch 2.13.0.\n\n{table}") == set()
    assert unsupported(f"## Title\n\n82.6, 81 % and 0.4.\n\n{table}") == {"82.6", "81", "0.4"}
