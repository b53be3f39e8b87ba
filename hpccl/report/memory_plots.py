"""Plots of memory maps and of reconstruction by selector, as figures in the style of `hpccl.report.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from hpccl.report.plots import COLOURS, INK, STYLE, legend, new_axes

__all__ = ["classes", "left_out", "memory", "reconstruction", "scatter"]

Pixels: TypeAlias = npt.NDArray[np.uint8]

_VECTORS = 2000  # number of points above which they are rasterised
_SIDE = 22.0  # of a picture, in typographic points


def scatter(table: Mapping[str, npt.NDArray[Any]], column: str, x_label: str, pictures: Mapping[int, Pixels]) -> Figure:
    """Plot error against a column on a logarithmic axis, coloured by task; examples in memory are circled.

    pictures: to show in place of points, by position in the table.
    """
    figure, axes = new_axes(width=8.6, height=5.4 if pictures else 3.6, x=x_label, y="error 1 − p(true class)")
    x = np.maximum(table[column].astype(np.float64), 1e-12)
    y = table["error"]
    for task in np.unique(table["task"]).tolist():
        here = table["task"] == task
        colour = COLOURS[task % len(COLOURS)]
        axes.scatter(
            x[here],
            y[here],
            s=5,
            color=colour,
            alpha=0.45,
            lw=0,
            label=f"task {task + 1}",
            rasterized=len(x) > _VECTORS,
        )
    kept = table["in_memory"]
    if kept.any():
        axes.scatter(x[kept], y[kept], s=20, facecolors="none", edgecolors=INK, lw=0.6, label="in memory")
    for position, picture in pictures.items():
        image = OffsetImage(_rgb(picture), zoom=_SIDE / max(picture.shape[:2]), interpolation="nearest")
        image.image.axes = axes
        colour = COLOURS[int(table["task"][position]) % len(COLOURS)]
        box = AnnotationBbox(
            image, (float(x[position]), float(y[position])), pad=0.1, bboxprops={"edgecolor": colour, "lw": 1.0}
        )
        axes.add_artist(box)
    axes.set_xscale("log")
    axes.set_ylim(-0.04, 1.04)
    legend(axes)
    return figure


def left_out(tasks: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot by task the NLL of training data, the estimates of the test NLL without test data, and the measured one."""
    figure, axes = new_axes(x="task", y="NLL / nats")
    names: dict[str, tuple[str, dict[str, Any]]] = {
        "train_nats": ("training data", {"color": COLOURS[4], "lw": 1.1}),
        "left_out": ("one left out", {"color": COLOURS[0], "lw": 1.4}),
        "left_out_newton": ("one left out, Newton", {"color": COLOURS[1], "lw": 1.4}),
        "test_nats": ("test data", {"color": INK, "lw": 2.0}),
    }
    x = [row["task"] + 1 for row in tasks]
    for key, (label, style) in names.items():
        y = [np.nan if row[key] is None else row[key] for row in tasks]
        if not np.isnan(y).all():
            axes.plot(x, y, marker=".", label=label, **style)
    axes.set_xticks(x[:: max(1, len(x) // 12)])
    legend(axes)
    return figure


def classes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot by class its NLL as it is, with one example left out, and with all of its examples left out."""
    figure, axes = new_axes(width=8.6, x="class", y="NLL / nats")
    x = np.arange(len(rows))
    for key, label, colour in (
        ("removed", "class removed", COLOURS[1]),
        ("left_out", "one left out", COLOURS[0]),
        ("nats", "as it is", INK),
    ):
        y = np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)
        if not np.isnan(y).all():
            axes.scatter(x, y, s=26, color=colour, label=label)
    if len(rows) <= 20:
        axes.set_xticks(x, [str(row["name"]) for row in rows], rotation=45, ha="right")
    axes.set_yscale("log")
    legend(axes)
    return figure


def memory(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot over tasks the size by task of origin, the accuracy of soft labels, and the share of the most sensitive."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 2.8))
        panels = figure.subplots(1, 3)
    x = np.array([row["task"] + 1 for row in rows])
    num_tasks = max(len(row["per_task"]) for row in rows)
    bottom = np.zeros(len(rows))
    for task in range(num_tasks):
        counts = np.array([row["per_task"][task] if task < len(row["per_task"]) else 0 for row in rows], np.float64)
        panels[0].bar(x, counts, bottom=bottom, color=COLOURS[task % len(COLOURS)])
        bottom += counts
    panels[0].set_ylabel("examples, by task of origin")
    agreement = [100 * float(np.mean(row["agreement"])) for row in rows]
    panels[1].plot(x, agreement, color=INK, marker="o", ms=4)
    panels[1].set_ylabel("soft labels right / %")
    for key, label, colour in (("sensitive_share", "memory", COLOURS[0]), ("chance", "by chance", COLOURS[1])):
        y = [np.nan if row[key] is None else 100 * row[key] for row in rows]
        panels[2].plot(x, y, color=colour, marker="o", ms=4, label=label)
    panels[2].set_ylabel("of the most sensitive / %")
    legend(panels[2])
    for panel in panels:
        panel.set_xlabel("after task")
        panel.set_xticks(x[:: max(1, len(x) // 8)])
        panel.grid(visible=True, axis="y")
    figure.subplots_adjust(wspace=0.4)
    return figure


def _rgb(picture: Pixels) -> Pixels:
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture


def reconstruction(rows: Sequence[Mapping[str, Any]], x_label: str) -> Figure:
    """Plot the error of the gradient and of its change along the path: a column per size, a line per selector."""
    sizes = sorted({row["size"] for row in rows if row["selector"] != "run"} or {row["size"] for row in rows})
    selectors = list(dict.fromkeys(row["selector"] for row in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.4 * len(sizes), 5.2))
        panels = figure.subplots(2, len(sizes), squeeze=False, sharex=True, sharey="row")
    for column, number in enumerate(sizes):
        for line, (key, label) in enumerate((("relative_error", "relative error"), ("change_error", "of the change"))):
            axes = panels[line, column]
            for place, selector in enumerate(selectors):
                own = selector == "run"  # it has one size and is shown in all columns
                here = [row for row in rows if row["selector"] == selector and (own or row["size"] == number)]
                y = [np.nan if row[key] is None else row[key] for row in here]
                style: dict[str, Any] = {"color": INK, "ls": ":"} if own else {"color": COLOURS[place % len(COLOURS)]}
                marker = ("o", "s", "^")[place // len(COLOURS) % 3]
                axes.plot([row["share"] for row in here], y, marker=marker, ms=3, lw=1.1, label=selector, **style)
            axes.grid(visible=True, axis="y")
            panels[line, 0].set_ylabel(label)
        panels[0, column].set_title(f"{number} examples of a task", fontsize=9)
        panels[1, column].set_xlabel(x_label, fontsize=8)
    legend(panels[0, -1])
    return figure
