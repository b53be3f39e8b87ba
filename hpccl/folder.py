"""The layout of a run folder, and writing files so that readers never see half of one."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpccl.errors import ConfigError, FolderError

__all__ = [
    "RunFolder",
    "expanded",
    "explain_os_error",
    "locked",
    "may_pass",
    "put_in_place",
    "refuse_unwritable",
    "replacing",
    "replacing_folder",
    "similar",
    "sync",
]


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    config.yaml code.txt env.txt events.jsonl jobs.jsonl checkpoints/ memory/ logs/ tensorboard/ report.{json,md,html}
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def code(self) -> Path:
        """Commit and uncommitted changes of the code that ran."""
        return self.path / "code.txt"

    @property
    def env(self) -> Path:
        """Versions of packages, and the machine."""
        return self.path / "env.txt"

    @property
    def events(self) -> Path:
        """The run's events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, one folder each."""
        return self.path / "checkpoints"

    @property
    def memory(self) -> Path:
        """Pictures of the memory for reports, one file a task, and the folder `copies`."""
        return self.path / "memory"

    @property
    def copies(self) -> Path:
        """Shards with copies of the memory's images, one folder a task; only with memory.keep=copy."""
        return self.memory / "shards"

    @property
    def logs(self) -> Path:
        """The ranks' output, one text file a rank."""
        return self.path / "logs"

    @property
    def jobs(self) -> Path:
        """The jobs submitted for the run, one JSON object a line."""
        return self.path / "jobs.jsonl"

    @property
    def error(self) -> Path:
        """The error that ended the last start, as JSON: job, restart, rank, kind, message, time."""
        return self.logs / "error.json"

    @property
    def tensorboard(self) -> Path:
        """Curves for TensorBoard."""
        return self.path / "tensorboard"

    def report(self, suffix: str) -> Path:
        """Return the path of report.json, report.md or report.html."""
        return self.path / f"report.{suffix}"

    def require(self) -> None:
        """Check that the folder is that of a run.

        Raises:
            FolderError: it is not.
        """
        if not self.config.is_file():
            raise FolderError(f"'{self.path}' is not a run folder (it has no config.yaml); give the folder of a run")

    def create(self) -> None:
        """Make the folder and its subfolders, and check that it can be written.

        Raises:
            FolderError: it cannot be made or written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.memory, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            explained = explain_os_error(error, other="another folder=...")
            raise FolderError(f"run folder '{self.path}' cannot be written: {explained}") from error


def similar(path: Path, names: Iterable[str]) -> Path | None:
    """Return the path whose name among `names`, those in its folder, is most similar to `path`; None if none is."""
    near = difflib.get_close_matches(path.name, list(names), n=1)
    return path.parent / near[0] if near else None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`, waiting for it; the system frees the lock of a process that dies.

    Only for work that several processes may repeat without harm: where the file system has no locks, all of them enter
    the context, which then yields False.

    Raises:
        OSError: the file cannot be made.
    """
    with open(path, "wb") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held


def refuse_unwritable(folder: Path, option: str) -> None:
    """Check, before long work, that a folder could be made and written.

    option: how the user gives another folder, for the message

    Raises:
        FolderError: it could not be.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise FolderError(f"'{folder}' cannot be written: {explain_os_error(error, other=option)}") from error


def expanded(key: str, text: str) -> Path:
    """Return the path that setting `key` names, with the home folder for `~`.

    Raises:
        ConfigError: it has a `$`, and nothing of that name exists.
    """
    if "$" in text and not os.path.exists(text):
        raise ConfigError(
            f"{key} = '{text}': environment variables are not expanded in a configuration; write them out"
        )
    return Path(text).expanduser()


def explain_os_error(error: OSError, *, other: str = "another folder") -> str:
    """Return the system's message and what to do; `other`: how the user gives another folder."""
    advice = {
        28: "the disk is full: free some space and run the same command again",
        122: "your disk quota is used up: free some space and run the same command again",
        13: f"no permission: choose {other} or ask its owner",
        27: "larger than `ulimit -f` or the file system allows: raise that and run the same command again",
        30: f"the file system is read-only: choose {other}",
        20: f"a part of the path is a file: choose {other}",
        17: f"a file is in the way: choose {other}",
        36: f"a file name has at most 255 bytes: choose {other}",
    }.get(error.errno or 0, "check the path and run the same command again")
    return f"{error.strerror or error} ({advice})"


def may_pass(error: OSError) -> bool:
    """Whether another attempt may succeed: servers of shared file systems answer so while they fail over."""
    return error.errno in _PASSING


_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` at the end, or deleted on an exception.

    Raises:
        FolderError: the file cannot be written (disk full, no permission).
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `final` at the end, or is deleted on an exception.

    Raises:
        FolderError: it cannot be written.
    """
    beside = final.with_name(f".{final.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        put_in_place(beside, final)
    except OSError as error:
        raise FolderError(f"'{final}' cannot be written: {explain_os_error(error)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, final: Path) -> None:
    """Rename the complete folder `beside` to `final`, then delete the former folder of that name.

    `final` is never half a folder: a process that is killed in between leaves the old one, the new one or none.

    Raises:
        OSError: it cannot be renamed; the former folder is still there.
    """
    old = final.with_name(f".{final.name}.{os.getpid()}.old.part")
    there = final.exists()
    if there:
        os.replace(final, old)
    try:
        os.replace(beside, final)
    except OSError:
        if there:
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's renames, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
