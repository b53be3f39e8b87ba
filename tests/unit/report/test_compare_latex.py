"""Tables for LaTeX: what is best, what is near it, and that every line fits its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpccl.config.data import DataConfig
from hpccl.config.train import TrainConfig
from hpccl.report.compare import Statistic, compare_runs
from hpccl.report.compare_latex import marks, render_latex
from tests.unit.report import synthetic
from tests.unit.report.test_compare_tables import PUBLISHED, write


def column(**values: tuple[float, float | None, int]) -> dict[tuple[str, str], Statistic]:
    return {(method, ""): Statistic(*value) for method, value in values.items()}


def test_the_best_and_what_is_within_its_standard_error() -> None:
    # The best one's standard error is 0.02 / sqrt(4) = 0.01; another one's does not count.
    values = column(ewc=(0.8, 0.02, 4), fr=(0.791, 0.0, 4), replay=(0.789, 0.5, 4), joint=(0.99, 0.0, 4))
    assert marks(values, "average_accuracy") == {("ewc", ""): "best", ("fr", ""): "near"}


def test_less_forgetting_is_better_and_more_transfer() -> None:
    values = column(ewc=(0.1, 0.02, 4), fr=(0.109, 0.0, 4), replay=(0.2, 0.0, 4))
    assert marks(values, "forgetting") == {("ewc", ""): "best", ("fr", ""): "near"}
    assert marks(values, "nll_class_incremental") == {("ewc", ""): "best", ("fr", ""): "near"}
    assert marks(values, "bwt") == {("replay", ""): "best"}


def test_one_seed_has_no_standard_error_and_equals_are_both_best() -> None:
    values = column(ewc=(0.8, None, 1), fr=(0.8, None, 1), replay=(0.7999, None, 1))
    assert marks(values, "average_accuracy") == {("ewc", ""): "best", ("fr", ""): "best"}
    assert marks(column(joint=(0.9, None, 1)), "average_accuracy") == {}
    assert marks({("ewc", ""): Statistic(None, None, 0)}, "average_accuracy") == {}


@pytest.fixture
def text(tmp_path: Path) -> str:
    published = tmp_path / "published.csv"
    published.write_text(PUBLISHED)
    runs = [
        write(tmp_path / "a", seed=0),
        write(tmp_path / "b", seed=1, shift=0.03125),
        write(tmp_path / "c", replay=0.0, shift=0.005),
        write(tmp_path / "d", size=10, replay=0.0, shift=-0.25),
        write(tmp_path / "ewc", size=0, replay=0.0),
        write(tmp_path / "joint", size=0, replay=0.0, quadratic=0.0, train=TrainConfig(data="seen", restart=True)),
    ]
    return render_latex(compare_runs(runs, published))


def test_tables_by_method_and_memory(text: str) -> None:
    first = text.split(r"\begin{table}")[1]
    rows = [line.removesuffix(r" \\").split(" & ") for line in first.splitlines() if " & " in line]
    assert rows == [
        ["method", "no memory", "$m = 10$", "$m = 20$"],
        ["ewc+fr+replay", "", "", r"$\mathbf{80.7 \pm 2.2}$"],
        [r"\quad published", "", "", r"$71.5 \pm 0.5$"],
        ["ewc+fr", "", r"$\mathbf{54.2}$", r"\underline{$79.7$}"],
        ["ewc", r"$\mathbf{79.2}$", "", ""],
        ["joint", "$79.2$", "", ""],
    ]
    assert "joint and published values do not compete. Published: Toy." in first


def test_likelihood_is_in_nats_and_calibration_in_percent(text: str) -> None:
    tables = {re.search(r"\\label\{tab:(.*)\}", one)[1]: one for one in text.split(r"\begin{table}")[1:]}  # type: ignore[index]  # every table has one
    assert r"$0.516 \pm 0.022$" in tables["nll"]
    assert "Negative log-likelihood after the last task, nats an image" in tables["nll"]
    assert r"$14.1 \pm 2.2$" in tables["ece-class-incremental"]
    assert (
        "Class-incremental expected calibration error after the last task, percent" in tables["ece-class-incremental"]
    )


def test_it_is_a_table_for_booktabs(text: str) -> None:
    assert text.startswith("% Needs \\usepackage{booktabs}.")
    assert text.isascii()
    found = text.split(r"\begin{table}")[1:]
    assert len(found) == 9
    assert len({re.search(r"\\label\{(.*)\}", one)[1] for one in found}) == 9  # type: ignore[index]
    for one in found:
        columns = re.search(r"\\begin\{tabular\}\{l(r*)\}", one)
        assert columns
        assert {line.count(" & ") for line in one.splitlines() if " & " in line} == {len(columns[1])}
        assert all(line.endswith(r" \\") for line in one.splitlines() if " & " in line)
        assert one.count(r"\toprule") == one.count(r"\midrule") == one.count(r"\bottomrule") == 1
        assert one.count("{") == one.count("}")
        assert one.count("$") % 2 == 0


def test_held_out_images_are_told_and_do_not_compete_with_test_images(tmp_path: Path) -> None:
    runs = {
        name: synthetic.write_run(tmp_path / name, synthetic.config(name=name, replay=replay, data=data))
        for name, replay, data in (("a", 0.5, DataConfig()), ("b", 0.5, DataConfig(validation=0.1)))
    }
    mixed = render_latex(compare_runs(list(runs.values())))
    assert "On held-out training images, and not competing: ewc+fr+replay m=20 data.validation=0.1" in mixed
    accuracy = mixed.split(r"\bottomrule")[0]
    assert accuracy.count(r"\mathbf") == 1
    alone = render_latex(compare_runs([runs["b"]]))
    assert "Average accuracy on held-out training images after the last task" in alone


def test_settings_are_escaped(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a"), write(tmp_path / "b", train=TrainConfig(batch_size=8))]
    assert r"ewc+fr+replay train.batch\_size=8 & " in render_latex(compare_runs(runs))
