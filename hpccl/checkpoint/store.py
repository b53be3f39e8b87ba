"""The checkpoints of a run folder: each is a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpccl.checkpoint.tree import read_tree, write_tree
from hpccl.errors import CheckpointError, FolderError
from hpccl.folder import explain_os_error

__all__ = ["FORMAT", "Mark", "Saved", "latest", "load", "marks", "save"]

FORMAT = 1
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
    """What saving cost."""

    num_bytes: int
    seconds: float


def save(checkpoints: Path, mark: Mark, tree: dict[str, Any], *, keep: int) -> Saved:
    """Write a checkpoint beside and rename it, then prune the older ones within tasks.

    Raises:
        FolderError: it cannot be written; what was there before is untouched.
    """
    start = time.perf_counter()
    beside = checkpoints / f".{mark.name}.{os.getpid()}.part"
    final = checkpoints / mark.name
    try:
        _clear(checkpoints)
        beside.mkdir(parents=True)
        num_bytes = write_tree(beside, tree, header={"format": FORMAT, "mark": mark.name})
        if final.exists():  # the same moment, repeated after a kill
            shutil.rmtree(final)
        os.replace(beside, final)
        _sync(checkpoints)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise FolderError(
            f"checkpoint '{final}' cannot be written: {explain_os_error(error)}; "
            "the checkpoints before it are untouched"
        ) from error
    _prune(checkpoints, keep)
    return Saved(num_bytes, time.perf_counter() - start)


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
