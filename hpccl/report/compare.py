"""Several runs side by side: mean and sample standard deviation over seeds, and published values beside."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report import plots
from hpccl.report.events import read_events
from hpccl.report.published import FIGURES as PUBLISHED
from hpccl.report.published import Published, read_published
from hpccl.report.summary import RunReport, read_config, summarise_events
from hpccl.report.text import markdown_table, percent, signed, spread, time_span
from hpccl.report.write import page, write_json, write_text

__all__ = [
    "IGNORED",
    "Comparison",
    "Group",
    "Statistic",
    "compare_runs",
    "flat",
    "print_comparison",
    "render_markdown",
]

# Attribute of RunReport -> heading. Seconds are not percent and are printed apart.
FIGURES: dict[str, str] = {
    "average_accuracy": "average accuracy",
    "average_accuracy_class_incremental": "class-incremental",
    "forgetting": "forgetting",
    "bwt": "BWT",
    "learning_accuracy": "learning accuracy",
}
_RUN_HEADER = ["run", "method", "status", "seed", "tasks", *FIGURES.values(), "time"]
_NOTE = (
    "Accuracies in percent, forgetting and BWT in percentage points, all of the network after the last task; "
    "task-incremental unless said otherwise. Time is wall time, resumes counted, pauses not."
)

# Keys that change what a run costs, or which of several equal paths it took, but not what is compared.
IGNORED = frozenset({"seed", "train.first_task_from", "data.cache", "data.workers"})

Flat: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (ddof 1) over the runs of a group; None where there is no value."""

    mean: float | None
    std: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ in their seed (and name, folder, machine) only."""

    method: str
    memory_size: int
    settings: str  # what tells it from other groups of the same method and memory; often empty
    seeds: list[int]
    runs: list[str]
    left_out: list[str]  # runs that are not finished, where others are
    statistics: dict[str, Statistic]
    published: Published | None

    @property
    def label(self) -> str:
        """A short name for plots."""
        parts = [self.method, f"m={self.memory_size}" if self.memory_size else "", self.settings]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were given, and every run."""

    groups: list[Group]
    runs: list[RunReport]
    dataset: str | None  # of the published values

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON types."""
        keys = ("name", "method", "seed", "status", "tasks_learned", "wall_seconds", "weights_sha256", *FIGURES)
        return {
            "format": 1,
            "dataset": self.dataset,
            "groups": [asdict(group) for group in self.groups],
            "runs": [{key: getattr(run, key) for key in keys} for run in self.runs],
        }


def compare_runs(
    folders: Sequence[Path], out: Path | None = None, published: Path | None = None, *, dataset: str | None = None
) -> Comparison:
    """Compare runs, and write comparison.{json,csv,md,html} if `out` is given.

    Args:
        folders: of the runs.
        out: folder for the files.
        published: a CSV file of published values to put beside.
        dataset: which data set of that file; None: the one with as many tasks as the runs.

    Raises:
        FolderError: a folder is not one of a run, or a file cannot be read or written.
        ConfigError: the published values do not fit, or it is not clear which data set is meant.
    """
    if not folders:
        raise FolderError("there is nothing to compare: give the folders of at least one run")
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))  # one run twice is not two seeds
    configs = [read_config(folder) for folder in distinct]
    runs = [
        summarise_events(config, read_events(RunFolder(folder).events))
        for config, folder in zip(configs, distinct, strict=True)
    ]
    table = read_published(published, dataset=dataset, num_tasks=_num_tasks(runs)) if published is not None else None
    groups = _groups([flat(config.identity()) for config in configs], runs, table.values if table else {})
    comparison = Comparison(groups, runs, table.dataset if table else None)
    if out is not None:
        _write(comparison, out)
    return comparison


def _num_tasks(runs: Iterable[RunReport]) -> int:
    return max(run.num_tasks for run in runs)


# ---------------------------------------------------------------- grouping


def flat(value: Any, prefix: str = "") -> Flat:
    """Dotted keys of the leaves; a mapping's own key is kept where it is empty."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: Flat = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _groups(
    identities: Sequence[Flat], runs: Sequence[RunReport], published: Mapping[tuple[str, int], Published]
) -> list[Group]:
    members: dict[str, list[int]] = {}
    for position, identity in enumerate(identities):
        key = json.dumps({k: v for k, v in identity.items() if k not in IGNORED}, sort_keys=True)
        members.setdefault(key, []).append(position)
    firsts = [positions[0] for positions in members.values()]
    found = []
    for positions in members.values():
        first = positions[0]
        alike = [
            identities[i] for i in firsts if _kind(identities[i], runs[i]) == _kind(identities[first], runs[first])
        ]
        method, memory = _kind(identities[first], runs[first])
        found.append(
            _group(method, memory, _settings(identities[first], alike), [runs[i] for i in positions])
            | {"published": published.get((method, memory))}
        )
    return [Group(**fields) for fields in found]


def _kind(identity: Flat, run: RunReport) -> tuple[str, int]:
    return run.method, int(identity["memory.size"])


def _settings(identity: Flat, alike: Sequence[Flat]) -> str:
    """`key=value` of every setting in which groups of one method and memory differ."""
    keys = dict.fromkeys(key for other in alike for key in other if key not in IGNORED)
    differing = [key for key in keys if len({json.dumps(other.get(key), sort_keys=True) for other in alike}) > 1]
    kinds = {key.removesuffix("kind") for key in differing if key.endswith(".kind")}
    told = [key for key in differing if not _explained(key, kinds, alike)]
    return " ".join(f"{key}={_short(identity.get(key))}" for key in told if key in identity)


def _explained(key: str, kinds: set[str], alike: Sequence[Flat]) -> bool:
    """A setting that some kinds lack, and that is equal wherever it is, says nothing beside the kind."""
    held = [json.dumps(other[key], sort_keys=True) for other in alike if key in other]
    return any(key.startswith(kind) for kind in kinds) and len(held) < len(alike) and len(set(held)) == 1


def _short(value: Any) -> str:
    return ",".join(map(_short, value)) if isinstance(value, list) else str(value)


def _group(method: str, memory: int, settings: str, runs: Sequence[RunReport]) -> dict[str, Any]:
    """The fields of a Group; only finished runs count, unless there is none."""
    finished = [run for run in runs if run.status == "done"]
    counted = finished or list(runs)
    return {
        "method": method,
        "memory_size": memory,
        "settings": settings,
        "seeds": [run.seed for run in counted],
        "runs": [run.name for run in counted],
        "left_out": [f"{run.name} ({run.status})" for run in runs if run not in counted],
        "statistics": {key: _statistic([getattr(run, key) for run in counted]) for key in (*FIGURES, "wall_seconds")},
    }


def _statistic(values: Sequence[float | None]) -> Statistic:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not known.size:
        return Statistic(None, None, 0)
    return Statistic(float(known.mean()), float(known.std(ddof=1)) if known.size > 1 else None, int(known.size))


# ---------------------------------------------------------------- the table


def _header(comparison: Comparison) -> list[str]:
    header = ["method", "m", *(["settings"] if _has_settings(comparison) else []), "seeds"]
    for key, heading in FIGURES.items():
        header += [heading, *([f"{heading}, published"] if _has_published(comparison, key) else [])]
    return [*header, "time"]


def _rows(comparison: Comparison) -> list[list[str]]:
    return [_row(comparison, group) for group in comparison.groups]


def _row(comparison: Comparison, group: Group) -> list[str]:
    row = [group.method, str(group.memory_size or "–")]
    row += [group.settings or "–"] if _has_settings(comparison) else []
    row += [str(len(group.seeds))]
    for key in FIGURES:
        statistic = group.statistics[key]
        row.append(spread(statistic.mean, statistic.std))
        if _has_published(comparison, key):
            mean, std = group.published.figures.get(key, (None, None)) if group.published else (None, None)
            row.append(spread(mean, std))
    return [*row, time_span(group.statistics["wall_seconds"].mean)]


def _has_settings(comparison: Comparison) -> bool:
    return any(group.settings for group in comparison.groups)


def _has_published(comparison: Comparison, key: str) -> bool:
    return comparison.dataset is not None and key in PUBLISHED


def _notes(comparison: Comparison) -> list[str]:
    notes = [_NOTE]
    held = [run.name for run in comparison.runs if run.validation is not None]
    notes += (
        [f"Not on test images but on held-out training images (data.validation): {', '.join(held)}."] if held else []
    )
    left_out = [name for group in comparison.groups for name in group.left_out]
    notes += [f"Not finished and left out: {', '.join(left_out)}."] if left_out else []
    early = [run.name for run in comparison.runs if run.status != "done" and run.name not in _names(left_out)]
    notes += [f"Not finished, shown as they stand: {', '.join(early)}."] if early else []
    return notes


def _names(left_out: Sequence[str]) -> set[str]:
    return {text.rsplit(" (", 1)[0] for text in left_out}


def _run_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [
            run.name,
            run.method,
            run.status,
            str(run.seed),
            f"{run.tasks_learned}/{run.num_tasks}",
            *((signed if key == "bwt" else percent)(getattr(run, key)) for key in FIGURES),
            time_span(run.wall_seconds),
        ]
        for run in comparison.runs
    ]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table and its notes.

    Args:
        comparison: what to print.
        console: None is standard output, wide enough for a line a group where it is a file.
    """
    target = console or Console(width=None if sys.stdout.isatty() else 200)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    left = _num_left(comparison)
    for position, heading in enumerate(_header(comparison)):
        table.add_column(heading, justify="left" if position < left else "right", no_wrap=position == 0)
    for row in _rows(comparison):
        table.add_row(*row)
    target.print(table)
    for note in _notes(comparison):
        target.print(note, style="dim", markup=False, highlight=False)


def _num_left(comparison: Comparison) -> int:
    return 3 if _has_settings(comparison) else 1


# ---------------------------------------------------------------- files


def _write(comparison: Comparison, out: Path) -> None:
    write_json(out / "comparison.json", comparison.to_dict())
    write_text(out / "comparison.csv", _render_csv(comparison))
    write_text(out / "comparison.md", render_markdown(comparison))
    write_text(out / "comparison.html", _render_html(comparison))


def render_markdown(comparison: Comparison) -> str:
    """Two tables: configurations and runs."""
    published = f" Published values: {comparison.dataset}." if comparison.dataset else ""
    parts = [
        f"# Comparison of {len(comparison.runs)} runs\n",
        f"Means over seeds, ± sample standard deviation.{published}\n",
        markdown_table(_header(comparison), _rows(comparison), left=_num_left(comparison)),
        *(f"{note}\n" for note in _notes(comparison)),
        "## Runs\n",
        markdown_table(_RUN_HEADER, _run_rows(comparison), left=3),
    ]
    return "\n".join(parts)


def _render_csv(comparison: Comparison) -> str:
    """One line a group, full precision, shares in [0, 1] and seconds."""
    buffer = io.StringIO()
    names = [f"{key}_{part}" for key in (*FIGURES, "wall_seconds") for part in ("mean", "std")]
    published = [f"published_{key}_{part}" for key in PUBLISHED for part in ("mean", "std")]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "memory_size", "settings", "num_seeds", "seeds", *names, *published])
    for group in comparison.groups:
        values = [value for found in group.statistics.values() for value in (found.mean, found.std)]
        figures = group.published.figures if group.published else {}
        beside = [value for key in PUBLISHED for value in figures.get(key, (None, None))]
        seeds = " ".join(map(str, group.seeds))
        writer.writerow([group.method, group.memory_size, group.settings, len(group.seeds), seeds, *values, *beside])
    return buffer.getvalue()


def _render_html(comparison: Comparison) -> str:
    series = {
        FIGURES[key]: [(group.statistics[key].mean, group.statistics[key].std) for group in comparison.groups]
        for key in ("average_accuracy", "average_accuracy_class_incremental")
    }
    if comparison.dataset is not None:
        series["published"] = [
            group.published.figures["average_accuracy"] if group.published else (None, None)
            for group in comparison.groups
        ]
    return page(
        "comparison.html.j2",
        num_runs=len(comparison.runs),
        dataset=comparison.dataset,
        header=_header(comparison),
        rows=_rows(comparison),
        left=_num_left(comparison),
        notes=_notes(comparison),
        plot=plots.bars([group.label for group in comparison.groups], series, "average accuracy by configuration"),
        run_header=_RUN_HEADER,
        run_rows=_run_rows(comparison),
    )
