"""Comparison of several runs: mean and sample standard deviation over seeds, next to published values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpccl.config.differences import ABSENT, Flat, flat
from hpccl.errors import ConfigError
from hpccl.output import console
from hpccl.report.archive import Recorded, read_runs
from hpccl.report.events import number, valid_json
from hpccl.report.published import FIGURES as PUBLISHED
from hpccl.report.published import Published, PublishedTable, read_published
from hpccl.report.summary import RunReport
from hpccl.report.text import TextTable, percent, plus_minus, signed, time_span

__all__ = [
    "FIGURES",
    "IGNORED",
    "LIKELIHOOD",
    "MEMORY_SIZES",
    "TOP5",
    "Comparison",
    "Group",
    "Statistic",
    "compare_runs",
    "group_cells",
    "group_header",
    "group_table",
    "mean_reconstruction",
    "print_comparison",
    "reconstruction_terms",
    "run_table",
    "statistic",
]

# Attribute of RunReport -> heading, for shares that are printed in percent.
FIGURES: dict[str, str] = {
    "average_accuracy": "average accuracy",
    "average_accuracy_class_incremental": "class-incremental",
    "final_union_accuracy": "class-incremental, pooled",
    "forgetting": "forgetting",
    "bwt": "BWT",
    "learning_accuracy": "learning accuracy",
}
# The same for likelihood, in nats per example, and expected calibration error, a share: lower is better.
LIKELIHOOD: dict[str, str] = {
    "nll": "NLL",
    "ece": "ECE",
    "nll_class_incremental": "class-incremental NLL",
    "ece_class_incremental": "class-incremental ECE",
}
# Where more than 5 classes compete: the share of images whose class is among the 5 likeliest.
TOP5: dict[str, str] = {"top5": "top-5", "top5_class_incremental": "class-incremental top-5"}
_NOTE = (
    "Accuracies in percent, forgetting and BWT in percentage points, all of the network after the last task; "
    "task-incremental unless said otherwise, and means over tasks. Time is wall time, with resumes and without pauses."
)
_POOLED_NOTE = (
    "Pooled: of all test images of all tasks together, so that a task counts by how many it has; "
    "in the column before, each task counts the same."
)

# MEMORY_SIZES have a column of their own. IGNORED keys change a run's cost or random path, but not what is compared.
MEMORY_SIZES = ("memory.size", "memory.total", "memory.fraction")
IGNORED = frozenset({"seed", "train.first_task_from", "data.cache", "data.workers"})

# Of these, methods of one comparison have the same, or a note says otherwise.
_SHARED = (
    *("stream.", "data.", "model.", "optim.", "engine.precision", "evaluate.classifier"),
    *("train.epochs", "train.batch_size", "train.head", "train.label_smoothing", "train.flip_test", "train.ema"),
)

_NEARLY = 0.005  # of two accuracies
_MANY = 2  # settings above which a group shows only those in which it differs from the first group


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
    memory_size: int  # examples kept per task; 0 also if memory is set as a total or as a share of each task
    memory: str  # how much is kept in words: 20, 100 in all, or 10 % of each task; empty for nothing
    settings: str  # settings that distinguish it from other groups of the same method and memory; often empty
    variant: str  # the same in short, for plots
    seeds: list[int]
    runs: list[str]
    members: list[int]  # positions of these in the comparison's runs
    left_out: list[str]  # runs that are not finished, if others are
    configuration: Flat  # all that decides the result except the seed, by dotted key
    statistics: dict[str, Statistic]
    published: Published | None

    @property
    def series(self) -> str:
        """A name that it shares with groups that keep more or fewer examples per task, and with no others."""
        parts = [self.method, self.memory if not self.memory_size else "", self.variant]
        return " ".join(part for part in parts if part)

    @property
    def label(self) -> str:
        """A short name for plots."""
        parts = [self.method, f"m={self.memory}" if self.memory else "", self.variant]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were given, the reports of all runs, and the recorded runs."""

    groups: list[Group]
    runs: list[RunReport]
    published: PublishedTable | None
    recorded: list[Recorded]

    @property
    def dataset(self) -> str | None:
        """The data set of the published values."""
        return self.published.dataset if self.published else None

    def members(self, group: Group) -> list[RunReport]:
        """Return the runs that count in a group."""
        return [self.runs[position] for position in group.members]

    @property
    def figures(self) -> dict[str, str]:
        """The FIGURES that its tables show: pooled accuracy only where it is not nearly the mean over tasks."""
        pairs = [(run.final_union_accuracy, run.average_accuracy_class_incremental) for run in self.runs]
        pooled = any(a is not None and b is not None and abs(a - b) >= _NEARLY for a, b in pairs)
        return {key: heading for key, heading in FIGURES.items() if pooled or key != "final_union_accuracy"}

    def held_out(self, group: Group) -> bool:
        """Whether it was tested on held-out training images (data.validation), no test images."""
        return any(run.validation is not None for run in self.members(group))

    def finished(self, group: Group) -> bool:
        """Whether all its runs are complete: others do not compete, because accuracies after few tasks are high."""
        return all(run.complete for run in self.members(group))

    def to_dict(self) -> dict[str, Any]:
        """Return strict JSON types; settings that all groups share are listed once, above the groups."""
        common = _common([group.configuration for group in self.groups])
        groups = [asdict(group) for group in self.groups]
        for group in groups:
            group["configuration"] = {k: v for k, v in group["configuration"].items() if k not in common}
        written = {
            "format": 2,
            "dataset": self.dataset,
            "configuration": common,
            "groups": groups,
            "runs": [_run_dict(run) for run in self.runs],
        }
        found: dict[str, Any] = valid_json(written)
        return found


def _common(configurations: Sequence[Flat]) -> Flat:
    """Return the settings that all configurations share."""
    first, *others = configurations
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}


def _run_dict(run: RunReport) -> dict[str, Any]:
    keys = (
        "name",
        "method",
        "seed",
        "status",
        "tasks_learned",
        "wall_seconds",
        "weights_sha256",
        *FIGURES,
        *LIKELIHOOD,
        *TOP5,
    )
    last = run.tasks_learned - 1
    return {key: getattr(run, key) for key in keys} | {
        "performance_drop": run.performance_drop,
        "training_seconds": _training_seconds(run),
        "images_trained": _images_trained(run),
        "images_per_second": run.images_per_second,
        "accuracy_after_last": run.accuracy_matrix[last] if run.tasks_learned else [],
        "accuracy_after_last_class_incremental": (
            run.accuracy_matrix_class_incremental[last] if run.tasks_learned else []
        ),
        "reconstruction": {
            term: {figure: mean_reconstruction(run, figure, term) for figure in ("cosine", "relative_error")}
            for term in reconstruction_terms(run)
        },
    }


def compare_runs(paths: Sequence[Path], published: Path | None = None, *, dataset: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        paths: folders of runs, and archives of earlier comparisons.
        published: a CSV file of published values to show next to the runs.
        dataset: the data set in that file; None: the one with as many tasks as the runs.

    Raises:
        FolderError: a path is neither, or a file cannot be read.
        ConfigError: there are no runs, the published values do not fit, or the data set is not clear.
    """
    recorded = read_runs(paths)
    if not recorded:
        raise ConfigError("there is nothing to compare: give the folders of at least one run")
    runs = [run.report() for run in recorded]
    table = read_published(published, dataset=dataset, num_tasks=_num_tasks(runs)) if published is not None else None
    groups = _groups([flat(run.config.identity()) for run in recorded], runs, table.values if table else {})
    return Comparison(groups, runs, table, recorded)


def _num_tasks(runs: Iterable[RunReport]) -> int:
    return max(run.num_tasks for run in runs)


# ---------------------------------------------------------------- grouping


def _groups(
    identities: Sequence[Flat], runs: Sequence[RunReport], published: Mapping[tuple[str, int], Published]
) -> list[Group]:
    members: dict[str, list[int]] = {}
    for position, identity in enumerate(identities):
        key = json.dumps({k: v for k, v in identity.items() if k not in IGNORED}, sort_keys=True)
        members.setdefault(key, []).append(position)
    firsts = [positions[0] for positions in members.values()]
    settings = {
        method: _Settings.of([identities[i] for i in firsts if runs[i].method == method])
        for method in dict.fromkeys(runs[i].method for i in firsts)
    }
    found = []
    for positions in members.values():
        first = positions[0]
        method, memory = _kind(identities[first], runs[first])
        size = int(identities[first]["memory.size"])
        found.append(
            _group(method, settings[method].of_group(identities[first]), {i: runs[i] for i in positions})
            | {"memory_size": size, "memory": memory}
            | {"published": published.get((method, size)) if size or not memory else None}
            | {"configuration": {k: v for k, v in identities[first].items() if k not in IGNORED}}
        )
    return [Group(**fields, variant=_variant(fields, found)) for fields in found]


def _variant(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the group's settings, or instead of several settings the name of its runs if that distinguishes it."""
    alike = [other for other in groups if (other["method"], other["memory"]) == (group["method"], group["memory"])]
    names = [set(other["runs"]) for other in alike]
    told = all(len(own) == 1 for own in names) and len(set.union(*names)) == len(names)
    return str(group["runs"][0]) if told and any(other["settings"].count(" ") for other in alike) else group["settings"]


def _kind(identity: Flat, run: RunReport) -> tuple[str, str]:
    return run.method, _budget(identity)


def _budget(identity: Flat) -> str:
    """Return how much memory is kept, in words; a bare number is examples per task."""
    if identity["memory.total"]:
        return f"{identity['memory.total']} in all"
    if identity["memory.fraction"]:
        return f"{100 * identity['memory.fraction']:g} % of each task"
    return str(identity["memory.size"] or "")


@dataclass(frozen=True)
class _Settings:
    """The settings, except the memory size, in which groups of one method differ, and those of the first group."""

    keys: tuple[str, ...]
    first: Flat

    @classmethod
    def of(cls, alike: Sequence[Flat]) -> _Settings:
        """Return those of the configurations of one method."""
        keys = dict.fromkeys(key for other in alike for key in other if key not in (*IGNORED, *MEMORY_SIZES))
        differing = [key for key in keys if len(_texts(key, alike)) > 1]
        kinds = {key.removesuffix("kind") for key in differing if key.endswith(".kind")}
        return cls(tuple(key for key in differing if not _explained(key, kinds, alike)), alike[0])

    def of_group(self, identity: Flat) -> str:
        """Return a group's `key=value`; if there are many, others than the first list those in which they differ."""
        told = self.keys
        if len(told) > _MANY and identity is not self.first:
            told = tuple(key for key in told if identity.get(key, ABSENT) != self.first.get(key, ABSENT))
        return " ".join(f"{key}={_short(identity[key])}" for key in told if key in identity)


def _texts(key: str, configurations: Iterable[Flat]) -> frozenset[str]:
    """Return the values of a setting, as text."""
    return frozenset(json.dumps(one.get(key, ABSENT), sort_keys=True) for one in configurations)


def _differing_between_methods(groups: Sequence[Group]) -> list[str]:
    """Return the settings of _SHARED that should be the same for all methods, but are not."""
    of_method = [
        [group.configuration for group in groups if group.method == method]
        for method in dict.fromkeys(group.method for group in groups)
    ]
    keys = [key for key in groups[0].configuration if key.startswith(_SHARED)]
    everywhere = [key for key in keys if all(key in group.configuration for group in groups)]
    return [key for key in everywhere if len({_texts(key, alike) for alike in of_method}) > 1]


def _explained(key: str, kinds: set[str], alike: Sequence[Flat]) -> bool:
    """Whether a setting is redundant given the kind: some kinds lack it, and it is equal in all others."""
    if not any(key.startswith(kind) for kind in kinds):
        return False
    held = [other for other in alike if key in other]
    return len(held) < len(alike) and len(_texts(key, held)) == 1


def _short(value: Any) -> str:
    return ",".join(map(_short, value)) if isinstance(value, list) else str(value)


def _group(method: str, settings: str, runs: Mapping[int, RunReport]) -> dict[str, Any]:
    """Return the fields of a Group; only complete runs count, unless there are none."""
    members = [position for position, run in runs.items() if run.complete] or list(runs)
    counted = [runs[position] for position in members]
    return {
        "method": method,
        "settings": settings,
        "seeds": [run.seed for run in counted],
        "runs": [run.name for run in counted],
        "members": members,
        "left_out": [f"{run.name} ({run.status})" for position, run in runs.items() if position not in members],
        "statistics": _statistics(counted),
    }


def _statistics(runs: Sequence[RunReport]) -> dict[str, Statistic]:
    keys = (*FIGURES, "performance_drop", *LIKELIHOOD, *TOP5, "wall_seconds")
    found = {key: statistic([getattr(run, key) for run in runs]) for key in keys}
    return found | {
        "training_seconds": statistic([_training_seconds(run) for run in runs]),
        "images_trained": statistic([_images_trained(run) for run in runs]),
        "images_per_second": statistic([run.images_per_second for run in runs]),
        "reconstruction_cosine": statistic([mean_reconstruction(run, "cosine") for run in runs]),
        "reconstruction_error": statistic([mean_reconstruction(run, "relative_error") for run in runs]),
    }


def _training_seconds(run: RunReport) -> float | None:
    """Return the seconds spent on training steps, summed over tasks; None before the first."""
    return sum(phase.seconds for phase in run.phases if phase.phase == "fit") or None


def _images_trained(run: RunReport) -> int | None:
    """Return the number of images trained on, including repeats and memory; None before the first."""
    return sum(phase.images for phase in run.phases if phase.phase == "fit") or None


def mean_reconstruction(run: RunReport, figure: str, term: str = "total") -> float | None:
    """Return the mean over tasks of a term's `cosine` or `relative_error`; None if never measured or not finite."""
    found = [number((measured["terms"].get(term) or {}).get(figure)) for measured in run.reconstruction]
    values = np.array([np.nan if value is None else value for value in found], dtype=np.float64)
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def reconstruction_terms(run: RunReport) -> list[str]:
    """Return the terms whose gradient was measured and is not always zero, in order of appearance."""
    measured = [found["terms"] for found in run.reconstruction]
    return list(
        dict.fromkeys(term for terms in measured for term, errors in terms.items() if errors and number(errors["norm"]))
    )


def statistic(values: Sequence[float | None]) -> Statistic:
    """Return the statistic of the values that are not None."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not known.size:
        return Statistic(None, None, 0)
    spread = known.size > 1 and bool(np.isfinite(known).all())  # a likelihood may be infinite
    return Statistic(float(known.mean()), float(known.std(ddof=1)) if spread else None, int(known.size))


# ---------------------------------------------------------------- the table


def group_table(comparison: Comparison) -> TextTable:
    """Return a table with one row per group: accuracy, forgetting and time, next to published values."""
    left = _num_left(comparison)
    return TextTable("Accuracy and forgetting", _header(comparison), _rows(comparison), left, _notes(comparison))


def run_table(comparison: Comparison) -> TextTable:
    """Return a table with one row per run."""
    header = ["run", "method", "status", "seed", "tasks", *comparison.figures.values(), "time"]
    return TextTable("Runs", header, _run_rows(comparison), left=3)


def group_header(comparison: Comparison) -> list[str]:
    """Return the headings of `group_cells`."""
    return ["method", "m", *(["settings"] if _has_settings(comparison) else [])]


def group_cells(comparison: Comparison, group: Group, *, settings: str | None = None) -> list[str]:
    """Return the cells that identify a group; `settings` replaces its short variant."""
    told = group.variant if settings is None else settings
    return [group.method, group.memory or "–", *([told or "–"] if _has_settings(comparison) else [])]


def _in_full(group: Group) -> str:
    """Return a group's settings, after the name that stands for them elsewhere, if any."""
    return group.settings if group.variant == group.settings else f"{group.variant}: {group.settings}".rstrip(": ")


def _header(comparison: Comparison) -> list[str]:
    header = [*group_header(comparison), "seeds"]
    for key, heading in comparison.figures.items():
        header += [heading, *([f"{heading}, published"] if _has_published(comparison, key) else [])]
    return [*header, "time"]


def _rows(comparison: Comparison) -> list[list[str]]:
    return [_row(comparison, group) for group in comparison.groups]


def _row(comparison: Comparison, group: Group) -> list[str]:
    row = [*group_cells(comparison, group, settings=_in_full(group)), _seeds(comparison, group)]
    for key in comparison.figures:
        statistic = group.statistics[key]
        row.append(plus_minus(statistic.mean, statistic.std))
        if _has_published(comparison, key):
            mean, std = group.published.figures.get(key, (None, None)) if group.published else (None, None)
            row.append(plus_minus(mean, std))
    return [*row, time_span(group.statistics["wall_seconds"].mean)]


def _seeds(comparison: Comparison, group: Group) -> str:
    """Return how many runs count, and after how many tasks if they are not finished."""
    counted = comparison.members(group)
    if comparison.finished(group):
        return str(len(counted))
    return f"{len(counted)}, after {min(run.tasks_learned for run in counted)} of {counted[0].num_tasks} tasks"


def _has_settings(comparison: Comparison) -> bool:
    return any(group.settings for group in comparison.groups)


def _has_published(comparison: Comparison, key: str) -> bool:
    return comparison.dataset is not None and key in PUBLISHED


def _notes(comparison: Comparison) -> list[str]:
    notes = [_NOTE, *([_POOLED_NOTE] if "final_union_accuracy" in comparison.figures else [])]
    held = [run.name for run in comparison.runs if run.validation is not None]
    notes += (
        [f"Not on test images but on held-out training images (data.validation): {', '.join(held)}."] if held else []
    )
    twice = [group.label for group in comparison.groups if len(set(group.seeds)) < len(group.seeds)]
    notes += [f"Several runs of one seed, each of which counts: {', '.join(twice)}."] if twice else []
    few = [
        group.label
        for group in comparison.groups
        if any(0 < group.statistics[key].n < len(group.seeds) for key in comparison.figures)
    ]
    notes += [f"Some figures are of fewer runs than there are: {', '.join(few)}."] if few else []
    if between := _differing_between_methods(comparison.groups):
        notes.append(f"Not the same for all methods: {', '.join(between)} (comparison.json has the values).")
    left_out = [name for group in comparison.groups for name in group.left_out]
    notes += [f"Not finished and left out: {', '.join(left_out)}."] if left_out else []
    early = [run.name for group in comparison.groups for run in comparison.members(group) if run.status != "done"]
    notes += [f"Not finished, shown as they stand: {', '.join(early)}."] if early else []
    notes += [f"{run.name}: {run.message}." for run in comparison.runs if run.status == "done" and run.message]
    return notes


def _run_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [
            run.name,
            run.method,
            run.status,
            str(run.seed),
            f"{run.tasks_learned}/{run.num_tasks}",
            *((signed if key == "bwt" else percent)(getattr(run, key)) for key in comparison.figures),
            time_span(run.wall_seconds),
        ]
        for run in comparison.runs
    ]


def print_comparison(comparison: Comparison, target: Console | None = None) -> None:
    """Print the table and its notes.

    Args:
        comparison: what to print.
        target: None for standard output, which is 200 columns wide unless it is a terminal.
    """
    target = target or console()
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    left = _num_left(comparison)
    for position, heading in enumerate(_header(comparison)):
        table.add_column(escape(heading), justify="left" if position < left else "right", no_wrap=position == 0)
    for row in _rows(comparison):
        table.add_row(*map(escape, row))
    target.print(table)
    for note in _notes(comparison):
        target.print(note, style="dim", markup=False, highlight=False)


def _num_left(comparison: Comparison) -> int:
    return 3 if _has_settings(comparison) else 1
