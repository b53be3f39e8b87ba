"""Add tasks to a finished run: `hpccl extend`.

The new run folder has the run's last checkpoint with a wider last layer, as if the run had ended the same task of the
longer stream; training continues from it like any run that was stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hpccl.checkpoint.store import Content, Mark, load, open_shards, save
from hpccl.config.extend import extended_config
from hpccl.config.load import dump, load_recorded
from hpccl.config.run import RunConfig
from hpccl.curvature.widen import padded, widened
from hpccl.data.layout import SPLITS, Layout
from hpccl.data.stream import ImageStream
from hpccl.dist.comm import Comm
from hpccl.dist.spread import placed_whole, wholes
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder, replacing_folder
from hpccl.models.build import build_model
from hpccl.prior.prior import Prior
from hpccl.report.events import read_events
from hpccl.train.adapt import last_mark
from hpccl.train.checks import check_memory
from hpccl.train.copies import open_for

__all__ = ["Extended", "extend"]

# State of an engine within a task, which the next one begins without.
_OF_A_TASK: Mapping[str, Any] = {"optimizer": None, "average": None, "credit": {}, "begun": {}}


@final
@dataclass(frozen=True)
class Extended:
    """What was written: the configuration of the new run, and the numbers of tasks and classes that were added."""

    config: RunConfig
    tasks: int
    classes: int


def extend(run: Path, out: Path, *, parts: Sequence[str], settings: Sequence[str] = ()) -> Extended:
    """Write the folder `out` of a run that continues `run` on further parts of its stream; `run` stays as it is.

    Args:
        run: folder of a finished run.
        out: the folder to write; it appears whole or not at all.
        parts: see `extended_config`.
        settings: likewise.

    Raises:
        CheckpointError: the last checkpoint is damaged.
        ConfigError: a part or a setting is not allowed, or the run cannot be continued with them.
        DataError: shards are missing or damaged.
        FolderError: `run` is no finished run, or its data changed, or `out` exists or cannot be written.
    """
    if out.exists():
        raise FolderError(f"--out '{out}' exists; give a new folder, to which the extended run is written")
    config, source = extended_config(run, out, parts=parts, settings=settings), RunFolder(run)
    mark, recorded = last_mark(run), load_recorded(source.config)
    before, after = open_for(recorded, source), open_for(config, source)
    assert isinstance(before, ImageStream), "a run's stream is of images"
    assert isinstance(after, ImageStream), "a run's stream is of images"
    assert _keeps(before.layout, after.layout), "parts are laid out one after the other"
    check_memory(config, after)
    content = _content(source, mark, config, (before, after))
    with replacing_folder(out) as beside:
        folder = RunFolder(beside)
        save(folder.checkpoints, mark, content, keep=config.checkpoint.keep)
        if source.memory.is_dir():
            shutil.copytree(source.memory, folder.memory, copy_function=_linked)
        folder.events.write_text(_events(source, mark), encoding="utf-8")
        folder.config.write_text(dump(config), encoding="utf-8")
    classes = len(after.class_names) - len(before.class_names)
    return Extended(config, len(after.tasks) - len(before.tasks), classes)


def _keeps(before: Layout, after: Layout) -> bool:
    """Whether the tasks and sample positions of a stream are the first ones of another: checkpoints depend on them."""
    columns = ("part", "local", "label", "group")
    pairs = [(before.index[split], after.index[split].only(np.arange(len(before.index[split])))) for split in SPLITS]
    same = all(np.array_equal(getattr(old, name), getattr(new, name)) for old, new in pairs for name in columns)
    return same and after.tasks[: len(before.tasks)] == before.tasks


# ---------------------------------------------------------------- the checkpoint


def _content(source: RunFolder, mark: Mark, config: RunConfig, streams: tuple[ImageStream, ImageStream]) -> Content:
    """Return the run's checkpoint `mark` with a last layer for the classes of the longer stream."""
    before, after = streams
    tree = load(source.checkpoints, mark)
    if tree["data"] != before.fingerprint:
        raise FolderError(f"the data changed since '{source.path}' was trained; restore the shards it was trained with")
    if mark.task != len(before.tasks) - 1:
        raise FolderError(
            f"'{source.path}' has learned {mark.task + 1} of {len(before.tasks)} tasks; continue it to its end first"
        )
    classes = len(after.class_names)
    fresh = build_model(config.model, image_shape=after.image_shape, num_classes=classes, seed=config.seed).state_dict()
    shards = open_shards(source.checkpoints, mark)
    prior = _wider_prior(Prior.from_state_dict(tree["prior"], shards, Comm.solo(), placed_whole, {}), fresh, classes)
    engine = {
        **tree["engine"],
        "weights": _wider_weights(placed_whole(tree["engine"]["weights"]), fresh),
        **_OF_A_TASK,
    }
    whole = {**tree, "engine": engine, "prior": prior.state_dict(), "data": after.fingerprint}
    return Content(whole, prior.precision, prior.curvature_shard)


def _wider_weights(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with new rows of the wider network, which has `fresh` weights."""
    found = {}
    for name, value in weights.items():
        like = fresh[name]
        if value.shape[1:] != like.shape[1:] or len(value.shape) != len(like.shape):
            raise ConfigError(
                f"the network cannot get more classes: '{name}' has shape {tuple(value.shape)}, and with the new "
                f"classes {tuple(like.shape)}; allowed: networks whose last layers alone get further rows"
            )
        found[name] = value if value.shape == like.shape else torch.cat([value, like[len(value) :].to(value)])
    return found


def _wider_prior(prior: Prior, fresh: Mapping[str, Tensor], classes: int) -> Prior:
    """Return the prior with zero curvature of new rows, and an anchor at their initial weights."""
    if prior.anchor is None:
        return prior
    old = wholes(prior.anchor)
    rows = {name: len(fresh[name]) for name, value in old.items() if value.shape != fresh[name].shape}
    anchor, quadratic, fromp, means = _wider_weights(old, fresh), prior.quadratic, prior.fromp, prior.means
    if quadratic is not None:
        pull = None if quadratic.pull is None else padded(wholes(quadratic.pull), rows)
        quadratic = replace(quadratic, precision=widened(quadratic.precision, rows), anchor=anchor, pull=pull)
    if fromp is not None and fromp.precision is not None:
        fromp = replace(fromp, precision=widened(fromp.precision, rows))
    if means is not None:
        means = replace(means, means=padded({"": means.means}, {"": classes})[""])
    return replace(prior, anchor=anchor, quadratic=quadratic, fromp=fromp, means=means)


# ---------------------------------------------------------------- other files


def _events(source: RunFolder, mark: Mark) -> str:
    """Return the run's events, ending with a stop in the place of its end."""
    events = read_events(source.events)
    learned = [event for event in events if event["event"] != "done"]
    end: dict[str, Any] = {
        "event": "stop",
        "time": events[-1]["time"],
        "task": mark.task,
        "phase": mark.phase,
        "step": mark.step,
        "reason": "extended",
    }
    return "".join(json.dumps(event) + "\n" for event in [*learned, end])


def _linked(source: str, target: str) -> None:
    """Link a file, or copy it if the file system has no links: files of the memory are replaced, never written to."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
