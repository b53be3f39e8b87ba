"""Shards of a finished folder that were lost since, written anew only as what they were; and one build of it at a time.

A shard is lost if it is gone or has another size; damage within is what `verify` finds.
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
    """Whether there is a file of so many bytes."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def lost_shards(folder: Path, manifest: Manifest) -> dict[str, ShardEntry]:
    """By file, what they were."""
    return {shard.file: shard for shard in manifest.shards if not has_size(folder / shard.file, shard.bytes)}


def refuse_changed(file: Path, shard: ShardEntry, expected: ShardEntry) -> None:
    """Compare a shard that was written anew with what it was; call it before `file` is put in place.

    Raises:
        DataError: it differs.
    """
    if shard != expected:
        raise DataError(
            f"'{file}' was written anew and is not what it was: its images changed, or the program that encodes "
            f"them did. Delete '{file.parent}' and run the same command again"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build of a folder at a time. The lock's file stays: whoever deleted it would let others in.

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
            pass  # a file system without locks; writing beside and renaming still keeps shards whole
        yield
