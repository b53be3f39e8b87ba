"""A tensor in a file of its own in the run folder: checkpoints name it, and processes of a machine share its pages.

A file is named by what is in it and never changed, so that a checkpoint means the same for ever, and a run folder may
be copied elsewhere. It is mapped, not read: what no step asks for is not in memory, and what several processes ask for
is there once.
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
    """In the tree of a checkpoint: the tensor of a file, by its path within the run folder."""

    path: str


def write_apart(root: Path, stem: str, tensor: Tensor) -> Apart:
    """Write `root/stem-<checksum>.safetensors`; other files of that stem go.

    Raises:
        FolderError: it cannot be written.
    """
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.view(-1).view(torch.uint8).numpy().data)
    found = Apart(f"{stem}-{digest.hexdigest()[:16]}.safetensors")
    with replacing(root / found.path) as path:
        write_tensors(path, {_NAME: value})
    with contextlib.suppress(OSError):  # the file itself is on the disk
        sync((root / found.path).parent)
    for other in (root / found.path).parent.glob(f"{Path(stem).name}-*.safetensors"):
        if other != root / found.path:
            other.unlink(missing_ok=True)
    return found


def read_apart(root: Path, where: Apart) -> Tensor:
    """The tensor, mapped: it must not be written to.

    Raises:
        CheckpointError: the file is missing or torn, or not in the run folder.
    """
    if not (root / where.path).resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"a checkpoint of '{root}' names a file outside of it, '{where.path}'; do not use it")
    try:
        with safetensors.safe_open(root / where.path, framework="pt") as file:
            found: Tensor = file.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{root / where.path}', which a checkpoint of this run needs, cannot be read ({error}): copy the whole "
            "run folder again, or delete the checkpoint to continue from the one before"
        ) from error
    return found
