"""Tensors in files of their own in the run folder: checkpoints refer to them, processes of a machine share their pages.

A file is named after a checksum of its contents and never changed, so that a checkpoint always means the same, and a
run folder may be copied elsewhere. It is memory-mapped: pages that no step uses are not in memory, and pages that
several processes use are there once.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from hpccl.checkpoint.streamed import write_tensors
from hpccl.errors import CheckpointError
from hpccl.folder import replacing, sync

__all__ = ["Apart", "read_apart", "write_apart"]

_NAME = "rows"


@final
@dataclass(frozen=True)
class Apart:
    """A leaf of a checkpoint's tree: the path, within the run folder, of the file that holds the tensor."""

    path: str


def write_apart(root: Path, stem: str, tensor: Tensor) -> Apart:
    """Write `root/stem-<checksum>.safetensors` and delete other files of that stem.

    Raises:
        FolderError: the file cannot be written.
    """
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.view(-1).view(torch.uint8).numpy().data)
    found = Apart(f"{stem}-{digest.hexdigest()[:16]}.safetensors")
    with replacing(root / found.path) as path:
        write_tensors(path, {_NAME: value})
    with contextlib.suppress(OSError):  # only the folder's entry; the file itself is synced
        sync((root / found.path).parent)
    for other in (root / found.path).parent.glob(f"{Path(stem).name}-*.safetensors"):
        if other != root / found.path:
            other.unlink(missing_ok=True)
    return found


def read_apart(root: Path, where: Apart) -> Tensor:
    """Return the tensor, memory-mapped: it must not be written to.

    Raises:
        CheckpointError: the file is missing or truncated, or not in the run folder.
    """
    if not (root / where.path).resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"a checkpoint of '{root}' refers to a file outside it, '{where.path}'; do not use it")
    try:
        with safetensors.safe_open(root / where.path, framework="pt") as file:
            found: Tensor = file.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{root / where.path}', which a checkpoint of this run needs, cannot be read ({error}): copy the whole "
            "run folder again, or delete the checkpoint to continue from the one before"
        ) from error
    return found
