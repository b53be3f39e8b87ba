"""Further tables of a comparison: paired differences, calibration, cost, accuracy of each task, reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from hpccl.report.compare import (
    LIKELIHOOD,
    TOP5,
    Comparison,
    Group,
    Statistic,
    group_cells,
    group_header,
    mean_reconstruction,
    reconstruction_terms,
    statistic,
)
from hpccl.report.events import number
from hpccl.report.metrics import NUM_BINS
from hpccl.report.summary import RunReport
from hpccl.report.text import TextTable, fixed, plus_minus, whole

__all__ = [
    "behind_best",
    "calibration",
    "cost",
    "paired",
    "rank_correlation",
    "reconstruction",
    "tables",
    "task_accuracy",
]

_CALIBRATION_NOTE = (
    "Of the network after the last task, means over the tasks learned. NLL: negative log-likelihood, nats an image; "
    f"ECE: expected calibration error in percent, {NUM_BINS} bins. Lower is better for both. Accuracies in percent."
)
# Figures in the order of their columns: scale of the value, and digits.
_CALIBRATION: dict[str, tuple[float, int]] = {
    "average_accuracy": (100, 1),
    "top5": (100, 1),
    "nll": (1, 3),
    "ece": (100, 1),
    "average_accuracy_class_incremental": (100, 1),
    "top5_class_incremental": (100, 1),
    "nll_class_incremental": (1, 3),
    "ece_class_incremental": (100, 1),
}
_NOT_PAIRED = frozenset({"bwt"})  # much the same as forgetting
_PAIRED_NOTE = (
    "in percentage points: mean ± standard error over the seeds that both have. "
    "Better: with how many of them the average accuracy is higher."
)
_BEHIND_NOTE = (
    "Average accuracy less that of the best with as large a memory, in percentage points: mean ± standard error over "
    "the seeds that both have (±: of two or more). The best is that with the highest mean over all of its own seeds."
)
_COST_NOTE = (
    "Wall-clock is total time, with resumes and without pauses; training is the steps alone. Tasks trained are fewer "
    "than all where another run gave the first (train.first_task_from) or only the last was trained (train.only_last): "
    "then times and images are of these alone."
)
_PUBLISHED_NOTE = (
    "Published minutes are of training the tasks that the published runs trained themselves, on another machine."
)
_TASK_NOTE = "Test accuracy in percent, task-incremental, of the network after the last task."
_RECONSTRUCTION_NOTE = (
    "Against the true gradient of all past tasks, at the weights at the end of each task; the mean is over tasks."
)
_FIGURES = {"cosine": "cosine", "relative_error": "relative error"}
_TITLES = {"cosine": "Gradient reconstruction, cosine", "relative_error": "Gradient reconstruction, relative error"}


def tables(comparison: Comparison) -> list[TextTable]:
    """Return the tables that have rows, in order."""
    found = [
        behind_best(comparison),
        paired(comparison),
        calibration(comparison),
        cost(comparison),
        task_accuracy(comparison),
    ]
    found += [reconstruction(comparison, key) for key in _FIGURES]
    return [table for table in found if table.rows]


# ---------------------------------------------------------------- seed by seed


def paired(comparison: Comparison) -> TextTable:
    """Differences between each group and the first one, over the seeds that both have.

    Groups that share fewer than two seeds with the first one are left out, and so are groups with unfinished runs.
    What a seed decides for both, such as the first task, cancels, so that differences vary less than the groups do.
    """
    first, *others = comparison.groups
    figures = {key: heading for key, heading in comparison.figures.items() if key not in _NOT_PAIRED}
    header = [*group_header(comparison), "shared seeds", *figures.values(), "better"]
    rows = [row for group in others if (row := _paired_row(comparison, first, group, tuple(figures)))]
    notes = [f"Less {first.label}, {_PAIRED_NOTE}"]
    title = "Differences from the first, seed by seed"
    return TextTable(title, header, rows, len(group_header(comparison)), notes)


def _paired_row(comparison: Comparison, first: Group, group: Group, figures: Sequence[str]) -> list[str]:
    ours, theirs = (_by_seed(comparison.members(each)) for each in (group, first))
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) < 2 or not (comparison.finished(first) and comparison.finished(group)):
        return []
    cells = [_mean_and_error([_less(ours[seed], theirs[seed], key) for seed in seeds]) for key in figures]
    higher = sum((_less(ours[seed], theirs[seed], "average_accuracy") or 0.0) > 0 for seed in seeds)
    return [*group_cells(comparison, group), str(len(seeds)), *cells, f"{higher} of {len(seeds)}"]


def _mean_and_error(differences: Sequence[float | None]) -> str:
    found = statistic(differences)
    error = None if found.std is None else found.std / math.sqrt(found.n)
    return plus_minus(found.mean, error, scale=100, digits=1)


def _by_seed(runs: Iterable[RunReport]) -> dict[int, list[RunReport]]:
    found: dict[int, list[RunReport]] = {}
    for run in runs:
        found.setdefault(run.seed, []).append(run)
    return found


def _less(runs: Sequence[RunReport], others: Sequence[RunReport], figure: str) -> float | None:
    """Return the difference of the means over runs of one seed."""
    one, two = (statistic([getattr(run, figure) for run in each]).mean for each in (runs, others))
    return None if one is None or two is None else one - two


# ---------------------------------------------------------------- against the best


def behind_best(comparison: Comparison) -> TextTable:
    """Average accuracy minus that of the best, by method and memory size, of finished runs; empty below two sizes."""
    finished = [
        group
        for group in comparison.groups
        if group.statistics["average_accuracy"].mean is not None and comparison.finished(group)
    ]
    best: dict[int, Group] = {}
    for size in sorted({group.memory_size for group in finished} - {0}):
        alike = [group for group in finished if group.memory_size == size]
        if len(alike) > 1:
            best[size] = max(alike, key=lambda group: group.statistics["average_accuracy"].mean or 0.0)
    rows = [
        [series, *(_behind(comparison, [one for one in finished if one.series == series], best[size]) for size in best)]
        for series in dict.fromkeys(group.series for group in finished if group.memory_size in best)
    ]
    header = ["method", *(f"m = {size}" for size in best)]
    return TextTable("Behind the best, by memory", header, rows if len(best) > 1 else [], 1, [_BEHIND_NOTE])


def _behind(comparison: Comparison, series: Sequence[Group], best: Group) -> str:
    group = next((group for group in series if group.memory_size == best.memory_size), None)
    if group is None:
        return plus_minus(None, None)
    if group is best:
        return "best"
    ours, theirs = (_by_seed(comparison.members(each)) for each in (group, best))
    return _mean_and_error([_less(ours[seed], theirs[seed], "average_accuracy") for seed in ours if seed in theirs])


# ---------------------------------------------------------------- likelihood and calibration


def calibration(comparison: Comparison) -> TextTable:
    """Accuracy, likelihood and calibration error by group, in both settings; no row where none was measured.

    Top-5 accuracies have a column where one was measured.
    """
    figures = [key for key in _CALIBRATION if key not in TOP5 or _has(comparison, key)]
    headings = {**comparison.figures, **TOP5, **LIKELIHOOD}
    header = [*group_header(comparison), "seeds", *(headings[key] for key in figures)]
    rows = [
        [*group_cells(comparison, group), str(len(group.seeds)), *_calibration_cells(group, figures)]
        for group in comparison.groups
        if any(group.statistics[key].mean is not None for key in LIKELIHOOD)
    ]
    notes = [_CALIBRATION_NOTE, *_distances_note(comparison)]
    return TextTable("Likelihood and calibration", header, rows, len(group_header(comparison)), notes)


def _has(comparison: Comparison, key: str) -> bool:
    return any(group.statistics[key].mean is not None for group in comparison.groups)


def _calibration_cells(group: Group, figures: Sequence[str]) -> list[str]:
    found = [(group.statistics[key], *_CALIBRATION[key]) for key in figures]
    return [plus_minus(of.mean, of.std, scale=scale, digits=digits) for of, scale, digits in found]


def _distances_note(comparison: Comparison) -> list[str]:
    apart = [group.label for group in comparison.groups if group.configuration["evaluate.classifier"] != "head"]
    return [f"From distances to class means, which are not probabilities: {', '.join(apart)}."] if apart else []


# ---------------------------------------------------------------- cost


def cost(comparison: Comparison) -> TextTable:
    """Wall-clock time, speed and images by group, next to published minutes if there are any."""
    published = any(group.published and group.published.minutes[0] is not None for group in comparison.groups)
    header = [*group_header(comparison), "seeds", "wall-clock, minutes", "training, minutes"]
    header += ["training, minutes, published"] if published else []
    header += ["images/s while training", "images trained", "tasks trained"]
    rows = [_cost_row(comparison, group, published=published) for group in comparison.groups]
    notes = [_COST_NOTE, *([_PUBLISHED_NOTE] if published else [])]
    return TextTable("Wall-clock and images", header, rows, len(group_header(comparison)), notes)


def _cost_row(comparison: Comparison, group: Group, *, published: bool) -> list[str]:
    row = [*group_cells(comparison, group), str(len(group.seeds))]
    row += [_minutes(group.statistics["wall_seconds"]), _minutes(group.statistics["training_seconds"])]
    if published:
        row.append(plus_minus(*(group.published.minutes if group.published else (None, None)), scale=1))
    rate = group.statistics["images_per_second"]
    trained = sorted({_tasks_trained(run) for run in comparison.members(group)})
    return [
        *row,
        plus_minus(rate.mean, rate.std, scale=1, digits=0),
        whole(group.statistics["images_trained"].mean),
        ", ".join(map(str, trained)),
    ]


def _minutes(seconds: Statistic) -> str:
    return plus_minus(seconds.mean, seconds.std, scale=1 / 60)


def _tasks_trained(run: RunReport) -> int:
    return len({phase.task for phase in run.phases if phase.phase == "fit"})


# ---------------------------------------------------------------- accuracy of each task


def task_accuracy(comparison: Comparison) -> TextTable:
    """Accuracy on each task after the last one, with published values in a row below."""
    num_tasks = max(run.num_tasks for run in comparison.runs)
    published = any(group.published and group.published.tasks for group in comparison.groups)
    header = [*group_header(comparison), *(["of"] if published else [])]
    rows: list[list[str]] = []
    for group in comparison.groups:
        cells, runs = group_cells(comparison, group), comparison.members(group)
        own = [statistic([_after_last(run, task) for run in runs]) for task in range(num_tasks)]
        rows.append([*cells, *(["here"] if published else []), *(plus_minus(one.mean, one.std) for one in own)])
        if group.published and group.published.tasks:
            rows.append([*cells, "published", *(plus_minus(*figure) for figure in group.published.tasks)])
    left = len(header)
    header += [f"t{task + 1}" for task in range(num_tasks)]
    return TextTable("Accuracy of each task after the last one", header, rows, left, [_TASK_NOTE])


def _after_last(run: RunReport, task: int) -> float | None:
    """Return the final accuracy on a task; None if it was not learned."""
    return run.accuracy_matrix[run.tasks_learned - 1][task] if task < run.tasks_learned else None


# ---------------------------------------------------------------- gradient reconstruction


def reconstruction(comparison: Comparison, figure: str) -> TextTable:
    """Reconstruction of the true gradient of all past tasks by each term, after each task but the first.

    figure: `cosine` or `relative_error`
    """
    tasks = sorted({measured["task"] for run in _counted(comparison) for measured in run.reconstruction})
    header = [*group_header(comparison), "term"]
    rows = [
        [*group_cells(comparison, group), term, *_term_cells(comparison.members(group), tasks, term, figure)]
        for group in comparison.groups
        for term in _terms(comparison.members(group))
    ]
    notes = [_RECONSTRUCTION_NOTE, *_correlation_note(comparison, figure)]
    left = len(header)
    return TextTable(_TITLES[figure], [*header, *(f"after t{task + 1}" for task in tasks), "mean"], rows, left, notes)


def _counted(comparison: Comparison) -> list[RunReport]:
    return [run for group in comparison.groups for run in comparison.members(group)]


def _terms(runs: Sequence[RunReport]) -> list[str]:
    return list(dict.fromkeys(term for run in runs for term in reconstruction_terms(run)))


def _term_cells(runs: Sequence[RunReport], tasks: Sequence[int], term: str, figure: str) -> list[str]:
    digits = 2 if figure == "cosine" else 3
    found = [statistic([_measured(run, task, term, figure) for run in runs]) for task in tasks]
    found.append(statistic([mean_reconstruction(run, figure, term) for run in runs]))
    return [plus_minus(one.mean, one.std, scale=1, digits=digits) for one in found]


def _measured(run: RunReport, task: int, term: str, figure: str) -> float | None:
    """Return a term's figure after a task; None if it was not measured or is not finite."""
    for measured in run.reconstruction:
        if measured["task"] == task:
            value = number((measured["terms"].get(term) or {}).get(figure))
            return value if value is not None and math.isfinite(value) else None
    return None


def _correlation_note(comparison: Comparison, figure: str) -> list[str]:
    found = rank_correlation(comparison, lambda run: mean_reconstruction(run, figure))
    if found is None:
        return []
    value, num_runs = found
    sides = f"a run's mean {_FIGURES[figure]} of the total with its average accuracy"
    return [f"Rank correlation (Spearman) of {sides}: {fixed(value, 2)} over {num_runs} runs."]


def rank_correlation(comparison: Comparison, figure: Callable[[RunReport], float | None]) -> tuple[float, int] | None:
    """Return Spearman's rank correlation of a figure with average accuracy over finished runs, and their number.

    None for fewer than three runs, or if all values of one of the two are equal.
    """
    from scipy.stats import spearmanr

    pairs = [(figure(run), run.average_accuracy) for run in _counted(comparison) if run.complete]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(known) < 3 or any(len(set(side)) == 1 for side in zip(*known, strict=True)):
        return None
    return float(spearmanr(*zip(*known, strict=True)).statistic), len(known)
