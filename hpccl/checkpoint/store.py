"""The checkpoints of a run folder: each is a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError

from hpccl.checkpoint.tree import has_slabs, read_header, read_tree, write_slabs, write_tree
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, FolderError, WorldError
from hpccl.folder import explain_os_error, put_in_place, sync

__all__ = [
    "FORMAT",
    "Content",
    "Mark",
    "Saved",
    "Shard",
    "Writing",
    "latest",
    "latest_of_all",
    "load",
    "marks",
    "open_shards",
    "refuse_torn",
    "save",
]

FORMAT = 1
_OF = "curvature"  # in a header: the number of the curvature that a checkpoint's shards hold
_UNSEEN = 120.0  # seconds until a folder that another node made must be seen
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


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    tree: tensors that all ranks hold (the leader writes them) and this rank's parts of those that are spread
    source: what `own` describes
    own: what this rank alone holds, by layer; empty on all ranks: no such files are written
    """

    tree: dict[str, Any]
    source: object = None
    own: dict[str, Any] = field(default_factory=dict)


def save(
    checkpoints: Path, mark: Mark, content: Content, *, keep: int, comm: Comm | None = None, shard: Shard | None = None
) -> Saved:
    """Write a checkpoint beside and rename it, then prune the older ones within tasks; collective.

    Args:
        checkpoints: the folder of all checkpoints.
        mark: when.
        content: what.
        keep: newest ones kept within a task.
        comm: the ranks; None: one.
        shard: remembers where this rank's own part was written last.

    Raises:
        FolderError: it cannot be written; what was there before is untouched.
        WorldError: another rank could not write.
    """
    writing = Writing.begin(checkpoints, mark, content, keep=keep, comm=comm or Comm.solo(), shard=shard or Shard())
    return writing.finish()


@dataclass
class Writing:
    """A checkpoint on its way: begun by all ranks together, written by each in a thread, finished by all together."""

    checkpoints: Path
    mark: Mark
    content: Content
    keep: int
    comm: Comm
    shard: Shard
    beside: Path
    header: dict[str, Any]
    start: float
    num_bytes: int = 0
    stalled: float = 0.0  # seconds that training waited
    failure: Exception | None = None
    thread: threading.Thread | None = None

    @classmethod
    def begin(
        cls, checkpoints: Path, mark: Mark, content: Content, *, keep: int, comm: Comm, shard: Shard, wait: bool = True
    ) -> Writing:
        """Collective. `wait` False: files are written while this rank goes on; the content must not change meanwhile.

        Raises:
            FolderError: the folder cannot be made.
            WorldError: ... by the leader.
        """
        start = time.perf_counter()
        process = comm.max(os.getpid() if comm.leader else 0)
        header = {
            "format": FORMAT,
            "mark": mark.name,
            "shards": comm.size if comm.any(bool(content.own)) else 0,
            "spread": comm.size if has_slabs(content.tree) else 0,
            _OF: comm.max(shard.number_of(content.source) if comm.leader else 0),
        }
        beside = checkpoints / f".{mark.name}.{process}.part"
        writing = cls(checkpoints, mark, content, keep, comm, shard, beside, header, start)
        with _together(comm, beside, writing.final):
            if comm.leader:
                _clear(checkpoints)
                beside.mkdir(parents=True)
        if wait:
            writing._write()
        else:
            writing.thread = threading.Thread(target=writing._write, name="checkpoint")
            writing.thread.start()
        return writing

    @property
    def final(self) -> Path:
        """The folder that appears."""
        return self.checkpoints / self.mark.name

    @property
    def written(self) -> bool:
        """Whether this rank has done its part. Not collective."""
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> Saved:
        """Wait for all ranks' parts and rename; collective.

        Raises:
            FolderError: it cannot be written; what was there before is untouched.
            WorldError: another rank could not write.
        """
        if self.thread is not None:
            self.thread.join()
        with _together(self.comm, self.beside, self.final):
            if self.failure is not None:
                raise self.failure
        with _together(self.comm, self.beside, self.final):
            if self.comm.leader:
                sync(self.beside)
                put_in_place(self.beside, self.final)  # where the same moment is repeated after a kill, one is there
                sync(self.checkpoints)
                _prune(self.checkpoints, self.keep)
        self.shard.moved(self.content.source, self.final, self.header[_OF])
        written = torch.tensor([self.num_bytes], device=self.comm.device)
        self.comm.sum_([written])
        return Saved(int(written), time.perf_counter() - self.start)

    def _write(self) -> None:
        """This rank's files. No collective: it may run in a thread."""
        rank, number = self.comm.rank, {_OF: self.header[_OF]}
        shards, spread = self.header["shards"], self.header["spread"]
        try:
            if shards:
                stem = _stem("curvature", rank, shards)
                self.num_bytes += self.shard.write(
                    self.beside, stem, self.content.source, self.content.own, self.header[_OF]
                )
            if spread:
                self.num_bytes += write_slabs(
                    self.beside, self.content.tree, header=number, stem=_stem("weights", rank, spread)
                )
            if self.comm.leader:
                self.num_bytes += write_tree(self.beside, self.content.tree, header=self.header)
        except Exception as error:  # noqa: BLE001 - in a thread: `finish` raises it, and no part is taken for whole
            self.failure = error


@contextlib.contextmanager
def _together(comm: Comm, beside: Path, final: Path) -> Iterator[None]:
    """A step that every rank finishes before the next one begins; if one fails, in whatever way, all do."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        failure = error
    if not comm.any(failure is not None):
        return
    if comm.leader:
        shutil.rmtree(beside, ignore_errors=True)
    if failure is None:
        raise WorldError(
            f"checkpoint '{final}' was not written: another rank could not write its part; see its message"
        )
    if not isinstance(failure, OSError):
        raise failure
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
            stem = _stem("curvature", number, count)
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


def refuse_torn(checkpoints: Path, mark: Mark) -> None:
    """See that every file of tensors is as long as it says, of all ranks, without reading them.

    Raises:
        CheckpointError: one is not.
    """
    folder = checkpoints / mark.name
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            problem = f"checkpoint '{folder}' cannot be read ({path.stem}: {error})"
            raise CheckpointError(f"{problem}; delete it to continue from the one before") from error


def _stem(what: str, number: int, count: int) -> str:
    return f"{what}-{number:05d}-of-{count:05d}"


def latest(checkpoints: Path) -> Mark | None:
    """The newest checkpoint, or None."""
    return max(marks(checkpoints), default=None)


def latest_of_all(checkpoints: Path, comm: Comm) -> Mark | None:
    """The newest checkpoint as the first rank finds it, the same on every rank; None if there is none. Collective.

    On a network file system another node's list of the folder may be a minute old: it waits until it sees it.

    Raises:
        WorldError: a rank does not see it in two minutes.
    """
    found = latest(checkpoints) if comm.leader else None
    name = comm.broadcast_text(found.name if found is not None else "")
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    until = time.monotonic() + _UNSEEN
    while not (seen := (checkpoints / name).is_dir()) and time.monotonic() < until:
        time.sleep(0.5)
    if comm.any(not seen):
        raise WorldError(
            f"checkpoint '{checkpoints / name}' is seen by the first process, but not by all in {_UNSEEN:.0f} s; is "
            "the run folder on a file system that all nodes share? Start the run again to continue"
        )
    return Mark.at(int(match[1]), match[2], int(match[3]))


def load(checkpoints: Path, mark: Mark, *, only: str | None = None, lazy: bool = False) -> dict[str, Any]:
    """The nest that was saved; what was spread over ranks, or if `lazy` every tensor, stays in its files (Stored).

    only: the first key that is wanted; None: all.

    Raises:
        CheckpointError: it is damaged, or of a format this version does not know.
    """
    wanted = None if only is None else only.__eq__
    header, tree = read_tree(
        checkpoints / mark.name, slabs=_weight_stems, wanted=wanted, lazy=lazy, apart=checkpoints.parent
    )
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint '{checkpoints / mark.name}' has format {header.get('format')!r}, this version reads {FORMAT}; "
            "continue with the version of hpccl that wrote it (see code.txt), or start in another folder=..."
        )
    return tree


def _weight_stems(header: dict[str, Any]) -> list[str]:
    count = header.get("spread", 0)
    return [_stem("weights", number, count) for number in range(count)]


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


def _clear(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    for entry in checkpoints.glob(".task-*.part"):
        shutil.rmtree(entry, ignore_errors=True)
