"""What a stream and its images require of each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.data import DataConfig, TimmAugment
from hpccl.config.model import TimmModel
from hpccl.config.stream import (
    BlurryScenario,
    DigitsStream,
    DomainScenario,
    FewShotScenario,
    PermutedScenario,
    RotatedScenario,
)

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]

# timm's transformers whose names have the one image size that they accept, unless options change it. Other networks
# that accept only one size are found when the network is built.
_SIZED = re.compile(r"(vit|deit3?|swin|swinv2|eva|eva02)_(?!s?relpos|intern)\w*_\d{3}")


def _parts_of_scenario(config: RunConfig) -> Iterator[Clash]:
    """What a scenario requires of the data sets of a stream."""
    stream, key = config.stream, "stream.scenario.kind"
    kind, parts = stream.scenario.kind, () if isinstance(stream, DigitsStream) else stream.parts
    if kind == "domains":
        if len(parts) < 2:
            problem = "every part is a task, but there is only one data set; set it to permuted or rotated"
            yield Clash((key, "stream.kind" if isinstance(stream, DigitsStream) else "stream.parts"), problem)
        if any(part.tasks > 1 for part in parts):
            yield Clash(
                ("stream.parts", key), "has a part with several tasks, but every part is one task; set tasks to 1"
            )
        if len({part.classes for part in parts}) > 1:
            yield Clash(("stream.parts", key), "has parts with different `classes`; set the same for all")
    if kind in ("permuted", "rotated", "few_shot") and _several_parts(config):
        yield Clash(("stream.parts", key), f"has {len(parts)} data sets, but {kind} tasks use one; keep only one")
    tasks = [stream.tasks] if isinstance(stream, DigitsStream) else [part.tasks for part in parts]
    if kind == "blurry" and 1 in tasks:
        problem = "mixes the tasks of a data set, but one has a single task; set tasks to 2 or more"
        yield Clash((key, "stream.tasks" if isinstance(stream, DigitsStream) else "stream.parts"), problem)
    if isinstance(stream.scenario, BlurryScenario) and stream.scenario.disjoint == 1:
        yield Clash(("stream.scenario.disjoint",), "leaves no class to be blurred; set it below 1, or kind to classes")


def _given_order(config: RunConfig) -> Iterator[Clash]:
    stream = config.stream
    if stream.order == "given" and stream.order_seed != type(stream).model_fields["order_seed"].default:
        problem = "seeds a random order of classes, but the order is given; set stream.order=random, or leave it out"
        yield Clash(("stream.order_seed", "stream.order"), problem)


def _changed_images(config: RunConfig) -> Iterator[Clash]:
    """Clashes of tasks that change all images, which needs decoded images of one size."""
    scenario, data, cause = config.stream.scenario, config.data, "stream.scenario.kind"
    if not isinstance(scenario, PermutedScenario | RotatedScenario):
        return
    if data.storage == "encoded":
        yield Clash(("data.storage", cause), "these tasks change decoded images; set it to auto or decoded")
    if isinstance(data.augment, TimmAugment):
        yield Clash(("data.augment.kind", cause), "these tasks change decoded images; set it to none or crop_flip")
    if data.progressive is not None:
        yield Clash(("data.progressive", cause), "these tasks need images of one size; leave it out")
    if data.test_size not in (None, data.image_size):
        yield Clash(("data.test_size", cause), "these tasks need images of one size; leave it out")
    if config.train.flip_test:
        problem = "mirrors images that the task has already changed, which training never does; set it to false"
        yield Clash(("train.flip_test", cause), problem)
    if isinstance(scenario, RotatedScenario) and scenario.angles == "even" and scenario.seed:
        yield Clash(("stream.scenario.seed", "stream.scenario.angles"), "even angles are not drawn; leave it 0")


def _several_parts(config: RunConfig) -> bool:
    return not isinstance(config.stream, DigitsStream) and len(config.stream.parts) > 1


def _few_shots(config: RunConfig) -> Iterator[Clash]:
    stream, scenario = config.stream, config.stream.scenario
    if not isinstance(scenario, FewShotScenario) or _several_parts(config):
        return
    if isinstance(stream, DigitsStream):
        tasks, cause, there, chosen = stream.tasks, "stream.tasks", 10, None
    else:
        tasks, cause, there, chosen = stream.parts[0].tasks, "stream.parts", None, stream.parts[0].classes
    if tasks < 2:
        yield Clash((cause, "stream.scenario.kind"), "has only the base task; add 1 for every session")
    if there is not None and scenario.base + scenario.way * (tasks - 1) > there:
        problem = f"with {tasks - 1} sessions of {scenario.way} classes exceeds the {there} classes; lower one of them"
        yield Clash(("stream.scenario.base", "stream.scenario.way", "stream.tasks"), problem)
    if chosen is not None:
        problem = "has `classes`, which few_shot sets to base + way * (tasks - 1); leave it out"
        yield Clash(("stream.parts", "stream.scenario.base"), problem)
    if scenario.lists is not None and scenario.seed:
        yield Clash(
            ("stream.scenario.seed", "stream.scenario.lists"), "seeds a draw of images, but lists name them; leave it 0"
        )


def _shared_classes(config: RunConfig) -> Iterator[Clash]:
    """Settings about new classes, in scenarios whose tasks may have none."""
    scenario, prior, cause = config.stream.scenario, config.prior, "stream.scenario.kind"
    if not isinstance(scenario, DomainScenario | PermutedScenario | RotatedScenario | BlurryScenario):
        return
    why = f"is about new classes, but {scenario.kind} tasks share theirs"
    if config.train.head_epochs:
        yield Clash(("train.head_epochs", cause), f"{why}; leave it 0")
    if "old_classes" in config.train.frozen:
        yield Clash(("train.frozen", cause), f"{why}; leave old_classes out")
    if prior.distill.weight > 0 and prior.distill.balance == "classes":
        yield Clash(("prior.distill.balance", cause), f"{why}; set it to fixed")
    if prior.distill.weight > 0 and config.train.loss == "sigmoid":
        problem = f"leaves old classes to the old network, but {scenario.kind} tasks share theirs; use cross_entropy"
        yield Clash(("train.loss", cause), problem)
    if prior.correct.share > 0:
        yield Clash(("prior.correct.share", cause), f"{why}; set it to 0")
    if prior.topology.nodes > 0:
        yield Clash(("prior.topology.nodes", cause), f"{why}; set it to 0")
    if config.evaluate.classifier == "prototype":
        yield Clash(("evaluate.classifier", cause), f"{why}; set it to head")


def _pictures(config: RunConfig) -> Iterator[Clash]:
    data, usual = config.data, DataConfig()
    if data.image_size is None:
        problem = "needs data.image_size, the side that images are resized to"
        if isinstance(data.augment, TimmAugment):
            yield Clash(("data.augment.kind", "data.image_size"), problem)
        if data.crop_pct != usual.crop_pct:
            yield Clash(("data.crop_pct", "data.image_size"), problem)
    if any(value <= 0 for value in data.std):
        yield Clash(("data.std",), "every standard deviation must be > 0")
    if len({len(data.mean), len(data.std)} - {1}) > 1:
        yield Clash(
            ("data.mean", "data.std"), f"has {len(data.mean)} numbers, data.std {len(data.std)}; give equally many"
        )
    if isinstance(data.augment, TimmAugment):
        policy = data.augment.auto_augment
        if data.augment.color_jitter > 0 and policy and "3a" not in policy:
            keys = ("data.augment.color_jitter", "data.augment.auto_augment")
            yield Clash(keys, f"timm ignores it with the policy '{policy}'; set it to 0, or use no policy")
        for key in ("scale", "ratio"):
            values = getattr(data.augment, key)
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                yield Clash((f"data.augment.{key}",), "must be [smallest, largest], both > 0")


def _sizes(config: RunConfig) -> Iterator[Clash]:
    """Sizes of training and test images that contradict each other, and networks that accept only one size."""
    data, grows = config.data, config.data.progressive
    if data.image_size is None:
        for key in ("test_size", "progressive"):
            if getattr(data, key) is not None:
                yield Clash((f"data.{key}", "data.image_size"), "needs data.image_size, the side of training images")
        return
    several = ["data.test_size"] if data.test_size not in (None, data.image_size) else []
    if grows is not None:
        several.append("data.progressive")
        if grows.first > data.image_size:
            yield Clash(("data.progressive.first", "data.image_size"), f"is above {data.image_size}; views only grow")
        if grows.begin > grows.end:
            yield Clash(("data.progressive.begin", "data.progressive.end"), f"is above {grows.end}; views only grow")
        if data.storage == "decoded" or isinstance(config.stream, DigitsStream):
            cause = "stream.kind" if isinstance(config.stream, DigitsStream) else "data.storage"
            yield Clash(
                ("data.progressive", cause), "needs the full images; use shards, and data.storage=auto or encoded"
            )
    model = config.model
    if (
        isinstance(model, TimmModel)
        and _SIZED.fullmatch(model.name)
        and not model.options.get("dynamic_img_size", False)
    ):
        for key in several:
            problem = f"gives images of several sizes, but {model.name} takes one; add dynamic_img_size: true"
            yield Clash((key, "model.options"), problem)
    if config.model.kind != "timm":
        for key in several:
            problem = f"gives images of several sizes, but {config.model.kind} is built for one; use a timm model"
            yield Clash((key, "model.kind"), problem)


RULES = (
    _parts_of_scenario,
    _given_order,
    _changed_images,
    _few_shots,
    _shared_classes,
    _pictures,
    _sizes,
)
