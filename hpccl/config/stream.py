"""What is learned, task by task: data sets, and what their tasks have in common."""

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
    """Every task has classes of its own: task-incremental with train.head=own, class-incremental with seen."""

    kind: Literal["classes"] = "classes"


class DomainScenario(Section):
    """Every part is a task, and all have the same class names (domain-incremental)."""

    kind: Literal["domains"] = "domains"


class PermutedScenario(Section):
    """Every task has all images, their pixels in an order of its own; the first task's are as stored."""

    kind: Literal["permuted"] = "permuted"
    seed: Seed = 0  # of the orders, which do not depend on the run's seed


class RotatedScenario(Section):
    """Every task has all images, turned by an angle of its own; the first task's are as stored."""

    kind: Literal["rotated"] = "rotated"
    degrees: Annotated[float, Field(gt=0, le=360)] = 180.0  # angles are below it
    angles: Literal["drawn", "even"] = "drawn"  # drawn uniformly; or degrees * task / tasks
    seed: Seed = 0  # of drawn angles, which do not depend on the run's seed


class BlurryScenario(Section):
    """Tasks share classes: training images of a class come with other tasks, too (Blurry-M, i-Blurry-N-M).

    Test images stay with the task that most of their class belongs to.
    """

    kind: Literal["blurry"] = "blurry"
    blur: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of a blurry class's training images that other tasks get
    disjoint: Fraction = 0.5  # share of each task's classes that no other task gets images of; 0: Blurry-M
    seed: Seed = 0  # of which images and classes, which do not depend on the run's seed


class FewShotScenario(Section):
    """A base task with all training images of `base` classes, then sessions of `way` new classes with `shots` images.

    `tasks` counts the sessions, the base included. Classes beyond base + way (tasks - 1) are left out.
    """

    kind: Literal["few_shot"] = "few_shot"
    base: PositiveInt  # classes of the first task
    way: PositiveInt  # classes of each session
    shots: PositiveInt  # training images of each class of a session
    # folder of session_2.txt, session_3.txt, ...: a training image a line, by its name (folders and extension do not
    # count) or by its number if names are numbers; session_1.txt may list those of the base. null: drawn by seed
    lists: Line | None = None
    seed: Seed = 0  # of drawn images, which do not depend on the run's seed


ScenarioConfig = Annotated[
    ClassScenario | DomainScenario | PermutedScenario | RotatedScenario | BlurryScenario | FewShotScenario,
    Field(discriminator="kind"),
]


class DigitsStream(Section):
    """scikit-learn's 1,797 handwritten digits (8x8, 1 channel), embedded: no download."""

    kind: Literal["digits"] = "digits"
    tasks: Annotated[int, Field(gt=0, le=10)] = 5  # the ten digits are split into so many tasks
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # of the classes
    order_seed: OrderSeed = 1993  # of order=random


class Part(Section):
    """One data set of shards, split into `tasks` tasks of equally many classes."""

    path: str  # folder that `hpccl shards build` wrote, or its URL in an object store (s3://, gs://, https://)
    tasks: PositiveInt = 1  # the classes are split into so many tasks
    classes: PositiveInt | None = None  # use only the first so many classes (after ordering)


class ShardStream(Section):
    """Data sets written by `hpccl shards build`, one after the other, each split by class."""

    kind: Literal["shards"] = "shards"
    parts: Annotated[tuple[Part, ...], Strict(False), Field(min_length=1)]  # the data sets, in the order of learning
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # of the classes within a part
    order_seed: OrderSeed = 1993  # of order=random
    train_split: str = "train"  # name of the split to train on
    test_split: str = "test"  # name of the split to test on


StreamConfig = Annotated[DigitsStream | ShardStream, Field(discriminator="kind")]
