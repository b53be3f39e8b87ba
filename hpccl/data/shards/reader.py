"""Random access to the images of one split of shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpccl.data.shards.manifest import INDEX, Index, Manifest, ShardEntry, refuse_absent, splits
from hpccl.data.shards.remote import ShardCache, is_url
from hpccl.errors import DataError
from hpccl.folder import may_pass

__all__ = ["Copies", "ShardSet", "close_files", "missing_files"]

Ints = npt.NDArray[np.int64]

_SNATCHED = 5  # times a fetched shard may be deleted before it is opened
_FILES = 4096  # open files that a process asks for, if it may have so many; half are for shards (ImageNet has 2000)
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another attempt to read
_FETCHED = 32  # fetched shards that a process keeps open: a deleted one takes up disk space until it is closed
_CHUNK = 1 << 20  # bytes that are hashed at a time


@dataclass(frozen=True, eq=False)
class ShardSet:
    """N images of one split; safe to use from threads, after a fork and after pickling.

    labels:   [N] int64, index into `classes`
    shard_of: [N] int64, non-decreasing
    sizes:    [N, 2] int32, width and height
    copies:   copies of some images, which are read instead of the originals; None: there are none
    missing:  numbers of shards that are gone; trouble: what is wrong with them, for messages
    """

    path: str
    manifest: Manifest
    index: Index
    labels: Ints
    shard_of: Ints
    files: _Files
    copies: Copies | None = None
    missing: tuple[int, ...] = ()
    trouble: str = ""

    @classmethod
    def open(cls, path: Path | str, split: str, cache: ShardCache | None = None) -> ShardSet:
        """Check that all shards are there and of the right size, and read the index.

        Args:
            path: a folder, or the URL of one in an object store, whose shards are fetched when they are read.
            split: such as `train`.
            cache: where fetched shards are kept.

        Raises:
            DataError: no such folder or split, an unknown format, or missing, truncated or altered files.
        """
        if is_url(str(path)):
            cache, url = cache or ShardCache.of(None, 100, 5), f"{str(path).rstrip('/')}/{split}"
            manifest = cache.manifest(url)
            index = cache.index(url, manifest)
            return cls._of(str(path), manifest, index, _Files(url, manifest.shards, cache))
        path = Path(path)
        folder = path / split
        refuse_absent(path)
        if not folder.is_dir():
            raise DataError(f"'{path}' has no split '{split}' ({_instead(path, split)})")
        manifest = Manifest.load(folder)
        _check_files(folder, manifest, path)
        return cls._of(str(path), manifest, Index.load(folder, manifest), _Files(str(folder), manifest.shards))

    @classmethod
    def listed(cls, path: Path | str, split: str, listing: Path, trouble: str) -> ShardSet:
        """Open what is left of a split whose manifest and index are in `listing`; trouble: why it cannot be opened.

        Raises:
            DataError: the listing is damaged.
        """
        manifest = Manifest.load(listing)
        index = Index.load(listing, manifest)
        folder = Path(path) / split
        # Of an object store that cannot be opened, all shards count as gone.
        gone = range(len(manifest.shards)) if is_url(str(path)) else missing_files(folder, manifest)
        found = cls._of(str(path), manifest, index, _Files(str(folder), manifest.shards))
        return replace(found, missing=tuple(gone), trouble=trouble)

    @classmethod
    def _of(cls, path: str, manifest: Manifest, index: Index, files: _Files) -> ShardSet:
        number = {name: label for label, name in enumerate(manifest.classes)}
        samples = [shard.samples for shard in manifest.shards]
        label = np.array([number[shard.class_name] for shard in manifest.shards], dtype=np.int64)
        return cls(
            path=path,
            manifest=manifest,
            index=index,
            labels=np.repeat(label, samples),
            shard_of=np.repeat(np.arange(len(samples), dtype=np.int64), samples),
            files=files,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def split(self) -> str:
        """The split's name, such as `train`."""
        return self.manifest.split

    @property
    def remote(self) -> bool:
        """Whether reading may download."""
        return self.files.cache is not None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names as in the source, sorted."""
        return self.manifest.classes

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """[N, 2] width and height."""
        return self.index.size

    @cached_property
    def fingerprint(self) -> str:
        """A hexadecimal hash that is equal if `read` returns the same for every sample."""
        return self.manifest.fingerprint

    def name(self, sample: int) -> str:
        """Return the global id of a sample, `<shard>/<key>`."""
        return f"{self.manifest.shards[int(self.shard_of[sample])].stem}/{self.index.key[sample].decode()}"

    def names(self, samples: Ints) -> list[str]:
        """Return global ids, `<shard>/<key>`."""
        return [self.name(int(sample)) for sample in samples]

    def extension(self, sample: int) -> str:
        """Return `jpg`, `png`, `webp`, ..."""
        return bytes(self.index.extension[sample]).decode()

    def read(self, sample: int) -> bytes:
        """Return the stored image file's bytes.

        Raises:
            DataError: the shard became unreadable, or is gone and there is no copy of the image.
        """
        copy = None if self.copies is None else self.copies.find(sample)
        if copy is not None:
            return copy[0].read(copy[1])
        shard, offset = int(self.shard_of[sample]), int(self.index.offset[sample])
        if shard in self.missing:
            raise DataError(f"image '{self.name(sample)}' is gone, and memory has no copy of it: {self.trouble}")
        return self.files.read(shard, offset, int(self.index.length[sample]))

    def last_of_files(self, samples: Ints) -> Ints:
        """Return for each file the last of the samples that are read from it."""
        _, backwards = np.unique(self._files_of(samples)[::-1], return_index=True)
        last: Ints = samples[::-1][backwards]
        return last

    def _files_of(self, samples: Ints) -> Ints:
        """[n] number of the file that each sample is read from: shards first, then those of each set of copies."""
        found: Ints = self.shard_of[samples]
        if self.copies is None:
            return found
        _, mine, theirs = np.intersect1d(samples, self.copies.sample, return_indices=True)
        first = len(self.manifest.shards)
        for which, copies in enumerate(self.copies.sets):
            here = self.copies.which[theirs] == which
            found[mine[here]] = first + copies.shard_of[self.copies.number[theirs[here]]]
            first += len(copies.manifest.shards)
        return found

    def check_file(self, sample: int) -> None:
        """Read all of the file that an image is read from, and compare its checksum with the manifest's.

        Raises:
            DataError: it was altered, or cannot be read.
        """
        copy = None if self.copies is None else self.copies.find(sample)
        if copy is not None:
            copy[0].check_file(copy[1])
        else:
            self.files.check(int(self.shard_of[sample]))

    def gone(self, samples: Ints) -> Ints:
        """Return the samples that are neither in an existing shard nor in a copy."""
        lost = np.isin(self.shard_of[samples], np.asarray(self.missing, dtype=np.int64))
        copied = np.zeros(0, np.int64) if self.copies is None else self.copies.sample
        return samples[lost & ~np.isin(samples, copied)]


@dataclass(frozen=True, eq=False)
class Copies:
    """Images of a split that other shards also have.

    sets: the other shards
    sample: [m] int64, ascending, numbers within the split; which, number: [m] index of the set, and number within it
    """

    sets: Sequence[ShardSet]
    sample: Ints
    which: Ints
    number: Ints

    def find(self, sample: int) -> tuple[ShardSet, int] | None:
        """Return the shards that have a copy of an image, and its number there; None without a copy."""
        place = int(np.searchsorted(self.sample, sample))
        if place == len(self.sample) or self.sample[place] != sample:
            return None
        return self.sets[int(self.which[place])], int(self.number[place])


class _Descriptor:
    """An open file that is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # The attribute is missing if os.open failed.
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True, eq=False)
class _Files:
    """The files of one split; the most recently used files of all splits stay open.

    place: a folder or a URL; cache: for a URL
    """

    place: str
    entries: Sequence[ShardEntry]
    cache: ShardCache | None = None

    def open(self, number: int) -> _Descriptor:
        """Open file `number`.

        Raises:
            DataError: it was deleted again and again before it could be opened.
            OSError: it cannot be opened.
        """
        entry = self.entries[number]
        if self.cache is None:
            return _Descriptor(f"{self.place}/{entry.file}")
        for _ in range(_SNATCHED):
            with contextlib.suppress(FileNotFoundError):  # deleted by a process that needed disk space
                return _Descriptor(str(self.cache.shard(self.place, entry)))
        raise DataError(
            f"'{entry.file}' was deleted {_SNATCHED} times before it could be opened: data.shard_gib is too small for "
            "the shards that all processes of this machine read at a time; raise it to what the shards of a task take"
        )

    def index(self, manifest: Manifest) -> bytes:
        """Return the bytes of the index file.

        Raises:
            OSError: it cannot be read.
        """
        if self.cache is None:
            return Path(self.place, INDEX).read_bytes()
        where = f"{self.place}/{INDEX}"
        return self.cache.fetch(where, manifest.index_bytes, manifest.index_sha256).read_bytes()

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Read `length` bytes of file `number`; again after a pause where the error may pass.

        Raises:
            DataError: it cannot be read or ends too early.
        """
        for pause in (*_PAUSES, None):
            try:
                return self._read(number, offset, length)
            except OSError as error:
                if pause is None or not may_pass(error):
                    raise self._unreadable(number, error) from error
            close_files()  # a stale one stays so
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, number: int, offset: int, length: int) -> bytes:
        descriptor = _opened(self, number)
        data = os.pread(descriptor.number, length, offset)
        while len(data) < length:
            more = os.pread(descriptor.number, length - len(data), offset + len(data))
            if not more:
                raise OSError(0, "the file ends too early")
            data += more
        return data

    def check(self, number: int) -> None:
        """Compare the checksum of file `number` with the manifest's.

        Raises:
            DataError: it was altered, or cannot be read.
        """
        entry, digest, offset = self.entries[number], hashlib.sha256(), 0
        try:
            descriptor = _opened(self, number)
            while chunk := os.pread(descriptor.number, _CHUNK, offset):
                digest.update(chunk)
                offset += len(chunk)
        except OSError as error:
            raise self._unreadable(number, error) from error
        if digest.hexdigest() == entry.sha256:
            return
        if self.cache is not None:
            raise DataError(
                f"'{self.cache.folder / entry.sha256}', the local copy of '{self.place}/{entry.file}', was altered "
                "since it was fetched; delete it and run the same command again"
            )
        raise DataError(
            f"shard '{self.place}/{entry.file}' was altered: its checksum differs from the manifest's. `hpccl shards "
            "verify` lists all such shards; copy them again, or delete them and run the command that built them again, "
            "which writes what is missing"
        )

    def _unreadable(self, number: int, error: OSError) -> DataError:
        shard = f"{self.place}/{self.entries[number].file}"
        return DataError(f"shard '{shard}' cannot be read ({error.strerror}): see `hpccl shards verify`")


def _most_files() -> int:
    """Return how many open files this process may ask for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files, usually 1024, to `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _opened(files: _Files, number: int) -> _Descriptor:
    return _lasting(files, number) if files.cache is None else _fetched(files, number)


# Files of all splits, parts and copies together, because memory's rows are read from the shards of all past classes.
# lru_cache needs no lock of our own, which a fork could leave taken; an evicted file closes after its last reader.
@lru_cache(maxsize=_most_files() // 2)
def _lasting(files: _Files, number: int) -> _Descriptor:
    _allow_files(_most_files())
    return files.open(number)


@lru_cache(maxsize=_FETCHED)
def _fetched(files: _Files, number: int) -> _Descriptor:
    return files.open(number)


def close_files() -> None:
    """Close this process's files, so that those that were deleted no longer take up disk space."""
    _lasting.cache_clear()
    _fetched.cache_clear()


def _instead(path: Path, split: str) -> str:
    """Return what to do where `path` lacks a split."""
    found = splits(path)
    build = f"build it with `hpccl shards build SOURCE {path} --split {split}`"
    if not found:
        return f"nor another; {build}"
    return f"found: {', '.join(found)}; set stream.train_split and stream.test_split to the names of two, or {build}"


def missing_files(folder: Path, manifest: Manifest) -> dict[int, str]:
    """Return by number what is wrong with shards that are missing or not of the size in the manifest."""
    bad = {}
    for number, shard in enumerate(manifest.shards):
        try:
            size = (folder / shard.file).stat().st_size
        except OSError:
            bad[number] = f"{shard.file} is missing"
            continue
        if size != shard.bytes:
            bad[number] = f"{shard.file} has {size} bytes instead of {shard.bytes}"
    return bad


def _check_files(folder: Path, manifest: Manifest, path: Path) -> None:
    bad = list(missing_files(folder, manifest).values())
    if bad:
        listed = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(
            f"shards in '{folder}' are missing or truncated: {listed}. `hpccl shards verify {path}` names all of them; "
            "copy them again, or run the command that built them again, which writes what is missing"
        )
