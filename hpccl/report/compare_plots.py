"""Plots of a comparison: figures against the size of memory, and gradient reconstruction against final accuracy."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from hpccl.report.compare import FIGURES, Comparison, mean_reconstruction
from hpccl.report.plots import COLOURS, INK, STYLE, bars, legend, new_axes

__all__ = ["AGAINST_MEMORY", "figures"]

Curve: TypeAlias = tuple[str | None, str, "Points", bool]  # label, method, points, whether they are published
Points: TypeAlias = list[tuple[int, float, float | None]]  # examples per task, mean, standard deviation

# One colour and marker per method in every plot of every comparison, and one colour and dashes per horizontal line.
_COLOURS = (*COLOURS, "#999933", "#8b5cf6", INK, "#8a8a8a", "#882255")
_MARKERS = "os^vDP<>Xd*"
_DASHES = ("-", "-.", ":")  # "--" is for published values
_METHODS = (
    "finetune",
    "fr",
    "fr+replay",
    "ewc",
    "replay",
    "ewc+fr",
    "ewc+replay",
    "ewc+fr+replay",
    "joint",
    "separate",
    "ewc+both",
    "bic",
    "cumulative",
    "der",
    "der++",
    "er",
    "er_ace",
    "feature_extraction",
    "finetune_head",
    "fromp",
    "gdumb",
    "icarl",
    "kpriors",
    "lwf",
    "lwf.mc",
    "mas",
    "mas_local",
    "online_ewc",
    "prototypes",
    "si",
    "topic",
)
AGAINST_MEMORY = {
    "accuracy": ("average_accuracy", "average accuracy / %"),
    "class_incremental": ("average_accuracy_class_incremental", "class-incremental accuracy / %"),
    "forgetting": ("forgetting", "forgetting / percentage points"),
}


def figures(comparison: Comparison) -> dict[str, Figure | None]:
    """Plot by name: configurations, accuracy, class_incremental and forgetting against memory, and reconstruction.

    In all but the first, a method has one colour and marker. None stands for a plot with nothing to show.
    """
    return {
        "configurations": _configurations(comparison),
        **{name: _against_memory(comparison, key, y) for name, (key, y) in AGAINST_MEMORY.items()},
        "reconstruction": _reconstruction(comparison),
    }


def _configurations(comparison: Comparison) -> Figure | None:
    """Plot bars of average accuracy in both settings, and of published values; unfinished runs say so."""
    series: dict[str, list[tuple[float | None, float | None]]] = {
        FIGURES[key]: [(group.statistics[key].mean, group.statistics[key].std) for group in comparison.groups]
        for key in ("average_accuracy", "average_accuracy_class_incremental")
    }
    if comparison.published:
        series["published"] = [
            group.published.figures["average_accuracy"] if group.published else (None, None)
            for group in comparison.groups
        ]
    labels = [group.label + " (not finished)" * (not comparison.finished(group)) for group in comparison.groups]
    return bars(labels, series)


def _style(method: str) -> dict[str, Any]:
    """Return a method's colour and marker."""
    place, count = _place(method), len(_COLOURS)
    return {"color": _COLOURS[place % count], "marker": _MARKERS[(place + place // count) % count]}


def _dashes(method: str) -> str:
    """Return the dashes of a method's horizontal line."""
    return _DASHES[_place(method) // len(_COLOURS) % len(_DASHES)]


def _place(method: str) -> int:
    """Return the number of a method's style; for methods not in _METHODS, a hash of the name decides."""
    known, styles = len(_METHODS), len(_COLOURS) ** 2
    return _METHODS.index(method) if method in _METHODS else known + zlib.crc32(method.encode()) % (styles - known)


# ---------------------------------------------------------------- against memory


def _against_memory(comparison: Comparison, key: str, y: str) -> Figure | None:
    """Plot mean and standard deviation by examples per task; methods without memory are horizontal lines.

    Open markers and dashes are published values of the methods that were run. None if there are fewer than two sizes.
    """
    own = _own(comparison, key)
    published = _published(comparison, key)
    run = {size for points in own.values() for size, _, _ in points if size}
    if not run or len(run | {size for points in published.values() for size, _, _ in points if size}) < 2:
        return None
    figure, axes = new_axes(width=7.0, height=4.4, x="memory / examples of a task", y=y)
    with rc_context(STYLE):
        _level(axes, own, published)
        curves: list[Curve] = [(name, method, points, False) for (name, method), points in own.items() if points[-1][0]]
        curves += [(None, method, points, True) for method, points in published.items() if points[-1][0]]
        for place, (name, method, points, beside) in enumerate(curves):
            _curve(axes, points, method, name, shift=1.02 ** (place - (len(curves) - 1) / 2), open_markers=beside)
        _log_ticks(axes, {size for _, _, points, _ in curves for size, _, _ in points})
        if published:
            # No points: this is for the legend only.
            axes.errorbar([], [], [], color=INK, ls="--", marker="o", mfc="none", ms=5, lw=0.9, label="published")
    legend(axes)
    return figure


def _own(comparison: Comparison, key: str) -> dict[tuple[str, str], Points]:
    """Return finished points by name and method, by size; a method with no size per task has size 0 alone."""
    found: dict[tuple[str, str], Points] = {}
    for group in comparison.groups:
        statistic = group.statistics[key]
        if statistic.mean is not None and comparison.finished(group):
            points = found.setdefault((group.series, group.method), [])
            points.append((group.memory_size, statistic.mean, statistic.std))
    return {name: sorted(points) for name, points in found.items()}


def _published(comparison: Comparison, key: str) -> dict[str, Points]:
    """Return published points by method, for methods that were run."""
    found: dict[str, Points] = {}
    run = {group.method for group in comparison.groups}
    for (method, size), values in comparison.published.values.items() if comparison.published else ():
        mean, std = values.figures.get(key, (None, None))
        if method in run and mean is not None:
            found.setdefault(method, []).append((size, mean, std))
    return {method: sorted(points) for method, points in found.items()}


def _level(axes: Axes, own: Mapping[tuple[str, str], Points], published: Mapping[str, Points]) -> None:
    """Draw the horizontal lines of methods without memory."""
    for (name, method), points in own.items():
        for size, mean, std in points:
            if not size:
                colour = _style(method)["color"]
                axes.axhline(100 * mean, color=colour, ls=_dashes(method), lw=1.2, label=name)
                if std is not None:
                    axes.axhspan(100 * (mean - std), 100 * (mean + std), color=colour, alpha=0.12, lw=0)
    for method, points in published.items():
        for size, mean, _ in points:
            if not size:
                axes.axhline(100 * mean, color=_style(method)["color"], lw=1, ls="--")


def _curve(
    axes: Axes, points: Points, method: str, name: str | None, *, shift: float, open_markers: bool
) -> ErrorbarContainer:
    """Draw a curve, shifted a little so that error bars do not hide each other."""
    held = [point for point in points if point[0]]
    x = np.array([shift * size for size, _, _ in held])
    mean = np.array([100 * value for _, value, _ in held])
    std = np.array([np.nan if value is None else 100 * value for _, _, value in held])
    style: dict[str, Any] = {"ls": "--", "lw": 0.9, "mfc": "none"} if open_markers else {"ls": "-", "lw": 1.4}
    return axes.errorbar(x, mean, yerr=std, ms=5, capsize=2, elinewidth=0.8, label=name, **_style(method), **style)


def _log_ticks(axes: Axes, sizes: set[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{size:,}" for size in sorted(sizes)])


# ---------------------------------------------------------------- gradient reconstruction


def _reconstruction(comparison: Comparison) -> Figure | None:
    """Plot a dot per run: mean cosine and relative error of the total over tasks, against final average accuracy."""
    panels = {"cosine": "mean cosine with the true gradient", "relative_error": "mean relative error of the gradient"}
    dots = {figure: _dots(comparison, figure) for figure in panels}
    if not any(dots.values()):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6))
        both = figure.subplots(1, 2, sharey=True)
        for axes, (key, x_label) in zip(both, panels.items(), strict=True):
            _scatter(axes, dots[key], x_label, logarithmic=key == "relative_error")
        both[0].set_ylabel(f"{FIGURES['average_accuracy']} / %")
    legend(both[-1])
    figure.subplots_adjust(wspace=0.08)
    return figure


def _dots(comparison: Comparison, figure: str) -> dict[str, list[tuple[float, float]]]:
    """Return by method (mean over tasks, final accuracy) of each finished run."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group in comparison.groups:
        for run in comparison.members(group):
            x, y = mean_reconstruction(run, figure), run.average_accuracy
            if x is not None and y is not None and run.complete:
                found.setdefault(group.method, []).append((x, 100 * y))
    return found


def _scatter(axes: Axes, dots: Mapping[str, Sequence[tuple[float, float]]], x_label: str, *, logarithmic: bool) -> None:
    """Draw dots, with `logarithmic` on a logarithmic axis if values differ by more than a factor of ten."""
    for method, points in dots.items():
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=26, alpha=0.75, lw=0, label=method, **_style(method))
    values = [x for points in dots.values() for x, _ in points]
    if logarithmic and values and 0 < 10 * min(values) < max(values):
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.grid(visible=True)
