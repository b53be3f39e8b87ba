"""Finds damaged shards, and splits that lost their manifest or index."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hpccl.data.shards.lost import LOCK
from hpccl.data.shards.manifest import (
    INDEX,
    MANIFEST,
    UNFINISHED,
    Index,
    Manifest,
    ShardEntry,
    file_sha256,
    refuse_absent,
    splits,
)
from hpccl.errors import DataError
from hpccl.folder import RunFolder

__all__ = ["Problem", "verify"]

_SIGNS = ("*.tar", INDEX, UNFINISHED, LOCK)  # files of a split that was built, or was being built


class Problem(NamedTuple):
    """A file, relative to the folder of shards, and what is wrong with it."""

    file: str
    what: str


def verify(path: Path, split: str | None = None, workers: int = 4) -> list[Problem]:
    """Compare every file with the manifest by reading all of it; empty when all is well.

    Args:
        path: a folder that `hpccl shards build` wrote.
        split: only this one.
        workers: files read at once.

    Raises:
        DataError: there is no such folder, there are no shards in it, or not this split.
    """
    refuse_absent(path)
    signs = {sign.parent.name for pattern in _SIGNS for sign in path.glob(f"[!.]*/{pattern}")}
    runs = {name for name in signs if RunFolder(path / name).config.is_file()}  # run folders have such a lock, too
    found = sorted({*splits(path), *(signs - runs)})
    if not found or (split is not None and not (path / split).is_dir()):
        raise DataError(
            f"no shards {f'of split {split!r} ' if split else ''}in '{path}' (found splits: {found or 'none'})"
        )
    problems: list[Problem] = []
    for name in [split] if split is not None else found:
        problems += _verify_split(path / name, workers)
    return problems


def _verify_split(folder: Path, workers: int) -> list[Problem]:
    problems = []
    if (folder / UNFINISHED).is_dir():
        problems.append(Problem(f"{folder.name}/{UNFINISHED}", "a build was not finished: run the same command again"))
        if not (folder / MANIFEST).exists():  # a build writes it last
            return problems
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return [*problems, Problem(f"{folder.name}/{MANIFEST}", str(error))]
    try:
        Index.load(folder, manifest)
    except DataError as error:
        problems.append(Problem(f"{folder.name}/{INDEX}", str(error)))
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as threads:  # hashing releases the interpreter's lock
        for problem in threads.map(lambda shard: _verify_shard(folder, shard), manifest.shards):
            problems += [problem] if problem else []
    known = {shard.file for shard in manifest.shards}
    extra = sorted(file.name for file in folder.glob("*.tar") if file.name not in known)
    return problems + [Problem(f"{folder.name}/{name}", "extra: it is not in the manifest") for name in extra]


def _verify_shard(folder: Path, shard: ShardEntry) -> Problem | None:
    path, name = folder / shard.file, f"{folder.name}/{shard.file}"
    try:
        size = path.stat().st_size
        if size < shard.bytes:
            return Problem(name, f"truncated: {size} of {shard.bytes} bytes")
        if size > shard.bytes or file_sha256(path) != shard.sha256:
            return Problem(name, "altered: its checksum differs from the manifest's")
    except FileNotFoundError:
        return Problem(name, "missing")
    except OSError as error:
        return Problem(name, f"unreadable: {error.strerror}")
    return None
