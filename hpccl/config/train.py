"""One task's training, and how the network is tested."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import IntPerTask, NonNegativeInt, PositiveFloat, PositiveInt, Section

__all__ = ["EvaluateConfig", "TrainConfig"]


class TrainConfig(Section):
    """One task's training.

    `restart` and `data` make the references: joint = seen + restart, separate = task + restart; and GDumb, which is
    memory + restart.
    """

    epochs: IntPerTask = (10,)  # one value, or one a task
    batch_size: PositiveInt = 256  # rows a step, over all ranks, memory included
    head: Literal["own", "seen"] = "own"  # which classes compete: a row's own task, or all seen so far
    # with head=seen, the classes that compete. task: in rows of a task's own images those of the task alone, so that
    # new images do not push old classes down (ER-ACE; LwF of PyCIL); all: in all rows with true labels also classes to
    # come, which learn that they are not there yet (Mammoth; the code of DER's authors)
    competing: Literal["seen", "task", "all"] = "seen"
    # of true labels: a softmax over the classes that compete, or a sigmoid for each of them, summed (iCaRL)
    loss: Literal["cross_entropy", "sigmoid"] = "cross_entropy"
    # seen: all tasks up to now (joint); memory: the memory alone, into which the task's examples come first (GDumb)
    data: Literal["task", "seen", "memory"] = "task"
    restart: bool = False  # a fresh network for every task
    only_last: bool = False  # train the last task alone; only with restart, where earlier tasks change nothing
    accumulate: PositiveInt = 1  # micro-batches a step
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient; null: no limit
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of true labels: of new and of replayed examples
    ema: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # decay of the averaged weights that end a task; the first steps' is lower
    )
    # epochs before the others of every later task, with a schedule of their own: only the new classes' rows of the last
    # layer learn
    head_epochs: NonNegativeInt = 0
    # names of parameters and buffers (with * and ?) that stay as the first task left them; `features`: all but those of
    # the last layer, `convolutions`: those of convolutions and normalisations, `old_classes`: rows of the last layer
    frozen: Annotated[tuple[str, ...], Strict(False)] = ()
    # of BatchNorm from the second task on: of the batch, or the running ones as they stand; few images say little
    norms: Literal["batch", "running"] = "batch"
    flip_test: bool = False  # evaluate on the mean of logits of an image and its mirror image
    first_task_from: str | None = None  # run folder with the same first task: take its weights, do not train it again


class EvaluateConfig(Section):
    """How the network is tested."""

    # nearest_mean: the class whose mean of normalised features, over memory and its mirror images, is closest (iCaRL)
    # prototype: the same with means over all training examples of a class, when it was learned; for frozen features
    classifier: Literal["head", "nearest_mean", "prototype"] = "head"
    # of classifier=nearest_mean: memory's examples, or all training examples of the tasks so far, an upper bound that
    # looks into the past (Mammoth's stock iCaRL)
    means: Literal["memory", "data"] = "memory"
