"""Description of a folder of shards: `manifest.json` is readable, `index.npz` locates each image.

    OUT/<split>/manifest.json, index.npz, c0000-000.tar, c0000-001.tar, c0001-000.tar, ...

A shard holds images of one class. Samples are numbered shard after shard, in the manifest's order; a sample's global
id is `<shard>/<key>`, such as `c0012-000/n01440764_10026`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccl.errors import DataError
from hpccl.folder import replacing, similar

__all__ = [
    "FORMAT",
    "INDEX",
    "MANIFEST",
    "UNFINISHED",
    "Index",
    "Manifest",
    "ShardEntry",
    "SkippedImage",
    "file_sha256",
    "refuse_absent",
    "splits",
]

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.npz"
_COPY_AGAIN = "copy the shards again, or delete their folder and build them again"
_SHA256 = re.compile(r"[0-9a-f]{64}")
UNFINISHED = ".build"  # folder of the notes from which a build is resumed


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: images of one class."""

    file: str
    class_name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def stem(self) -> str:
        """The first part of its samples' ids."""
        return self.file.removesuffix(".tar")


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that could not be decoded."""

    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """One split.

    source: base name of the source; listing: SHA-256 of the names and sizes of its images; classes: sorted, of all
    splits that were built together
    """

    split: str
    source: str
    listing: str
    encoding: dict[str, Any]
    samples_per_shard: int
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    index_bytes: int
    index_sha256: str
    skipped: tuple[SkippedImage, ...] = ()

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines what `read` returns."""
        parts = [self.split, *self.classes, self.index_sha256, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what the shards were made from, with names for messages; equal identities make equal shards."""
        return {
            "source": self.source,
            "images of the source": self.listing,
            "encoding": self.encoding,
            "samples_per_shard": self.samples_per_shard,
            "classes": list(self.classes),
        }

    def save(self, folder: Path) -> None:
        """Write manifest.json."""
        fields = dataclasses.asdict(self)
        shards = [_rename(shard, "class_name", "class") for shard in fields.pop("shards")]
        index = {"file": INDEX, "bytes": fields.pop("index_bytes"), "sha256": fields.pop("index_sha256")}
        document = {"format": FORMAT, **fields, "samples": self.samples, "index": index, "shards": shards}
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"'{folder}' has no {MANIFEST}: it is not a finished folder of shards (see `hpccl shards build`)"
            ) from None
        except OSError as error:
            raise DataError(f"'{path}' cannot be read ({error}): {_COPY_AGAIN}") from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, path: str) -> Manifest:
        """Parse the bytes of manifest.json; `path` is named in messages.

        Raises:
            DataError: they are damaged or of another format.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise DataError(f"'{path}' cannot be read ({error}): {_COPY_AGAIN}") from error
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise DataError(f"'{path}' has format {found!r}, but this version of hpccl reads format {FORMAT}")
        try:
            manifest = _parse(document)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path}' is damaged ({error!r}): {_COPY_AGAIN}") from error
        _refuse_untrusted(manifest, path)
        return manifest


@dataclass(frozen=True, eq=False)
class Index:
    """The location of each of N samples in its shard.

    key: [N] bytes; extension: [N] bytes; offset, length: [N] int64, of the image's bytes in the tar;
    size: [N, 2] int32, width and height.
    """

    key: npt.NDArray[np.bytes_]
    extension: npt.NDArray[np.bytes_]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    size: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of(cls, rows: Sequence[tuple[str, str, int, int, int, int]]) -> Index:
        """Make an index from rows (key, extension, offset, length, width, height)."""
        keys, extensions, offsets, lengths, widths, heights = zip(*rows, strict=True) if rows else ((),) * 6
        return cls(
            key=np.array([key.encode() for key in keys], dtype=np.bytes_),
            extension=np.array([extension.encode() for extension in extensions], dtype=np.bytes_),
            offset=np.array(offsets, dtype=np.int64),
            length=np.array(lengths, dtype=np.int64),
            size=np.array([widths, heights], dtype=np.int32).T.copy(),
        )

    def save(self, folder: Path) -> tuple[int, str]:
        """Write index.npz; return its size in bytes and its SHA-256."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **vars(self))
        with replacing(folder / INDEX) as path:
            path.write_bytes(buffer.getbuffer())
        return len(buffer.getbuffer()), hashlib.sha256(buffer.getbuffer()).hexdigest()

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> Index:
        """Read and check index.npz.

        Raises:
            DataError: it is missing, truncated or altered.
        """
        path = folder / INDEX
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"'{path}' cannot be read ({error.strerror}): {_COPY_AGAIN}") from error
        return cls.parse(data, manifest, str(path))

    @classmethod
    def parse(cls, data: bytes, manifest: Manifest, path: str) -> Index:
        """Parse the bytes of index.npz; `path` is named in messages.

        Raises:
            DataError: they are truncated or altered.
        """
        advice = _COPY_AGAIN
        if len(data) != manifest.index_bytes or hashlib.sha256(data).hexdigest() != manifest.index_sha256:
            raise DataError(f"'{path}' is truncated or altered (its checksum is not the manifest's): {advice}")
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                index = cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"'{path}' is damaged ({error}): {advice}") from error
        if len(index) != manifest.samples:
            raise DataError(f"'{path}' lists {len(index)} samples, the manifest {manifest.samples}: {advice}")
        return index


def splits(path: Path) -> list[str]:
    """Return the names of the finished splits in a folder of shards."""
    return sorted(manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}"))


def refuse_absent(path: Path) -> None:
    """Raise if there is no folder of shards at all, as opposed to one without the wanted split.

    Raises:
        DataError: there is no such folder; the message suggests a similar name.
    """
    if path.is_dir():
        return
    if path.exists():
        raise DataError(f"'{path}' is a file, not a folder of shards: give the folder that `hpccl shards build` wrote")
    near = similar(path, (folder.name for folder in path.parent.glob("*") if folder.is_dir()))
    seen_from = "" if path.is_absolute() else f", seen from '{Path.cwd()}'"
    advice = f"did you mean '{near}'?" if near else "check the path, or see `hpccl shards build`"
    raise DataError(f"the folder of shards '{path}' does not exist{seen_from}; {advice}")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_untrusted(manifest: Manifest, path: str) -> None:
    """Refuse names and checksums that could be paths, as copies and downloads are written under them.

    Raises:
        DataError: there is one, or a shard's class is not listed.
    """
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".."):
            raise DataError(f"'{path}' names a shard outside of its folder, '{shard.file}'; do not use it")
    for found in (manifest.index_sha256, *(shard.sha256 for shard in manifest.shards)):
        if not _SHA256.fullmatch(str(found)):
            raise DataError(f"'{path}' has {found!r} instead of a SHA-256; do not use it")
    unknown = sorted({shard.class_name for shard in manifest.shards} - set(manifest.classes))
    if unknown:
        raise DataError(f"'{path}' is damaged (it does not list the class '{unknown[0]}' of a shard): {_COPY_AGAIN}")


def _parse(document: dict[str, Any]) -> Manifest:
    return Manifest(
        split=document["split"],
        source=document["source"],
        listing=document["listing"],
        encoding=document["encoding"],
        samples_per_shard=document["samples_per_shard"],
        classes=tuple(document["classes"]),
        shards=tuple(ShardEntry(**_rename(shard, "class", "class_name")) for shard in document["shards"]),
        index_bytes=document["index"]["bytes"],
        index_sha256=document["index"]["sha256"],
        skipped=tuple(SkippedImage(**skipped) for skipped in document["skipped"]),
    )


def _rename(fields: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in fields.items()}
