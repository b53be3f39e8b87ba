"""From data sets to tasks: the scenario, and its effect on images, names and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import numpy as np
import numpy.typing as npt

from hpccl.config.data import DataConfig
from hpccl.config.stream import (
    BlurryScenario,
    ClassScenario,
    DigitsStream,
    DomainScenario,
    FewShotScenario,
    PermutedScenario,
    RotatedScenario,
    StreamConfig,
)
from hpccl.data.changes import Changes, Permuted, Rotated, angles
from hpccl.data.layout import SPLITS, Collection, Layout, align, arrange, held_out
from hpccl.data.protocols import Split
from hpccl.data.scenarios import blurred, drawn_shots, listed_shots, repeated
from hpccl.errors import ConfigError

__all__ = ["arranged", "changes_of", "labelled", "marked"]


def arranged(
    collections: Sequence[Collection],
    stream: StreamConfig,
    data: DataConfig,
    names: Callable[[npt.NDArray[np.int64]], Sequence[str]],
) -> Layout:
    """Lay out the tasks; with data.validation, tests use held-out training images (both splits are then the same one).

    names: maps numbers of training images of the first data set to their names
    """
    order, seed, first = stream.order, stream.order_seed, collections[0]
    match stream.scenario:
        case ClassScenario():
            return _tested(arrange(collections, order=order, seed=seed), data)
        case DomainScenario():
            return _tested(align(collections, order=order, seed=seed), data)
        case PermutedScenario() | RotatedScenario():
            # Held out before it is repeated, so that no task trains on what another one tests on.
            whole = _tested(arrange([replace(first, tasks=1)], order=order, seed=seed), data)
            return repeated(whole, first.tasks)
        case BlurryScenario(blur=blur, disjoint=disjoint, seed=own_seed):
            layout = _tested(arrange(collections, order=order, seed=seed), data)
            return blurred(layout, blur=blur, disjoint=disjoint, seed=own_seed)
        case FewShotScenario(shots=shots, lists=lists, seed=own_seed):
            sessions = arrange([_sessions(first, stream.scenario)], order=order, seed=seed)
            # Held out before shots are drawn: sessions are tested on a share of all their images, not of their shots.
            if lists is None:
                return drawn_shots(_tested(sessions, data), shots=shots, seed=own_seed)
            folder = Path(lists).expanduser()
            return listed_shots(sessions, folder, names, shots=shots, validation=data.validation)
        case _:
            assert_never(stream.scenario)


def _tested(layout: Layout, data: DataConfig) -> Layout:
    return layout if data.validation is None else held_out(layout, data.validation)


def _sessions(collection: Collection, scenario: FewShotScenario) -> Collection:
    """Restrict the data set to as many classes as the base and the sessions have."""
    widths = (scenario.base, *[scenario.way] * (collection.tasks - 1))
    if sum(widths) > len(collection.class_names):
        raise ConfigError(
            f"{scenario.base} base classes and {collection.tasks - 1} sessions of {scenario.way} are {sum(widths)} "
            f"classes, but '{collection.title}' has {len(collection.class_names)}; set stream.scenario.base, way or "
            "the number of tasks lower"
        )
    return replace(collection, keep=sum(widths), widths=widths)


def changes_of(stream: StreamConfig) -> Changes | None:
    """Return how tasks change their images; None if they do not."""
    match stream.scenario:
        case PermutedScenario(seed=seed):
            return Changes(Permuted(seed))
        case RotatedScenario(degrees=degrees, angles=kind, seed=seed):
            tasks = stream.tasks if isinstance(stream, DigitsStream) else stream.parts[0].tasks
            return Changes(Rotated(angles(tasks, degrees=degrees, drawn=kind == "drawn", seed=seed)))
        case _:
            return None


def marked(fingerprint: str, layout: Layout, stream: StreamConfig, data: DataConfig) -> str:
    """Return a fingerprint that also depends on the order of samples, where a seed or a file decides it.

    It also depends on what is held out of domains, or of repeated data sets: earlier versions held out other images.
    """
    by_class, domains = isinstance(stream.scenario, ClassScenario), isinstance(stream.scenario, DomainScenario)
    once = len(set(layout.first_of)) == len(layout.first_of)
    if (by_class and (once or data.validation is None)) or (domains and data.validation is None):
        return fingerprint
    digest = hashlib.sha256(fingerprint.encode())
    for split in SPLITS:
        digest.update(layout.index[split].local.tobytes())
        digest.update(layout.index[split].label.tobytes())
    return digest.hexdigest()


def labelled(name: str, layout: Layout, split: Split, sample: int) -> str:
    """Return an image's name, followed by the number of the task that changed the image, if one did."""
    change = layout.index[split].change
    return name if change is None or change[sample] == 0 else f"{name}@{change[sample] + 1}"
