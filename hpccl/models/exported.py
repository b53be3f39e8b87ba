"""Networks that `hpccl export` wrote: a folder with model.safetensors and config.json.

config.json has timm's format, so that timm can read the networks that are timm's. Its entry `hpccl` holds the rest, and
is all that this module needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import nn

from hpccl.config.model import ModelConfig
from hpccl.errors import DataError
from hpccl.models.build import build_model

__all__ = ["CONFIG", "WEIGHTS", "load_exported"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_ModelConfig: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


def load_exported(folder: Path | str) -> nn.Module:
    """Load the network of a `hpccl export`, in evaluation mode: [n, channels, h, w] -> logits [n, num_classes].

    Raises:
        DataError: the folder is not such an export, or damaged.
    """
    folder = Path(folder)
    described = _described(folder)
    try:
        model = build_model(
            _ModelConfig.validate_python(described["model"]),
            image_shape=tuple(described["image_shape"]),
            num_classes=described["num_classes"],
            seed=0,
        )
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"the export in '{folder}' is damaged: {error}; write it again with `hpccl export`") from error
    return model.eval()


def _described(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        described: dict[str, Any] = content["hpccl"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{folder}' is not an export by hpccl: {CONFIG} cannot be read ({error!r}); give the folder OUT of "
            "`hpccl export RUN OUT`"
        ) from error
    return described
