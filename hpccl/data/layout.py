"""From data sets with classes to a stream of tasks: when each class is learned, and its number in the stream.

Everything is numbered in learning order. Classes: task 0 has 0..K-1, task 1 the next; within a task they keep the order
of their data set. Sample positions: task by task, within a task class by class, within a class as stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpccl.data.order import mix, permutation
from hpccl.data.protocols import Split
from hpccl.errors import ConfigError, DataError

__all__ = [
    "ClassTask",
    "Collection",
    "Index",
    "Layout",
    "align",
    "arrange",
    "extended",
    "held_out",
    "numbered",
    "tested_on",
    "unique_titles",
    "validation_share",
]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
SPLITS: tuple[Split, Split] = ("train", "test")
# The purpose of a hash, other than those in hpccl.data.order: which examples are held out, the same for every seed.
_HELD_OUT = 401


@dataclass(frozen=True)
class Collection:
    """One data set to be cut into tasks.

    labels, groups: by split, [num_images] class number within the data set and shard number
    tasks: number of tasks; keep: number of classes to use, the first ones in order; None for all
    widths: number of classes of each task, consistent with `tasks` and `keep`; None for equally many
    images: identifies its training images; None: no other data set has them
    """

    title: str
    class_names: Sequence[str]
    labels: Mapping[Split, Ints]
    groups: Mapping[Split, Ints]
    tasks: int
    keep: int | None = None
    widths: tuple[int, ...] | None = None
    images: str | None = None


@dataclass(frozen=True)
class ClassTask:
    """One step of the stream: some classes and where their examples are."""

    index: int
    name: str
    classes: tuple[int, ...]
    train: range
    test: range

    def samples(self, split: Split) -> range:
        """The stream's sample positions that belong to this task."""
        return self.train if split == "train" else self.test


@dataclass(frozen=True, eq=False)
class Index:
    """By sample position [num_samples]: the data set and the number within it, class and shard in the stream.

    change: number of the change of the image (see hpccl.data.changes); None: all images are as stored
    """

    part: Ints
    local: Ints
    label: Ints
    group: Ints
    change: Ints | None = None

    def __len__(self) -> int:
        return len(self.label)

    def only(self, kept: npt.NDArray[np.bool_] | Ints) -> Index:
        """Return the samples where `kept` [num_samples] is True, in order, or those at positions `kept` [n]."""
        change = None if self.change is None else self.change[kept]
        return Index(self.part[kept], self.local[kept], self.label[kept], self.group[kept], change)


@dataclass(frozen=True, eq=False)
class Layout:
    """The tasks of a stream and the index of each split.

    added: positions, after those of the tasks, of further training examples of the same classes
    first_of: by data set, the first one with the same images: itself, unless it repeats an earlier one
    """

    tasks: tuple[ClassTask, ...]
    class_names: tuple[str, ...]
    index: Mapping[Split, Index]
    added: range = range(0)
    first_of: tuple[int, ...] = ()


def arrange(collections: Sequence[Collection], *, order: Literal["given", "random"], seed: int) -> Layout:
    """Cut each data set into tasks of equally many classes (or of `widths`), one data set after the other.

    Raises:
        ConfigError: more classes are asked for than there are, or they cannot be split evenly.
        DataError: a task has no examples.
    """
    chosen = [_class_order(part, which, order, seed) for which, part in enumerate(collections)]
    tasks: list[ClassTask] = []
    pieces: dict[Split, list[Index]] = {"train": [], "test": []}
    names: list[tuple[str, str]] = []
    for which, (part, classes) in enumerate(zip(collections, chosen, strict=True)):
        widths = part.widths or (len(classes) // part.tasks,) * part.tasks
        for number, width in enumerate(widths):
            mine = np.sort(classes[sum(widths[:number]) :][:width])
            first = len(names)
            ranges = [
                _append(pieces[split], collections, which, classes=mine, first=first, split=split) for split in SPLITS
            ]
            title = numbered(part.title, number, part.tasks)
            for split, positions in zip(SPLITS, ranges, strict=True):
                if not positions:
                    raise DataError(f"task {title} has no {split} images; its classes: {_list(part, mine)}")
            names += [(part.title, part.class_names[name]) for name in mine]
            tasks.append(ClassTask(len(tasks), title, tuple(range(first, first + width)), *ranges))
    index: dict[Split, Index] = {split: _joined(pieces[split]) for split in SPLITS}
    return Layout(tuple(tasks), _told_apart(names), index, first_of=_first_of(collections))


def extended(layout: Layout, more: Sequence[Collection], *, parts: int) -> Layout:
    """Append further training examples of the tasks' classes, class by class as in a task; the tasks stay the same.

    parts: number of data sets in the layout; those in `more` are numbered from there.

    Raises:
        DataError: a class is not one of the layout's.
    """
    known = {name: number for number, name in enumerate(layout.class_names)}
    pieces = [layout.index["train"]]
    assert pieces[0].change is None, "added images are of no task that changes them"
    for which, part in enumerate(more, start=parts):
        used = np.unique(part.labels["train"])
        unknown = [part.class_names[number] for number in used if part.class_names[number] not in known]
        if unknown:
            raise DataError(
                f"'{part.title}' has images of class '{unknown[0]}' ({len(unknown)} such classes), which the run has "
                f"not learned; allowed: {', '.join(layout.class_names[:5])}{', ...' if len(known) > 5 else ''}. "
                "New classes are new tasks: add them with `hpccl extend RUN --out OUT --part SHARDS`"
            )
        number_of = np.array([known.get(name, -1) for name in part.class_names], dtype=np.int64)
        label = number_of[part.labels["train"]]
        local = np.argsort(label, kind="stable")
        earlier = int(pieces[-1].group.max(initial=-1)) + 1
        group = part.groups["train"][local] + earlier
        pieces.append(Index(np.full(len(local), which), local, label[local], group))
    index: dict[Split, Index] = {**layout.index, "train": _joined(pieces)}
    return replace(layout, index=index, added=range(len(pieces[0]), len(index["train"])))


def align(collections: Sequence[Collection], *, order: Literal["given", "random"], seed: int) -> Layout:
    """Make each data set a task; all have the same classes, identified by their names.

    Raises:
        ConfigError: more classes are asked for than there are.
        DataError: class names differ, or a task has no examples.
    """
    first, *_ = collections
    classes = np.sort(_class_order(first, 0, order, seed))
    names = tuple(first.class_names[number] for number in classes)
    shared = [_renumbered(part, first) for part in collections]
    tasks: list[ClassTask] = []
    pieces: dict[Split, list[Index]] = {"train": [], "test": []}
    for which, part in enumerate(shared):
        ranges = [_append(pieces[split], shared, which, classes=classes, first=0, split=split) for split in SPLITS]
        for split, positions in zip(SPLITS, ranges, strict=True):
            if not positions:
                raise DataError(f"task {part.title} has no {split} images; its classes: {_list(part, classes)}")
        tasks.append(ClassTask(which, part.title, tuple(range(len(names))), *ranges))
    index: dict[Split, Index] = {split: _joined(pieces[split]) for split in SPLITS}
    return Layout(tuple(tasks), names, index, first_of=_first_of(collections))


def _first_of(collections: Sequence[Collection]) -> tuple[int, ...]:
    """Return, by data set, the first one with the same images."""
    names = [part.images for part in collections]
    return tuple(which if name is None else names.index(name) for which, name in enumerate(names))


def _renumbered(part: Collection, first: Collection) -> Collection:
    """Renumber the classes as in another data set, which has the same class names."""
    missing = sorted(set(first.class_names) ^ set(part.class_names))
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"'{part.title}' and '{first.title}' do not have the same classes ({some}); with stream.scenario.kind="
            "domains every part has all of them: build the shards from folders with the same class names"
        )
    number = np.array([list(first.class_names).index(name) for name in part.class_names], dtype=np.int64)
    labels: dict[Split, Ints] = {split: number[part.labels[split]] for split in SPLITS}
    return replace(part, class_names=first.class_names, labels=labels)


def held_out(layout: Layout, share: float) -> Layout:
    """Test on a share of each class's training examples instead of training on them: see `validation_share`."""
    return tested_on(layout, validation_share(layout, share))


def validation_share(layout: Layout, share: float, *, spared: Bools | None = None) -> Bools:
    """[n] mask of a share of the training examples of each class in each data set.

    The choice depends on a hash of where an example is stored: it is the same for every seed, order of classes and
    split into tasks, and for every repetition of a data set.

    Args:
        layout: has n training examples.
        share: in (0, 1); rounded to a whole number of examples, at least one.
        spared: [n] mask of examples that must not be chosen.

    Raises:
        ConfigError: a class would have no example left.
    """
    index = layout.index["train"]
    held = np.zeros(len(index), dtype=bool)
    order = np.lexsort((index.label, index.part))  # stable
    first_of = np.array(layout.first_of, dtype=np.int64)
    ends = np.flatnonzero((np.diff(index.part[order]) != 0) | (np.diff(index.label[order]) != 0)) + 1
    for mine in np.split(order, ends):
        free = mine if spared is None else mine[~spared[mine]]
        count = max(1, round(share * len(mine)))
        if count > len(free) or count == len(mine):
            raise ConfigError(
                f"class '{layout.class_names[index.label[mine[0]]]}' has {len(mine)} training images"
                f"{'' if spared is None else f', {len(mine) - len(free)} of them listed'}; data.validation={share:g} "
                f"would leave {'none' if spared is None else 'too few'} of them to train on; make it smaller, or leave "
                "such classes out"
            )
        priority = mix(_HELD_OUT, first_of[index.part[free]], index.local[free])
        held[free[np.argsort(priority, kind="stable")[:count]]] = True
    return held


def tested_on(layout: Layout, held: Bools) -> Layout:
    """Test on the training examples where `held` [n] is True, instead of training on them."""
    index = layout.index["train"]
    before = np.concatenate([[0], np.cumsum(held)])  # [n + 1] held examples before each position

    def cut(task: ClassTask) -> ClassTask:
        start, stop = int(before[task.train.start]), int(before[task.train.stop])
        return replace(task, train=range(task.train.start - start, task.train.stop - stop), test=range(start, stop))

    kept: dict[Split, Index] = {"train": index.only(~held), "test": index.only(held)}
    return replace(layout, tasks=tuple(cut(task) for task in layout.tasks), index=kept)


def _class_order(part: Collection, which: int, order: Literal["given", "random"], seed: int) -> Ints:
    """Return the classes of one data set in learning order, as numbers within the data set."""
    total = len(part.class_names)
    keep = total if part.keep is None else part.keep
    if keep > total:
        raise ConfigError(
            f"{keep} classes of '{part.title}' are asked for but it has {total}; set classes to at most {total}"
        )
    if part.widths is None and keep % part.tasks:
        allowed = [divisor for divisor in range(1, keep + 1) if keep % divisor == 0]
        raise ConfigError(
            f"{keep} classes of '{part.title}' cannot be split into {part.tasks} tasks of equally many; "
            f"tasks can be {', '.join(map(str, allowed))}"
        )
    classes = permutation(total, seed, which) if order == "random" else np.arange(total)
    return classes[:keep]


def _append(
    pieces: list[Index], collections: Sequence[Collection], which: int, *, classes: Ints, first: int, split: Split
) -> range:
    """Append the examples of one task's classes and return their positions."""
    labels, groups = collections[which].labels[split], collections[which].groups[split]
    local = np.flatnonzero(np.isin(labels, classes))
    label = first + np.searchsorted(classes, labels[local])
    by_class = np.argsort(label, kind="stable")
    earlier = sum(int(part.groups[split].max(initial=-1)) + 1 for part in collections[:which])
    start = sum(len(piece) for piece in pieces)
    local, label = local[by_class], label[by_class]
    pieces.append(Index(np.full(len(local), which), local, label, groups[local] + earlier))
    return range(start, start + len(local))


def numbered(title: str, number: int, tasks: int) -> str:
    """Return the name of a data set's task `number` (from 0)."""
    return title if tasks == 1 else f"{title}[{number + 1}/{tasks}]"


def _joined(pieces: Sequence[Index]) -> Index:
    return Index(
        *(
            np.concatenate([getattr(piece, name) for piece in pieces]).astype(np.int64)
            for name in ("part", "local", "label", "group")
        )
    )


def _list(part: Collection, classes: Ints, most: int = 5) -> str:
    names = [part.class_names[number] for number in classes[:most]]
    return ", ".join(names) + (", ..." if len(classes) > most else "")


def _told_apart(names: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return unique class names: names that occur in several data sets are prefixed with the title of theirs."""
    times = Counter(name for _, name in names)
    return tuple(name if times[name] == 1 else f"{title}/{name}" for title, name in names)


def unique_titles(titles: Sequence[str]) -> tuple[str, ...]:
    """Make titles unique: repetitions get #2, #3, ..."""
    seen: Counter[str] = Counter()
    result = []
    for title in titles:
        seen[title] += 1
        result.append(title if seen[title] == 1 else f"{title}#{seen[title]}")
    return tuple(result)
