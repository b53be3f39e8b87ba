"""Plots of a report as SVG text that takes its text colour from the page, so that it fits light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpccl.folder import replacing
from hpccl.report.events import latest, number
from hpccl.report.metrics import NUM_BINS

__all__ = [
    "COLOURS",
    "INK",
    "STYLE",
    "accuracy_over_tasks",
    "bars",
    "calibration",
    "legend",
    "loss_curves",
    "new_axes",
    "reconstruction",
    "reliability",
    "save_figure",
    "svg",
]

Floats: TypeAlias = npt.NDArray[np.float64]

# Wong 2011, "Points of view: color blindness", without black and yellow; legible on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK = "#010203"  # stands for the page's text colour until the SVG is written
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # `$` in a path or a setting is no formula
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_TERMS = ("new", "soft", "replay", "quadratic", "anchor", "minmax")  # others have the colour of `anchor`
_MAX_POINTS = 600
_MAX_LEGEND = 12


def svg(figure: Figure, label: str) -> str:
    """Return the figure as an <svg> element with the page's text colour and font, scaled to its container.

    Args:
        figure: drawn with `STYLE`.
        label: description of what it shows, for screen readers.
    """
    buffer = io.StringIO()
    # The salt makes the ids of two figures in one page differ.
    with rc_context({**STYLE, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Metadata is useless, and a <style> inside would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Groups are numbered from 1 in every figure, but an id may occur only once in a page.
    text = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", text)
    text = re.sub(r"font-family: [^;]*; ?", "", text)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text, count=1)


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure black on white, as PNG or SVG according to the path's suffix.

    Raises:
        FolderError: it cannot be written.
    """
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure.savefig(
            buffer, format=path.suffix[1:], dpi=130, facecolor="white", bbox_inches="tight", metadata=metadata
        )
    with replacing(path) as beside:
        beside.write_bytes(buffer.getvalue())


def new_axes(width: float = 6.4, height: float = 2.9, *, x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, in the page's style."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, axis="y")
    return figure, axes


def legend(axes: Axes) -> None:
    """Add a legend to the right of the axes."""
    with rc_context(STYLE):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _task_ticks(axes: Axes, num_tasks: int) -> None:
    every = max(1, num_tasks // 12)
    axes.set_xticks(range(1, num_tasks + 1, every))


def _array(rows: Sequence[Sequence[float | None]]) -> Floats:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def accuracy_over_tasks(rows: Sequence[Sequence[float | None]], label: str) -> str | None:
    """Plot the accuracy on each task learned, and their mean, after each task; None before the first evaluation."""
    a = 100 * _array(rows)
    if not a.size or np.isnan(a).all():
        return None
    num_tasks = len(a)
    figure, axes = new_axes(x="tasks learned", y="test accuracy / %")
    steps = np.arange(1, num_tasks + 1)
    for task in range(num_tasks):
        axes.plot(steps[task:], a[task:, task], color=COLOURS[task % len(COLOURS)], lw=1, alpha=0.6, marker=".")
    measured = [t for t in range(num_tasks) if not np.isnan(a[t, : t + 1]).any()]
    means = [a[t, : t + 1].mean() for t in measured]
    axes.plot([t + 1 for t in measured], means, color=INK, lw=2.2, marker="o", ms=4, label="mean")
    for task in range(num_tasks) if num_tasks <= _MAX_LEGEND else ():
        axes.lines[task].set_label(f"task {task + 1}")
    legend(axes)
    _task_ticks(axes, num_tasks)
    return svg(figure, label)


def loss_curves(events: Sequence[Mapping[str, Any]], label: str) -> str | None:
    """Plot the loss and its terms over all steps; vertical lines separate tasks. None without steps."""
    steps = latest(events, "step", "task", "step")
    if not steps:
        return None
    lengths = {int(event["task"]): int(event["num_steps"]) for event in steps}
    starts = {task: sum(n for other, n in lengths.items() if other < task) for task in lengths}
    x = np.array([starts[event["task"]] + event["step"] for event in steps], dtype=np.float64)
    figure, axes = new_axes(width=10, x="step", y="nats per training example")
    curves = _curves(steps)
    for name, y in curves.items():
        axes.plot(*_thinned(x, y), label=name, **_line(name))
    for start in sorted(starts.values())[1:]:
        axes.axvline(start, color=INK, lw=0.6, alpha=0.35, ls=":")
    positive = np.concatenate([y[np.isfinite(y) & (y > 0)] for y in curves.values()])
    if positive.size and positive.max() > 100 * np.median(positive):
        axes.set_yscale("log")
    legend(axes)
    return svg(figure, label)


def _line(term: str) -> dict[str, Any]:
    """Return a term's line style, the same in every plot; the total is the heavy line."""
    if term in {"loss", "total"}:
        return {"color": INK, "lw": 1.8}
    return {"color": COLOURS[_TERMS.index(term if term in _TERMS else "anchor")], "lw": 1.1}


def _curves(steps: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """Return the curves of the loss and its terms, without terms that are always zero."""
    names = list(dict.fromkeys(name for event in steps for name in event.get("terms") or {}))
    curves = {name: _series([(event.get("terms") or {}).get(name) for event in steps]) for name in names}
    shown = {name: y for name, y in curves.items() if np.any(np.nan_to_num(y) != 0)}
    return {**shown, "loss": _series([event.get("loss") for event in steps])}


def _series(values: Sequence[Any]) -> Floats:
    numbers = (number(value) for value in values)
    return np.array([np.nan if value is None or not np.isfinite(value) else value for value in numbers])


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Reduce a curve to at most _MAX_POINTS points: the means of equally long segments."""
    stretch = -(-len(x) // _MAX_POINTS)
    if stretch == 1:
        return x, y
    whole = len(x) // stretch * stretch
    return x[:whole].reshape(-1, stretch).mean(axis=1), y[:whole].reshape(-1, stretch).mean(axis=1)


def reconstruction(measured: Sequence[Mapping[str, Any]], label: str) -> str | None:
    """Plot cosine and relative error of each term of the prior's gradient, by task. None if never measured."""
    if not measured:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 2.7))
        panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for event in measured for name in event["terms"]))
    tasks = [event["task"] + 1 for event in measured]
    for axes, figure_name, title in zip(
        panels, ("cosine", "relative_error"), ("cosine", "relative error"), strict=True
    ):
        for name in names:
            y = _series([(event["terms"].get(name) or {}).get(figure_name) for event in measured])
            axes.plot(tasks, y, marker=".", label=name, **_line(name))
        axes.set_xlabel("after learning task")
        axes.set_ylabel(title)
        axes.set_xticks(tasks[:: max(1, len(tasks) // 8)])
        axes.grid(visible=True, axis="y")
    legend(panels[-1])
    figure.subplots_adjust(wspace=0.28)
    return svg(figure, label)


def calibration(measured: Mapping[str, Sequence[Sequence[float]]], label: str) -> str | None:
    """Plot accuracy by confidence in each setting, from [3, M] `calibration_bins`. None if never measured."""
    if not measured:
        return None
    curves = {
        setting: {"": np.array([[number(value) for value in row] for row in bins], dtype=np.float64)}
        for setting, bins in measured.items()
    }
    return svg(reliability(curves), label)


def reliability(panels: Mapping[str, Mapping[str, Floats]]) -> Figure:
    """Plot a reliability diagram (Guo et al. 2017) per setting, from [3, M] `calibration_bins` per curve."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4))
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (setting, curves) in zip(grid, panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        for (curve, bins), colour in zip(curves.items(), COLOURS, strict=False):
            count, confidence, right = bins[:, bins[0] > 0]
            axes.plot(confidence / count, right / count, color=colour, marker="o", ms=4, lw=1.2, label=curve)
        axes.set_title(setting.replace("_", "-"), fontsize=9)
        axes.set_xlabel(f"confidence, {NUM_BINS} bins")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.grid(visible=True)
    grid[0].set_ylabel("accuracy")
    if any(len(curves) > 1 for curves in panels.values()):
        legend(grid[-1])
    return figure


def bars(names: Sequence[str], series: Mapping[str, Sequence[tuple[float | None, float | None]]]) -> Figure | None:
    """Plot horizontal bars in percent with error bars, one group per name and one bar per series.

    Args:
        names: of the groups, from top to bottom.
        series: by legend entry, (share in [0, 1] or None, its standard deviation or None) of every group.
    """
    shown = {key: values for key, values in series.items() if any(mean is not None for mean, _ in values)}
    if not shown:
        return None
    figure, axes = new_axes(width=7.0, height=0.7 + len(names) * (0.16 + 0.17 * len(shown)), x="accuracy / %", y="")
    thickness = 0.8 / len(shown)
    for position, (key, values) in enumerate(shown.items()):
        y = np.arange(len(names)) - 0.4 + (position + 0.5) * thickness
        means = _series([None if mean is None else 100 * mean for mean, _ in values])
        spread = _series([None if std is None else 100 * std for _, std in values])
        colour = COLOURS[position % len(COLOURS)]
        axes.barh(y, means, thickness * 0.92, xerr=spread, color=colour, ecolor=INK, capsize=2, label=key)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first name is on top
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlim(0, 100)
    legend(axes)
    return figure
