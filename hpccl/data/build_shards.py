"""A stream of the images in shards: checked, and decoded either once into a cache or for every use."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpccl.config.data import DataConfig, TimmAugment
from hpccl.config.stream import Part, ShardStream
from hpccl.data.arranged import arranged, changes_of, labelled, marked
from hpccl.data.augment import BatchAugment, Normaliser
from hpccl.data.decoded import DecodedImages, Kept, cache_folder, keep_decoded, kept_path
from hpccl.data.encoded import EncodedImages, Maker
from hpccl.data.layout import SPLITS, Collection, Layout, extended, unique_titles
from hpccl.data.outline import Outline
from hpccl.data.protocols import Split
from hpccl.data.settings import batch_augment, evaluation_view, tested_split
from hpccl.data.shards.copies import open_with_copies
from hpccl.data.shards.decode import decode
from hpccl.data.shards.reader import ShardSet
from hpccl.data.shards.remote import ShardCache, is_url
from hpccl.data.stream import ImageSource, ImageStream
from hpccl.data.timm_view import TimmView
from hpccl.data.views import EvaluationView
from hpccl.errors import ConfigError, DataError

__all__ = ["open_shards", "outline_shards"]

Shapes = dict[Split, tuple[int, int]]  # (height, width) of the views of a split

_SMALL = 64  # pixels a side up to which storage=auto decodes once
_DISK_SHARE = 0.5  # of the free disk space that storage=auto may fill with decoded images


@dataclass(frozen=True, eq=False)
class _Opened:
    """One part of a stream: the shards of its splits."""

    part: Part
    title: str
    splits: dict[Split, ShardSet]

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[k, 2] the distinct (width, height) of its images, without unknown ones, which are stored as (0, 0)."""
        sizes = np.concatenate([np.asarray(shards.sizes, dtype=np.int64) for shards in self.splits.values()])
        # Pairs packed into one number, for which np.unique is much faster.
        found = np.unique(sizes[:, 0] << 32 | sizes[:, 1])
        known: npt.NDArray[np.int64] = np.stack([found >> 32, found & 0xFFFFFFFF], axis=1)
        return known.compress(known.min(axis=1) > 0, axis=0)


def outline_shards(stream: ShardStream, data: DataConfig, *, copies: Path | None) -> Outline:
    """See `hpccl.data.build.outline`; reads the indices alone."""
    parts = _open_parts(stream, data, copies)
    layout = arranged([_collection(part) for part in parts], stream, data, partial(_names, parts))
    shapes, view = _view_shapes(parts, data), evaluation_view(data, "test")
    sizes = np.concatenate([part.sizes for part in parts])
    as_stored = bool((sizes == shapes["test"][::-1]).all())
    return Outline(layout, (3, *shapes["train"]), view, (3, *shapes["test"]), as_stored)


def open_shards(stream: ShardStream, data: DataConfig, added: Sequence[str], copies: Path | None) -> ImageStream:
    """See `hpccl.data.build.open_stream`."""
    parts = _open_parts(stream, data, copies)
    layout = arranged([_collection(part) for part in parts], stream, data, partial(_names, parts))
    if added:
        more = _open_added(stream, data, parts, added)
        layout = extended(layout, [_collection(part) for part in more], parts=len(parts))
        parts = [*parts, *more]
    shapes, changes = _view_shapes(parts, data), changes_of(stream)
    decoded = _storage(parts, data, shapes) == "decoded"
    if changes is not None and not decoded:
        raise ConfigError(
            f"stream.scenario.kind={stream.scenario.kind} changes decoded images, so that they must be kept decoded; "
            f"set data.storage=decoded (of images up to {_SMALL} pixels a side, auto is decoded if there is room)"
        )
    source: ImageSource
    if decoded:
        source = replace(_decoded_source(parts, layout, data, shapes), changes=changes)
    else:
        source = _encoded_source(parts, layout, data, shapes)
    opened = ImageStream(
        layout,
        (3, *shapes["train"]),
        source,
        partial(_name_of, parts, layout),
        marked(_fingerprint(parts), layout, stream, data),
        test_shape=(3, *shapes["test"]),
        shards=[part.splits["train"] for part in parts],
    )
    if isinstance(source, DecodedImages) and data.bad_images == "stop" and opened.skipped():
        raise DataError(_explain_bad(opened, source))
    return opened


def _fingerprint(parts: Sequence[_Opened]) -> str:
    together = "\n".join(shards.fingerprint for part in parts for shards in part.splits.values())
    return hashlib.sha256(together.encode()).hexdigest()


def _open_parts(stream: ShardStream, data: DataConfig, copies: Path | None) -> list[_Opened]:
    stored: dict[Split, str] = {"train": stream.train_split, "test": stream.test_split}
    names: dict[Split, str] = {"train": stream.train_split, "test": stored[tested_split(data)]}
    titles = unique_titles([_title(part.path) for part in stream.parts])
    cache = ShardCache.of(data.shard_cache, data.shard_gib, data.retries)
    opened = []
    for number, (part, title) in enumerate(zip(stream.parts, titles, strict=True)):
        place = part.path if is_url(part.path) else Path(part.path).expanduser()
        train = open_with_copies(place, names["train"], cache, folder=copies, part=number)
        splits: dict[Split, ShardSet] = {"train": train, "test": _open_test(place, names["test"], cache, train)}
        _check_classes(part, splits, names)
        opened.append(_Opened(part, title, splits))
    return opened


def _open_test(place: Path | str, split: str, cache: ShardCache, train: ShardSet) -> ShardSet:
    try:
        return ShardSet.open(place, split, cache)
    except DataError as error:
        if train.copies is None:
            raise
        raise DataError(
            f"{error}. memory.keep=copy copies training images only: the test images of every task are needed until "
            "the end, as accuracy on all tasks is measured after each"
        ) from error


def _open_added(stream: ShardStream, data: DataConfig, parts: Sequence[_Opened], added: Sequence[str]) -> list[_Opened]:
    """Open further training images; without data.image_size, they must have the same size as the stream's."""
    titles = unique_titles([*(part.title for part in parts), *map(_title, added)])[len(parts) :]
    cache = ShardCache.of(data.shard_cache, data.shard_gib, data.retries)
    opened = []
    for path, title in zip(added, titles, strict=True):
        place = path if is_url(path) else Path(path).expanduser()
        part = _Opened(Part(path=path), title, {"train": ShardSet.open(place, stream.train_split, cache)})
        known, found = np.concatenate([other.sizes for other in parts]), part.sizes
        if data.image_size is None and len(found) and not (found == known[0]).all():
            (width, height), (other_width, other_height) = found[0], known[0]
            raise DataError(
                f"images of '{path}' are {width} x {height} and those of the stream {other_width} x {other_height}; "
                "data.image_size is not set, so both must have one size: build the shards from images of that size"
            )
        opened.append(part)
    return opened


def _title(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[1] if is_url(path) else Path(path).expanduser().resolve().name


def _check_classes(part: Part, splits: dict[Split, ShardSet], names: dict[Split, str]) -> None:
    train, test = (_classes_with_images(splits[split]) for split in SPLITS)
    if splits["train"].classes == splits["test"].classes and train == test:
        return
    differing: dict[Split, list[str]] = {"train": sorted(train - test), "test": sorted(test - train)}
    words = [
        f"only in {names[split]}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for split, found in differing.items()
        if found
    ]
    raise DataError(
        f"'{part.path}' has images of {len(train)} classes in split '{names['train']}' and of {len(test)} in "
        f"'{names['test']}', which are not the same ({'; '.join(words) or 'lists of classes differ'}); "
        "build both splits from folders with the same class names"
    )


def _classes_with_images(shards: ShardSet) -> set[str]:
    return {shards.classes[label] for label in np.unique(shards.labels)}


def _collection(opened: _Opened) -> Collection:
    return Collection(
        title=opened.title,
        class_names=opened.splits["train"].classes,
        labels={split: np.asarray(shards.labels, dtype=np.int64) for split, shards in opened.splits.items()},
        groups={split: np.asarray(shards.shard_of, dtype=np.int64) for split, shards in opened.splits.items()},
        tasks=opened.part.tasks,
        keep=opened.part.classes,
        images=opened.splits["train"].fingerprint,
    )


def _name_of(parts: Sequence[_Opened], layout: Layout, split: Split, sample: int) -> str:
    index = layout.index[split]
    part = parts[index.part[sample]]
    return labelled(f"{part.title}/{part.splits[split].name(int(index.local[sample]))}", layout, split, sample)


def _names(parts: Sequence[_Opened], local: npt.NDArray[np.int64]) -> list[str]:
    """Return the names of training images of the first part."""
    return list(parts[0].splits["train"].names(local))


def _view_shapes(parts: Sequence[_Opened], data: DataConfig) -> Shapes:
    """Return (height, width) of the views of each split."""
    if data.image_size is not None:
        test = data.test_size or data.image_size
        return {"train": (data.image_size, data.image_size), "test": (test, test)}
    sizes = np.unique(np.concatenate([part.sizes for part in parts]), axis=0)
    if len(sizes) != 1:
        known = ", ".join(f"{width} x {height}" for width, height in sizes[:3])
        raise ConfigError(
            f"images have {len(sizes)} sizes ({known}{', ...' if len(sizes) > 3 else ''}); "
            "set data.image_size to the side of the squares that the model gets"
        )
    width, height = sizes[0].tolist()
    return {"train": (height, width), "test": (height, width)}


def _storage(parts: Sequence[_Opened], data: DataConfig, shapes: Shapes) -> Literal["decoded", "encoded"]:
    if data.storage == "decoded" and isinstance(data.augment, TimmAugment):
        raise ConfigError(
            "data.storage is decoded but data.augment.kind is timm, which crops from the full image; "
            "set data.storage to auto or encoded, or data.augment.kind to crop_flip or none"
        )
    if data.storage != "auto":
        return data.storage
    sizes = np.unique(np.concatenate([part.sizes for part in parts]), axis=0)
    small = len(sizes) == 1 and max(*sizes[0].tolist(), *shapes["train"], *shapes["test"]) <= _SMALL
    if isinstance(data.augment, TimmAugment) or data.progressive is not None or not small:
        return "encoded"
    paths = _kept_paths(parts, data)
    missing = sum(
        len(part.splits[split].labels) * 3 * shapes[split][0] * shapes[split][1]
        for part, by_split in zip(parts, paths, strict=True)
        for split, path in by_split.items()
        if not path.exists()
    )
    folder = cache_folder(data.cache).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return "decoded" if missing <= _DISK_SHARE * shutil.disk_usage(existing).free else "encoded"


def _kept_paths(parts: Sequence[_Opened], data: DataConfig) -> list[dict[Split, Path]]:
    folder, views = cache_folder(data.cache), {split: evaluation_view(data, split) for split in SPLITS}
    return [
        {split: kept_path(folder, shards.fingerprint, repr(views[split])) for split, shards in part.splits.items()}
        for part in parts
    ]


def _decoded_source(parts: Sequence[_Opened], layout: Layout, data: DataConfig, shapes: Shapes) -> DecodedImages:
    kept: dict[Split, list[Kept]] = {split: [] for split in SPLITS}
    for part, paths in zip(parts, _kept_paths(parts, data), strict=True):
        for split, shards in part.splits.items():
            view, path, shape = evaluation_view(data, split), paths[split], (*shapes[split], 3)
            if shards.missing and not path.exists():
                kept[split].append(_decoded_rest(path, shards, view, shape))
                continue
            kept[split].append(_keep(path, shards, view, shape, np.arange(len(shards))))
    return DecodedImages(
        parts=kept,
        index=layout.index,
        augment=batch_augment(data, where="decoded images"),
        normalise=Normaliser.of(data.mean, data.std, 3),
    )


def _decoded_rest(path: Path, shards: ShardSet, view: EvaluationView, shape: tuple[int, int, int]) -> Kept:
    """Keep the images that are not gone, in a file of their own."""
    every = np.arange(len(shards))
    rest = np.setdiff1d(every, shards.gone(every))
    digest = hashlib.sha256(rest.tobytes()).hexdigest()[:16]
    beside = path.with_stem(f"{path.stem}-{digest}")
    found = _keep(beside, shards, view, shape, rest)
    return replace(found, bad={int(rest[row]): reason for row, reason in found.bad.items()}, numbers=rest)


def _keep(
    path: Path, shards: ShardSet, view: EvaluationView, shape: tuple[int, int, int], numbers: npt.NDArray[np.int64]
) -> Kept:
    """Open some images in decoded form, or decode them first; in the file they have the numbers 0, 1, ..."""
    last = frozenset(shards.last_of_files(numbers).tolist())

    def read(row: int) -> bytes:
        number = int(numbers[row])
        data = shards.read(number)
        # The path identifies the bytes that the shards should have, so images decoded from other bytes must not be
        # stored there. Checked with a file's last image: the file is then in the page cache, and a change while it was
        # decoded is found as well.
        if number in last:
            shards.check_file(number)
        return data

    def decoded(data: bytes, row: int) -> npt.NDArray[np.uint8]:
        return view(decode(data, shards.name(int(numbers[row]))))

    return keep_decoded(path, shape=(len(numbers), *shape), read=read, decode=decoded)


def _encoded_source(parts: Sequence[_Opened], layout: Layout, data: DataConfig, shapes: Shapes) -> EncodedImages:
    normalise = Normaliser.of(data.mean, data.std, 3)
    augment: BatchAugment | dict[int, TimmView]
    if isinstance(data.augment, TimmAugment):
        height, width = shapes["train"]
        if height != width:
            raise ConfigError(f"images are {width} x {height} and data.augment.kind is timm; set data.image_size")
        sides = (height,) if data.progressive is None else data.progressive.sides(height)
        augment = {side: TimmView.of(data.augment, size=side, mean=data.mean) for side in sides}
    else:
        augment = batch_augment(data, where="encoded images")
    makers: dict[Split, Maker] = {
        split: Maker(
            sets=[part.splits[split] for part in parts if split in part.splits],  # added parts come last
            index=layout.index[split],
            shape=(3, *shapes[split]),
            view=evaluation_view(data, split),
            augment=augment,
        )
        for split in SPLITS
    }
    remote = any(each.remote for maker in makers.values() for each in maker.sets)
    return EncodedImages(
        makers,
        normalise,
        workers=data.workers,
        timeout=None if remote else data.timeout,
        stop_at_bad=data.bad_images == "stop",
    )


def _explain_bad(stream: ImageStream, source: DecodedImages) -> str:
    bad = stream.skipped()
    split, sample, name, reason = bad[0]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    notes = source.parts[split][int(source.index[split].part[sample])].notes
    return (
        f"{name}: {reason}{others}; set data.bad_images to skip to leave out such images, or build the shards "
        "again from repaired ones. This was found when the images were decoded: to decode them again, delete "
        f"'{notes}'"
    )
