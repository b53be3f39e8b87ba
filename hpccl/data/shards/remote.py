"""Shards in an object store: fetched whole, checked, and cached in a folder of bounded size.

A URL is anything that fsspec understands: s3://, gs://, https://, file://, memory://. Processes of a machine share the
folder: a shard is downloaded once, to a temporary file that is renamed. The least recently used shards are deleted
first; a file that is being read stays readable. Other files in the folder are left alone and not counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from hpccl.data.shards.manifest import INDEX, MANIFEST, Index, Manifest, ShardEntry
from hpccl.errors import DataError
from hpccl.folder import expanded, explain_os_error, locked

__all__ = ["ShardCache", "is_url", "load_manifest"]

Result = TypeVar("Result")

_CHUNK = 1 << 23
_LONGEST_PAUSE = 60.0
_STALE = 3600.0  # seconds after which a partial download counts as abandoned, where files cannot be locked
_KEPT = re.compile(r"[0-9a-f]{64}")  # files are named by their checksum
_HALF = re.compile(r"\.[0-9a-f]{64}\.[0-9]+\.part")
_SWEEP = ".lock"  # held while files are deleted, and while a partial download is created


def is_url(path: str) -> bool:
    """Whether it is a URL rather than a folder."""
    return "://" in path


def load_manifest(path: str, split: str) -> Manifest:
    """Load the manifest of a split in a folder or at a URL.

    Raises:
        DataError: it is missing, damaged or of another format, or the store cannot be read.
    """
    if is_url(path):
        return ShardCache().manifest(f"{path.rstrip('/')}/{split}")
    return Manifest.load(Path(path).expanduser() / split)


@dataclass(frozen=True)
class ShardCache:
    """A cache of an object store's files on this machine.

    max_bytes: of all cached files, downloads in progress included; exceeded only while downloads in progress alone are
        larger
    tries: attempts at a download; pause: seconds after the first failure, doubled each time
    """

    folder: Path = Path("~/.cache/hpccl/shards")
    max_bytes: int = 100 << 30
    tries: int = 5
    pause: float = 1.0

    @classmethod
    def of(cls, folder: str | None, gib: float, tries: int) -> ShardCache:
        """Make one from the configuration; folder None is the user's cache folder."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        where = Path(home) / "hpccl" / "shards" if folder is None else expanded("data.shard_cache", folder)
        return cls(where, int(gib * (1 << 30)), tries)

    def manifest(self, url: str) -> Manifest:
        """Read `url/manifest.json`, which is small, may change, and is never cached."""
        where = f"{url}/{MANIFEST}"
        return Manifest.parse(self._persistently(lambda: b"".join(_chunks(where)), where), where)

    def index(self, url: str, manifest: Manifest) -> Index:
        """Return the index of a split."""
        path = self.fetch(f"{url}/{INDEX}", manifest.index_bytes, manifest.index_sha256)
        try:
            return Index.parse(path.read_bytes(), manifest, f"{url}/{INDEX}")
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {explain_os_error(error)}") from error

    def shard(self, url: str, entry: ShardEntry) -> Path:
        """Return the path of a shard's local copy."""
        return self.fetch(f"{url}/{entry.file}", entry.bytes, entry.sha256)

    def fetch(self, url: str, size: int, sha256: str) -> Path:
        """Return the path of a file's local copy, downloaded if necessary; it may be deleted if not opened soon.

        Raises:
            DataError: it cannot be downloaded, does not match the manifest, or does not fit.
        """
        path = self.folder / sha256
        if _used(path):
            return path
        if size > self.max_bytes:
            raise DataError(
                f"'{url}' has {size} bytes, more than the {self.max_bytes} that data.shard_gib allows in all: raise it"
            )
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / f".lock-{sha256[:2]}"):
                if not _used(path):  # another process may have been quicker
                    self._make_room(size, beside)
                    self._persistently(lambda: self._download(url, path, beside, size), url)
                    self._shrink(spared=sha256)  # others may have been downloaded meanwhile
        except OSError as error:
            raise DataError(
                f"shards cannot be kept in '{self.folder}': {explain_os_error(error)}; set data.shard_cache to a "
                "folder that can be written, or data.shard_gib to at most its free space"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        return path

    def _download(self, url: str, path: Path, beside: Path, size: int) -> None:
        digest, written = hashlib.sha256(), 0
        with _local(_taken, beside, size) as file:
            for chunk in _chunks(url):
                _local(file.write, chunk)
                digest.update(chunk)
                written += len(chunk)
            _local(file.flush)
            if written != size or digest.hexdigest() != path.name:
                raise ValueError(f"it has {written} bytes and not the checksum of the {size} in the manifest")
            _local(os.replace, beside, path)

    def _make_room(self, size: int, beside: Path) -> None:
        """Delete the least recently used files until `size` bytes are free within the bound, and reserve them."""
        with _taken(beside, size):
            self._shrink()

    def _shrink(self, spared: str = "") -> None:
        """Delete the least recently used files until all are within the bound; files without permission stay."""
        there, total = [], 0
        with locked(self.folder / _SWEEP):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):  # gone, or of another user
                    status = entry.stat()
                    if _KEPT.fullmatch(entry.name) and entry.is_file():
                        there.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif not _HALF.fullmatch(entry.name):
                        continue
                    elif _abandoned(entry.path, status.st_mtime):
                        os.unlink(entry.path)
                        continue
                    total += status.st_size
            for _, kept, oldest in sorted(there):
                if total <= self.max_bytes:
                    return
                if Path(oldest).name != spared:
                    with contextlib.suppress(OSError):
                        Path(oldest).unlink(missing_ok=True)
                        total -= kept

    def _persistently(self, action: Callable[[], Result], url: str) -> Result:
        """Retry after a pause, because stores are sometimes busy; permanent failures are not retried."""
        for attempt in range(1, self.tries + 1):
            try:
                return action()
            except _LocalError as error:
                raise error.cause from error
            except FileNotFoundError as error:
                raise DataError(
                    f"'{url}' does not exist: check stream.parts.*.path and the name of the split"
                ) from error
            except (ImportError, ValueError) as error:
                if isinstance(error, ImportError) or "rotocol" in str(error):
                    kind = url.split("://", maxsplit=1)[0]
                    raise DataError(
                        f"'{url}' cannot be read: {error}. Install fsspec's package for {kind} (s3fs for s3, gcsfs for "
                        "gs, aiohttp for https), or copy the shards to a folder"
                    ) from error
                self._rest(attempt, url, error)
            except Exception as error:  # noqa: BLE001 - every store has exceptions of its own
                self._rest(attempt, url, error)
        raise AssertionError("the last attempt returns or raises")

    def _rest(self, attempt: int, url: str, error: Exception) -> None:
        if attempt == self.tries:
            raise DataError(
                f"'{url}' could not be read in {self.tries} attempts ({type(error).__name__}: {error}): check the "
                "network and your credentials, then run the same command again; data.retries sets the attempts"
            ) from error
        time.sleep(min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.Random().uniform(0.5, 1.0))


class _LocalError(Exception):
    """A failure of this machine's disk, not of the store."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _local(action: Callable[..., Result], *arguments: object) -> Result:
    try:
        return action(*arguments)
    except OSError as error:
        raise _LocalError(error) from error


def _chunks(url: str) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _taken(path: Path, size: int) -> BinaryIO:
    """Create a file of `size` bytes to be written, which is locked as long as it is open."""
    with locked(path.parent / _SWEEP):  # otherwise another process could delete it as abandoned before it is locked
        file = path.open("wb")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(size)
    return file


def _abandoned(path: str, changed: float) -> bool:
    """Whether a partial download belongs to no process any more."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return changed < time.time() - _STALE
    return True


def _used(path: Path) -> bool:
    """Whether a file exists; if so, mark it as the most recently used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:
        return path.exists()  # another user's file, or a folder that cannot be written
    return True
