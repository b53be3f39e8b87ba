"""What some methods compute at the end of a task besides memory and curvature: logit correction and class means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.stream import PermutedScenario, RotatedScenario
from hpccl.data.protocols import Task, heads_of, training_samples
from hpccl.memory.means import ClassMeans, normalised
from hpccl.memory.store import Memory
from hpccl.prior.correction import Correction
from hpccl.train.kept import validation
from hpccl.train.passes import answers, shared_images
from hpccl.train.score import input_of, last_layer
from hpccl.train.state import RunState, World

__all__ = ["class_means", "correction", "featuring"]

Ints = npt.NDArray[np.int64]


def correction(task: Task, state: RunState, world: World) -> Correction | None:
    """Fit the logit correction to held-out examples of all seen classes; None for a first task or if off. Collective.

    The network is in evaluation mode and is not changed; every rank solves the same problem.

    Raises:
        Stopped: the run was asked to stop.
    """
    config = world.config.prior.correct
    if config.share == 0 or task.index == 0:
        return None
    samples = validation(world.config, world.stream, task)
    num_classes = len(world.stream.class_names)
    with world.phase(task, "correct") as phase:
        phase.images = len(samples)
        found = [torch.zeros(0, num_classes)]
        usable = [torch.zeros(0, dtype=torch.bool)]
        for _, said, readable in answers(state.engine.predict, samples, world):
            found.append(said.cpu())
            usable.append(readable)
        logits, valid = world.comm.gather(torch.cat(found)), world.comm.gather(torch.cat(usable).long()) > 0
        labels = torch.from_numpy(world.stream.labels("train")[samples])
        fitted = Correction.fitted(
            logits[valid],
            labels[valid],
            task=task.index,
            classes=task.classes,
            seen=_seen(task, world),
            penalty=config.penalty,
        )
    world.log.write("correction", task=task.index, alpha=fitted.alpha, beta=fitted.beta, num=fitted.num)
    return fitted


def class_means(task: Task, memory: Memory, state: RunState, world: World) -> ClassMeans | None:
    """Return the class means that evaluate.classifier needs; None for `head`. Collective.

    They are means over memory or all seen data (`nearest_mean`), or of the data of each class's task (`prototype`).

    Raises:
        ConfigError: the network has no last nn.Linear layer whose input could be the features.
        Stopped: the run was asked to stop.
    """
    match world.config.evaluate.classifier:
        case "head":
            return None
        case "nearest_mean":
            of_data = world.config.evaluate.means == "data"
            samples = _samples(world.stream.tasks[: task.index + 1]) if of_data else memory.sample.numpy()
            # Mirror images of rotated or permuted images do not belong to the task.
            mirrored = not isinstance(world.config.stream.scenario, PermutedScenario | RotatedScenario)
            return ClassMeans.of_sums(task.index, _feature_sums(task, samples, state, world, mirrored=mirrored))
        case "prototype":
            own = _samples([task])
            new = ClassMeans.of_sums(task.index, _feature_sums(task, own, state, world, mirrored=False))
            return new if state.prior.means is None else state.prior.means.joined(new)
        case _ as never:
            assert_never(never)


def _samples(tasks: Sequence[Task]) -> Ints:
    """Return the sample positions of all training examples of some tasks."""
    return np.concatenate([training_samples(task) for task in tasks])


def _feature_sums(task: Task, samples: Ints, state: RunState, world: World, *, mirrored: bool) -> Tensor:
    """Return, by class, sums [C, d] float64 of the normalised features of images (and mirror images); collective."""
    with world.phase(task, "means") as phase, featuring(state, world) as features:
        phase.images = len(samples) * (2 if mirrored else 1)
        labels = torch.from_numpy(world.stream.labels("train"))
        sums: Tensor | None = None
        for seen in shared_images(samples, world, size=world.stream_batch):
            number = len(seen.sample)
            found = normalised(features(seen.pixels).double())
            if mirrored:
                found = found + normalised(features(seen.pixels.flip(-1)).double())
            found = (found[:number] * seen.valid[:number, None].to(found.device)).cpu()
            if sums is None:
                sums = torch.zeros(len(world.stream.class_names), found.shape[1], dtype=torch.float64)
            sums.index_add_(0, labels[torch.from_numpy(seen.sample)], found)
        assert sums is not None, "there are images, and every rank has a pass"
        world.comm.sum_([sums])
    return sums


@contextlib.contextmanager
def featuring(state: RunState, world: World, *, asked_by: str | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from pixels to the input of the last layer [n, d] fp32, in evaluation mode; collective.

    asked_by: the setting that needs it, for error messages; None: evaluate.classifier

    Raises:
        ConfigError: the last layer is no nn.Linear.
    """
    asked_by = asked_by or f"evaluate.classifier={world.config.evaluate.classifier}"
    layer = last_layer(state.engine.module, world, state, asked_by=asked_by)
    with input_of(layer) as latest:

        def features(pixels: Tensor) -> Tensor:
            state.engine.predict(pixels)
            return latest()

        yield features


def _seen(task: Task, world: World) -> Tensor:
    return heads_of(world.stream.tasks[: task.index + 1], len(world.stream.class_names)).any(dim=0)
