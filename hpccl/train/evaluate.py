"""Accuracy, likelihood and calibration on the test data of every task; one pass gives task- and class-incremental."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hpccl.data.protocols import Task, heads_of, task_numbers
from hpccl.errors import DataError, DivergedError
from hpccl.report.metrics import calibration_bins, calibration_error
from hpccl.train.end_of_task import featuring
from hpccl.train.loss import row_nats
from hpccl.train.passes import answers, with_mirror_images
from hpccl.train.state import RunState, World

__all__ = ["evaluate", "evaluate_all"]

_TOP = 5  # classes, the likeliest ones, as is usual for ImageNet

Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


def evaluate(task: Task, state: RunState, world: World) -> None:
    """Test after training on `task`, log the results and keep them in the state.

    Raises:
        DataError: none of a task's test images can be decoded.
        DivergedError: logits are not finite.
        Stopped: the run was asked to stop; nothing was changed.
    """
    with world.phase(task, "evaluate") as phase:
        scores = _tested(state, world, task.index)
        results = [_result(each, scores, task.index, world) for each in world.stream.tasks]
        phase.images = sum(result["num"] for result in results)
    calibration = {}
    if world.config.own_networks:
        # Every task has its own network: results of earlier networks stay.
        results = state.results[: task.index] + results[task.index :]
    else:
        calibration = _calibration(scores, world.stream.tasks[: task.index + 1])
    state.results = results
    world.log.write("evaluate", task=task.index, results=results, calibration=calibration)


def evaluate_all(state: RunState, world: World, *, last: int) -> list[dict[str, Any]]:
    """Return the results of every task of the stream, including those not yet trained (for forward transfer).

    Each is {task, num, task_incremental, class_incremental}, the latter two {accuracy, nll, ece} and, where more than 5
    classes compete, top5: the share of images whose class is among the 5 likeliest. In class_incremental the classes of
    tasks 0..last compete; it is None for later tasks and where every task has its own network.

    Raises:
        DataError: none of a task's test images can be decoded.
        DivergedError: logits are not finite.
        Stopped: the run was asked to stop.
    """
    scores = _tested(state, world, last)
    return [_result(task, scores, last, world) for task in world.stream.tasks]


def _tested(state: RunState, world: World, last: int) -> Scores:
    """Return the `_scores` [N, 9] of all test images."""
    count = world.stream.tasks[-1].samples("test").stop
    scores = [_scores(*seen, world, last) for seen in _logits(count, state, world, last)]
    empty = torch.zeros(0, 9, device=state.engine.device)
    gathered: Scores = world.comm.gather(torch.cat([empty, *scores])).cpu().numpy()
    for task in world.stream.tasks:
        _check(task, _rows(task, gathered))
    return gathered


def _check(task: Task, rows: Scores) -> None:
    """Refuse figures that would be of no images, or of a network that has diverged; the same on all ranks."""
    if not len(rows):
        raise DataError(
            f"task {task.index} ('{task.name}') has no test images that can be decoded, so it cannot be tested; repair "
            "the data, or leave its classes out of the stream"
        )
    # A step's gradient is checked before its update, so nothing else notices a last step that goes too far.
    wrong = np.count_nonzero(~np.isfinite(rows[:, 2]))
    if wrong:
        raise DivergedError(
            f"the network's logits are not finite for {wrong} of {len(rows)} test images of task {task.index} "
            f"('{task.name}'): it has diverged, or its weights are damaged. Train with a lower optim.lr, or with "
            "train.clip_norm, in another folder=... (or name=...), as the settings of a run are fixed"
        )


def _logits(count: int, state: RunState, world: World, last: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits [n, C], labels [n] (-1 where an image cannot be decoded) and tasks [n] of batches of test images."""
    labels = torch.from_numpy(world.stream.labels("test"))
    with _classifier(state, world, last) as classifier:
        classify = with_mirror_images(classifier, world)
        for sample, logits, readable in answers(classify, np.arange(count), world, split="test"):
            shown = torch.where(readable, labels[torch.from_numpy(sample)], -1)
            tasks = torch.from_numpy(task_numbers(world.stream.tasks, "test", sample))
            yield logits, shown.to(logits.device), tasks.to(logits.device)


@contextlib.contextmanager
def _classifier(state: RunState, world: World, last: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from pixels to logits [n, C]: the network's, perhaps corrected, or nearest-mean scores.

    Corrections and means are of the network at the end of a task; before the first task's end and in the middle of a
    task, the plain head is used.
    """
    correction, means = state.prior.correction, state.prior.means
    if means is not None and means.task == last:
        with featuring(state, world) as features:
            yield lambda pixels: means.scores(features(pixels))
    elif correction is not None and correction.task == last:
        yield lambda pixels: correction(state.engine.predict(pixels))
    else:
        yield state.engine.predict


def _scores(logits: Tensor, labels: Tensor, tasks: Tensor, world: World, last: int) -> Tensor:
    """Return [n, 9]: valid, then (right, nats, confidence, top-5) over the own head and over all seen classes."""
    heads = heads_of(world.stream.tasks, logits.shape[1]).to(logits.device)
    truth = labels.clamp(min=0)
    own = heads[tasks]
    seen = heads[: last + 1].any(dim=0).expand_as(own)
    target = torch.nn.functional.one_hot(truth, logits.shape[1]).float()
    columns = [(labels >= 0).float()]
    for head in (own, seen):
        probabilities = logits.masked_fill(~head, -torch.inf).softmax(dim=1)
        confidence, guess = probabilities.max(dim=1)
        right = (guess == truth).float()
        above = (head & (logits > logits.gather(1, truth[:, None]))).sum(dim=1)  # 0 where logits are not finite
        top5 = (above < _TOP).float() * confidence.isfinite()
        columns += [right, row_nats(logits, target, head), confidence, top5]
    return torch.stack(columns, dim=1)


def _rows(task: Task, scores: Scores) -> Scores:
    """Return the rows of a task's decodable images."""
    rows = scores[task.samples("test").start : task.samples("test").stop]
    return rows[rows[:, 0] > 0]


def _result(task: Task, scores: Scores, last: int, world: World) -> dict[str, Any]:
    rows = _rows(task, scores)
    competing = task.index <= last and not world.config.own_networks
    seen = {label for other in world.stream.tasks[: last + 1] for label in other.classes}
    return {
        "task": task.index,
        "num": len(rows),
        "task_incremental": _summary(rows[:, 1:5], len(task.classes)),
        "class_incremental": _summary(rows[:, 5:9], len(seen)) if competing else None,
    }


def _calibration(scores: Scores, learned: Sequence[Task]) -> dict[str, list[list[float]]]:
    """Return, by setting, `calibration_bins` of all learned tasks: counts, sums of confidence, numbers correct."""
    rows = np.concatenate([_rows(task, scores) for task in learned])
    settings = {"task_incremental": rows[:, 1:4], "class_incremental": rows[:, 5:8]}
    return {name: calibration_bins(own[:, 2], own[:, 0]).round(4).tolist() for name, own in settings.items()}


def _summary(columns: Scores, num_classes: int) -> dict[str, float]:
    """Return the figures of images among so many competing classes."""
    right, nats, confidence, top5 = columns.astype(np.float64).T
    return {
        "accuracy": float(right.mean()),
        **({"top5": float(top5.mean())} if num_classes > _TOP else {}),
        "nll": float(nats.mean()),
        "ece": calibration_error(calibration_bins(confidence, right)),
    }
