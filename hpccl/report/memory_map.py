"""The memory map of a run as files: memory_map.html, tables as CSV and JSON, plots as SVG and PNG."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from hpccl.folder import replacing
from hpccl.report import memory_plots, plots
from hpccl.report.pictures import data_url, picture_sheet, small_picture
from hpccl.report.text import fixed, percent, whole
from hpccl.report.write import page, write_json, write_text

__all__ = ["MemoryMap", "summary", "worth_showing", "write_memory_map"]

Ints: TypeAlias = npt.NDArray[np.int64]
Table: TypeAlias = Mapping[str, npt.NDArray[Any]]
Rows: TypeAlias = list[list[str]]

_OF_CLASS = 10  # pictures of the most, and as many of the least, memorable examples of a class
_MAX_PICTURES = 2000  # per page
_MAX_CLASSES = 100
_IN_SCATTER = 24
_LISTED = 20

_TASKS = ["task", "name", "examples", "train NLL", "left out", "left out, Newton", "measured test NLL"]
_CLASSES = ["class", "name", "task", "examples", "NLL", "one left out", "class removed", "sensitivity", "leverage"]
_MEMORY = [
    "after task",
    "examples",
    "of each task",
    "of a class",
    "soft label agrees with the true one",
    "among the most sensitive",
    "by chance",
]
_EXAMPLES = ["sample", "class", "error", "variance", "leverage", "sensitivity", "in memory"]


@dataclass(frozen=True)
class MemoryMap:
    """The memory map of a run's training examples at one checkpoint; columns of `table` are [n].

    names: [n] of the examples
    table: sample, task, label, in_memory, error, nats, variance, leverage, sensitivity, sensitivity_diagonal,
        left_out and perhaps left_out_newton (`hpccl.memory.perturbation`)
    num_seen: training examples of the tasks so far, of which the table may be a uniform sample
    tasks, classes, memory: rows of the page's tables
    pictures: by sample, uint8 [h, w, 1 or 3]
    """

    run: str
    checkpoint: str
    task: int
    posterior: str
    prior_precision: float
    num_seen: int
    class_names: Sequence[str]
    names: Sequence[str]
    table: Table
    tasks: Sequence[Mapping[str, Any]]
    classes: Sequence[Mapping[str, Any]]
    memory: Sequence[Mapping[str, Any]]
    pictures: Mapping[int, npt.NDArray[np.uint8]]


def worth_showing(table: Table) -> Ints:
    """Return the positions in the table whose pictures are shown."""
    shown = [np.concatenate([most, least]) for most, least in _of_classes(table).values()]
    return np.unique(np.concatenate([*shown, spread_out(table["variance"], table["error"])]))


def summary(found: MemoryMap) -> dict[str, Any]:
    """Return JSON values: everything except the examples, of which only the most sensitive are listed."""
    table = found.table
    top = np.argsort(-table["sensitivity"], kind="stable")[:_LISTED]
    return {
        "format": 1,
        "run": found.run,
        "checkpoint": found.checkpoint,
        "task": found.task,
        "posterior": found.posterior,
        "prior_precision": found.prior_precision,
        "num_examples": len(table["sample"]),
        "num_seen": found.num_seen,
        "effective_parameters": float(table["leverage"].mean()) * found.num_seen,
        "tasks": [dict(row) for row in found.tasks],
        "classes": [dict(row) for row in found.classes],
        "memory": [dict(row) for row in found.memory],
        "most_sensitive": [_example(found, int(position)) for position in top],
    }


def write_memory_map(found: MemoryMap, out: Path) -> Path:
    """Write all files; return the path of the page.

    Raises:
        FolderError: one cannot be written.
    """
    figures = _figures(found)
    for name, (figure, _) in figures.items():
        for suffix in ("svg", "png"):
            plots.save_figure(figure, out / f"{name}.{suffix}")
    write_json(out / "memory_map.json", summary(found))
    _write_csv(out / "memory_map.csv", found)
    target = out / "memory_map.html"
    write_text(target, _page(found, figures))
    return target


def spread_out(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Ints:
    """Return at most _IN_SCATTER points that are spread over the plane by rank and value (farthest-first traversal)."""
    ranks = np.stack([np.argsort(np.argsort(each, kind="stable")) for each in (x, y)], axis=1) / max(1, len(x) - 1)
    # By value too, so that outliers are among them.
    scaled = np.stack([_unit(np.log(np.maximum(x, 1e-300))), _unit(y)], axis=1)
    points = np.concatenate([0.5 * ranks, scaled], axis=1)
    chosen = [int(np.argmax(points[:, 2] + points[:, 3]))]
    nearest = np.full(len(points), np.inf)
    for _ in range(min(_IN_SCATTER, len(points)) - 1):
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(axis=1))
        chosen.append(int(np.argmax(nearest)))
    return np.unique(np.array(chosen, dtype=np.int64))


def _unit(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


def _of_classes(table: Table) -> dict[int, tuple[Ints, Ints]]:
    """Return by class the positions of its most and least sensitive examples; of many classes, the most sensitive."""
    labels = np.unique(table["label"])
    if len(labels) > _MAX_CLASSES:
        means = [float(table["sensitivity"][table["label"] == number].mean()) for number in labels]
        labels = np.sort(labels[np.argsort(means)[-_MAX_CLASSES:]])
    count = max(3, min(_OF_CLASS, _MAX_PICTURES // (2 * len(labels))))
    found = {}
    for number in labels.tolist():
        here = np.flatnonzero(table["label"] == number)
        order = here[np.argsort(-table["sensitivity"][here], kind="stable")]
        few = min(count, len(order) // 2)
        found[number] = order[:few], order[::-1][:few]
    return found


# ---------------------------------------------------------------- parts of the page


def _figures(found: MemoryMap) -> dict[str, tuple[Figure, str]]:
    """Return by file name the figure, and a description of it."""
    table = found.table
    few = spread_out(table["variance"], table["error"])
    shown = {int(p): found.pictures[s] for p in few if (s := int(table["sample"][p])) in found.pictures}
    figures = {
        "error_variance": (
            memory_plots.scatter(table, "variance", "mean variance of the logits", shown),
            "prediction error against the variance of the logits, one point a training example",
        ),
        "error_leverage": (
            memory_plots.scatter(table, "leverage", "leverage tr(Λ v)", {}),
            "prediction error against leverage, one point a training example",
        ),
        "left_out": (
            memory_plots.left_out(found.tasks),
            "NLL of the training data, estimated without test data, and measured on test data, by task",
        ),
        "classes": (
            memory_plots.classes(found.classes[:_MAX_CLASSES]),
            "NLL of each class as it is, with one example left out, and with the class left out",
        ),
    }
    if found.memory:
        figures["memory"] = memory_plots.memory(found.memory), "the memory over tasks"
    return figures


def _page(found: MemoryMap, figures: Mapping[str, tuple[Figure, str]]) -> str:
    table = found.table
    top = np.argsort(-table["sensitivity"], kind="stable")[:_LISTED]
    return page(
        "memory_map.html.j2",
        found=found,
        num_examples=whole(len(table["sample"])),
        num_seen=whole(found.num_seen),
        prior_precision=f"{found.prior_precision:.3g}",
        effective=whole(float(table["leverage"].mean()) * found.num_seen),
        plots={name: plots.svg(figure, label) for name, (figure, label) in figures.items()},
        task_header=_TASKS,
        task_rows=_task_rows(found),
        class_header=_CLASSES,
        class_rows=_class_rows(found),
        memory_header=_MEMORY,
        memory_rows=_memory_rows(found),
        example_header=_EXAMPLES,
        example_rows=_example_rows(found, top),
        sheets=_sheets(found),
    )


def _task_rows(found: MemoryMap) -> Rows:
    keys = ("train_nats", "left_out", "left_out_newton", "test_nats")
    return [
        [str(row["task"] + 1), row["name"], whole(row["examples"]), *(fixed(row[key]) for key in keys)]
        for row in found.tasks
    ]


def _class_rows(found: MemoryMap) -> Rows:
    keys = ("nats", "left_out", "removed", "sensitivity", "leverage")
    return [
        [
            str(row["class"]),
            row["name"],
            str(row["task"] + 1),
            whole(row["examples"]),
            *(fixed(row[key]) for key in keys),
        ]
        for row in found.classes
    ]


def _memory_rows(found: MemoryMap) -> Rows:
    return [
        [
            str(row["task"] + 1),
            whole(row["size"]),
            " ".join(str(count) for count in row["per_task"]),
            f"{row['smallest_class']} to {row['largest_class']}",
            "  ".join(percent(share) for share in row["agreement"]),
            percent(row["sensitive_share"]),
            percent(row["chance"]),
        ]
        for row in found.memory
    ]


def _example_rows(found: MemoryMap, positions: Ints) -> Rows:
    rows = []
    for position in positions.tolist():
        example = _example(found, position)
        figures = [fixed(example[key]) for key in ("error", "variance", "leverage", "sensitivity")]
        rows.append([example["name"], example["class"], *figures, "yes" if example["in_memory"] else ""])
    return rows


def _example(found: MemoryMap, position: int) -> dict[str, Any]:
    values = {name: column[position].item() for name, column in found.table.items()}
    return {**values, "name": found.names[position], "class": found.class_names[values["label"]]}


def _sheets(found: MemoryMap) -> list[dict[str, Any]]:
    """Return a sheet of the most and one of the least memorable examples of each class."""
    sheets = []
    for number, sides in _of_classes(found.table).items():
        urls = []
        for positions in sides:
            samples = [int(sample) for sample in found.table["sample"][positions]]
            pictures = [small_picture(found.pictures[sample]) for sample in samples if sample in found.pictures]
            sheet = picture_sheet(pictures) if pictures else None
            width = 0 if sheet is None else sheet.width * max(1, min(3, 440 // max(1, sheet.width)))
            urls.append({"data": "" if sheet is None else data_url(sheet), "width": width})
        sheets.append({"name": found.class_names[number], "most": urls[0], "least": urls[1]})
    return sheets


def _write_csv(path: Path, found: MemoryMap) -> None:
    """Write one line per example."""
    columns = list(found.table)
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "class", *columns])
        values = zip(*(found.table[name].tolist() for name in columns), strict=True)
        for name, label, row in zip(found.names, found.table["label"].tolist(), values, strict=True):
            writer.writerow([name, found.class_names[label], *(_short(value) for value in row)])


def _short(value: Any) -> Any:
    """Round a float to six digits, and write a bool as 0 or 1."""
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6g}" if isinstance(value, float) else value
