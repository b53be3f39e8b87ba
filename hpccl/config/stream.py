"""The stream of tasks: its data sets, and how they are split into tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import Fraction, Line, PositiveInt, Section, Seed

__all__ = [
    "BlurryScenario",
    "ClassScenario",
    "DigitsStream",
    "DomainScenario",
    "FewShotScenario",
    "Part",
    "PermutedScenario",
    "RotatedScenario",
    "ScenarioConfig",
    "ShardStream",
    "StreamConfig",
]

OrderSeed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class ClassScenario(Section):
    """Each task has its own classes: task-incremental with train.head=own, class-incremental with train.head=seen."""

    kind: Literal["classes"] = "classes"


class DomainScenario(Section):
    """Each part of the stream is a task; all parts have the same class names (domain-incremental)."""

    kind: Literal["domains"] = "domains"


class PermutedScenario(Section):
    """Each task has all images, with their pixels in its own order; the first task has them as stored."""

    kind: Literal["permuted"] = "permuted"
    seed: Seed = 0  # seed of the pixel orders, which do not depend on the run's seed


class RotatedScenario(Section):
    """Each task has all images, rotated by its own angle; the first task has them as stored."""

    kind: Literal["rotated"] = "rotated"
    degrees: Annotated[float, Field(gt=0, le=360)] = 180.0  # upper bound of the angles, exclusive
    angles: Literal["drawn", "even"] = "drawn"  # drawn: uniformly at random; even: degrees * task / tasks
    seed: Seed = 0  # seed of the drawn angles, which do not depend on the run's seed


class BlurryScenario(Section):
    """Tasks share classes: some training images of a class are given to other tasks (Blurry-M, i-Blurry-N-M).

    Test images stay with the task that their class is dealt to first, which has most of it unless much is blurred.
    """

    kind: Literal["blurry"] = "blurry"
    blur: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of a blurry class's training images given to other tasks
    disjoint: Fraction = 0.5  # share of each task's classes that stay in this task alone; 0: Blurry-M
    seed: Seed = 0  # seed of the choice of images and classes, which does not depend on the run's seed


class FewShotScenario(Section):
    """A base task with all training images of `base` classes, then sessions of `way` new classes with `shots` images.

    `tasks` is the number of sessions, including the base. Classes beyond base + way (tasks - 1) are left out.
    """

    kind: Literal["few_shot"] = "few_shot"
    base: PositiveInt  # number of classes of the first task
    way: PositiveInt  # number of new classes of each later session
    shots: PositiveInt  # training images of each class of a later session
    # folder of session_2.txt, session_3.txt, ..., with one training image per line: its name (folders and extension are
    # ignored), or its number if names are numbers; session_1.txt may list the base images. null: images are drawn
    lists: Line | None = None
    seed: Seed = 0  # seed of the drawn images, which do not depend on the run's seed


ScenarioConfig = Annotated[
    ClassScenario | DomainScenario | PermutedScenario | RotatedScenario | BlurryScenario | FewShotScenario,
    Field(discriminator="kind"),
]


class DigitsStream(Section):
    """scikit-learn's 1,797 handwritten digits (8x8 pixels, 1 channel), which need no download."""

    kind: Literal["digits"] = "digits"
    tasks: Annotated[int, Field(gt=0, le=10)] = 5  # number of tasks; with kind=classes the ten digits are split
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # order of the classes
    order_seed: OrderSeed = 1993  # seed of order=random


class Part(Section):
    """One data set in shards, split into `tasks` tasks with equally many classes."""

    path: str  # folder written by `hpccl shards build`, or its URL in an object store (s3://, gs://, https://)
    tasks: PositiveInt = 1  # number of tasks that the classes are split into
    classes: PositiveInt | None = None  # use only this many classes, the first after ordering; null: all


class ShardStream(Section):
    """Data sets written by `hpccl shards build`, learned one after the other, each split by class."""

    kind: Literal["shards"] = "shards"
    parts: Annotated[tuple[Part, ...], Strict(False), Field(min_length=1)]  # the data sets, in the order of learning
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # order of the classes within a part
    order_seed: OrderSeed = 1993  # seed of order=random
    train_split: str = "train"  # name of the split to train on
    test_split: str = "test"  # name of the split to test on


StreamConfig = Annotated[DigitsStream | ShardStream, Field(discriminator="kind")]
