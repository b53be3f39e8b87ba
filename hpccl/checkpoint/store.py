"""The checkpoints of a run folder: each is a folder that appears complete or not at all."""

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
from hpccl.errors import CheckpointError, FolderError, HpcclError, WorldError
from hpccl.folder import explain_os_error, may_pass, put_in_place, sync

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
_OF = "curvature"  # header key: a random number that identifies the curvature in a checkpoint's shards
_UNSEEN = 120.0  # seconds within which other nodes must see a new folder
_PHASES = ("fit", "fitted", "done")
_NAME = re.compile(r"task-(\d{3,})-(fit|fitted|done)-(\d{8,})")


@dataclass(frozen=True, order=True)
class Mark:
    """When a checkpoint was taken; marks sort in the order of a run.

    phase: `fit` during a task's training, `fitted` at its end, `done` after memory, curvature and evaluation
    """

    task: int
    phase_index: int
    step: int

    @classmethod
    def at(cls, task: int, phase: str, step: int) -> Mark:
        """Make a mark from the phase's name."""
        return cls(task, _PHASES.index(phase), step)

    @property
    def phase(self) -> str:
        """The phase: fit, fitted or done."""
        return _PHASES[self.phase_index]

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"task-{self.task:03d}-{self.phase}-{self.step:08d}"


@dataclass(frozen=True)
class Saved:
    """The cost of saving: bytes written by all ranks, and seconds."""

    num_bytes: int
    seconds: float


@dataclass
class Shard:
    """The part that each rank writes for itself: large and seldom changed, so unchanged files are hard-linked.

    written: the object that was written last, and its folder
    number: its random number, which all its files have, to tell them from those of other checkpoints
    """

    written: tuple[object, Path] | None = None
    number: int = 0

    def number_of(self, source: object) -> int:
        """Return the number of `source`: a new random one unless it was written last."""
        known = self.written is not None and self.written[0] is source
        return self.number if known else secrets.randbits(62)

    def write(self, folder: Path, stem: str, source: object, tree: dict[str, Any], number: int) -> int:
        """Write `tree`, the state of `source`, or link the files that hold it; return the bytes written.

        Raises:
            OSError: see write_tree.
        """
        return 0 if self._linked(folder, stem, source) else write_tree(folder, tree, header={_OF: number}, stem=stem)

    def moved(self, source: object, folder: Path, number: int) -> None:
        """Record that `source` is now in `folder`."""
        self.written, self.number = (source, folder), number

    def _linked(self, folder: Path, stem: str, source: object) -> bool:
        if self.written is None or self.written[0] is not source:
            return False
        try:
            for suffix in ("safetensors", "json"):
                os.link(self.written[1] / f"{stem}.{suffix}", folder / f"{stem}.{suffix}")
        except OSError:  # removed meanwhile, or no links on this file system
            for suffix in ("safetensors", "json"):
                (folder / f"{stem}.{suffix}").unlink(missing_ok=True)
            return False
        return True


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    tree: replicated tensors (the leader writes them) and this rank's parts of spread tensors
    source: the object whose state `own` is
    own: state that only this rank holds, by layer; if empty on all ranks, no such files are written
    """

    tree: dict[str, Any]
    source: object = None
    own: dict[str, Any] = field(default_factory=dict)


def save(
    checkpoints: Path, mark: Mark, content: Content, *, keep: int, comm: Comm | None = None, shard: Shard | None = None
) -> Saved:
    """Write a checkpoint to a temporary folder, rename it, and prune older ones within tasks; collective.

    Args:
        checkpoints: the folder of all checkpoints.
        mark: when it is taken.
        content: what it holds.
        keep: number of newest checkpoints kept within a task.
        comm: the ranks; None: one process.
        shard: remembers where this rank's own part was written last.

    Raises:
        FolderError: it cannot be written; earlier checkpoints are untouched.
        WorldError: another rank could not write.
    """
    writing = Writing.begin(checkpoints, mark, content, keep=keep, comm=comm or Comm.solo(), shard=shard or Shard())
    return writing.finish()


@dataclass
class Writing:
    """A checkpoint being written: begun by all ranks together, written by each in a thread, finished together."""

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
        """Begin to write; collective.

        If `wait` is False, files are written in the background; the content must not change meanwhile.

        Raises:
            FolderError: the folder cannot be made, on the leader.
            WorldError: the same, on the other ranks.
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
        """The checkpoint's final folder."""
        return self.checkpoints / self.mark.name

    @property
    def written(self) -> bool:
        """Whether this rank has written its part. Not collective."""
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> Saved:
        """Wait for all ranks' parts and rename; collective.

        Raises:
            FolderError: it cannot be written; earlier checkpoints are untouched.
            WorldError: another rank could not write, or the file system does not answer.
        """
        if self.thread is not None:
            self.thread.join()
        with _together(self.comm, self.beside, self.final):
            if self.failure is not None:
                raise self.failure
        with _together(self.comm, self.beside, self.final):
            if self.comm.leader:
                sync(self.beside)
                put_in_place(self.beside, self.final)  # replaces the one that an earlier, killed start wrote here
                sync(self.checkpoints)
        self.shard.moved(self.content.source, self.final, self.header[_OF])
        written = torch.tensor([self.num_bytes], device=self.comm.device)
        self.comm.sum_([written])
        if self.comm.leader:  # last, as the others need not wait for it
            with contextlib.suppress(OSError, HpcclError):  # nor does a failure stop the run
                _prune(self.checkpoints, self.keep)
        return Saved(int(written), time.perf_counter() - self.start)

    def _write(self) -> None:
        """Write this rank's files. Not collective: it may run in a thread."""
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
        except Exception as error:  # noqa: BLE001 - in a thread: `finish` raises it; no partial checkpoint appears
            self.failure = error


@contextlib.contextmanager
def _together(comm: Comm, beside: Path, final: Path) -> Iterator[None]:
    """Run a step on all ranks, after which they wait for each other; if it fails on one, all raise. Collective."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised below, once the others know
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
    kind = WorldError if may_pass(failure) else FolderError
    raise kind(
        f"checkpoint '{final}' cannot be written: {explain_os_error(failure)}; the checkpoints before it are untouched"
    ) from failure


def open_shards(checkpoints: Path, mark: Mark) -> Callable[[Callable[[str], bool]], dict[str, list[dict[str, Any]]]]:
    """Return a function that reads the ranks' own parts: from a filter of layers to the states of all ranks by layer.

    It raises CheckpointError if a file is missing, truncated or from another checkpoint.
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
    """Check that the tensor files of all ranks have the length that their headers say, without reading them.

    Raises:
        CheckpointError: one has not.
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
    """Return the newest checkpoint, or None."""
    return max(marks(checkpoints), default=None)


def latest_of_all(checkpoints: Path, comm: Comm) -> Mark | None:
    """Return the newest checkpoint that the leader finds, the same on every rank; None if there is none. Collective.

    On a network file system another node's listing of the folder may be a minute old: ranks wait until they see it.

    Raises:
        WorldError: a rank does not see it within two minutes.
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
            f"some processes did not see checkpoint '{checkpoints / name}' of the first process in {_UNSEEN:.0f} s; "
            "put the run folder on a file system shared by all nodes, and start the run again to continue"
        )
    return Mark.at(int(match[1]), match[2], int(match[3]))


def load(checkpoints: Path, mark: Mark, *, only: str | None = None, lazy: bool = False) -> dict[str, Any]:
    """Return the tree that was saved; spread tensors, or all tensors if `lazy`, stay in their files (Stored).

    only: the top-level key to read; None: all

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know.
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
    """Return all checkpoints of a folder, in the order of a run."""
    if not checkpoints.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in checkpoints.iterdir())
    return sorted(Mark.at(int(m[1]), m[2], int(m[3])) for m in found if m)


def _prune(checkpoints: Path, keep: int) -> None:
    """Keep `done` checkpoints, and the newest `keep` `fit` checkpoints of unfinished tasks; delete other `fit` ones.

    `fitted` ones of finished tasks are deleted, except the first task's: other runs may start from its weights.
    """
    found = marks(checkpoints)
    ended = {mark.task for mark in found if mark.phase == "done"}
    within = [mark for mark in found if mark.phase == "fit" and mark.task not in ended]
    for mark in found:
        passed = mark.phase == "fitted" and mark.task > 0 and mark.task in ended
        if passed or (mark.phase == "fit" and mark not in within[-keep:]):
            _remove(checkpoints / mark.name)


def _remove(folder: Path) -> None:
    """Delete a folder, renaming it first: a half-deleted one must not look like a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old.part")
    with contextlib.suppress(OSError):  # a failure to prune must not stop a run
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _clear(checkpoints: Path) -> None:
    """Delete incomplete checkpoints of killed processes."""
    for entry in checkpoints.glob(".task-*.part"):
        shutil.rmtree(entry, ignore_errors=True)
