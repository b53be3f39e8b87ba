"""Checks of a configuration that need the data or the network."""

from __future__ import annotations

import math

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Listed, Stream
from hpccl.errors import ConfigError
from hpccl.memory.budget import kept_of, per_class
from hpccl.models.build import refuse_sizes

__all__ = ["check_memory", "check_sizes"]


def check_memory(config: RunConfig, stream: Listed) -> None:
    """Check the configuration against the data's tasks and classes.

    Raises:
        ConfigError: the memory is larger than a task, or has no example of a class where each needs one, or is too
            small for a part that is held out; a topology has more nodes than the first task has examples; a task has
            one class and a head of its own.
    """
    # Few-shot sessions are exempt: memory keeps all of their examples.
    tasks = stream.tasks[:1] if config.stream.scenario.kind == "few_shot" else stream.tasks
    sizes = {task.name: len(task.samples("train")) for task in tasks}
    smallest = min(sizes, key=lambda name: sizes[name])
    if config.memory.size > sizes[smallest]:
        raise ConfigError(
            f"memory.size={config.memory.size} is larger than task '{smallest}', which has {sizes[smallest]} training "
            f"examples; allowed: 0 to {sizes[smallest]} (examples kept of each task)"
        )
    nodes, first = config.prior.topology.nodes, len(stream.tasks[0].samples("train"))
    if nodes > first:
        raise ConfigError(
            f"prior.topology.nodes={nodes} is more than the {first} training examples of the first task; allowed: 1 to "
            f"{first}, or 0 for no topology"
        )
    _check_heads(config, stream)
    _check_every_class_kept(config, stream)
    share, classes = config.prior.correct.share, len(stream.class_names)
    if share > 0 and 0 in per_class(config.memory.total, share, classes):
        raise ConfigError(
            f"prior.correct.share={share} with memory.total={config.memory.total} leaves some of the {classes} classes "
            "without an example to hold out or without one to train on; allowed: memory.total >= "
            f"{math.ceil(classes / share)}, and a share below 1/2"
        )


def _check_heads(config: RunConfig, stream: Listed) -> None:
    """Refuse heads of one class: its softmax probability is always 1, so nothing is learned and accuracy is 100 %."""
    alone = [task.name for task in stream.tasks if len(task.classes) == 1]
    if alone and config.train.head == "own" and not isinstance(config.adapt, AnyAdaptation):
        raise ConfigError(
            f"train.head=own: task '{alone[0]}' has a single class ({len(alone)} such tasks), so a head of its own "
            "learns nothing; set train.head=seen, or fewer tasks"
        )


def _check_every_class_kept(config: RunConfig, stream: Listed) -> None:
    """Refuse memories that may lack a class where that class would then have no mean, or never be learned."""
    if config.evaluate.classifier == "nearest_mean":
        needs = "each of which needs an example for its mean (evaluate.classifier=nearest_mean)"
    elif config.train.data == "memory":
        needs = "each of which is learned from memory alone (train.data=memory)"
    else:
        return
    total, classes = config.memory.total, len(stream.class_names)
    # With other selectors each task divides its quota among its own classes, even if other tasks share these.
    if config.memory.selector.kind not in ("greedy", "reservoir"):
        classes = sum(len(task.classes) for task in stream.tasks)
    if 0 < total < classes:
        raise ConfigError(
            f"memory.total={total} is less than the {classes} classes of all tasks, {needs}; allowed: at least "
            f"{classes}"
        )
    for task in stream.tasks:
        kept = kept_of(config.memory, len(task.samples("train")))
        if kept < len(task.classes):
            key = "memory.size" if config.memory.size else "memory.fraction"
            raise ConfigError(
                f"{key}={getattr(config.memory, key[7:])} keeps {kept} examples of task '{task.name}', fewer than its "
                f"{len(task.classes)} classes, {needs}; raise {key}"
            )


def check_sizes(config: RunConfig, stream: Stream) -> None:
    """Check that the network accepts views of all sizes, before anything is trained.

    Raises:
        ConfigError: it does not.
    """
    shape, num_classes = stream.image_shape, len(stream.class_names)
    refuse_sizes(config.model, image_shape=shape, num_classes=num_classes, sides=config.data.sides())
