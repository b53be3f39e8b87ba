"""A nest of dicts and lists with tensors as leaves, as one safetensors file and one JSON file. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hpccl.errors import CheckpointError

__all__ = ["read_header", "read_tree", "write_tree"]

_TENSOR = "__tensor__"


def write_tree(folder: Path, tree: dict[str, Any], *, header: dict[str, Any], stem: str = "state") -> int:
    """Write <stem>.safetensors and <stem>.json into an existing folder; returns the bytes written.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _strip(tree, "", tensors)
    data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    text = json.dumps({**header, "tree": skeleton}).encode()
    for name, content in ((f"{stem}.safetensors", data), (f"{stem}.json", text)):
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return len(data) + len(text)


def read_tree(
    folder: Path, *, stem: str = "state", wanted: Callable[[str], bool] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, tree) of what write_tree wrote; tensors are on the CPU.

    wanted: of the tree's first keys, which are read; the tensors of others never leave the file.

    Raises:
        CheckpointError: a file is missing, torn or not what it says.
    """
    try:
        header = json.loads((folder / f"{stem}.json").read_text())
        skeleton = header.pop("tree")
        if wanted is not None:
            skeleton = {key: value for key, value in skeleton.items() if wanted(key)}
        with safetensors.safe_open(folder / f"{stem}.safetensors", framework="pt") as file:
            # A copy begins where any other tensor may; a place in the file may not, and products of matrices that begin
            # elsewhere are rounded otherwise: a resumed run would not be the undisturbed one.
            tree = _fill(skeleton, lambda name: file.get_tensor(name).clone())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint '{folder}' cannot be read ({stem}: {error}); delete it to continue from the one before"
        ) from error
    return header, tree


def read_header(folder: Path) -> dict[str, Any]:
    """The header alone.

    Raises:
        CheckpointError: missing or torn.
    """
    try:
        header: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint '{folder}' cannot be read ({error}); delete it to continue from the one before"
        ) from error
    del header["tree"]
    return header


def _strip(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The nest with every tensor replaced by its name in `tensors`."""
    if isinstance(node, Tensor):
        tensors[path] = node
        return {_TENSOR: path}
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node), f"keys must be text at '{path}'"
        return {key: _strip(value, f"{path}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_strip(value, f"{path}/{index}", tensors) for index, value in enumerate(node)]
    assert node is None or isinstance(node, (bool, int, float, str)), f"cannot be saved: {type(node)} at '{path}'"
    return node


def _fill(node: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensor(node[_TENSOR])
        return {key: _fill(value, tensor) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, tensor) for value in node]
    return node
