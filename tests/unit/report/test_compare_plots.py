"""What the plots of a comparison hold, read back from their axes, and that their files are the same every time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from hpccl.config.load import load
from hpccl.config.optim import TimmOptim
from hpccl.config.train import TrainConfig
from hpccl.report.compare import Comparison, compare_runs
from hpccl.report.compare_files import write_comparison
from hpccl.report.compare_plots import figures
from tests.unit.report.test_compare_tables import write

PUBLISHED = """dataset,method,memory_per_task,row,last_task_trained,final_avg_acc_pct,bwt_pct,forgetting_max_pct
Toy,ewc+fr+replay,20,mean(n=2),3,71.5,-1.5,2.5
Toy,ewc+fr+replay,20,"std(n=2,ddof=1)",,0.5,0.25,0.125
Toy,ewc+fr+replay,50,mean(n=2),3,75,,
Toy,ewc,,mean(n=1),3,55,,
Toy,fr,20,mean(n=1),3,44,,
"""


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    published = tmp_path / "published.csv"
    published.write_text(PUBLISHED)
    runs = [
        write(tmp_path / "a", seed=0, cosines=[0.5, 0.25]),
        write(tmp_path / "b", seed=1, cosines=[0.5, 0.75], shift=0.03125),
        write(tmp_path / "c", size=10, cosines=[0.5, 0.5], shift=-0.125),
        write(tmp_path / "ewc", size=0, replay=0.0, cosines=[0.125, 0.125]),
        write(tmp_path / "joint", size=0, replay=0.0, quadratic=0.0, train=TrainConfig(data="seen", restart=True)),
    ]
    return compare_runs(runs, published)


def drawn(comparison: Comparison, name: str) -> Figure:
    figure = figures(comparison)[name]
    assert figure is not None
    return figure


def curves(axes: Axes) -> dict[str, tuple[list[float], list[float], Any]]:
    """By colour and marker, x and y and the marker's face of lines with markers."""
    found = {}
    for line in axes.lines:
        if line.get_marker() not in {"None", "|", "_", None, ""} and len(np.asarray(line.get_xdata())):
            x, y = (np.asarray(data, dtype=float).tolist() for data in (line.get_xdata(), line.get_ydata()))
            found[f"{line.get_linestyle()} {line.get_marker()}"] = (x, y, line)
    return found


def test_accuracy_against_memory_with_published_points(comparison: Comparison) -> None:
    (axes,) = drawn(comparison, "accuracy").axes
    own, published = curves(axes)["- >"], curves(axes)["-- >"]
    assert own[0] == pytest.approx([10, 20], rel=0.03), "a little aside"
    assert own[1] == pytest.approx([100 * (2.375 / 3 - 0.125), 100 * (2.375 / 3 + 0.015625)])
    assert published[0] == pytest.approx([20, 50], rel=0.03)
    assert published[1] == pytest.approx([71.5, 75]), "also of a size that was not run"
    assert own[2].get_color() == published[2].get_color()
    assert published[2].get_markerfacecolor() == "none"
    levels = {
        round(float(np.asarray(line.get_ydata())[0]), 4): line for line in axes.lines if line.get_marker() == "None"
    }
    assert {55.0, 79.1667} <= set(levels), "methods without memory are level lines"
    assert levels[55.0].get_linestyle() == "--"
    assert 44.0 not in [value for _, y, _ in curves(axes).values() for value in y], "fr was not run"
    labels = axes.get_legend().get_texts()  # type: ignore[union-attr]
    assert sorted(text.get_text() for text in labels) == ["ewc", "ewc+fr+replay", "joint", "published"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["10", "20", "50"]


def test_error_bars_are_the_deviation_over_seeds(comparison: Comparison) -> None:
    (axes,) = drawn(comparison, "accuracy").axes
    (bars,) = [one for one in axes.containers if one.get_label() == "ewc+fr+replay"]
    assert isinstance(bars, ErrorbarContainer)
    one_seed, two_seeds = bars[2][0].get_segments()
    assert not np.isfinite(one_seed).any(), "one seed has no deviation"
    low, high = np.asarray(two_seeds)[:, 1]
    assert (high - low) / 2 == pytest.approx(100 * 0.03125 / 2**0.5)
    assert (high + low) / 2 == pytest.approx(100 * (2.375 / 3 + 0.03125 / 2))


def test_settings_of_one_method_are_lines_of_one_colour(tmp_path: Path) -> None:
    speeds: dict[str, dict[str, Any]] = {"slow": {}, "fast": {"optim": TimmOptim(lr=(1e-2,))}}
    runs = [
        write(tmp_path / f"{speed}-{size}", size=size, **more) for speed, more in speeds.items() for size in (10, 20)
    ]
    assert figures(compare_runs(runs[::2]))["accuracy"] is None, "one size is no line"
    (axes,) = drawn(compare_runs(runs), "accuracy").axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["ewc+fr+replay optim.lr=0.001", "ewc+fr+replay optim.lr=0.01"]


def test_one_dot_a_run_of_reconstruction_against_accuracy(comparison: Comparison) -> None:
    cosine, error = drawn(comparison, "reconstruction").axes
    dots = {str(found.get_label()): np.asarray(found.get_offsets()) for found in cosine.collections}
    assert set(dots) == {"ewc+fr+replay", "ewc"}, "nothing was measured of joint"
    accuracy = 100 * 2.375 / 3
    expected = [[0.375, accuracy], [0.625, accuracy + 3.125], [0.5, accuracy - 12.5]]
    assert dots["ewc+fr+replay"] == pytest.approx(np.array(expected))
    assert dots["ewc"] == pytest.approx(np.array([[0.125, accuracy]]))
    errors = {str(found.get_label()): np.asarray(found.get_offsets()) for found in error.collections}
    assert errors["ewc+fr+replay"][:, 0] == pytest.approx([3.0, (2 + 4 / 3) / 2, 2.0])
    colours = [{tuple(np.ravel(found.get_facecolor())) for found in axes.collections} for axes in (cosine, error)]
    assert len(colours[0]) == 2
    assert colours[0] == colours[1], "one colour a method in both"


def test_bars_by_configuration(comparison: Comparison) -> None:
    (axes,) = drawn(comparison, "configurations").axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["ewc+fr+replay m=20", "ewc+fr+replay m=10", "ewc", "joint"]
    widths = {str(one.get_label()): [bar.get_width() for bar in one.patches] for one in axes.containers[1::2]}  # type: ignore[attr-defined]
    assert widths["average accuracy"][0] == pytest.approx(100 * (2.375 / 3 + 0.03125 / 2))
    assert widths["published"][::2] == pytest.approx([71.5, 55.0])


def test_methods_can_be_told_apart() -> None:
    from hpccl.report.compare_plots import _dashes, _style

    files = Path(__file__).parents[3] / "configs" / "method"
    methods = sorted({load([file], []).method for file in files.glob("*.yaml")} | {"cumulative"})
    assert len(methods) > 20
    marked = [tuple(_style(method).values()) for method in methods]
    level = [(_style(method)["color"], _dashes(method)) for method in methods]
    assert len(set(marked)) == len(set(level)) == len(methods)
    assert tuple(_style("something new").values()) not in marked


def test_unfinished_runs_are_not_drawn_as_final(tmp_path: Path) -> None:
    """Accuracies after few tasks are high: in a curve over sizes of memory they would be a false peak."""
    runs = [write(tmp_path / f"m{size}", size=size, cosines=[0.5, 0.5]) for size in (10, 20, 40)]
    events = [json.loads(line) for line in (runs[1] / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    early = [event for event in events if event["event"] != "done" and event.get("task") != 2]
    (runs[1] / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in early), encoding="utf-8")
    found = compare_runs(runs)
    (axes,) = drawn(found, "accuracy").axes
    (curve,) = curves(axes).values()
    assert curve[0] == [10.0, 40.0]
    dots = drawn(found, "reconstruction").axes[0].collections[0].get_offsets()
    assert len(np.asarray(dots)) == 2
    labels = [text.get_text() for text in drawn(found, "configurations").axes[0].get_yticklabels()]
    labels += [text.get_text() for text in drawn(found, "configurations").axes[0].get_xticklabels()]
    assert sum("(not finished)" in label for label in labels) == 1
    write_comparison(found, tmp_path / "out")
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8") as file:
        rows = {row["memory_size"]: (row["finished"], row["tasks_learned"]) for row in csv.DictReader(file)}
    assert rows == {"10": ("true", "3"), "20": ("false", "2"), "40": ("true", "3")}


def test_nothing_to_show_is_left_out_and_removed(comparison: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_comparison(comparison, out)
    assert (out / "comparison_accuracy.svg").exists()
    alone = compare_runs([write(tmp_path / "alone", size=0, replay=0.0)])
    assert [name for name, figure in figures(alone).items() if figure] == ["configurations"]
    write_comparison(alone, out)
    assert {path.name for path in out.glob("comparison_*")} == {
        "comparison_configurations.png",
        "comparison_configurations.svg",
    }


def test_files_are_the_same_every_time(comparison: Comparison, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_comparison(comparison, tmp_path / name)
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    for path in (tmp_path / "first").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        ET.fromstring(text)
        assert "<dc:date>" not in text
