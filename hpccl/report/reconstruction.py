"""Gradient reconstruction by selector as a table and as files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from hpccl.folder import replacing
from hpccl.report import memory_plots, plots
from hpccl.report.text import fixed, markdown_table
from hpccl.report.write import page, write_json, write_text

__all__ = ["FIGURES", "Reconstruction", "markdown", "write_reconstruction"]

FIGURES = ("cosine", "relative_error", "change_cosine", "change_error")
_HEADER = ["selector", "examples of a task", "cosine", "relative error", "cosine of change", "error of change"]


@dataclass(frozen=True)
class Reconstruction:
    """Errors of priors along the path from the end of a task to the end of the next.

    task: the task at whose end memory was chosen
    past: share of the past on which the true gradient was computed
    curvature: where the curvature comes from
    straight: whether the path is a straight line
    rows: selector, size, point, share, step, cosine, relative_error, change_cosine, change_error, norm, true_norm;
        None where a figure is not finite
    """

    run: str
    task: int
    past: float
    curvature: str
    straight: bool
    rows: Sequence[Mapping[str, Any]]

    def means(self) -> list[dict[str, Any]]:
        """Return the means over the path, by selector and size."""
        groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault((row["selector"], row["size"]), []).append(row)
        return [
            {"selector": selector, "size": number, **{name: _mean([row[name] for row in rows]) for name in FIGURES}}
            for (selector, number), rows in groups.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, including the means."""
        return {"format": 1, **asdict(self), "means": self.means()}


def markdown(found: Reconstruction) -> str:
    """Return the means as a table, with notes on what was measured."""
    return markdown_table(_HEADER, _cells(found)) + "\n" + "\n".join(_notes(found)) + "\n"


def write_reconstruction(found: Reconstruction, out: Path) -> Path:
    """Write reconstruction.{html,md,csv,json,svg,png}; return the path of the HTML page.

    Raises:
        FolderError: a file cannot be written.
    """
    figure = _figure(found)
    for suffix in ("svg", "png"):
        plots.save_figure(figure, out / f"reconstruction.{suffix}")
    write_json(out / "reconstruction.json", found.as_dict())
    write_text(out / "reconstruction.md", markdown(found))
    with (
        replacing(out / "reconstruction.csv") as beside,
        beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(found.rows[0]))
        writer.writeheader()
        writer.writerows(found.rows)
    target = out / "reconstruction.html"
    plot = plots.svg(figure, "reconstruction of the past's gradient by selector, along the path to the next task")
    write_text(
        target,
        page(
            "reconstruction.html.j2",
            run=found.run,
            task=found.task,
            plot=plot,
            header=_HEADER,
            rows=_cells(found),
            notes=_notes(found),
        ),
    )
    return target


def _figure(found: Reconstruction) -> Figure:
    return memory_plots.reconstruction(found.rows, "share of the way to the next task's weights")


def _cells(found: Reconstruction) -> list[list[str]]:
    return [[row["selector"], str(row["size"]), *(fixed(row[name]) for name in FIGURES)] for row in found.means()]


def _notes(found: Reconstruction) -> list[str]:
    points = len({row["point"] for row in found.rows})
    path = "a straight line" if found.straight else "checkpoints"
    where = (
        f"{found.run}: memory chosen after task {found.task + 1} (--task {found.task}); means over {points} points on "
        f"the way to the weights after task {found.task + 2} ({path})."
    )
    what = f"True gradient of {100 * found.past:g} % of the past; curvature: {found.curvature}."
    own = {row["size"] for row in found.rows if row["selector"] == "run"}
    if not own:
        return [where, f"{what} The run trained without a memory and without a quadratic."]
    if own == {0}:
        return [where, f"{what} The selector `run` is what the run trained with: its quadratic, without a memory."]
    return [where, f"{what} The selector `run` is the memory that the run trained with."]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
