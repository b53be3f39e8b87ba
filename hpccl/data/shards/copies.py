"""Copies of some images of a split: those that a memory keeps, so that the originals may be deleted.

    FOLDER/parts/000/manifest.json, index.npz        manifest and index of split 0, without its images
    FOLDER/task-003-000500/manifest.json, index.npz, c0012-000.tar, ...    the copies of one task, here 500

Copies are shards like any other (`hpccl shards verify FOLDER` reads them). Shards and images keep their names, so that
an image has one global id wherever it is read from; `listing` in the manifest of copies is the fingerprint of the split
that they come from. Folders are written under temporary names, renamed, and never changed: a smaller choice has a
folder of its own.
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
    """Return the name of the folder of `count` images of a task."""
    return f"task-{task:03d}-{count:06d}"


def copy_images(folder: Path, name: str, shards: ShardSet, samples: Ints, *, part: int) -> None:
    """Copy some images of split number `part` to `folder/name`, byte by byte, unless they are there already.

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
    """Delete the copies of tasks, except for the folders named in `keep`."""
    kept = set(keep)
    for path in folder.glob("task-*"):
        if path.name not in kept:
            hidden = path.with_name(f".{path.name}.old")  # a half-deleted folder must not look complete
            with contextlib.suppress(OSError):  # only disk space is lost
                os.replace(path, hidden)
    for hidden in folder.glob(".task-*"):
        shutil.rmtree(hidden, ignore_errors=True)


def open_with_copies(
    place: Path | str, split: str, cache: ShardCache, *, folder: Path | None, part: int = 0
) -> ShardSet:
    """Open a split of which `folder` may have copies; if its shards are gone, only the copies can be read.

    Raises:
        DataError: it cannot be opened, and none of its images were copied.
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
    """Return the manifest of a split of which `folder` may have copies, even if its shards are gone.

    Raises:
        DataError: it cannot be read, and none of its images were copied.
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
    """Whether the shards at `place` are not those that images were copied from."""
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
    (folder / MANIFEST).unlink(missing_ok=True)  # it is written last
    with replacing(folder / INDEX) as path:
        path.write_bytes(shards.files.index(shards.manifest))  # its checksum is part of the fingerprint
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
    """Return all copies that the folder has of a split, and what is wrong with damaged ones.

    Images that are in several folders are read from the last one.
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
            damaged.append(str(error))  # harmless as long as the originals are there
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
    """[m] number within `shards` of every copy, found by the names of the shard and the image."""
    by_file = {entry.file: number for number, entry in enumerate(shards.manifest.shards)}
    found = np.empty(len(copied), dtype=np.int64)
    for number, entry in enumerate(copied.manifest.shards):
        original = by_file[entry.file]
        first, stop = np.searchsorted(shards.shard_of, [original, original + 1])
        place = {key: first + k for k, key in enumerate(shards.index.key[first:stop].tolist())}
        mine = np.flatnonzero(copied.shard_of == number)
        found[mine] = [place[key] for key in copied.index.key[mine].tolist()]
    return found
