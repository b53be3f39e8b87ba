"""The files of a comparison: comparison.{md,csv,json,html,tex}, its plots as PNG and SVG, an archive of its runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.figure import Figure

from hpccl.report import plots
from hpccl.report.archive import NAME, write_archive
from hpccl.report.compare import Comparison, group_table, run_table
from hpccl.report.compare_latex import render_latex
from hpccl.report.compare_plots import AGAINST_MEMORY, figures
from hpccl.report.compare_tables import tables
from hpccl.report.published import FIGURES as PUBLISHED
from hpccl.report.write import page, write_json, write_text

__all__ = ["render_markdown", "write_comparison"]

_CAPTIONS = {
    "configurations": "Average accuracy after the last task, by configuration",
    "accuracy": "Average accuracy after the last task, against memory",
    "class_incremental": "Class-incremental accuracy after the last task, against memory",
    "forgetting": "Forgetting, against memory",
    "reconstruction": "Gradient reconstruction against final accuracy, one dot a run",
}
_BESIDE = " Full: here, ± standard deviation over seeds; open and dashed: published; level lines: without memory."


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write comparison.{md,csv,json,html,tex}, comparison_NAME.{png,svg} per plot, an archive; return the HTML page.

    A plot that has nothing to show is left out, and its files of an earlier comparison are removed.

    Raises:
        FolderError: a file cannot be written.
    """
    drawn = figures(comparison)
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    write_archive(out / NAME, comparison.recorded)
    write_json(out / "comparison.json", comparison.to_dict())
    write_text(out / "comparison.csv", _render_csv(comparison))
    write_text(out / "comparison.tex", render_latex(comparison))
    write_text(out / "comparison.md", render_markdown(comparison, shown))
    for name, figure in drawn.items():
        for suffix in ("png", "svg"):
            path = out / f"comparison_{name}.{suffix}"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                plots.save_figure(figure, path)
    target = out / "comparison.html"
    write_text(target, _render_html(comparison, shown))
    return target


def render_markdown(comparison: Comparison, shown: dict[str, Figure]) -> str:
    """Return all tables, and references to the PNG files of the plots in `shown`."""
    published = f" Published values: {comparison.dataset}." if comparison.dataset else ""
    parts = [
        f"# Comparison of {len(comparison.runs)} runs\n",
        f"Means over seeds, ± sample standard deviation.{published}\n",
    ]
    for table in (group_table(comparison), *tables(comparison), run_table(comparison)):
        parts += [f"## {table.title}\n", table.markdown()]
    parts += ["## Plots\n"] if shown else []
    parts += [f"![{_caption(comparison, name)}](comparison_{name}.png)\n" for name in shown]
    return "\n".join(parts)


def _caption(comparison: Comparison, name: str) -> str:
    return _CAPTIONS[name] + "." + (_BESIDE if comparison.dataset and name in AGAINST_MEMORY else "")


def _render_csv(comparison: Comparison) -> str:
    """Return one line per group, in full precision, with shares in [0, 1] and seconds.

    Figures of a group that is not `finished` are after the fewest `tasks_learned` of its runs, and not to be compared.
    """
    buffer = io.StringIO()
    names = [f"{key}_{part}" for key in comparison.groups[0].statistics for part in ("mean", "std")]
    published = [f"published_{key}_{part}" for key in PUBLISHED for part in ("mean", "std")]
    writer = csv.writer(buffer, lineterminator="\n")
    about = ["method", "memory_size", "memory", "settings", "num_seeds", "seeds"]
    writer.writerow([*about, "finished", "tasks_learned", "tested_on", *names, *published])
    for group in comparison.groups:
        values = [value for found in group.statistics.values() for value in (found.mean, found.std)]
        beside = [
            value for key in PUBLISHED for value in (group.published.figures[key] if group.published else ("", ""))
        ]
        seeds = " ".join(map(str, group.seeds))
        told = [group.method, group.memory_size, group.memory, group.settings, len(group.seeds), seeds]
        learned = min(run.tasks_learned for run in comparison.members(group))
        finished = str(comparison.finished(group)).lower()
        on = "held-out training images" if comparison.held_out(group) else "test images"
        writer.writerow([*told, finished, learned, on, *values, *beside])
    return buffer.getvalue()


def _render_html(comparison: Comparison, shown: dict[str, Figure]) -> str:
    return page(
        "comparison.html.j2",
        num_runs=len(comparison.runs),
        dataset=comparison.dataset,
        groups=group_table(comparison),
        figures=[(_caption(comparison, name), plots.svg(figure, _CAPTIONS[name])) for name, figure in shown.items()],
        tables=tables(comparison),
        runs=run_table(comparison),
    )
