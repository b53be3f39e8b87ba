"""Write safetensors files tensor by tensor, in any order, with no more than one of them in memory.

The format is a length (8 bytes), a JSON table of dtypes, shapes and offsets, and the data. The safetensors library can
only write files that are in memory as a whole; tests check that it reads ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, final

import torch
from torch import Tensor

__all__ = ["Writer", "checksum", "write_tensors", "writing"]

# The format's names of the dtypes that networks use.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@final
@dataclass(frozen=True)
class Writer:
    """An open file with room for all tensors.

    places: by name: dtype, shape and offset of the first byte
    sums: by name: the checksum of the written tensor
    """

    file: BinaryIO
    places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]
    sums: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor, of the dtype and shape that were announced."""
        dtype, shape, first = self.places[name]
        assert (value.dtype, tuple(value.shape)) == (dtype, shape), f"'{name}' is not as announced"
        assert name not in self.sums, f"'{name}' is there"
        plain = value.detach().cpu().contiguous()
        self.sums[name] = checksum(plain)
        self.file.seek(first)
        self.file.write(_bytes(plain))


@contextlib.contextmanager
def writing(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> Iterator[Writer]:
    """Create a file at `path`; every tensor must have been written when the context ends.

    Raises:
        OSError: the file cannot be written.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[name] = position
        position += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes, aligned for any dtype
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + position)
        writer = Writer(file, {name: (*kind, start + offsets[name]) for name, kind in tensors.items()})
        yield writer
        assert writer.sums.keys() == tensors.keys(), "every tensor is written"
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Create a file at `path` with all `tensors`, with permissions by the user's umask; return their checksums.

    The library's own functions hold the whole file in memory, or make files that only their owner may read and raise
    an error of their own if the disk is full.

    Raises:
        OSError: the file cannot be written.
    """
    # The widest dtypes first: then every tensor begins at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in ordered.items()}
    with writing(path, kinds, metadata=metadata or {}) as writer:
        for name, value in ordered.items():
            writer.write(name, value)
    return writer.sums


def checksum(value: Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous tensor on the CPU."""
    return zlib.crc32(_bytes(value))


def _bytes(value: Tensor) -> memoryview:
    found: memoryview = value.reshape(-1).view(torch.uint8).numpy().data
    return found
