"""Writes the tables of results in the documentation from the output of benchmarks and `hpccl report --out`.

    python -m benchmarks._tables

In a page, `<!-- table: NAME -->` begins a table and `<!-- end -->` ends it. NAME is that of a benchmark, which leaves
JSON lines in docs/results/benchmarks/, or FOLDER/TITLE: the table of that title, such as `wall-clock-and-images`, in
docs/results/FOLDER/comparison.md (TITLE=CELL: the rows with such a cell), or FOLDER/reconstruction: the means over
docs/results/FOLDER/reconstruction-*/, which `hpccl memory reconstruct` wrote of several runs. A table whose file is not
there stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hpccl.folder import replacing
from hpccl.report.reconstruction import FIGURES
from hpccl.report.text import fixed

__all__ = ["FOLDER", "PAGES", "filled"]

_DOCS = Path(__file__).parent.parent / "docs"
FOLDER = _DOCS / "results" / "benchmarks"
PAGES = (
    *(_DOCS / page for page in ("results.md", "curvature.md", "memory.md", "methods.md")),
    _DOCS.parent / "README.md",
)

_TABLE = re.compile(r"<!-- table: (?P<name>[^ ]*) -->\n(?P<rows>.*?)<!-- end -->", re.DOTALL)
_MIB = 2**20
_FORMS = ("exact", "truncated")

Details = dict[str, Any]  # a benchmark's "details"


def filled(page: str, folder: Path) -> str:
    """Return the page with its tables filled from the files in `folder`.

    Raises:
        ValueError: a table has no end, or a name that is not known here or in its comparison.
    """
    if page.count("<!-- table: ") != len(_TABLE.findall(page)):
        raise ValueError("a '<!-- table: NAME -->' has no '<!-- end -->'")
    return _TABLE.sub(lambda found: _table(found, folder), page)


def _table(found: re.Match[str], folder: Path) -> str:
    name = found["name"]
    where, _, title = name.rpartition("/")
    if not where:
        made = _of_benchmark(name, folder)
    elif title == "reconstruction":
        made = _of_reconstructions(folder.parent / where)
    else:
        made = _of_comparison(name, folder.parent)
    rows = "".join(f"{row}\n" for row in made) or found["rows"]
    return f"<!-- table: {name} -->\n{rows}<!-- end -->"


def _of_benchmark(name: str, folder: Path) -> list[str]:
    if name not in _TABLES:
        raise ValueError(f"unknown table '{name}'; allowed: {', '.join(_TABLES)}, and FOLDER/TITLE of a comparison")
    pattern, make = _TABLES[name]
    results = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
    return make(results) if results else []


def _of_comparison(name: str, results: Path) -> list[str]:
    """Return the first table below a title of results/FOLDER/comparison.md; with `=CELL`, the rows with that cell."""
    path, _, cell = name.partition("=")
    where, _, title = path.rpartition("/")
    file = results / where / "comparison.md"
    if not file.exists():
        return []
    # In comparisons of earlier versions, the first table has no title.
    found = {"accuracy-and-forgetting": file.read_text(encoding="utf-8")}
    for part in re.split(r"^## ", found["accuracy-and-forgetting"], flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")] = text
    if title not in found:
        raise ValueError(f"unknown table '{name}'; of {file} allowed: {', '.join(found)}")
    rows: list[str] = re.findall(r"^\|.*$", found[title].partition("\n## ")[0], flags=re.MULTILINE)
    return rows[:2] + [row for row in rows[2:] if not cell or cell in map(str.strip, row.split("|"))]


def _of_reconstructions(folder: Path) -> list[str]:
    """Return mean and sample standard deviation, over runs, of each run's mean along its path."""
    groups: dict[tuple[str, int], list[Details]] = {}
    for file in sorted(folder.glob("reconstruction-*/reconstruction.json")):
        for row in json.loads(file.read_text())["means"]:
            groups.setdefault((row["selector"], row["size"]), []).append(row)
    cells = [
        (selector, str(size), str(len(rows)), *(_spread([row[name] for row in rows]) for name in FIGURES))
        for (selector, size), rows in groups.items()
    ]
    head = ("selector", "m", "seeds", "cosine", "relative error", "cosine of change", "error of change")
    return _rows(head, sorted(cells, key=lambda row: int(row[1]))) if cells else []


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return fixed(known[0] if known else None)
    return f"{fixed(mean(known))} ± {fixed(stdev(known))}"


def _rows(head: Sequence[str], cells: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return a table whose first `left` columns are text and the others numbers."""
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
    head = ["model", "", "Monte-Carlo, s", "empirical, s", "times forward + backward", "peak memory, MiB"]
    head += ["time over hpccl's", "memory over hpccl's"]
    cells = []
    for result in results:
        details, cpu = result["details"], result["machine"]["cpu"]
        images = {f"{case['model']}@{case['pixels']}": case["batch"] * case["batches"] for case in details["cases"]}
        for name, seconds in details["processor_seconds"].items():
            over, peaks = details["over_forward_backward"][name], details["peak_bytes"][name]
            case = f"{name}, {images[name]} images, {cpu}"
            for library in dict.fromkeys(name.partition("/")[0] for name in seconds):
                names = (library,) * 2 if library == "forward_backward" else (f"{library}/mc", f"{library}/empirical")
                cells.append((case, library.replace("_", " + "), *_timed(names, seconds, over, peaks)))
            if "hpccl/everything" in seconds:
                timed = _timed(("hpccl/everything", ""), seconds, over, peaks)
                cells.append((case, "hpccl, norms too", *timed))
    return _rows(head, cells, left=2)


def _timed(names: tuple[str, str], seconds: Details, over: Details, peaks: Details) -> tuple[str, ...]:
    """Return the cells of two runs, with sampled and with true labels; – where one failed or is missing."""
    drawn, _ = names
    times = [f"{seconds[name]:.2f}" if name in seconds else "–" for name in names]
    ratio = f"{over[drawn]:.2f}" if drawn in over else "–"
    peak = f"{peaks[drawn] / _MIB:.0f}" if drawn in peaks else "–"
    both = {drawn, "hpccl/mc"}
    beside = [f"{of[drawn] / of['hpccl/mc']:.2f}" if both <= of.keys() else "–" for of in (seconds, peaks)]
    return (*times, ratio, peak, *beside)


def _pull(results: Sequence[Details]) -> list[str]:
    head = (
        "model",
        "processor",
        "processes",
        "cores",
        "trace kept",
        "products",
        "exact",
        "truncated",
        "nothing, once more (noise)",
        "exact, processor time",
        "truncated, processor time",
        "relative error of the truncated pull",
        "Gflop of the exact pull",
        "of the truncated",
        "bytes a step without the pull",
        "bytes that the pull adds",
        "exact factors of a rank, MiB",
        "truncated",
    )
    cells = []
    for result in results:
        details, machine = result["details"], result["machine"]
        for case, found in details["cases"].items():
            for nproc, of in found["processes"].items():
                kept, products = f"{details['keep_trace']:.0%}", details.get("products", "fp32")
                where = (machine["cpu"], nproc, str(machine["cores"]), kept, products)
                cells.append((case, *where, *_of_pull(found, of)))
    return _rows(head, cells, left=2)


def _of_pull(found: Details, of: Details) -> tuple[str, ...]:
    sent = of["collective_bytes"]
    return (
        *(f"{of['step_ratio'][form]:.3f}" for form in (*_FORMS, "again")),
        *(f"{of['processor_time_ratio'][form]:.3f}" for form in _FORMS),
        f"{found['relative_error']:.1e}",
        *(f"{found['gflop'][form]:.1f}" for form in _FORMS),
        f"{sent['plain']:,}",
        f"{max((sent[form] - sent['plain'] for form in _FORMS), key=abs):,}",
        *(f"{of['factor_bytes_per_rank'][form] / _MIB:.1f}" for form in _FORMS),
    )


def _engines(results: Sequence[Details]) -> list[str]:
    head = (
        "model",
        "engine",
        "processor",
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
        (f"{name}@{case['size']}", engine, result["machine"]["cpu"], nproc, *_of_engine(measured))
        for result in results
        for name, case in result["details"]["cases"].items()
        for engine, sizes in case["engines"].items()
        for nproc, measured in sizes.items()
    ]
    return _rows(head, sorted(cells, key=lambda row: (row[0], int(row[3]), row[1])), left=3)


def _engines_worst(results: Sequence[Details]) -> list[str]:
    """Return the headlines over all files: the worst engine and network; of duplicates, the less noisy one counts."""
    runs: dict[tuple[str, str], dict[str, Details]] = {}
    for result in results:
        for name, case in result["details"]["cases"].items():
            for engine, sizes in case["engines"].items():
                known = runs.setdefault((f"{name}@{case['size']}", engine), {})
                known |= {nproc: min(known.get(nproc, of), of, key=_noise) for nproc, of in sizes.items()}
    pairs = {key: sizes["2"] for key, sizes in runs.items() if "2" in sizes}

    def worst(label: str, ratio: str, method: str) -> tuple[str, str, str]:
        model, engine = max(pairs, key=lambda key: pairs[key][ratio][method])
        return label, f"{pairs[model, engine][ratio][method]:.3f}", f"{model}, {engine}"

    cells = [
        worst(f"{method}, by {how}, 2 processes", ratio, method)
        for method in reversed(_FORMS)
        for ratio, how in (("clock_ratio", "the clock"), ("processor_ratio", "processor time"))
    ]
    extra = {key: max((of["extra_bytes"] for of in sizes.values()), key=abs) for key, sizes in runs.items()}
    most = max(extra, key=lambda key: abs(extra[key]))
    cells.append(("extra bytes", f"{extra[most]:,}", ", ".join(most) if extra[most] else "all"))
    for (model, engine), sizes in sorted(runs.items()):
        if engine in {"fsdp2", "zero-3"} and {"2", "4"} <= sizes.keys():
            falls = {
                method: peak / sizes["2"]["peak_bytes"][method] for method, peak in sizes["4"]["peak_bytes"].items()
            }
            method = max(falls, key=lambda each: falls[each])
            cells.append(("peak memory, 4 processes over 2", f"{falls[method]:.3f}", f"{model}, {engine}, {method}"))
    return _rows(("worst", "", "of"), cells)


def _noise(of: Details) -> float:
    return abs(float(of["clock_ratio"]["again"]) - 1)


def _of_engine(of: Details) -> tuple[str, ...]:
    """Return the cells of an engine, – for memory that was not measured."""
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


def _reconstruction(results: Sequence[Details]) -> list[str]:
    """Return medians over the points of the trajectory."""
    (result,) = results
    cells = []
    for name, medians in result["details"]["medians"].items():
        prior, _, m = name.partition("/")
        measures = ("cosine", "relative_error", "change_cosine", "change_error")
        numbers = [f"{medians[key]:.4f}" if key in medians else "–" for key in measures]
        cells.append((prior, m, *numbers))
    head = ("prior", "m", "cosine", "relative error", "cosine with the change", "relative error of the change")
    return _rows(head, cells)


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


def _memory_selectors(results: Sequence[Details]) -> list[str]:
    (result,) = results
    rows = result["details"]["rows"]
    errors = {(row["prior"], row["selector"]): mean(row["errors"]) for row in rows}
    right = {(row["prior"], row["selector"]): mean(row["accuracies"]) for row in rows}
    priors, selectors = (list(dict.fromkeys(row[key] for row in rows)) for key in ("prior", "selector"))
    head = ["selector", *(f"{prior}: {what}" for prior in priors for what in ("error", "accuracy, %"))]
    cells = [
        (selector, *(
            cell
            for prior in priors
            for cell in (f"{errors[prior, selector]:.2f}", f"{100 * right[prior, selector]:.1f}")
        ))
        for selector in selectors
    ]  # fmt: skip
    return _rows(head, cells)


def _optimizers(results: Sequence[Details]) -> list[str]:
    (result,) = results
    of = result["details"]
    over, processor, held = of["time_over"], of["processor_time_over_adamw"], of["state_bytes_per_weight"]
    head = ("network", "optimiser", "over SGD", "over AdamW", "over AdamW, processor time", "state, bytes a weight")
    cells = [
        (
            model,
            name,
            f"{over['sgd'][model].get(name, 1):.2f}",
            f"{over['adamw'][model].get(name, 1):.2f}",
            f"{processor[model].get(name, 1):.2f}",
            f"{held[model][name]:.1f}",
        )
        for model in held
        for name in held[model]
    ]
    return _rows(head, cells, left=2)


def _methods(results: Sequence[Details]) -> list[str]:
    """Return our methods and their opponents, by processor time."""
    (result,) = results
    of = result["details"]
    over, peers, peaks, own = (of[key] for key in ("time_over_finetune", "time_over_peer", "peak_bytes", "peer_of"))
    head = ("method", "a step, ms", "over finetune", "ours over it", "peak memory, MiB")
    cells = [
        (
            name,
            f"{1e3 * seconds:.0f}",
            f"{over.get(name, 1):.2f}",
            f"{peers[name]:.2f} ({own[name]})" if name in peers else "–",
            f"{peaks[name] / _MIB:.0f}" if name in peaks else "–",
        )
        for name, seconds in of["processor_seconds"].items()
    ]
    return _rows(head, cells)


def _allocator(results: Sequence[Details]) -> list[str]:
    (result,) = results
    head = ("network", "training, images/s", "with memory kept", "inference, images/s", "with memory kept", "peak")
    cells = [
        (
            name,
            f"{case['own']['training']:.0f}",
            f"{case['ratio']['training']:.2f}",
            f"{case['own']['inference']:.0f}",
            f"{case['ratio']['inference']:.2f}",
            f"{case['ratio']['peak']:.2f}",
        )
        for name, case in result["details"]["cases"].items()
    ]
    return _rows(head, cells)


_TABLES: dict[str, tuple[str, Callable[[Sequence[Details]], list[str]]]] = {
    "curvature": ("curvature_*.json", _curvature),
    "pull": ("pull_*.json", _pull),
    "engines": ("engines*.json", _engines),
    "engines_worst": ("engines*.json", _engines_worst),
    "reconstruction": ("reconstruction.json", _reconstruction),
    "reconstruction_wins": ("reconstruction.json", _headline),
    "task_sum": ("task_sum.json", _task_sum),
    "data_loading": ("data_loading.json", _headline),
    "selection": ("selection.json", _selection),
    "memory_selectors": ("memory_selectors.json", _memory_selectors),
    "optimizers": ("optimizers.json", _optimizers),
    "methods": ("methods.json", _methods),
    "allocator": ("allocator.json", _allocator),
    "submit": ("submit.json", _headline),
    "step_overhead": ("step_overhead.json", _headline),
    "task_growth": ("task_growth.json", _headline),
}


if __name__ == "__main__":
    for path in PAGES:
        content = filled(path.read_text(), FOLDER)
        with replacing(path) as beside:
            beside.write_text(content)
