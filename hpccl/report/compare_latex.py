r"""A comparison as LaTeX tables with booktabs: methods in rows, examples per task in columns.

In each column the best mean is bold, and means within one standard error of it (s / sqrt(n) of the best) are
underlined. References (`joint`, `separate`, `cumulative`), which keep all data or a network per task, published values
and unfinished runs do not compete.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from hpccl.report.compare import FIGURES, LIKELIHOOD, TOP5, Comparison, Group, Statistic
from hpccl.report.published import FIGURES as PUBLISHED
from hpccl.report.published import Figure
from hpccl.report.text import plus_minus

__all__ = ["marks", "render_latex"]

Column: TypeAlias = tuple[int, str]  # examples per task, and the whole budget in words
Cells: TypeAlias = dict[Column, Statistic]

_REFERENCES = frozenset({"joint", "separate", "cumulative"})
_LOWER_IS_BETTER = frozenset({"forgetting", *LIKELIHOOD})
_HEADINGS = {
    "average_accuracy_class_incremental": "Class-incremental accuracy",
    "final_union_accuracy": "Class-incremental accuracy on the test images of all tasks together",
    "bwt": "BWT",
    "top5": "Top-5 accuracy",
    "top5_class_incremental": "Class-incremental top-5 accuracy",
    "nll": "Negative log-likelihood",
    "ece": "Expected calibration error",
    "nll_class_incremental": "Class-incremental negative log-likelihood",
    "ece_class_incremental": "Class-incremental expected calibration error",
}
_NATS = frozenset({"nll", "nll_class_incremental"})
_UNITS = {"forgetting": "percentage points", "bwt": "percentage points", **dict.fromkeys(_NATS, "nats an image")}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def render_latex(comparison: Comparison) -> str:
    """Return one table per measured figure; they need the package booktabs."""
    head = r"% Needs \usepackage{booktabs}."
    made = [
        _table(comparison, key)
        for key in (*comparison.figures, *TOP5, *LIKELIHOOD)
        if any(_known(group.statistics[key]) for group in comparison.groups)
    ]
    return "\n\n".join([head, *made]) + "\n"


def _known(statistic: Statistic) -> bool:
    return statistic.mean is not None


def _table(comparison: Comparison, key: str) -> str:
    rows = _series(comparison, key)
    columns = sorted({_column(group) for group in comparison.groups})
    tested = [group for group in comparison.groups if not comparison.held_out(group)]
    finished = {_place(group) for group in tested or comparison.groups if comparison.finished(group)}
    marked = {
        one: marks({name: cells[one] for name, cells in rows.items() if one in cells and (name, one) in finished}, key)
        for one in columns
    }
    lines = [_line(_head(columns)), r"\midrule"]
    for name, cells in rows.items():
        own = [_cell(cells.get(column), marked[column].get(name, ""), key) for column in columns]
        lines.append(_line([_escaped(" ".join(part for part in name if part)), *own]))
        beside = _published(comparison, name[0], key)
        if beside:
            lines.append(_line([r"\quad published", *(_published_cell(beside.get(column), key) for column in columns)]))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_caption(comparison, key)}}}",
            rf"\label{{tab:{key.replace('_', '-')}}}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _series(comparison: Comparison, key: str) -> dict[tuple[str, str], Cells]:
    """Return the cells of each row, by method and variant."""
    found: dict[tuple[str, str], Cells] = {}
    for group in comparison.groups:
        row, column = _place(group)
        found.setdefault(row, {})[column] = group.statistics[key]
    return found


def _place(group: Group) -> tuple[tuple[str, str], Column]:
    """Return a group's row and column."""
    return (group.method, group.variant), _column(group)


def marks(column: Mapping[tuple[str, str], Statistic], key: str) -> dict[tuple[str, str], str]:
    """Mark each (method, variant) that is the `best` or `near` it; references are left out.

    Args:
        column: the values to compare.
        key: the figure, which decides whether higher or lower is better.
    """
    sign = -1.0 if key in _LOWER_IS_BETTER else 1.0
    values = {
        name: sign * statistic.mean
        for name, statistic in column.items()
        if statistic.mean is not None and name[0] not in _REFERENCES
    }
    if not values:
        return {}
    best = max(values.values())
    winners = [column[name] for name, value in values.items() if value == best]
    error = max((one.std / math.sqrt(one.n) for one in winners if one.std is not None), default=0.0)
    return {name: "best" if value == best else "near" for name, value in values.items() if value >= best - error}


def _column(group: Group) -> Column:
    return group.memory_size, group.memory


def _head(columns: Sequence[Column]) -> list[str]:
    return ["method", *(f"$m = {size}$" if size else _escaped(words) or "no memory" for size, words in columns)]


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(statistic: Statistic | None, mark: str, key: str) -> str:
    if statistic is None or statistic.mean is None:
        return ""
    text = _number(statistic.mean, statistic.std, key)
    match mark:
        case "best":
            return rf"$\mathbf{{{text}}}$"
        case "near":
            return rf"\underline{{${text}$}}"
        case _:
            return f"${text}$"


def _published_cell(figure: Figure | None, key: str) -> str:
    return "" if figure is None or figure[0] is None else f"${_number(*figure, key)}$"


def _number(mean: float | None, std: float | None, key: str) -> str:
    text = plus_minus(mean, std, scale=1, digits=3) if key in _NATS else plus_minus(mean, std)
    return text.replace("−", "-").replace("±", r"\pm")


def _published(comparison: Comparison, method: str, key: str) -> dict[Column, Figure]:
    """Return a method's published values by column, where a group of runs has that column too."""
    if comparison.published is None or key not in PUBLISHED:
        return {}
    found = {
        _column(group): group.published.figures[key]
        for group in comparison.groups
        if group.method == method and group.published
    }
    return found if any(mean is not None for mean, _ in found.values()) else {}


def _caption(comparison: Comparison, key: str) -> str:
    seeds = sorted({len(group.seeds) for group in comparison.groups})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    published = f" Published: {_escaped(comparison.dataset)}." if comparison.dataset and key in PUBLISHED else ""
    heading = _HEADINGS.get(key) or FIGURES[key].capitalize()
    seeded = f"{number} seed{'s' * (seeds != [1])}"
    unit = _UNITS.get(key, "percent")
    references = sorted(_REFERENCES & {group.method for group in comparison.groups})
    aside = " and ".join(
        [*([", ".join(references)] if references else []), *(["published values"] if published else [])]
    )
    apart = f"; {aside} do not compete" if aside else ""
    early = [group for group in comparison.groups if not comparison.finished(group)]
    apart += (
        f". Not finished, and not competing: {_escaped(', '.join(group.label for group in early))}" if early else ""
    )
    held = [group for group in comparison.groups if comparison.held_out(group)]
    if len(held) == len(comparison.groups):
        heading += " on held-out training images"
    elif held:
        apart += f". On held-out training images, and not competing: {_escaped(', '.join(g.label for g in held))}"
    return (
        f"{heading} after the last task, {unit}: mean $\\pm$ sample standard deviation over {seeded}; "
        "$m$ examples of a task in memory. Bold: the best of a column; underlined: within one standard error of it"
        f"{apart}.{published}"
    )


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^–&%$#_{}]", lambda found: _SPECIAL[found[0]], text)
