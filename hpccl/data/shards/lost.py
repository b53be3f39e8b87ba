"""Shards of a finished folder that were lost, to be rebuilt only if identical; and a lock for one build at a time.

A shard is lost if it is gone or has another size; other damage is found by `verify`.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from hpccl.data.shards.manifest import Manifest, ShardEntry
from hpccl.errors import DataError, FolderError
from hpccl.folder import explain_os_error

__all__ = ["LOCK", "has_size", "locked", "lost_shards", "refuse_changed"]

LOCK = ".lock"


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of `size` bytes."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def lost_shards(folder: Path, manifest: Manifest) -> dict[str, ShardEntry]:
    """Return the manifest's entries of lost shards, by file."""
    return {shard.file: shard for shard in manifest.shards if not has_size(folder / shard.file, shard.bytes)}


def refuse_changed(file: Path, shard: ShardEntry, expected: ShardEntry) -> None:
    """Compare a shard that was written again with the original; call it before `file` is put in place.

    Raises:
        DataError: it differs.
    """
    if shard != expected:
        raise DataError(
            f"'{file}' was rewritten with other content: its images changed, or the program that encodes "
            f"them did. Delete '{file.parent}' and run the same command again"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allow one build of a folder at a time. The lock file stays: deleting it would let other processes in.

    Raises:
        DataError: another process builds it.
        FolderError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise FolderError(f"'{folder}' cannot be made or written: {explain_os_error(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is building '{folder}': wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks; atomic renames still keep shards whole
        yield
