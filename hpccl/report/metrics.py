"""Figures of merit of continual learning and of classifiers; pure functions of numpy arrays.

Legend: T tasks, a[t, j] in [0, 1] the test accuracy on task j after learning task t (both from 0), NaN where it was not
measured; k the last task learned; b[j] the accuracy on task j of the untrained network. A figure that needs a value
that was not measured is NaN.

Sources: Lopez-Paz and Ranzato 2017 (GEM, sec. 2) for average accuracy, BWT and FWT; Chaudhry et al. 2018 (Riemannian
walk, eq. 3 and 4) for forgetting; Rebuffi et al. 2017 (iCaRL, sec. 4.1) for average incremental accuracy; Riemer et al.
2019 (MER, sec. 5) for learning accuracy; Guo et al. 2017 (On calibration, eq. 3) for ECE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "NUM_BINS",
    "Setting",
    "accuracy",
    "accuracy_matrix",
    "average_accuracy",
    "average_incremental_accuracy",
    "average_of_curve",
    "backward_transfer",
    "calibration_bins",
    "calibration_error",
    "expected_calibration_error",
    "forgetting",
    "forward_transfer",
    "last_of_curve",
    "last_task",
    "learning_accuracy",
    "matrix",
    "negative_log_likelihood",
    "num_tested",
    "performance_drop",
    "union_accuracy",
    "untrained",
]

Floats: TypeAlias = npt.NDArray[np.float64]
Setting: TypeAlias = Literal["task_incremental", "class_incremental"]
NUM_BINS = 15

# ---------------------------------------------------------------- from events to a matrix


def matrix(
    evaluations: Sequence[Mapping[str, Any]], num_tasks: int, *, setting: Setting, figure: str = "accuracy"
) -> Floats:
    """[T, T] a figure of each task (column) after each task (row), NaN where not measured.

    Args:
        evaluations: `evaluate` events; the last one per task counts. Task -1 (untrained) is left out.
        num_tasks: T.
        setting: which classes compete.
        figure: accuracy, nll or ece.
    """
    values = np.full((num_tasks, num_tasks), np.nan)
    for event in evaluations:
        if event["task"] >= 0:
            values[event["task"]] = _row(event, num_tasks, setting, figure)
    return values


def accuracy_matrix(evaluations: Sequence[Mapping[str, Any]], num_tasks: int, setting: Setting) -> Floats:
    """[T, T] the accuracies a[t, j]."""
    return matrix(evaluations, num_tasks, setting=setting)


def untrained(evaluations: Sequence[Mapping[str, Any]], num_tasks: int) -> Floats:
    """[T] b, the task-incremental accuracies before any training (row -1); NaN where not measured."""
    before = [event for event in evaluations if event["task"] == -1]
    return _row(before[-1], num_tasks, "task_incremental", "accuracy") if before else np.full(num_tasks, np.nan)


def _row(event: Mapping[str, Any], num_tasks: int, setting: Setting, figure: str) -> Floats:
    row = np.full(num_tasks, np.nan)
    for result in event["results"]:
        measured = result.get(setting)
        if measured is not None and measured.get(figure) is not None:
            row[result["task"]] = float(measured[figure])
    return row


# ---------------------------------------------------------------- continual learning


def last_task(a: Floats) -> int:
    """k, the last task after which anything was measured; -1 if none."""
    rows = np.flatnonzero(~np.isnan(a).all(axis=1)) if a.size else np.array([], dtype=np.int64)
    return int(rows[-1]) if len(rows) else -1


def _mean(values: Floats) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def average_accuracy(a: Floats, *, after: int | None = None) -> float:
    """A_k = 1/(k+1) sum_{j <= k} a[k, j] (Lopez-Paz and Ranzato 2017, ACC).

    Args:
        a: [T, T].
        after: k; None: the last task learned.
    """
    k = last_task(a) if after is None else after
    return _mean(a[k, : k + 1]) if k >= 0 else float("nan")


def average_incremental_accuracy(a: Floats) -> float:
    """1/(k+1) sum_{t <= k} A_t (Rebuffi et al. 2017)."""
    return _mean(np.array([average_accuracy(a, after=t) for t in range(last_task(a) + 1)]))


def num_tested(evaluations: Sequence[Mapping[str, Any]], num_tasks: int) -> Floats:
    """[T] test examples of each task; NaN where nothing was measured."""
    sizes = np.full(num_tasks, np.nan)
    for result in (result for event in evaluations for result in event["results"]):
        sizes[result["task"]] = result.get("num", np.nan)
    return sizes


def union_accuracy(a: Floats, sizes: Floats) -> Floats:
    """[T] accuracy on the test examples of all tasks seen, sum_{j <= t} n_j a[t, j] / sum_{j <= t} n_j; NaN if unknown.

    With class-incremental accuracies, this is the accuracy of one classifier of all seen classes on all their test
    images (A_t in iCaRL and TOPIC). It equals `average_accuracy` where tasks have equally many test images.

    Args:
        a: [T, T].
        sizes: [T] n, of `num_tested`.
    """
    seen = np.tril(np.ones(a.shape, dtype=bool))
    n = np.where(seen, sizes, 0.0)  # unseen tasks may not have been measured
    found: Floats = (n * np.where(seen, a, 0.0)).sum(axis=1) / n.sum(axis=1)
    return found


def last_of_curve(curve: Floats) -> float:
    """Return A_k, after the last task learned; NaN before the first."""
    learned = _learned(curve)
    return float(curve[learned - 1]) if learned else float("nan")


def average_of_curve(curve: Floats, *, include_first: bool = True) -> float:
    """Return the mean of A_0, ..., A_k up to the last task learned; there are two conventions.

    Args:
        curve: [T] of `union_accuracy`.
        include_first: count A_0, on the first task alone (iCaRL), or not (the tables of BiC and WA).
    """
    measured = curve[: _learned(curve)]
    return _mean(measured if include_first else measured[1:])


def performance_drop(curve: Floats) -> float:
    """PD = A_0 - A_k, from the base session to the last one (few-shot class-incremental learning); NaN after one."""
    learned = _learned(curve)
    return float(curve[0] - curve[learned - 1]) if learned > 1 else float("nan")


def _learned(curve: Floats) -> int:
    known = np.flatnonzero(~np.isnan(curve))
    return int(known[-1]) + 1 if len(known) else 0


def forgetting(a: Floats) -> float:
    """F = 1/k sum_{j < k} (max_{l < k} a[l, j] - a[k, j]) (Chaudhry et al. 2018, eq. 3 and 4).

    The maximum leaves out the last row, so F is negative where the last task helped the earlier ones. Rows before task
    j count where they were measured; NaN after one task, or if a task was not measured before the last one.
    """
    k = last_task(a)
    if k < 1:
        return float("nan")
    earlier = np.where(np.isnan(a[:k, :k]), -np.inf, a[:k, :k]).max(axis=0)
    return _mean(np.where(np.isinf(earlier), np.nan, earlier) - a[k, :k])


def backward_transfer(a: Floats) -> float:
    """BWT = 1/k sum_{j < k} (a[k, j] - a[j, j]) (Lopez-Paz and Ranzato 2017); NaN after one task."""
    k = last_task(a)
    return _mean(a[k, :k] - np.diagonal(a)[:k]) if k >= 1 else float("nan")


def forward_transfer(a: Floats, b: Floats) -> float:
    """FWT = 1/k sum_{1 <= j <= k} (a[j-1, j] - b[j]) (Lopez-Paz and Ranzato 2017); NaN after one task."""
    k = last_task(a)
    return _mean(np.diagonal(a, offset=1)[:k] - b[1 : k + 1]) if k >= 1 else float("nan")


def learning_accuracy(a: Floats) -> float:
    """LA = 1/(k+1) sum_{j <= k} a[j, j] (Riemer et al. 2019): how well a task is learned when it is new.

    LA of a joint run, evaluated after every task, minus LA of a method is the mean of the intransigence of Chaudhry et
    al. 2018.
    """
    return _mean(np.diagonal(a)[: last_task(a) + 1])


# ---------------------------------------------------------------- classifiers


def accuracy(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the share of examples whose most probable class is the label; of ties, the first class is taken.

    Args:
        probabilities: [n, C].
        labels: [n].
    """
    return _mean((np.argmax(np.asarray(probabilities), axis=1) == np.asarray(labels)).astype(np.float64))


def negative_log_likelihood(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """-1/n sum_i log p[i, y_i], nats per example; infinite if a label has probability 0.

    Args:
        probabilities: [n, C].
        labels: [n].
    """
    p = np.asarray(probabilities, dtype=np.float64)
    chosen = p[np.arange(len(p)), np.asarray(labels, dtype=np.int64)]
    with np.errstate(divide="ignore"):
        return _mean(-np.log(chosen))


def calibration_bins(confidence: npt.ArrayLike, correct: npt.ArrayLike, *, num_bins: int = NUM_BINS) -> Floats:
    """[3, num_bins] count, sum of confidence and number correct in bins ((m-1)/M, m/M] of equal width.

    Bins of parts of the data (batches, ranks) add up to the bins of the whole.

    Args:
        confidence: [n] probability of the predicted class; those that are not numbers are left out.
        correct: [n] whether the prediction is the label.
        num_bins: M.
    """
    p, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    p, correct = p[np.isfinite(p)], correct[np.isfinite(p)]
    index = np.clip(np.ceil(p * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    weights = (np.ones_like(p), p, correct.astype(np.float64))
    return np.stack([np.bincount(index, weights=weight, minlength=num_bins) for weight in weights])


def calibration_error(bins: Floats) -> float:
    """ECE = sum_m |B_m|/n |accuracy(B_m) - confidence(B_m)| (Guo et al. 2017, eq. 3); NaN without examples.

    Args:
        bins: [3, M] of `calibration_bins`.
    """
    count, confidence, correct = bins
    total = count.sum()
    return float(np.abs(correct - confidence).sum() / total) if total else float("nan")


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, num_bins: int = NUM_BINS
) -> float:
    """ECE over equal-width bins of the probability of the predicted class (Guo et al. 2017, eq. 3).

    Args:
        probabilities: [n, C].
        labels: [n].
        num_bins: M.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    correct = np.argmax(p, axis=1) == np.asarray(labels)
    return calibration_error(calibration_bins(p.max(axis=1, initial=0.0), correct, num_bins=num_bins))
