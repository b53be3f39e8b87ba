"""Published values from a CSV file, by method and memory size."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from hpccl.errors import ConfigError, FolderError
from hpccl.folder import explain_os_error

__all__ = ["FIGURES", "Figure", "Published", "PublishedTable", "read_published"]

# Attribute of RunReport -> column, in percent.
FIGURES = {"average_accuracy": "final_avg_acc_pct", "forgetting": "forgetting_max_pct", "bwt": "bwt_pct"}
_REQUIRED = ("dataset", "method", "memory_per_task", "row", "last_task_trained", *FIGURES.values())
_METHODS = {"batch-joint": "joint", "batch-separate": "separate"}
# Columns that a file may have: minutes of training, and the accuracy on each task after the last one, in percent.
_MINUTES = "train_min_total"
_TASK = "acc_task{}_pct"

Row: TypeAlias = Mapping[str, str]
Figure: TypeAlias = tuple[float | None, float | None]  # mean and standard deviation


@dataclass(frozen=True)
class Published:
    """Published mean and standard deviation of each figure, as shares.

    tasks: accuracy on each task after the last one; empty if not given
    minutes: of training, summed over all tasks that the row's runs trained
    """

    seeds: int
    figures: dict[str, Figure]
    tasks: list[Figure] = field(default_factory=list)
    minutes: Figure = (None, None)


@dataclass(frozen=True)
class PublishedTable:
    """The values of one data set of a file, by (method, memory examples per task)."""

    dataset: str
    values: dict[tuple[str, int], Published]


def read_published(path: Path, *, dataset: str | None, num_tasks: int) -> PublishedTable:
    """Read the rows `mean(n=..)` and `std(n=..)` of one data set.

    Args:
        path: the CSV file.
        dataset: its name in the file; None: the only one with `num_tasks` tasks.
        num_tasks: number of tasks of the runs.

    Raises:
        FolderError: the file cannot be read.
        ConfigError: it has other columns, or it is not clear which data set is meant.
    """
    rows = _read(path)
    try:
        return _table(rows, dataset, num_tasks, path)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"published values '{path}' have a cell that is not a number: {error}") from error


def _table(rows: Sequence[Row], dataset: str | None, num_tasks: int, path: Path) -> PublishedTable:
    tasks: dict[str, int] = {}
    for row in rows:
        tasks[row["dataset"]] = max(tasks.get(row["dataset"], 0), _last_task(row))
    chosen = _choose(tasks, dataset, num_tasks, path)
    # A run that was abandoned before the last task has no final figures.
    whole = [row for row in rows if row["dataset"] == chosen and _last_task(row) in {0, tasks[chosen]}]
    return PublishedTable(chosen, _values(whole, tasks[chosen]))


def _last_task(row: Row) -> int:
    return int(row["last_task_trained"] or 0)  # rows of deviations may leave it out


def _read(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows: list[Row] = list(reader)
            columns = reader.fieldnames or ()
    except OSError as error:
        raise FolderError(f"published values '{path}' cannot be read: {explain_os_error(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"published values '{path}' are not a CSV file: {error}") from error
    if missing := [column for column in _REQUIRED if column not in columns]:
        raise ConfigError(
            f"published values '{path}' lack the columns {', '.join(missing)}; found: {', '.join(columns)}"
        )
    return rows


def _choose(tasks: Mapping[str, int], dataset: str | None, num_tasks: int, path: Path) -> str:
    known = ", ".join(f"{name} ({count} tasks)" for name, count in tasks.items())
    if dataset is not None:
        if dataset not in tasks:
            raise ConfigError(f"published values '{path}' have no data set '{dataset}'; there are: {known}")
        return dataset
    fitting = [name for name, count in tasks.items() if count == num_tasks]
    if len(fitting) != 1:
        found = "several data sets" if fitting else "no data set"
        raise ConfigError(
            f"published values '{path}' have {found} with {num_tasks} tasks, as the runs have; there are: {known}. "
            "Choose one, or leave the published values out"
        )
    return fitting[0]


def _values(rows: Sequence[Row], num_tasks: int) -> dict[tuple[str, int], Published]:
    stds = {_key(row): row for row in rows if row["row"].startswith("std(")}
    found = {}
    for row in rows:
        if match := re.fullmatch(r"mean\(n=(\d+)\)", row["row"]):
            std = stds.get(_key(row), {})
            figures = {name: _figure(row, std, column) for name, column in FIGURES.items()}
            tasks = [_figure(row, std, _TASK.format(task + 1)) for task in range(num_tasks)]
            minutes = _figure(row, std, _MINUTES, unit=1.0)
            known = tasks if any(mean is not None for mean, _ in tasks) else []
            found[_key(row)] = Published(int(match[1]), figures, known, minutes)
    return found


def _figure(mean: Row, std: Row, column: str, *, unit: float = 100.0) -> Figure:
    return _number(mean.get(column), unit), _number(std.get(column), unit)


def _key(row: Row) -> tuple[str, int]:
    return _METHODS.get(row["method"], row["method"]), int(float(row["memory_per_task"] or 0))


def _number(cell: str | None, unit: float) -> float | None:
    """Parse a cell; None for values that were not measured, which exports leave empty or write as nan."""
    value = float(cell) / unit if cell else None
    return value if value is None or math.isfinite(value) else None
