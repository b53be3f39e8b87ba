"""Random access to the images of one split of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpccl.data.shards.manifest import Index, Manifest, splits
from hpccl.errors import DataError

__all__ = ["ShardSet"]

Ints = npt.NDArray[np.int64]

_MAX_OPEN = 128  # of the usual 1024 files a process may have open


@dataclass(frozen=True, eq=False)
class ShardSet:
    """N images of one split; safe to use from threads, after a fork and after pickling.

    labels:   [N] int64, index into `classes`
    shard_of: [N] int64, non-decreasing
    sizes:    [N, 2] int32, width and height
    """

    path: Path
    manifest: Manifest
    index: Index
    labels: Ints
    shard_of: Ints
    files: _Files

    @classmethod
    def open(cls, path: Path, split: str) -> ShardSet:
        """Check that all shards are there, with the right length, and read the index.

        Raises:
            DataError: no such split, an unknown format, or missing, truncated or altered files, by name.
        """
        folder = path / split
        if not folder.is_dir():
            found = ", ".join(splits(path)) or "none"
            raise DataError(f"'{path}' has no split '{split}' (found: {found}): see `hpccl shards build`")
        manifest = Manifest.load(folder)
        _check_files(folder, manifest, path)
        number = {name: label for label, name in enumerate(manifest.classes)}
        samples = [shard.samples for shard in manifest.shards]
        label = np.array([number[shard.class_name] for shard in manifest.shards], dtype=np.int64)
        return cls(
            path=path,
            manifest=manifest,
            index=Index.load(folder, manifest),
            labels=np.repeat(label, samples),
            shard_of=np.repeat(np.arange(len(samples), dtype=np.int64), samples),
            files=_Files([str(folder / shard.file) for shard in manifest.shards]),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def split(self) -> str:
        """Such as `train`."""
        return self.manifest.split

    @property
    def classes(self) -> tuple[str, ...]:
        """Names as in the source, sorted."""
        return self.manifest.classes

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """[N, 2] width and height."""
        return self.index.size

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal when `read` returns the same for every sample."""
        return self.manifest.fingerprint

    def name(self, sample: int) -> str:
        """Global id, `<shard>/<key>`."""
        return f"{self.manifest.shards[int(self.shard_of[sample])].stem}/{self.index.key[sample].decode()}"

    def names(self, samples: Ints) -> list[str]:
        """Global ids, `<shard>/<key>`."""
        return [self.name(int(sample)) for sample in samples]

    def extension(self, sample: int) -> str:
        """`jpg`, `png`, `webp`, ..."""
        return bytes(self.index.extension[sample]).decode()

    def read(self, sample: int) -> bytes:
        """The stored image file's bytes.

        Raises:
            DataError: the shard became unreadable.
        """
        shard, offset = int(self.shard_of[sample]), int(self.index.offset[sample])
        return self.files.read(shard, offset, int(self.index.length[sample]))


class _Descriptor:
    """A file that is closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # Missing where os.open failed.
        if hasattr(self, "number"):
            os.close(self.number)


class _Files:
    """The most recently used files stay open."""

    def __init__(self, paths: list[str], max_open: int = _MAX_OPEN) -> None:
        self.paths = paths
        self.max_open = max_open
        # Needs no lock of ours, which a fork could leave locked; an evicted file closes when its last reader is done.
        self._opened = lru_cache(maxsize=max_open)(_Descriptor)

    def __reduce__(self) -> tuple[type[_Files], tuple[list[str], int]]:
        return _Files, (self.paths, self.max_open)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """`length` bytes of file `number`.

        Raises:
            DataError: it cannot be read or ends too early.
        """
        try:
            descriptor = self._opened(self.paths[number])
            data = os.pread(descriptor.number, length, offset)
            while len(data) < length:
                more = os.pread(descriptor.number, length - len(data), offset + len(data))
                if not more:
                    raise OSError(0, "the file ends too early")
                data += more
        except OSError as error:
            raise DataError(
                f"shard '{self.paths[number]}' cannot be read ({error.strerror}): see `hpccl shards verify`"
            ) from error
        return data


def _check_files(folder: Path, manifest: Manifest, path: Path) -> None:
    bad = []
    for shard in manifest.shards:
        try:
            size = (folder / shard.file).stat().st_size
        except OSError:
            bad.append(f"{shard.file} is missing")
            continue
        if size != shard.bytes:
            bad.append(f"{shard.file} has {size} bytes instead of {shard.bytes}")
    if bad:
        listed = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(
            f"shards in '{folder}' are missing or truncated: {listed}. `hpccl shards verify {path}` names all of them; "
            "copy them again, or delete the folder and build again"
        )
