"""Predictions under uncertain weights as files: uncertainty.{html,json,csv}, plots and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from hpccl.folder import replacing
from hpccl.report import plots
from hpccl.report.metrics import calibration_bins, calibration_error
from hpccl.report.pictures import data_url, picture_sheet, small_picture
from hpccl.report.plots import COLOURS, STYLE, legend, reliability
from hpccl.report.text import fixed, markdown_table, percent, whole
from hpccl.report.write import page, write_json, write_text

__all__ = ["Uncertainty", "markdown", "summary", "worth_showing", "write_uncertainty"]

Ints: TypeAlias = npt.NDArray[np.int64]
Table: TypeAlias = Mapping[str, npt.NDArray[Any]]

_SHOWN = 60  # pictures of the most, and as many of the least, certain images
_HEADS = {"own": "task_incremental", "seen": "class_incremental"}
_WHICH = {"mean": "one network, at the mean", "posterior": "predictive distribution"}
_HEADER = ["setting", "prediction", "images", "accuracy / %", "NLL / nats", "ECE / %", "Brier score", "entropy / nats"]
_WORDS = {
    "sampled": "weights drawn from the posterior",
    "probit": "linearised at the mean, probit approximation",
    "monte_carlo": "linearised at the mean, logits drawn",
}


@dataclass(frozen=True)
class Uncertainty:
    """Predictions for test images at one checkpoint.

    approximation: sampled, probit or monte_carlo; samples: number of draws of weights or of logits, 0 for none
    chosen: whether the prior precision is the one of largest evidence
    effective_parameters: how many of num_weights the data determine
    head: the classes that competed in the run's training, own or seen
    table: see tools.uncertainty.predictions
    pictures: by sample, uint8 [h, w, 1 or 3]
    """

    run: str
    checkpoint: str
    task: int
    approximation: str
    samples: int
    prior_precision: float
    chosen: bool
    effective_parameters: float
    num_weights: int
    head: str
    class_names: Sequence[str]
    task_names: Sequence[str]
    table: Table
    pictures: Mapping[int, npt.NDArray[np.uint8]]


def worth_showing(table: Table, head: str, *, last: int) -> Ints:
    """Return the positions in the table whose pictures are shown: the most and the least certain, of learned tasks."""
    known = np.flatnonzero(table["task"] <= last)
    order = known[np.argsort(table[f"posterior_{head}_entropy"][known], kind="stable")]
    few = min(_SHOWN, len(order) // 2)
    return np.concatenate([order[:few], order[::-1][:few]])


def summary(found: Uncertainty) -> dict[str, Any]:
    """Return JSON values: figures of all learned tasks, of each task, and of detecting images of future tasks."""
    table = found.table
    learned = table["task"] <= found.task
    return {
        "format": 1,
        "run": found.run,
        "checkpoint": found.checkpoint,
        "task": found.task,
        "approximation": found.approximation,
        "samples": found.samples,
        "prior_precision": found.prior_precision,
        "prior_precision_by_evidence": found.chosen,
        "effective_parameters": found.effective_parameters,
        "num_weights": found.num_weights,
        "num_images": int(learned.sum()),
        **{which: _settings(table, which, learned) for which in _WHICH},
        "tasks": [
            {
                "task": task,
                "name": found.task_names[task],
                "num": int((table["task"] == task).sum()),
                **{which: _settings(table, which, table["task"] == task) for which in _WHICH},
            }
            for task in np.unique(table["task"][learned]).tolist()
        ],
        "unseen": _unseen(table, learned),
    }


def _settings(table: Table, which: str, rows: npt.NDArray[np.bool_]) -> dict[str, dict[str, float | None]]:
    return {name: _figures(table, f"{which}_{head}", rows) for head, name in _HEADS.items()}


def _figures(table: Table, prefix: str, rows: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    right, confidence = table[f"{prefix}_right"][rows], table[f"{prefix}_confidence"][rows]
    found = {
        "accuracy": float(right.mean()),
        "nll": float(table[f"{prefix}_nats"][rows].mean()),
        "ece": calibration_error(calibration_bins(confidence, right)),
        "brier": float(table[f"{prefix}_brier"][rows].mean()),
        "entropy": float(table[f"{prefix}_entropy"][rows].mean()),
    }
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def _unseen(table: Table, learned: npt.NDArray[np.bool_]) -> dict[str, Any] | None:
    """Return the area under the ROC curve of detecting images of tasks not yet learned, by two scores."""
    if learned.all() or not learned.any():
        return None
    found: dict[str, Any] = {"num_unseen": int((~learned).sum())}
    for which in _WHICH:
        entropy, confidence = table[f"{which}_seen_entropy"], table[f"{which}_seen_confidence"]
        found[which] = {
            "auroc_entropy": float(roc_auc_score(~learned, entropy)),
            "auroc_confidence": float(roc_auc_score(~learned, -confidence)),
        }
    return found


def markdown(found: Uncertainty) -> str:
    """Return the figures as a table, with notes on how they were made."""
    return markdown_table(_HEADER, _rows(found), left=2) + "\n" + "\n".join(_notes(found)) + "\n"


def write_uncertainty(found: Uncertainty, out: Path) -> Path:
    """Write all files; return the path of the page.

    Raises:
        FolderError: one cannot be written.
    """
    figures = _plots(found)
    for name, (figure, _) in figures.items():
        for suffix in ("svg", "png"):
            plots.save_figure(figure, out / f"{name}.{suffix}")
    write_json(out / "uncertainty.json", summary(found))
    write_text(out / "uncertainty.md", markdown(found))
    _write_csv(out / "uncertainty.csv", found)
    sheets = _sheets(found)
    for name, _, _, data in sheets:
        with replacing(out / f"{name}.png") as beside:
            beside.write_bytes(data)
    target = out / "uncertainty.html"
    write_text(
        target,
        page(
            "uncertainty.html.j2",
            found=found,
            header=_HEADER,
            rows=_rows(found),
            notes=_notes(found),
            plots={name: plots.svg(figure, label) for name, (figure, label) in figures.items()},
            sheets=[{"title": title, "data": url} for _, title, url, _ in sheets],
        ),
    )
    return target


def _rows(found: Uncertainty) -> list[list[str]]:
    learned = found.table["task"] <= found.task
    rows = []
    for head, setting in _HEADS.items():
        for which, word in _WHICH.items():
            figures = _figures(found.table, f"{which}_{head}", learned)
            rows.append(
                [
                    setting.replace("_", "-"),
                    word,
                    whole(int(learned.sum())),
                    percent(figures["accuracy"]),
                    fixed(figures["nll"]),
                    percent(figures["ece"]),
                    fixed(figures["brier"]),
                    fixed(figures["entropy"]),
                ]
            )
    return rows


def _notes(found: Uncertainty) -> list[str]:
    drawn = f", {found.samples} draws" if found.samples else ""
    by = "the largest evidence" if found.chosen else "choice"
    determined = f"{whole(found.effective_parameters)} of {whole(found.num_weights)}"
    notes = [
        f"{found.run}, checkpoint {found.checkpoint}: {_WORDS[found.approximation]}{drawn}.",
        f"Prior precision {found.prior_precision:.3g} by {by}: the data determine {determined} weights.",
    ]
    unseen = _unseen(found.table, found.table["task"] <= found.task)
    if unseen is not None:
        areas = "; ".join(
            f"{word}: {fixed(unseen[which]['auroc_entropy'])} by entropy, "
            f"{fixed(unseen[which]['auroc_confidence'])} by the largest probability"
            for which, word in _WHICH.items()
        )
        notes.append(
            f"Area under the ROC curve for telling {whole(unseen['num_unseen'])} images of tasks to come from those of "
            f"learned tasks, among the classes seen: {areas}."
        )
    return notes


def _plots(found: Uncertainty) -> dict[str, tuple[Figure, str]]:
    """Return by file name the figure, and a description of it."""
    learned = found.table["task"] <= found.task
    figures = {
        "reliability": (
            _reliability(found.table, learned),
            "accuracy by confidence, of one network and of the predictive distribution, in both settings",
        )
    }
    if not learned.all():
        figures["unseen"] = (
            _entropies(found.table, learned),
            "entropy of predictions for learned tasks and for tasks to come",
        )
    return figures


def _reliability(table: Table, rows: npt.NDArray[np.bool_]) -> Figure:
    def bins(which: str, head: str) -> npt.NDArray[np.float64]:
        return calibration_bins(table[f"{which}_{head}_confidence"][rows], table[f"{which}_{head}_right"][rows])

    return reliability(
        {setting: {word: bins(which, head) for which, word in _WHICH.items()} for head, setting in _HEADS.items()}
    )


def _entropies(table: Table, learned: npt.NDArray[np.bool_]) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.9))
        panels = figure.subplots(1, 2, sharey=True)
    for axes, (which, word) in zip(panels, _WHICH.items(), strict=True):
        entropy = table[f"{which}_seen_entropy"]
        edges = np.linspace(0, max(float(entropy.max()), 1e-6), 31).tolist()
        for rows, label, colour in ((learned, "learned tasks", COLOURS[0]), (~learned, "tasks to come", COLOURS[1])):
            axes.hist(entropy[rows], bins=edges, density=True, histtype="step", color=colour, lw=1.4, label=label)
        axes.set_title(word, fontsize=9)
        axes.set_xlabel("entropy / nats")
    panels[0].set_ylabel("density")
    legend(panels[1])
    return figure


def _sheets(found: Uncertainty) -> list[tuple[str, str, str, bytes]]:
    """Return (file name, title, data URL, PNG) of the sheets of the most and of the least certain images."""
    shown = worth_showing(found.table, found.head, last=found.task)
    sheets = []
    for name, title, positions in (
        ("most_certain", "The most certain predictions", shown[: len(shown) // 2]),
        ("least_certain", "The least certain predictions", shown[len(shown) // 2 :]),
    ):
        samples = [int(sample) for sample in found.table["sample"][positions]]
        pictures = [small_picture(found.pictures[sample]) for sample in samples if sample in found.pictures]
        if not pictures:
            continue
        right = found.table[f"posterior_{found.head}_right"][positions]
        sheet, buffer = picture_sheet(pictures), io.BytesIO()
        sheet.save(buffer, format="PNG")
        full = f"{title}, {percent(float(right.mean()))} % of them right"
        sheets.append((name, full, data_url(sheet), buffer.getvalue()))
    return sheets


def _write_csv(path: Path, found: Uncertainty) -> None:
    """Write one line per image."""
    columns = list(found.table)
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *columns])
        for row in zip(*(found.table[name].tolist() for name in columns), strict=True):
            values = [f"{value:.6g}" if isinstance(value, float) else value for value in row]
            writer.writerow([found.class_names[row[columns.index("label")]], *values])
