"""The checkpoints of a run folder: each is a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpccl.checkpoint.tree import read_header, read_tree, write_tree
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, FolderError, WorldError
from hpccl.folder import explain_os_error

__all__ = ["FORMAT", "Mark", "Saved", "Shard", "latest", "load", "marks", "open_shards", "save"]

FORMAT = 1
_OF = "curvature"  # in a header: the number of the curvature that a checkpoint's shards hold
_PHASES = ("fit", "fitted", "done")
_NAME = re.compile(r"task-(\d{3,})-(fit|fitted|done)-(\d{8,})")


@dataclass(frozen=True, order=True)
class Mark:
    """When a checkpoint was taken, in the order of a run.

    phase: `fit` within a task's training, `fitted` at its end, `done` after memory, curvature and evaluation.
    """

    task: int
    phase_index: int
    step: int

    @classmethod
    def at(cls, task: int, phase: str, step: int) -> Mark:
        """A mark by the phase's name."""
        return cls(task, _PHASES.index(phase), step)

    @property
    def phase(self) -> str:
        """fit, fitted or done."""
        return _PHASES[self.phase_index]

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"task-{self.task:03d}-{self.phase}-{self.step:08d}"


@dataclass(frozen=True)
class Saved:
    """What saving cost: bytes written by all ranks, seconds."""

    num_bytes: int
    seconds: float


@dataclass
class Shard:
    """What each rank writes for itself: large, seldom changed, so it is linked from the checkpoint before if it can be.

    written: what was written last, and where
    number: of what was written last; in all its files, to tell them from those of any other checkpoint
    """

    written: tuple[object, Path] | None = None
    number: int = 0

    def number_of(self, source: object) -> int:
        """A random one for what was not written last."""
        known = self.written is not None and self.written[0] is source
        return self.number if known else secrets.randbits(62)

    def write(self, folder: Path, stem: str, source: object, tree: dict[str, Any], number: int) -> int:
        """Write `tree`, which describes `source`, or link the files that hold it; returns the bytes written.

        Raises:
            OSError: see write_tree.
        """
        return 0 if self._linked(folder, stem, source) else write_tree(folder, tree, header={_OF: number}, stem=stem)

    def moved(self, source: object, folder: Path, number: int) -> None:
        """`source` is now in `folder`."""
        self.written, self.number = (source, folder), number

    def _linked(self, folder: Path, stem: str, source: object) -> bool:
        if self.written is None or self.written[0] is not source:
            return False
        try:
            for suffix in ("safetensors", "json"):
                os.link(self.written[1] / f"{stem}.{suffix}", folder / f"{stem}.{suffix}")
        except OSError:  # removed meanwhile, or a file system without links
            for suffix in ("safetensors", "json"):
                (folder / f"{stem}.{suffix}").unlink(missing_ok=True)
            return False
        return True


def save(
    checkpoints: Path,
    mark: Mark,
    tree: dict[str, Any],
    *,
    keep: int,
    comm: Comm | None = None,
    shard: Shard | None = None,
    source: object = None,
    own: dict[str, Any] | None = None,
) -> Saved:
    """Write a checkpoint beside and rename it, then prune the older ones within tasks; collective.

    Args:
        checkpoints: the folder of all checkpoints.
        mark: when.
        tree: what all ranks hold; the leader writes it.
        keep: newest ones kept within a task.
        comm: the ranks; None: one.
        shard: remembers where this rank's own part was written last.
        source: what `own` describes.
        own: what this rank alone holds, by layer; empty or None on all ranks: no shards are written.

    Raises:
        FolderError: it cannot be written; what was there before is untouched.
        WorldError: another rank could not write.
    """
    start = time.perf_counter()
    comm, shard = comm or Comm.solo(), shard or Shard()
    process = comm.max(os.getpid() if comm.leader else 0)
    beside, final = checkpoints / f".{mark.name}.{process}.part", checkpoints / mark.name
    count = comm.size if comm.any(bool(own)) else 0
    number = comm.max(shard.number_of(source) if comm.leader else 0)
    num_bytes = 0
    with _together(comm, beside, final):
        if comm.leader:
            _clear(checkpoints)
            beside.mkdir(parents=True)
    with _together(comm, beside, final):
        if count:
            num_bytes += shard.write(beside, _shard_stem(comm.rank, count), source, own or {}, number)
        if comm.leader:
            header = {"format": FORMAT, "mark": mark.name, "shards": count, _OF: number}
            num_bytes += write_tree(beside, tree, header=header)
    with _together(comm, beside, final):
        if comm.leader:
            if final.exists():  # the same moment, repeated after a kill
                shutil.rmtree(final)
            os.replace(beside, final)
            _sync(checkpoints)
            _prune(checkpoints, keep)
    shard.moved(source, final, number)
    written = torch.tensor([num_bytes], device=comm.device)
    comm.sum_([written])
    return Saved(int(written), time.perf_counter() - start)


@contextlib.contextmanager
def _together(comm: Comm, beside: Path, final: Path) -> Iterator[None]:
    """A step that every rank finishes before the next one begins; if one fails, all do."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if not comm.any(failure is not None):
        return
    if comm.leader:
        shutil.rmtree(beside, ignore_errors=True)
    if failure is None:
        raise WorldError(
            f"checkpoint '{final}' was not written: another rank could not write its part; see its message"
        )
    raise FolderError(
        f"checkpoint '{final}' cannot be written: {explain_os_error(failure)}; the checkpoints before it are untouched"
    ) from failure


def open_shards(checkpoints: Path, mark: Mark) -> Callable[[Callable[[str], bool]], dict[str, list[dict[str, Any]]]]:
    """A function that reads what ranks wrote for themselves: of the wanted layers, the states of all ranks by layer.

    It raises CheckpointError if a file is missing, torn or from another checkpoint.
    """
    folder = checkpoints / mark.name

    def read(wanted: Callable[[str], bool]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        whole = read_header(folder)
        count = whole.get("shards", 0)
        for number in range(count):
            stem = _shard_stem(number, count)
            header, tree = read_tree(folder, stem=stem, wanted=wanted)
            if header.get(_OF) != whole.get(_OF):
                raise CheckpointError(
                    f"'{folder / stem}' belongs to another checkpoint; "
                    f"delete '{folder}' to continue from the one before"
                )
            for layer, states in tree.items():
                found.setdefault(layer, []).extend(states)
        return found

    return read


def _shard_stem(number: int, count: int) -> str:
    return f"curvature-{number:05d}-of-{count:05d}"


def latest(checkpoints: Path) -> Mark | None:
    """The newest checkpoint, or None."""
    return max(marks(checkpoints), default=None)


def load(checkpoints: Path, mark: Mark) -> dict[str, Any]:
    """The nest that was saved.

    Raises:
        CheckpointError: it is damaged, or of a format this version does not know.
    """
    header, tree = read_tree(checkpoints / mark.name)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint '{checkpoints / mark.name}' has format {header.get('format')!r}, this version reads {FORMAT}; "
            "continue with the version of hpccl that wrote it (see code.txt), or start in another folder=..."
        )
    return tree


def marks(checkpoints: Path) -> list[Mark]:
    """All checkpoints of a folder, in the order of a run."""
    if not checkpoints.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in checkpoints.iterdir())
    return sorted(Mark.at(int(m[1]), m[2], int(m[3])) for m in found if m)


def _prune(checkpoints: Path, keep: int) -> None:
    """Ends of tasks stay; of the rest within tasks, the newest `keep`. What led to a finished task goes.

    Only the first task's weights before consolidation stay too: other runs may start from them.
    """
    found = marks(checkpoints)
    ended = {mark.task for mark in found if mark.phase == "done"}
    within = [mark for mark in found if mark.phase == "fit" and mark.task not in ended]
    for mark in found:
        passed = mark.phase == "fitted" and mark.task > 0 and mark.task in ended
        if passed or (mark.phase == "fit" and mark not in within[-keep:]):
            _remove(checkpoints / mark.name)


def _remove(folder: Path) -> None:
    """Out of sight first: a half-deleted folder must not look like a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old.part")
    with contextlib.suppress(OSError):  # pruning is no reason to stop a run
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    for entry in checkpoints.glob(".task-*.part"):
        shutil.rmtree(entry, ignore_errors=True)
