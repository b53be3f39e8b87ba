"""The report of one run as report.json, report.md and report.html, made from its folder alone."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from hpccl.errors import FolderError
from hpccl.folder import RunFolder, explain_os_error, replacing
from hpccl.report import plots
from hpccl.report.events import Event, number, read_events
from hpccl.report.pictures import memory_grids
from hpccl.report.summary import PhaseCost, RunReport, phase_totals, read_config, summarise_events
from hpccl.report.text import TextTable, fixed, markdown_table, percent, signed, size, time_span, whole

__all__ = ["page", "render_html", "render_markdown", "report_if_writable", "report_run", "write_json", "write_text"]

_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


def report_run(folder: Path) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run folder.

    Returns:
        The content of report.json.

    Raises:
        FolderError: it is not a run folder, a file in it is damaged, or a report cannot be written.
    """
    content, texts = _made(folder)
    _write(folder, texts)
    return content


def report_if_writable(folder: Path) -> str:
    """Do the same as `report_run`; if the folder may not be written, return the system's message instead of raising.

    Returns "" if the reports were written.

    Raises:
        FolderError: as for `report_run`, for any other cause.
    """
    _, texts = _made(folder)
    try:
        _write(folder, texts)
    except FolderError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NOT_OURS:
            return os.strerror(cause.errno)
        raise
    return ""


def _made(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of report.json, and each report's text by suffix."""
    run = RunFolder(folder)
    events = read_events(run.events) if run.events.exists() else _nothing_yet(folder)
    report = summarise_events(read_config(folder), events)
    content = report.to_dict()
    texts = {"json": _json(content), "md": render_markdown(report), "html": render_html(report, events, folder)}
    return content, texts


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    for suffix, text in texts.items():
        write_text(RunFolder(folder).report(suffix), text)


def _nothing_yet(folder: Path) -> list[Event]:
    """Raise the error for a folder without events: it is no run, or the run has not started."""
    read_config(folder)
    raise FolderError(f"run '{folder}' has not started: it has no events.jsonl. Run `hpccl train {folder}/config.yaml`")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, indented by two spaces.

    Raises:
        FolderError: it cannot be written.
    """
    write_text(path, _json(content))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file atomically in UTF-8; bytes of file names that are not UTF-8 are escaped.

    Raises:
        FolderError: it cannot be written.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def page(template: str, **content: Any) -> str:
    """Render a packaged template; an undefined name in it is an error."""
    environment = Environment(
        loader=PackageLoader("hpccl.report"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


# ---------------------------------------------------------------- tables, the same in both formats


def _figures(report: RunReport) -> list[tuple[str, str]]:
    """Return (value, label) pairs, the headline first."""
    return [
        (f"{percent(report.average_accuracy)} %", "average accuracy"),
        (f"{percent(report.average_accuracy_class_incremental)} %", "average accuracy, class-incremental"),
        (f"{percent(report.final_union_accuracy)} %", "class-incremental, all test images"),
        (f"{percent(report.average_union_accuracy)} %", "its mean over tasks"),
        (percent(report.performance_drop), "its drop, first to last, points"),
        (percent(report.forgetting), "forgetting, points"),
        (signed(report.bwt), "backward transfer, points"),
        (signed(report.fwt), "forward transfer, points"),
        (f"{percent(report.learning_accuracy)} %", "learning accuracy"),
        (f"{percent(report.average_incremental_accuracy)} %", "average incremental accuracy"),
        *([(f"{percent(top5)} %", "top-5, class-incremental")] if (top5 := report.top5_class_incremental) else []),
        (fixed(report.nll), "NLL, nats"),
        (fixed(report.ece), "ECE, 15 bins"),
        (whole(report.images_per_second), "images/s while training"),
        (time_span(report.wall_seconds), f"wall time, {report.segments} start{'s' * (report.segments != 1)}"),
        (size(report.memory_bytes), "memory"),
    ]


def _on_validation(share: float) -> str:
    return f"Not on test images: measured on {100 * share:g} % of the training images, held out of training."


def _tables(report: RunReport) -> dict[str, TextTable]:
    """Return the tables of both formats by name, those without rows included."""
    return {
        "tasks": _tasks(report),
        "reconstruction": _reconstruction(report),
        "memory": _memory(report),
        "curvature": _curvature(report),
        "phases": _phases(report.phases),
        "cost": _cost(phase_totals(report.phases)),
        "checkpoints": _checkpoints(report),
        "skipped": _skipped(report),
    }


def _tasks(report: RunReport) -> TextTable:
    rows = [
        [
            str(task["task"] + 1),
            str(task.get("name", "")),
            str(len(task.get("classes", []))),
            whole(task.get("num_train")),
            whole(task.get("num_test")),
        ]
        for task in report.tasks
    ]
    return TextTable("Tasks", ["task", "name", "classes", "training images", "test images"], rows, left=2)


def _phases(phases: Sequence[PhaseCost]) -> TextTable:
    rows = [[str(phase.task + 1), *row] for phase, row in zip(phases, _cost(phases).rows, strict=True)]
    return TextTable("By task", ["task", *_cost([]).header], rows, left=2)


def _cost(phases: Sequence[PhaseCost]) -> TextTable:
    rows = [
        [
            phase.phase,
            time_span(phase.seconds),
            whole(phase.images or None),
            whole(phase.images_per_second),
            size(phase.peak_memory_bytes),
        ]
        for phase in phases
    ]
    return TextTable("Cost", ["phase", "time", "images", "images/s", "peak memory"], rows)


def _memory(report: RunReport) -> TextTable:
    rows = [
        [
            str(memory["task"] + 1),
            whole(sum(memory.get("per_task") or [])),
            size(memory.get("bytes")),
            size(memory.get("soft_bytes")),
            "  ".join(percent(number(share)) for share in memory.get("agreement") or []) or "–",
        ]
        for memory in report.memory
    ]
    header = ["after task", "examples", "all bytes", "of soft labels", "soft label agrees with the true one"]
    return TextTable("Memory", header, rows)


def _curvature(report: RunReport) -> TextTable:
    rows = [
        [
            str(found["task"] + 1),
            str(found.get("kind", "")),
            fixed(number(found.get("trace"))),
            whole(found.get("num_examples")),
            whole(found.get("parameters")),
            size(found.get("bytes")),
            size(found.get("rank_bytes")),
            whole(found.get("terms")),
            fixed(number(found.get("error"))),
        ]
        for found in report.curvature
    ]
    header = ["task", "kind", "trace", "examples", "parameters", "size", "of one rank", "terms", "error"]
    return TextTable("Curvature", header, rows, left=2)


def _reconstruction(report: RunReport) -> TextTable:
    rows = [
        [
            str(measured["task"] + 1),
            term,
            fixed(number(errors.get("cosine"))),
            fixed(number(errors.get("relative_error"))),
            fixed(number(errors.get("norm"))),
            fixed(number(measured.get("true_norm"))),
        ]
        for measured in report.reconstruction
        for term, errors in measured["terms"].items()
        if errors is not None
    ]
    header = ["after task", "term", "cosine", "relative error", "norm", "true norm"]
    return TextTable("Gradient-reconstruction error", header, rows, left=2)


def _checkpoints(report: RunReport) -> TextTable:
    by_task: dict[int, list[Mapping[str, Any]]] = {}
    for checkpoint in report.checkpoints:
        by_task.setdefault(checkpoint["task"], []).append(checkpoint)
    rows = [
        [
            str(task + 1),
            str(len(saved)),
            size(saved[-1].get("bytes")),
            time_span(sum(number(checkpoint.get("seconds")) or 0.0 for checkpoint in saved)),
        ]
        for task, saved in by_task.items()
    ]
    return TextTable("Checkpoints", ["task", "saved", "last size", "time"], rows)


def _skipped(report: RunReport) -> TextTable:
    header = ["split", "sample", "name", "reason"]
    rows = [[str(skipped.get(key, "")) for key in header] for skipped in report.skipped_examples]
    return TextTable(f"Skipped images: {report.skipped}", header, rows, left=4)


def _origin(report: RunReport) -> list[tuple[str, str]]:
    machine = report.machine
    parts = [machine.get("hostname"), machine.get("cpu"), machine.get("gpu")]
    cores = machine.get("cores")
    memory = machine.get("memory_bytes")
    parts += [f"{cores} cores" if cores else None, size(memory) if memory else None]
    found = {
        "command": " ".join(report.command),
        "commit": report.commit,
        "weights sha256": report.weights_sha256,
        "processes": report.world_size,
        "machine": ", ".join(str(part) for part in parts if part),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    return [(name, str(value)) for name, value in found.items() if value]


# ---------------------------------------------------------------- Markdown


def render_markdown(report: RunReport) -> str:
    """Return the report as Markdown that is readable with and without rendering."""
    facts = f"{report.method}, seed {report.seed}, {report.tasks_learned} of {report.num_tasks} tasks, {report.status}"
    sections = [f"# {report.name}\n\n{facts}\n"]
    sections += [f"> {_on_validation(report.validation)}\n"] if report.validation else []
    sections += [f"> {report.message}\n"] if report.message else []
    sections += [markdown_table(["figure", "value"], [[label, value] for value, label in _figures(report)])]
    tables = _tables(report)
    del tables["phases"]
    matrices = [
        _matrix_table("Accuracy, task-incremental", report.accuracy_matrix),
        _matrix_table("Accuracy, class-incremental", report.accuracy_matrix_class_incremental),
    ]
    sections += [f"## {table.title}\n\n{table.markdown()}" for table in (*matrices, *tables.values()) if table.rows]
    sections += ["## Where this comes from\n\n" + "".join(f"- {name}: {value}\n" for name, value in _origin(report))]
    return "\n".join(sections)


def _matrix_table(title: str, rows: Sequence[Sequence[float | None]]) -> TextTable:
    """Return a table in percent, without rows that were not measured."""
    header = ["after task", *(str(task + 1) for task in range(len(rows)))]
    measured = [(task, row) for task, row in enumerate(rows) if any(value is not None for value in row)]
    return TextTable(title, header, [[str(task + 1), *(percent(value) for value in row)] for task, row in measured])


# ---------------------------------------------------------------- HTML


def render_html(report: RunReport, events: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return one self-contained page.

    Args:
        report: the summary of `events`.
        events: for the loss curves.
        folder: of the run, for the configuration and the pictures of the memory.
    """
    return page(
        "run.html.j2",
        report=report,
        measured_on=_on_validation(report.validation) if report.validation else "",
        tiles=[tile for tile in _figures(report) if not tile[0].startswith("–")],
        accuracy_plot=plots.accuracy_over_tasks(report.accuracy_matrix, "task-incremental accuracy over tasks"),
        class_accuracy_plot=plots.accuracy_over_tasks(
            report.accuracy_matrix_class_incremental, "class-incremental accuracy over tasks"
        ),
        calibration_plot=plots.calibration(report.calibration, "accuracy by confidence, in both settings"),
        loss_plot=plots.loss_curves(events, "loss and its terms over steps"),
        reconstruction_plot=plots.reconstruction(report.reconstruction, "gradient-reconstruction error over tasks"),
        tables=_tables(report),
        grids=_grids(report, folder),
        origin=_origin(report),
        config_text=_config_text(folder),
    )


def _config_text(folder: Path) -> str:
    try:
        return RunFolder(folder).config.read_text(encoding="utf-8")
    except OSError as error:
        raise FolderError(f"'{folder}/config.yaml' cannot be read: {explain_os_error(error)}") from error


def _grids(report: RunReport, folder: Path) -> list[dict[str, Any]]:
    """Return the memory grids with their classes; small ones are shown at two or three times their size."""
    names = {task["task"]: ", ".join(task.get("class_names") or []) for task in report.tasks}
    return [
        {
            **vars(grid),
            "title": names.get(grid.task, "")[:200],
            "page_width": grid.width * max(1, min(3, 960 // max(1, grid.width))),
        }
        for grid in memory_grids(folder)
    ]
