"""From data sets to tasks: the scenario, and what it does to images, names and fingerprints."""

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
    """The tasks; with data.validation, tests are on held-out training images (both splits are then the same one).

    names: of the training images of the first data set, by their numbers in it
    """
    order, seed, first = stream.order, stream.order_seed, collections[0]
    match stream.scenario:
        case ClassScenario():
            return _tested(arrange(collections, order=order, seed=seed), data)
        case DomainScenario():
            return _tested(align(collections, order=order, seed=seed), data)
        case PermutedScenario() | RotatedScenario():
            # Held out before it is repeated: what one task tests on, no other trains on.
            whole = _tested(arrange([replace(first, tasks=1)], order=order, seed=seed), data)
            return repeated(whole, first.tasks)
        case BlurryScenario(blur=blur, disjoint=disjoint, seed=own_seed):
            layout = _tested(arrange(collections, order=order, seed=seed), data)
            return blurred(layout, blur=blur, disjoint=disjoint, seed=own_seed)
        case FewShotScenario(shots=shots, lists=lists, seed=own_seed):
            sessions = arrange([_sessions(first, stream.scenario)], order=order, seed=seed)
            # Held out before shots are drawn: sessions are tested on more than a share of their shots.
            if lists is None:
                return drawn_shots(_tested(sessions, data), shots=shots, seed=own_seed)
            folder = Path(lists).expanduser()
            return listed_shots(sessions, folder, names, shots=shots, validation=data.validation)
        case _:
            assert_never(stream.scenario)


def _tested(layout: Layout, data: DataConfig) -> Layout:
    return layout if data.validation is None else held_out(layout, data.validation)


def _sessions(collection: Collection, scenario: FewShotScenario) -> Collection:
    """The data set with as many classes as the base and the sessions have."""
    widths = (scenario.base, *[scenario.way] * (collection.tasks - 1))
    if sum(widths) > len(collection.class_names):
        raise ConfigError(
            f"{scenario.base} base classes and {collection.tasks - 1} sessions of {scenario.way} are {sum(widths)} "
            f"classes, but '{collection.title}' has {len(collection.class_names)}; set stream.scenario.base, way or "
            "the number of tasks lower"
        )
    return replace(collection, keep=sum(widths), widths=widths)


def changes_of(stream: StreamConfig) -> Changes | None:
    """What tasks do to their images."""
    match stream.scenario:
        case PermutedScenario(seed=seed):
            return Changes(Permuted(seed))
        case RotatedScenario(degrees=degrees, angles=kind, seed=seed):
            tasks = stream.tasks if isinstance(stream, DigitsStream) else stream.parts[0].tasks
            return Changes(Rotated(angles(tasks, degrees=degrees, drawn=kind == "drawn", seed=seed)))
        case _:
            return None


def marked(fingerprint: str, layout: Layout, stream: StreamConfig, data: DataConfig) -> str:
    """A fingerprint that also changes with which sample is where, where a seed or a file decides it.

    And with what domains, or data sets that come again, hold out: earlier versions took other images.
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
    """A name that says which task changed the image, if one did."""
    change = layout.index[split].change
    return name if change is None or change[sample] == 0 else f"{name}@{change[sample] + 1}"
