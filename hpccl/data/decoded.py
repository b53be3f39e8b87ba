"""The fast path for small images: decoded once, kept as uint8 in a memory-mapped file that all processes share.

A file holds the evaluation view of every image of one split of one data set, [num, h, w, channels] in the order of
its shards. It does not depend on how classes are ordered or cut into tasks, so that all runs share it. Beside it lies
a list of the images that could not be decoded (zero pixels in the file).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hpccl.data.augment import BatchAugment, Normaliser
from hpccl.data.changes import Changes
from hpccl.data.layout import Index
from hpccl.data.protocols import Split
from hpccl.data.rows import Images, Request, Views
from hpccl.data.transfer import CPU, delivered
from hpccl.errors import DataError, FolderError
from hpccl.folder import expanded, locked, replacing
from hpccl.machine import usable_cores

__all__ = ["DecodedImages", "Kept", "cache_folder", "keep_decoded", "kept_path"]

Pixels = npt.NDArray[np.uint8]
Read = Callable[[int], bytes]
Decode = Callable[[bytes, int], Pixels]
_FORMAT = 1
_CHUNK = 1024  # images decoded between two writes


@dataclass(frozen=True, eq=False)
class Kept:
    """Decoded images of a split.

    pixels: [num, h, w, channels] uint8
    bad: why an image could not be decoded, by number
    numbers: [num] numbers of the images that `pixels` holds, ascending, if some are gone; None: of all, in order
    notes: the file that `bad` was read from, if any
    """

    pixels: Pixels
    bad: Mapping[int, str] = field(default_factory=dict)
    numbers: npt.NDArray[np.int64] | None = None
    notes: Path | None = None

    def take(self, numbers: npt.NDArray[np.int64]) -> Pixels:
        """Return the pixels [n, h, w, channels] of some images.

        Raises:
            DataError: one is gone.
        """
        if self.numbers is None:
            return self.pixels[numbers]
        gone = numbers[~np.isin(numbers, self.numbers)]
        if len(gone):
            raise DataError(f"image {int(gone[0])} of its split is gone with its shard, and memory has no copy of it")
        return self.pixels[np.searchsorted(self.numbers, numbers)]


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """Makes batches from decoded images: one gather, one crop, one normalisation per batch.

    changes: how tasks change their images, after augmentation
    """

    parts: Mapping[Split, Sequence[Kept]]
    index: Mapping[Split, Index]
    augment: BatchAugment
    normalise: Normaliser
    changes: Changes | None = None

    def load(
        self, requests: Iterable[Request], split: Split, device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, made in a background thread."""
        views = (self.make(request, split) for request in requests)
        return delivered(views, self.normalise, device, background=True)

    def make(self, request: Request, split: Split) -> Views:
        """Make one batch."""
        pixels, valid = self.gather(request.sample, split)
        assert request.size is None or pixels.shape[1:3] == (request.size, request.size), "kept at one size"
        return Views(self._changed(self.augment(pixels, request.key), request.sample, split), valid)

    def _changed(self, pixels: Pixels, samples: npt.NDArray[np.int64], split: Split) -> Pixels:
        change = self.index[split].change
        return pixels if self.changes is None or change is None else self.changes(pixels, change[samples])

    def gather(self, samples: npt.NDArray[np.int64], split: Split) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        """Return the stored pixels [n, h, w, channels] and whether they are valid [n]."""
        parts, index = self.parts[split], self.index[split]
        part, local = index.part[samples], index.local[samples]
        pixels = np.empty((len(samples), *parts[0].pixels.shape[1:]), dtype=np.uint8)
        valid = np.ones(len(samples), dtype=bool)
        for which in np.unique(part):
            mine = part == which
            pixels[mine] = parts[which].take(local[mine])
            if parts[which].bad:
                valid[mine] = ~np.isin(local[mine], list(parts[which].bad))
        return pixels, valid

    def raw(self, sample: int, split: Split) -> Pixels:
        """Return the pixels [h, w, channels] of one image, as its task changes it."""
        samples = np.asarray([sample])
        pixels: Pixels = self._changed(self.gather(samples, split)[0], samples, split)[0]
        return pixels

    def skipped(self) -> list[tuple[Split, int, str]]:
        """(split, sample, reason) of all images of the stream that could not be decoded."""
        found: list[tuple[Split, int, str]] = []
        for split, index in self.index.items():
            for which, part in enumerate(self.parts[split]):
                bad = np.flatnonzero((index.part == which) & np.isin(index.local, list(part.bad)))
                found += [(split, int(sample), part.bad[int(index.local[sample])]) for sample in bad]
        return found


def cache_folder(configured: str | None) -> Path:
    """Return data.cache, or hpccl/decoded in the user's cache folder."""
    if configured is not None:
        return expanded("data.cache", configured)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hpccl" / "decoded"


def kept_path(folder: Path, fingerprint: str, view: str) -> Path:
    """Return the file of the decoded images of a split; `view` describes how they are resized."""
    key = hashlib.sha256(f"{_FORMAT}\n{fingerprint}\n{view}".encode()).hexdigest()[:32]
    return folder / f"{key}.npy"


def keep_decoded(path: Path, *, shape: tuple[int, int, int, int], read: Read, decode: Decode) -> Kept:
    """Open `path`; if it is not there yet, decode all images into it first. Any number of processes may do so at once.

    Args:
        path: ends in .npy.
        shape: [num, h, w, channels].
        read: number -> an image file's bytes. If it raises, decoding stops and nothing is kept: unlike an undecodable
            image, the cause may be repaired without a change of `path`. Called from threads, like `decode`.
        decode: (these bytes, number) -> [h, w, channels]; raises DataError for an image that cannot be decoded.

    Raises:
        DataError: the folder cannot be written. What `read` raises is passed on.
    """
    try:
        kept = _opened(path, shape)
        if kept is not None:
            return kept
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")) as alone:
            kept = _opened(path, shape)  # another process may have been quicker
            if kept is None:
                if alone:
                    _remove_halves(path)
                _write(path, shape, read, decode)
    except (OSError, FolderError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise DataError(
            f"decoded images cannot be kept in '{path.parent}': {getattr(cause, 'strerror', None) or error}; "
            f"set data.cache to a folder that can be written and has {np.prod(shape) / 1e9:.2f} GB free, "
            "or data.storage to encoded"
        ) from error
    kept = kept or _opened(path, shape)
    if kept is None:
        raise DataError(f"'{path}' was removed while it was opened; run the same command again")
    return kept


def _opened(path: Path, shape: tuple[int, ...]) -> Kept | None:
    """Open the file; None if it is missing or does not fit."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        bad = json.loads(_bad_path(path).read_text())
    except (FileNotFoundError, ValueError, EOFError):
        return None
    if pixels.shape != shape or pixels.dtype != np.uint8:
        return None
    return Kept(pixels, {int(number): reason for number, reason in bad.items()}, notes=_bad_path(path))


def _remove_halves(path: Path) -> None:
    """Remove the partial files of processes that were killed while they held the lock."""
    for half in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            half.unlink()


def _bad_path(path: Path) -> Path:
    return path.with_suffix(".bad.json")


def _write(path: Path, shape: tuple[int, int, int, int], read: Read, decode: Decode) -> None:
    bad: dict[int, str] = {}

    def attempt(number: int) -> Pixels:
        data = read(number)
        try:
            pixels = decode(data, number)
        except DataError as error:
            bad[number] = str(error)
            return np.zeros(shape[1:], dtype=np.uint8)
        if pixels.shape != shape[1:]:
            bad[number] = f"has {pixels.shape} pixels and channels, not {shape[1:]}"
            return np.zeros(shape[1:], dtype=np.uint8)
        return pixels

    threads = usable_cores()
    with replacing(path) as beside, open(beside, "wb") as file, ThreadPoolExecutor(threads) as pool:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        )
        for start in range(0, shape[0], _CHUNK):
            numbers = range(start, min(start + _CHUNK, shape[0]))
            # Written rather than mapped: a full disk then raises an error, not a bus error.
            file.write(np.stack(list(pool.map(attempt, numbers))).data)
        # Put in place before the images, so that a process that finds these also finds the list.
        with replacing(_bad_path(path)) as bad_beside:
            bad_beside.write_text(json.dumps({str(number): reason for number, reason in sorted(bad.items())}))
