"""Copies of some images of a split: what a memory keeps, so that the originals may go.

    FOLDER/parts/000/manifest.json, index.npz        what split 0 says of all its images, without them
    FOLDER/task-003-000500/manifest.json, index.npz, c0012-000.tar, ...    the copies of one task, here 500

Copies are shards like any other (`hpccl shards verify FOLDER` reads them). A shard and an image keep their names, so
that an image has one global id, wherever it is read from; `listing` in their manifest is the fingerprint of the split
that they are from. Folders are written beside and renamed, and never changed: a smaller choice has a folder of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpccl.data.shards.manifest import INDEX, MANIFEST, Index, Manifest, ShardEntry
from hpccl.data.shards.reader import Copies, ShardSet
from hpccl.data.shards.remote import ShardCache, is_url, load_manifest
from hpccl.data.shards.write import Row, ShardWriter
from hpccl.errors import DataError, FolderError
from hpccl.folder import explain_os_error, replacing, replacing_folder, sync

__all__ = ["copied_name", "copy_images", "drop_copies", "manifest_with_copies", "open_with_copies"]

Ints = npt.NDArray[np.int64]


def copied_name(task: int, count: int) -> str:
    """The folder of `count` images of a task."""
    return f"task-{task:03d}-{count:06d}"


def copy_images(folder: Path, name: str, shards: ShardSet, samples: Ints, *, part: int) -> None:
    """Copy some images of split number `part` to `folder/name`, byte by byte; what is there already stays.

    samples: [m] numbers within the split.

    Raises:
        DataError: an image cannot be read.
        FolderError: the folder cannot be written.
    """
    try:
        _keep_listing(_listing(folder, part), shards)
        samples = np.sort(samples)
        if _is_there(folder / name, shards, samples):
            return
        with replacing_folder(folder / name) as beside:
            _write(beside, name, shards, samples)
    except OSError as error:
        raise FolderError(f"'{folder / name}' cannot be written: {explain_os_error(error)}") from error


def drop_copies(folder: Path, keep: Iterable[str]) -> None:
    """Delete the copies of tasks but those of some names."""
    kept = set(keep)
    for path in folder.glob("task-*"):
        if path.name not in kept:
            hidden = path.with_name(f".{path.name}.old")  # half a folder must not look like a whole one
            with contextlib.suppress(OSError):  # room is lost, nothing else
                os.replace(path, hidden)
    for hidden in folder.glob(".task-*"):
        shutil.rmtree(hidden, ignore_errors=True)


def open_with_copies(
    place: Path | str, split: str, cache: ShardCache, *, folder: Path | None, part: int = 0
) -> ShardSet:
    """Open a split of which `folder` may have copies; a split whose shards are gone is what the copies have of it.

    Raises:
        DataError: it cannot be opened, and nothing was copied of it.
    """
    if folder is None:
        return ShardSet.open(place, split, cache)
    try:
        shards = ShardSet.open(place, split, cache)
    except DataError as error:
        listing = _listing(folder, part)
        if not (listing / MANIFEST).is_file() or _is_another(place, split, listing):
            raise
        shards = ShardSet.listed(place, split, listing, str(error))
    copies, damaged = _copies(folder, shards)
    return replace(shards, copies=copies, trouble="; ".join(filter(None, [shards.trouble, *damaged])))


def manifest_with_copies(place: str, split: str, *, folder: Path | None, part: int) -> Manifest:
    """The manifest of a split of which `folder` may have copies, also where its shards are gone.

    Raises:
        DataError: it cannot be read, and nothing was copied of it.
    """
    try:
        return load_manifest(place, split)
    except DataError:
        if folder is None or not (_listing(folder, part) / MANIFEST).is_file():
            raise
        return Manifest.load(_listing(folder, part))


def _listing(folder: Path, part: int) -> Path:
    return folder / "parts" / f"{part:03d}"


def _is_another(place: Path | str, split: str, listing: Path) -> bool:
    """Whether other shards were put into the place of those that were copied."""
    if is_url(str(place)) or not (Path(place) / split / MANIFEST).is_file():
        return False
    return Manifest.load(Path(place) / split).fingerprint != Manifest.load(listing).fingerprint


def _keep_listing(folder: Path, shards: ShardSet) -> None:
    with contextlib.suppress(DataError):
        there = Manifest.load(folder)
        if there.fingerprint == shards.fingerprint:
            Index.load(folder, there)
            return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # the last that is written
    with replacing(folder / INDEX) as path:
        path.write_bytes(shards.files.index(shards.manifest))  # its checksum is a part of the fingerprint
    shards.manifest.save(folder)


def _is_there(folder: Path, shards: ShardSet, samples: Ints) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = ShardSet.open(folder.parent, folder.name)
    except DataError:
        return False
    return found.manifest.listing == shards.fingerprint and np.array_equal(_originals(found, shards), samples)


def _write(folder: Path, name: str, shards: ShardSet, samples: Ints) -> None:
    entries: list[ShardEntry] = []
    rows: list[Row] = []
    for number in np.unique(shards.shard_of[samples]).tolist():
        original = shards.manifest.shards[number]
        label = int(shards.labels[np.searchsorted(shards.shard_of, number)])
        path = folder / original.file
        with path.open("wb") as file, contextlib.closing(ShardWriter(file, label)) as writer:
            for sample in samples[shards.shard_of[samples] == number].tolist():
                width, height = map(int, shards.index.size[sample])
                key, extension = shards.index.key[sample].decode(), shards.extension(sample)
                writer.add(key, extension, shards.read(sample), width=width, height=height)
        sync(path)
        entries.append(writer.entry(original.file, original.class_name))
        rows += writer.rows
    num_bytes, sha256 = Index.of(rows).save(folder)
    replace(
        shards.manifest,
        split=name,
        listing=shards.fingerprint,
        shards=tuple(entries),
        index_bytes=num_bytes,
        index_sha256=sha256,
        skipped=(),
    ).save(folder)


def _copies(folder: Path, shards: ShardSet) -> tuple[Copies | None, list[str]]:
    """All that the folder has of a split, and what is wrong with the rest.

    What several folders have is read from the last.
    """
    sets: list[ShardSet] = []
    places: list[Ints] = []
    damaged: list[str] = []
    for path in sorted(folder.glob(f"task-*/{MANIFEST}")):
        try:
            if Manifest.load(path.parent).listing != shards.fingerprint:
                continue
            found = ShardSet.open(folder, path.parent.name)
        except DataError as error:
            damaged.append(str(error))  # no harm as long as the originals are there
            continue
        places.append(
            np.stack([_originals(found, shards), np.full(len(found), len(sets)), np.arange(len(found))], axis=1)
        )
        sets.append(found)
    if not sets:
        return None, damaged
    table = np.concatenate(places)
    sample, last = np.unique(table[::-1, 0], return_index=True)
    which, number = table[::-1][last, 1], table[::-1][last, 2]
    return Copies(sets, sample, which, number), damaged


def _originals(copied: ShardSet, shards: ShardSet) -> Ints:
    """[m] number within `shards` of every copy, by the names of its shard and its own."""
    by_file = {entry.file: number for number, entry in enumerate(shards.manifest.shards)}
    found = np.empty(len(copied), dtype=np.int64)
    for number, entry in enumerate(copied.manifest.shards):
        original = by_file[entry.file]
        first, stop = np.searchsorted(shards.shard_of, [original, original + 1])
        place = {key: first + k for k, key in enumerate(shards.index.key[first:stop].tolist())}
        mine = np.flatnonzero(copied.shard_of == number)
        found[mine] = [place[key] for key in copied.index.key[mine].tolist()]
    return found
