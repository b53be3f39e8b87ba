"""The configuration of a finished run to which further tasks are added, made from that of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.base import per_task
from hpccl.config.differences import differences, flat
from hpccl.config.load import load, load_recorded
from hpccl.config.run import READING, RunConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.config.tree import plain, read_value
from hpccl.errors import ConfigError
from hpccl.folder import RunFolder

__all__ = ["SETTINGS", "extended_config"]

_PER_TASK = ("train.epochs", "optim.lr", "prior.weight", "curvature.fraction")
# What the tasks that are learned depend on stays as it is; all other settings may change, as when a run is resumed.
SETTINGS = (
    f"{', '.join(_PER_TASK)}, whose values are those of the new tasks; "
    f"{', '.join(f'data.{name}' for name in READING)}, memory.keep, curvature.batch_size, curvature.max_factor, "
    "curvature.max_parameters; all of cluster, engine (except engine.precision), checkpoint, log"
)  # in words


def extended_config(run: Path, out: Path, *, parts: Sequence[str], settings: Sequence[str]) -> RunConfig:
    """The configuration of RUN with further parts in its stream.

    Args:
        run: folder of the run.
        out: folder of the extended run.
        parts: of the stream, each a path or a mapping such as `{path: shards/new, tasks: 2}`.
        settings: `key=value` that override the run's; of settings with a value per task, those of the new tasks.

    Raises:
        ConfigError: a part or a setting is not allowed, or the run is of a kind that cannot go on.
        FolderError: RUN is not a run.
    """
    source = _source(run)
    assert isinstance(source.stream, ShardStream), "_source refuses other streams"
    if not parts:
        raise ConfigError("nothing to add: give the shards of the new tasks with --part")
    old = source.stream.parts
    stream = [*(part.model_dump(mode="json") for part in old), *map(_part, parts)]
    name = f"{source.name.removesuffix('-extended')}-extended"
    words = [f"stream.parts={json.dumps(stream)}", f"folder={json.dumps(str(out))}", f"name={name}"]
    learned = sum(part.tasks for part in old)
    config = load([run / "config.yaml"], [*words, *(_setting(each, source, learned) for each in settings)])
    plainly = load([run / "config.yaml"], words)
    _refuse_changed(source, config)
    _refuse_changed_past(plainly, config, learned)
    return config


def _source(run: Path) -> RunConfig:
    """The configuration of the run; raises FolderError or ConfigError if no run of its kind can go on."""
    folder = RunFolder(run)
    folder.require()
    source = load_recorded(folder.config)
    train = source.train
    if isinstance(source.adapt, AnyAdaptation):
        raise ConfigError(
            f"'{run}' is an adaptation of '{source.adapt.source}', which has a single task; extend that run"
        )
    if not isinstance(source.stream, ShardStream):
        raise ConfigError(
            f"'{run}' has stream.kind={source.stream.kind}, whose classes are all of its stream; allowed: runs with "
            "stream.kind=shards"
        )
    if train.restart or train.only_last:
        key = "train.only_last" if train.only_last else "train.restart"
        raise ConfigError(
            f"'{run}' was trained with {key}=true: a new task does not begin where it ended, so that there is nothing "
            "to continue; train a new run on all parts"
        )
    if source.prior.loss == "squared" and train.head == "seen":
        raise ConfigError(
            f"'{run}' was trained with prior.loss=squared and train.head=seen, where soft labels have the logits of "
            "all classes to come, which lack the new ones; allowed: prior.loss=cross_entropy, or train.head=own"
        )
    return source


def _part(text: str) -> Any:
    """A part of the stream as plain values: a path, or a mapping in YAML's flow style."""
    if not text.lstrip().startswith("{"):
        return Part(path=text).model_dump(mode="json")
    node, mistakes = read_value(text, f"--part {text}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return plain(node)


def _setting(setting: str, source: RunConfig, learned: int) -> str:
    """The setting for the whole stream: of those with a value per task, the run's values come first."""
    key, _, text = setting.partition("=")
    if key in ("folder", "name"):
        raise ConfigError(f"{setting}: --out sets the folder and the name of the extended run; leave {key} out")
    if key not in _PER_TASK:
        return setting
    given = plain(read_value(text, setting)[0])
    values = [*_per_task(source, key, learned), *(given if isinstance(given, list) else [given])]
    return f"{key}={json.dumps(values)}"


def _refuse_changed(source: RunConfig, config: RunConfig) -> None:
    free = ("stream.parts", *_PER_TASK)
    for key, before, now in differences(flat(source.identity()), flat(config.identity())):
        if key not in free:
            raise ConfigError(
                f"{key}={now}: the tasks that are learned depend on {key}, which stays {before}; leave it out. Keys "
                f"that may be set: {SETTINGS}"
            )


def _refuse_changed_past(plainly: RunConfig, config: RunConfig, learned: int) -> None:
    """Raise ConfigError if settings such as `stream.parts.0.tasks=3` or `train.epochs.0=3` change learned tasks.

    plainly: the same without settings
    learned: number of learned tasks
    """
    assert isinstance(config.stream, ShardStream), "stream.kind may not be set"
    assert isinstance(plainly.stream, ShardStream), "_source refuses other streams"
    if config.stream.parts != plainly.stream.parts:
        raise ConfigError("stream.parts: the run's parts stay, and --part adds to them; leave stream.parts out")
    for key in _PER_TASK:
        before, now = (_per_task(each, key, learned) for each in (plainly, config))
        if before != now:
            raise ConfigError(
                f"{key} of the learned tasks: {now}; they were trained with {before}, which stays. Give {key}=... with "
                "the values of the new tasks alone"
            )


def _per_task(config: RunConfig, key: str, tasks: int) -> list[float]:
    """The setting's values for the first tasks."""
    section, name = key.split(".")
    return [per_task(getattr(getattr(config, section), name), task) for task in range(tasks)]
