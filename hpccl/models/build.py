"""From a configuration to a network with one head over all classes of the stream."""

from __future__ import annotations

from pathlib import Path
from typing import assert_never

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from hpccl.compat import import_timm
from hpccl.config.sections import MlpModel, ModelConfig, PaperModel, TimmModel
from hpccl.errors import ConfigError, DataError
from hpccl.models.dropout import replace_dropout
from hpccl.models.small import cifarnet, mlp, vgg_small

__all__ = ["build_model", "skeleton"]


def build_model(config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network [n, *image_shape] -> logits [n, num_classes]; a function of its arguments alone.

    Raises:
        ConfigError: the model is unknown or does not fit the images.
        DataError: its checkpoint file is missing or does not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match config:
            case PaperModel(kind="cifarnet"):
                return cifarnet(image_shape, num_classes, dropout=config.dropout)
            case PaperModel():
                return vgg_small(image_shape, num_classes)
            case MlpModel():
                return mlp(image_shape, num_classes, hidden=config.hidden)
            case TimmModel():
                return _timm(config, image_shape, num_classes)
            case _:
                assert_never(config)


def skeleton(config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network without memory for its weights (torch's meta device): names, shapes and types."""
    with torch.device("meta"):
        return build_model(config, image_shape=image_shape, num_classes=num_classes, seed=0)


def _timm(config: TimmModel, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name[:6]}*")[:6]
        raise ConfigError(f"model.name '{config.name}' is not a timm model; similar: {', '.join(near) or 'none'}")
    try:
        model: nn.Module = timm.create_model(
            config.name, pretrained=False, num_classes=num_classes, in_chans=image_shape[0], **config.options
        )
    except TypeError as error:
        raise ConfigError(f"model.options {config.options} does not suit '{config.name}': {error}") from error
    if config.checkpoint is not None:
        _load_backbone(model, Path(config.checkpoint))
    replace_dropout(model)
    return model


def _load_backbone(model: nn.Module, path: Path) -> None:
    """Load everything whose shape fits; only the head may differ."""
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"model.checkpoint '{path}' cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    head = {name for name, value in own.items() if name in weights and weights[name].shape != value.shape}
    classifier = getattr(model, "default_cfg", {}).get("classifier", "")
    names = tuple(name for name in ((classifier,) if isinstance(classifier, str) else classifier) if name)
    missing = [name for name in own if name not in weights and not name.startswith(names)]
    wrong = [name for name in head if not name.startswith(names)]
    if missing or wrong:
        raise DataError(
            f"model.checkpoint '{path}' is of another model: missing {missing[:5]}, other shape {wrong[:5]}; "
            "allowed: a file of the same timm model, whatever its number of classes"
        )
    kept = {name: value for name, value in weights.items() if name in own and not name.startswith(names)}
    model.load_state_dict(kept, strict=False)
