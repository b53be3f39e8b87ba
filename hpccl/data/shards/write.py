"""Writes one shard: a tar of images of one class that webdataset can read, hashed as it is written."""

from __future__ import annotations

import hashlib
from typing import IO, TypeAlias

from webdataset.writer import TarWriter

from hpccl.data.shards.manifest import ShardEntry

__all__ = ["Row", "ShardWriter"]

_BLOCK = 512  # bytes of a tar header, and the multiple to which contents are padded

# key, extension, offset and length of the image in the tar, width, height
Row: TypeAlias = tuple[str, str, int, int, int, int]


class ShardWriter:
    """Adds images to an open file; `rows` locates them, `entry` describes the file once it is closed."""

    def __init__(self, file: IO[bytes], label: int) -> None:
        self.rows: list[Row] = []
        self._label = str(label).encode()
        self._hashing = _HashingFile(file)
        self._tar = TarWriter(self._hashing, user="hpccl", group="hpccl", mtime=0, encoder=False)

    def add(self, key: str, extension: str, data: bytes, *, width: int, height: int) -> None:
        """Append one image file's bytes."""
        offset = self._image_offset(extension)
        self._tar.write({"__key__": key, extension: data, "cls": self._label})
        self.rows.append((key, extension, offset, len(data), width, height))

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()

    def entry(self, file: str, class_name: str) -> ShardEntry:
        """Return the manifest's entry; call it after `close`."""
        return ShardEntry(file, class_name, len(self.rows), self._hashing.bytes, self._hashing.digest.hexdigest())

    def _image_offset(self, extension: str) -> int:
        """Return the first byte of the next image in the tar; TarWriter sorts a sample's parts by extension."""
        padded = -(-len(self._label) // _BLOCK) * _BLOCK
        before = _BLOCK + padded if extension > "cls" else 0
        return int(self._tar.tarstream.offset) + before + _BLOCK


class _HashingFile:
    """Passes on, counts and hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)
