"""Training on one task, and how the network is tested."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import IntPerTask, NonNegativeInt, PositiveFloat, PositiveInt, Section

__all__ = ["EvaluateConfig", "TrainConfig"]


class TrainConfig(Section):
    """Training on one task.

    `data` and `restart` together define the references joint (seen, with restart), separate (task, with restart) and
    GDumb (memory, with restart).
    """

    epochs: IntPerTask = (10,)  # number of epochs; one value, or one per task
    batch_size: PositiveInt = 256  # rows per step, over all ranks, including memory
    head: Literal["own", "seen"] = "own"  # which classes compete: those of a row's own task, or all seen so far
    # which classes compete with head=seen. seen: all seen so far; task: in rows of a task's own images only the task's
    # classes, so that new images do not push old classes down (ER-ACE; LwF of PyCIL), except for images that memory
    # will keep; all: in rows with true labels also future classes, which learn that they have not come yet (Mammoth;
    # the code of DER's authors)
    competing: Literal["seen", "task", "all"] = "seen"
    # loss of true labels: of a softmax over the competing classes, or of a sigmoid for each of them, summed (iCaRL)
    loss: Literal["cross_entropy", "sigmoid"] = "cross_entropy"
    # training data. task: the new task; seen: all tasks so far (joint); memory: the memory alone, after it has taken
    # examples of the new task (GDumb)
    data: Literal["task", "seen", "memory"] = "task"
    restart: bool = False  # start every task from the initial weights
    only_last: bool = False  # train on the last task alone; only with restart, where earlier tasks have no effect
    accumulate: PositiveInt = 1  # micro-batches per step
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient; null: no limit
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # smoothing of true labels, of new and replayed examples
    ema: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # decay of the averaged weights that end a task, lower in the first steps; null: no average
    )
    # extra epochs at the start of every task but the first, with their own schedule, in which only the last layer's
    # rows of new classes learn
    head_epochs: NonNegativeInt = 0
    # names of parameters and buffers (with * and ?) that do not change after the first task; `features`: all but those
    # of the last layer, `convolutions`: those of convolutions and normalisations, `old_classes`: the last layer's rows
    # of old classes
    frozen: Annotated[tuple[str, ...], Strict(False)] = ()
    # BatchNorm statistics from the second task on: those of the batch, or fixed running ones, for tasks of few images
    norms: Literal["batch", "running"] = "batch"
    flip_test: bool = False  # test with the mean of the logits of an image and its mirror image
    first_task_from: str | None = None  # run folder with the same first task: use its weights, do not train it again


class EvaluateConfig(Section):
    """How the network is tested."""

    # head: the network's own head; nearest_mean: the class whose mean of normalised features, over memory and its
    # mirror images, is closest (iCaRL); prototype: the same with means over all training examples of a class, computed
    # when it was learned; for frozen features
    classifier: Literal["head", "nearest_mean", "prototype"] = "head"
    # examples of the means of classifier=nearest_mean: memory's, or all training examples of the tasks so far, an upper
    # bound that reads past data (Mammoth's iCaRL as it is)
    means: Literal["memory", "data"] = "memory"
