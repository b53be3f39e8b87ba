"""Tasks that share classes or images, or have few of them: layouts made from layouts.

A sample's position depends on the scenario's seed and on where its image is stored, not on the run's seed.

Sources: Bang et al. 2021 (Rainbow Memory) for Blurry-M: M % of a task's images are of other tasks' classes. Koh et al.
2022 (i-Blurry) for i-Blurry-N-M: that, but N % of the classes belong to one task alone. Tao et al. 2020 (TOPIC, sec. 3)
for few-shot sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from hpccl.data.layout import ClassTask, Index, Layout, numbered, tested_on, validation_share
from hpccl.data.order import mix
from hpccl.data.shards.sources import sample_key
from hpccl.errors import ConfigError, DataError

__all__ = ["blurred", "drawn_shots", "listed_shots", "repeated"]

Ints = npt.NDArray[np.int64]
# Numbers within the data set [n] -> names.
Names = Callable[[Ints], Sequence[str]]

# The purposes of hashes, other than those in hpccl.data.order, layout and changes.
_DISJOINT, _BLUR, _SHOTS = 421, 422, 423


# ---------------------------------------------------------------- views of one data set


def repeated(layout: Layout, tasks: int) -> Layout:
    """Repeat the only task of a layout `tasks` times: task t applies change t to every image."""
    (task,) = layout.tasks
    index = {split: _repeated(each, tasks) for split, each in layout.index.items()}
    train, test = len(task.train), len(task.test)
    views = tuple(
        ClassTask(
            index=number,
            name=numbered(task.name, number, tasks),
            classes=task.classes,
            train=range(number * train, (number + 1) * train),
            test=range(number * test, (number + 1) * test),
        )
        for number in range(tasks)
    )
    return replace(layout, tasks=views, index=index)


def _repeated(index: Index, times: int) -> Index:
    tiled = index.only(np.tile(np.arange(len(index)), times))
    return replace(tiled, change=np.repeat(np.arange(times), len(index)))


# ---------------------------------------------------------------- blurry boundaries


def blurred(layout: Layout, *, blur: float, disjoint: float, seed: int) -> Layout:
    """Move training images of some classes to other tasks; test images stay.

    Of every task, round(disjoint * classes) classes are drawn whose images all stay. Of each other class,
    round(blur * images) training images are drawn and dealt out to the other tasks of its data set in turn, so that
    the numbers these get differ by at most one. A task's classes are those of which it has training images.

    Raises:
        ConfigError: no image would be moved.
    """
    index = layout.index["train"]
    part_of_task = [int(index.part[task.train.start]) for task in layout.tasks]
    own = np.repeat(np.arange(len(layout.tasks)), [len(task.train) for task in layout.tasks])
    owner = own.copy()
    for task in layout.tasks:
        others = [t for t, part in enumerate(part_of_task) if part == part_of_task[task.index] and t != task.index]
        for label in _blurry_classes(task, disjoint, seed) if others else ():
            mine = np.flatnonzero(index.label == label)
            count = min(round(blur * len(mine)), len(mine) - 1)
            moved = mine[np.argsort(mix(seed, _BLUR, index.part[mine], index.local[mine]), kind="stable")[:count]]
            # Classes begin at different tasks, so that remainders do not all go to the first.
            owner[moved] = np.array(others)[(label + np.arange(count)) % len(others)]
    if np.array_equal(owner, own):
        raise ConfigError(
            f"stream.scenario.blur={blur:g} and disjoint={disjoint:g} leave every image with its task: "
            "round(disjoint * classes) classes of each task are not blurred, and of each other class round(blur * "
            "images) images are; set disjoint lower or blur higher, or kind to classes"
        )
    order = np.lexsort((np.arange(len(index)), index.label, owner))
    ends = np.cumsum(np.bincount(owner, minlength=len(layout.tasks))).tolist()
    mixed = index.only(order)

    def with_arrivals(task: ClassTask) -> ClassTask:
        train = range(ends[task.index - 1] if task.index else 0, ends[task.index])
        arrived = np.unique(mixed.label[train.start : train.stop]).tolist()
        return replace(task, train=train, classes=tuple(sorted({*task.classes, *arrived})))

    tasks = tuple(with_arrivals(task) for task in layout.tasks)
    return replace(layout, tasks=tasks, index={**layout.index, "train": mixed})


def _blurry_classes(task: ClassTask, disjoint: float, seed: int) -> list[int]:
    """Return the classes of a task whose images are shared with other tasks."""
    classes = np.array(task.classes)
    alone = round(disjoint * len(classes))
    return [int(label) for label in np.sort(classes[np.argsort(mix(seed, _DISJOINT, classes), kind="stable")[alone:]])]


# ---------------------------------------------------------------- few shots


def drawn_shots(layout: Layout, *, shots: int, seed: int) -> Layout:
    """Keep `shots` training images of every class outside the first task: those with the smallest hashes.

    Raises:
        ConfigError: a class has fewer.
    """
    index = layout.index["train"]
    kept = np.zeros(len(index), dtype=bool)
    kept[: layout.tasks[0].train.stop] = True
    for task in layout.tasks[1:]:
        for label in task.classes:
            mine = np.flatnonzero(index.label == label)
            if len(mine) < shots:
                raise ConfigError(
                    f"class '{layout.class_names[label]}' has {len(mine)} training images, of which "
                    f"stream.scenario.shots={shots} are asked for; set it to at most {len(mine)}"
                )
            priority = mix(seed, _SHOTS, index.part[mine], index.local[mine])
            kept[mine[np.argsort(priority, kind="stable")[:shots]]] = True
    return _only(layout, kept)


def listed_shots(layout: Layout, folder: Path, names: Names, *, shots: int, validation: float | None = None) -> Layout:
    """Keep the training images of each task that its file in `folder` lists; all of the first, if it has no file.

    names: maps numbers within the data set to `<shard>/<key>`
    validation: share of each class to test on instead of the test images; after the first task, taken from the images
        that no file lists

    Raises:
        ConfigError: too few images of a class are not listed.
        DataError: a file is missing or cannot be read, or lists an image that is not there, is another task's, or is
            there twice; or it lists another number than `shots` of a class.
    """
    index = layout.index["train"]
    found: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names(index.local)):
        found[_number(PurePosixPath(name).name)].append(position)
    kept = np.zeros(len(index), dtype=bool)
    for task in layout.tasks:
        path = folder / f"session_{task.index + 1}.txt"
        if task.index == 0 and not path.exists():
            kept[: task.train.stop] = True
            continue
        for entry in _entries(path):
            position = _position(entry, found, task, layout, path)
            if kept[position]:
                raise DataError(f"'{path}' lists '{entry}' twice; an image may be listed once")
            kept[position] = True
        if task.index > 0:
            _check_shots(kept, task, layout, path, shots)
    if validation is None:
        return _only(layout, kept)
    held = validation_share(layout, validation, spared=kept & (np.arange(len(kept)) >= layout.tasks[0].train.stop))
    return _only(tested_on(layout, held), kept[~held])


def _only(layout: Layout, kept: npt.NDArray[np.bool_]) -> Layout:
    """Drop the training samples where `kept` is False."""
    before = np.concatenate([[0], np.cumsum(kept)]).tolist()
    tasks = tuple(
        replace(task, train=range(before[task.train.start], before[task.train.stop])) for task in layout.tasks
    )
    return replace(layout, tasks=tasks, index={**layout.index, "train": layout.index["train"].only(kept)})


def _entries(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}; stream.scenario.lists is a folder "
            "of session_2.txt, session_3.txt, ... with a training image a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _number(key: str) -> str:
    """Return a number without leading zeros, and any other key as it is."""
    return str(int(key)) if key.isdecimal() else key


def _position(entry: str, found: dict[str, list[int]], task: ClassTask, layout: Layout, path: Path) -> int:
    """Return the one training sample that an entry names."""
    index = layout.index["train"]
    places = found.get(_number(sample_key(entry)), [])
    if len(places) > 1:  # the same name in several classes, distinguished by the folder
        folder = PurePosixPath(entry.replace("\\", "/")).parent.name
        places = [place for place in places if layout.class_names[index.label[place]] == folder]
    if len(places) != 1:
        raise DataError(
            f"'{path}' lists '{entry}', which names {len(places)} of the training images of this stream's classes; "
            "allowed: names (without folders and extension), or numbers if images are named by numbers"
        )
    if places[0] not in task.train:
        name = layout.class_names[index.label[places[0]]]
        raise DataError(
            f"'{path}' lists '{entry}', an image of class '{name}', which session {task.index + 1} does not learn; "
            "stream.order, base and way must be those that the lists were made for"
        )
    return places[0]


def _check_shots(kept: npt.NDArray[np.bool_], task: ClassTask, layout: Layout, path: Path, shots: int) -> None:
    index = layout.index["train"]
    for label in task.classes:
        count = int((kept & (index.label == label)).sum())
        if count != shots:
            raise DataError(
                f"'{path}' lists {count} images of class '{layout.class_names[label]}', but stream.scenario.shots="
                f"{shots}; set it to the number that the lists have"
            )
