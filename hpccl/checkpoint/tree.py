"""Trees (nested dicts and lists with tensors as leaves) as one safetensors file and one JSON file. Never a pickle.

Tensors that are spread over ranks (dist.spread.Slab) are in files of their own, one per rank, with a table of which
elements each file has; they can be read in any other division. Tensors in separate files (apart.Apart) are stored as
the file's path.

The JSON file has a checksum of every tensor, which is compared when the tensor is read whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from hpccl.checkpoint.apart import Apart, read_apart
from hpccl.checkpoint.streamed import checksum, write_tensors
from hpccl.dist.spread import Slab, Stored
from hpccl.errors import CheckpointError

__all__ = ["StoredWhole", "has_slabs", "read_header", "read_tree", "write_slabs", "write_tree"]

_TENSOR = "__tensor__"
_SPREAD = "__spread__"
_APART = "__apart__"
_SUMS = "crc32"  # key of the tensors' checksums; absent in files of earlier versions


def write_tree(folder: Path, tree: dict[str, Any], *, header: dict[str, Any], stem: str = "state") -> int:
    """Write <stem>.safetensors and <stem>.json into an existing folder; return the bytes written.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor | Slab] = {}
    skeleton = _strip(tree, "", tensors)
    own = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    return _write(folder, stem, own, {**header, "tree": skeleton})


def write_slabs(folder: Path, tree: dict[str, Any], *, header: dict[str, Any], stem: str) -> int:
    """Write this rank's elements of the tree's spread tensors likewise; return the bytes written.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor | Slab] = {}
    _strip(tree, "", tensors)
    slabs = {name: value for name, value in tensors.items() if isinstance(value, Slab) and value.span.numel}
    slabs = {name: slab for name, slab in slabs.items() if slab.span.copy == 0}
    places = {name: slab.span.start for name, slab in slabs.items()}
    return _write(folder, stem, {name: slab.local for name, slab in slabs.items()}, {**header, "tree": places})


def has_slabs(tree: dict[str, Any]) -> bool:
    """Whether any tensor is spread; the same on all ranks."""
    tensors: dict[str, Tensor | Slab] = {}
    _strip(tree, "", tensors)
    return any(isinstance(value, Slab) for value in tensors.values())


def _write(folder: Path, stem: str, tensors: Mapping[str, Tensor], content: dict[str, Any]) -> int:
    path = folder / f"{stem}.safetensors"
    text = json.dumps({**content, _SUMS: write_tensors(path, tensors)}).encode()
    with open(folder / f"{stem}.json", "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size + len(text)


def _checked(value: Tensor, name: str, expected: int | None) -> Tensor:
    """Return the tensor; raise ValueError if its checksum is not the `expected` one."""
    if expected is not None and checksum(value) != expected:
        raise ValueError(f"'{name}' was altered since it was written")
    return value


def read_tree(
    folder: Path,
    *,
    stem: str = "state",
    wanted: Callable[[str], bool] | None = None,
    lazy: bool = False,
    apart: Path | None = None,
    slabs: Callable[[dict[str, Any]], list[str]] = lambda header: [],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (header, tree) as written by write_tree; tensors are on the CPU, spread ones stay in files (Stored).

    wanted: selects top-level keys of the tree; tensors of others are not read
    lazy: leave all tensors in their files
    apart: the folder that paths of separate files start from; None: the tree may have none
    slabs: from the header to the stems of the files that all ranks' write_slabs wrote

    Raises:
        CheckpointError: a file is missing, truncated, altered or malformed.
    """
    try:
        header = json.loads((folder / f"{stem}.json").read_text())
        skeleton, sums = header.pop("tree"), header.pop(_SUMS, {})
        spread = _Spread.open(folder, slabs(header))
        if wanted is not None:
            skeleton = {key: value for key, value in skeleton.items() if wanted(key)}
        with safetensors.safe_open(folder / f"{stem}.safetensors", framework="pt") as file:
            # Copied, for alignment: matrix products may round differently for tensors that begin at odd addresses of
            # a mapped file, and a resumed run would differ from an uninterrupted one.

            def read(name: str) -> Tensor | Stored:
                if not lazy:
                    return _checked(file.get_tensor(name).clone(), name, sums.get(name))
                shape = tuple(file.get_slice(name).get_shape())
                return StoredWhole(folder / f"{stem}.safetensors", name, shape, sums.get(name))

            tree = _fill(skeleton, read, spread, apart)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint '{folder}' cannot be read ({stem}: {error}); delete it to continue from the one before"
        ) from error
    return header, tree


def read_header(folder: Path) -> dict[str, Any]:
    """Return the header alone.

    Raises:
        CheckpointError: it is missing or truncated.
    """
    try:
        header: dict[str, Any] = json.loads((folder / "state.json").read_text())
        del header["tree"]
        header.pop(_SUMS, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint '{folder}' cannot be read ({error}); delete it to continue from the one before"
        ) from error
    return header


_Piece = tuple[int, Path, int | None]


@dataclass(frozen=True)
class _Spread:
    """Where the elements of spread tensors are: by name, pieces of (first element, file, checksum)."""

    pieces: dict[str, list[_Piece]]

    @classmethod
    def open(cls, folder: Path, stems: list[str]) -> _Spread:
        pieces: dict[str, list[_Piece]] = {}
        for stem in stems:
            content = json.loads((folder / f"{stem}.json").read_text())
            sums, path = content.get(_SUMS, {}), folder / f"{stem}.safetensors"
            for name, start in content["tree"].items():
                pieces.setdefault(name, []).append((start, path, sums.get(name)))
        return cls({name: sorted(found, key=lambda piece: piece[:2]) for name, found in pieces.items()})

    def stored(self, name: str, shape: list[int], dtype: str) -> _StoredTensor:
        return _StoredTensor(name, tuple(shape), getattr(torch, dtype), tuple(self.pieces.get(name, ())))


@final
@dataclass(frozen=True)
class _StoredTensor:
    """See dist.spread.Stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """See Stored.read.

        Raises:
            CheckpointError: a file is missing, truncated or altered, or elements are in none of the files.
        """
        found = torch.empty(stop - start, dtype=self.dtype)
        missing = stop - start
        ends = [*(first for first, _, _ in self.pieces[1:]), math.prod(self.shape)]
        for (first, path, expected), end_of_piece in zip(self.pieces, ends, strict=False):
            if first >= stop or end_of_piece <= start:  # opening every rank's file for every tensor would take long
                continue
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    part = file.get_slice(self.name)
                    begin, end = max(first, start), min(first + math.prod(part.get_shape()), stop)
                    if begin < end:
                        taken: Tensor = part[begin - first : end - first]
                        complete = end - begin == math.prod(part.get_shape())
                        found[begin - start : end - start] = _checked(taken, self.name, expected if complete else None)
                        missing -= end - begin
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"'{path}' cannot be read ({error}); {_BEFORE.format(path.parent)}") from error
        if missing:
            where = self.pieces[0][1].parent if self.pieces else "the checkpoint"
            raise CheckpointError(
                f"{missing} elements of '{self.name}' are missing from the files of '{where}'; {_BEFORE.format(where)}"
            )
        return found


@final
@dataclass(frozen=True)
class StoredWhole:
    """A tensor in a safetensors file, which is opened for every read and closed again: see dist.spread.Stored.

    Reads return copies: the pages of a file that stays mapped would add up to all of it in memory.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    checksum: int | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """See Stored.read.

        Raises:
            CheckpointError: the file is missing, truncated or altered.
        """
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                whole = _checked(file.get_tensor(self.name), self.name, self.checksum)
                found = whole.reshape(-1)[start:stop].clone()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error}") from error
        return found


_BEFORE = "delete '{}' to continue from the one before"


def _strip(node: Any, path: str, tensors: dict[str, Tensor | Slab]) -> Any:
    """Return the tree with every tensor replaced by a reference; add the tensors to `tensors` by name."""
    if isinstance(node, Tensor):
        tensors[path] = node
        return {_TENSOR: path}
    if isinstance(node, Slab):
        tensors[path] = node
        return {_SPREAD: path, "shape": list(node.shape), "dtype": str(node.local.dtype).removeprefix("torch.")}
    if isinstance(node, Apart):
        return {_APART: node.path}
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node), f"keys must be text at '{path}'"
        return {key: _strip(value, f"{path}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_strip(value, f"{path}/{index}", tensors) for index, value in enumerate(node)]
    assert node is None or isinstance(node, (bool, int, float, str)), f"cannot be saved: {type(node)} at '{path}'"
    return node


def _fill(node: Any, tensor: Callable[[str], Tensor | Stored], spread: _Spread, apart: Path | None) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensor(node[_TENSOR])
        if _SPREAD in node:
            return spread.stored(node[_SPREAD], node["shape"], node["dtype"])
        if _APART in node:
            if apart is None:
                raise ValueError(f"it refers to another file, '{node[_APART]}'")
            return read_apart(apart, Apart(node[_APART]))
        return {key: _fill(value, tensor, spread, apart) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, tensor, spread, apart) for value in node]
    return node
