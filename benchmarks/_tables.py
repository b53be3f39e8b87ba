"""Writes the tables of figures in the documentation from the JSON lines that benchmarks printed.

    python -m benchmarks._tables

In a page, `<!-- table: NAME -->` begins a table and `<!-- end -->` ends it. A table whose benchmark has left no file in
docs/results/benchmarks/ stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpccl.folder import replacing

__all__ = ["FOLDER", "PAGES", "filled"]

_DOCS = Path(__file__).parent.parent / "docs"
FOLDER = _DOCS / "results" / "benchmarks"
PAGES = (_DOCS / "results.md", _DOCS / "curvature.md")

_TABLE = re.compile(r"<!-- table: (?P<name>[^ ]*) -->\n(?P<rows>.*?)<!-- end -->", re.DOTALL)
_MIB = 2**20

Details = dict[str, Any]  # what a benchmark says under "details"


def filled(page: str, folder: Path) -> str:
    """The page with its tables made of the files in `folder`.

    Raises:
        ValueError: a table has no end, or a name that is not known here.
    """
    if page.count("<!-- table: ") != len(_TABLE.findall(page)):
        raise ValueError("a '<!-- table: NAME -->' has no '<!-- end -->'")
    return _TABLE.sub(lambda found: _table(found, folder), page)


def _table(found: re.Match[str], folder: Path) -> str:
    name = found["name"]
    if name not in _TABLES:
        raise ValueError(f"unknown table '{name}'; allowed: {', '.join(_TABLES)}")
    pattern, make = _TABLES[name]
    results = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
    rows = "".join(f"{row}\n" for row in make(results)) if results else found["rows"]
    return f"<!-- table: {name} -->\n{rows}<!-- end -->"


def _rows(head: Sequence[str], cells: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The first `left` columns are text, the others are numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]


def _headline(results: Sequence[Details]) -> list[str]:
    (result,) = results
    numbers = result["headline"].items()
    return _rows(
        ("key", "value"),
        [(key, f"{value:.3f}" if isinstance(value, float) else f"{value:,}") for key, value in numbers],
    )


def _curvature(results: Sequence[Details]) -> list[str]:
    head = ("model", "", "Monte-Carlo, s", "empirical, s", "times forward + backward", "peak memory, MiB")
    cells = []
    for details in (result["details"] for result in results):
        for case, seconds in details["processor_seconds"].items():
            over, peaks = details["over_forward_backward"][case], details["peak_bytes"][case]
            for library in dict.fromkeys(name.partition("/")[0] for name in seconds):
                names = (library,) * 2 if library == "forward_backward" else (f"{library}/mc", f"{library}/empirical")
                cells.append((case, library.replace("_", " + "), *_timed(names, seconds, over, peaks)))
            if "hpccl/everything" in seconds:
                timed = _timed(("hpccl/everything", ""), seconds, over, peaks)
                cells.append((case, "hpccl, norms too", *timed))
    return _rows(head, cells, left=2)


def _timed(names: tuple[str, str], seconds: Details, over: Details, peaks: Details) -> tuple[str, ...]:
    """Of the runs of these names, with drawn and with true labels; – where one failed or is not there."""
    drawn, _ = names
    times = [f"{seconds[name]:.2f}" if name in seconds else "–" for name in names]
    ratio = f"{over[drawn]:.2f}" if drawn in over else "–"
    peak = f"{peaks[drawn] / _MIB:.0f}" if drawn in peaks else "–"
    return (*times, ratio, peak)


def _pull(results: Sequence[Details]) -> list[str]:
    runs = [
        (_named(case, nproc, result), found, of)
        for result in results
        for case, found in result["details"]["cases"].items()
        for nproc, of in found["processes"].items()
    ]

    def row(label: str, figure: Callable[[Details, Details], str]) -> tuple[str, ...]:
        return label, *(figure(found, of) for _, found, of in runs)

    cells = [
        row("exact", lambda found, of: f"{of['step_ratio']['exact']:.3f}"),
        row("truncated", lambda found, of: f"{of['step_ratio']['truncated']:.3f}"),
        row("nothing, once more (noise)", lambda found, of: f"{of['step_ratio']['again']:.3f}"),
        row("relative error of the truncated pull", lambda found, of: f"{found['relative_error']:.1e}"),
        row("operations of the exact pull, Gflop", lambda found, of: f"{found['gflop']['exact']:.1f}"),
        row("operations of the truncated pull, Gflop", lambda found, of: f"{found['gflop']['truncated']:.1f}"),
        row("bytes a step without the pull", lambda found, of: f"{of['collective_bytes']['plain']:,}"),
        row("bytes a step with the exact pull", lambda found, of: f"{of['collective_bytes']['exact']:,}"),
        row("exact factors of a rank, MiB", lambda found, of: f"{of['factor_bytes_per_rank']['exact'] / _MIB:.1f}"),
        row("truncated factors, MiB", lambda found, of: f"{of['factor_bytes_per_rank']['truncated'] / _MIB:.1f}"),
    ]
    return _rows(("model, trace kept, processes, cores", *(label for label, _, _ in runs)), cells)


def _named(case: str, nproc: str, result: Details) -> str:
    """With what was remarked on the file later, if anything."""
    details, cores = result["details"], result["machine"]["cores"]
    remark = f", {details['remark']}" if "remark" in details else ""
    return f"{case}, {details['keep_trace']:.0%}, {nproc}, {cores}{remark}"


def _engines(results: Sequence[Details]) -> list[str]:
    head = (
        "model",
        "engine",
        "processes",
        "finetune, s",
        "exact",
        "truncated",
        "finetune once more (noise)",
        "truncated, processor time",
        "operations of the exact pull",
        "of the truncated",
        "bytes over weights",
        "extra bytes",
        "peak of finetune, MiB",
        "of exact",
        "of truncated",
        "tensors of truncated, MiB",
    )
    cells = [
        (f"{name}@{case['size']}", engine, nproc, *_of_engine(measured))
        for result in results
        for name, case in result["details"]["cases"].items()
        for engine, sizes in case["engines"].items()
        for nproc, measured in sizes.items()
    ]
    return _rows(head, cells, left=2)


def _of_engine(of: Details) -> tuple[str, ...]:
    """– for memory that was not measured."""
    peaks = [of["peak_bytes"].get(method) for method in ("finetune", "exact", "truncated")]
    return (
        f"{of['seconds']['finetune']:.2f}",
        *(f"{of['clock_ratio'][method]:.3f}" for method in ("exact", "truncated", "again")),
        f"{of['processor_ratio']['truncated']:.3f}",
        *(f"{of['pull_share'][method]:.1%}" for method in ("exact", "truncated")),
        f"{sum(of['bytes_over_parameters'].values()):.2f}",
        f"{of['extra_bytes']:,}",
        *("–" if peak is None else f"{peak / _MIB:.0f}" for peak in (*peaks, of["tensor_bytes"].get("truncated"))),
    )


def _task_sum(results: Sequence[Details]) -> list[str]:
    (result,) = results
    cells = []
    for policy, layers in result["details"]["table"].items():
        kind, comma, rest = policy.partition(",")
        terms = sorted({layer["terms"] for layer in layers.values()})
        worst = [max(layer[key] for layer in layers.values()) for key in ("frobenius", "product")]
        numbers = [f"{value:.3f}" for value in worst]
        cells.append((f"`{kind}`{comma}{rest}", "-".join(str(number) for number in terms), *numbers))
    return _rows(("policy", "terms", "Frobenius", "product with the way the weights went"), cells)


def _selection(results: Sequence[Details]) -> list[str]:
    (result,) = results
    cases = result["details"]["cases"]
    ranks = sorted((name for name in cases if name != "numpy"), key=int)
    head = ("selector", *(f"examples/s, {number} processes" for number in ranks), "numpy")

    def cell(of: Details) -> str:
        return f"{of['examples'] / of['seconds']:,.0f} ({max(0, of['peak_bytes']) / _MIB:.0f} MiB)"

    columns = (*ranks, "numpy")
    return _rows(head, [(name, *(cell(cases[each][name]) for each in columns)) for name in cases["numpy"]])


_TABLES: dict[str, tuple[str, Callable[[Sequence[Details]], list[str]]]] = {
    "curvature": ("curvature_*.json", _curvature),
    "pull": ("pull_*.json", _pull),
    "engines": ("engines*.json", _engines),
    "task_sum": ("task_sum.json", _task_sum),
    "data_loading": ("data_loading.json", _headline),
    "selection": ("selection.json", _selection),
    "step_overhead": ("step_overhead.json", _headline),
    "task_growth": ("task_growth.json", _headline),
}


if __name__ == "__main__":
    for path in PAGES:
        content = filled(path.read_text(), FOLDER)
        with replacing(path) as beside:
            beside.write_text(content)
