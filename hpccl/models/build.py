"""From a configuration to a network with one head over all classes of the stream."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import nn

from hpccl.compat import import_timm
from hpccl.config.model import MlpModel, ModelConfig, PaperModel, TimmModel
from hpccl.errors import ConfigError
from hpccl.machine import out_of_memory
from hpccl.models.dropout import replace_dropout
from hpccl.models.small import cifarnet, mlp, vgg_small

__all__ = ["build_model", "refuse_sizes", "skeleton"]


def build_model(config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Build a network [n, *image_shape] -> logits [n, num_classes], initialised as a function of the arguments alone.

    config.checkpoint is loaded by `hpccl.models.pretrained`.

    Raises:
        ConfigError: the model is unknown or does not fit the images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _built(config, image_shape, num_classes)
    replace_dropout(model)
    return model


def _built(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
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
    """Build the network on torch's meta device, without memory for its weights: names, shapes and dtypes."""
    with torch.device("meta"):
        return build_model(config, image_shape=image_shape, num_classes=num_classes, seed=0)


def refuse_sizes(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int, sides: Sequence[int]
) -> None:
    """Check that the network takes the images, and views of other sizes, on the meta device if possible.

    Raises:
        ConfigError: it does not take `image_shape`, or one of the other `sides`.
    """
    others = [side for side in sides if image_shape[1:] != (side, side)]
    if isinstance(config, TimmModel):
        network = _taking(config, image_shape, num_classes)
    elif others:  # such networks check image_shape when they are built
        bare = skeleton(config, image_shape=image_shape, num_classes=num_classes).eval()
        network = bare if _refused(bare, image_shape) is None else None
    else:
        return
    if network is None:
        return  # it cannot be tried on the meta device
    for side in others:
        error = _refused(network, (image_shape[0], side, side))
        if error is not None:
            name = config.name if isinstance(config, TimmModel) else config.kind
            raise ConfigError(
                f"data.progressive or data.test_size gives images of {side} pixels, which '{name}' does not accept "
                f"({error}); omit them, or make the network accept any size (most of timm's transformers: "
                "model.options={dynamic_img_size: true})"
            )


def _taking(config: TimmModel, shape: tuple[int, int, int], num_classes: int) -> nn.Module | None:
    """Return the network on the meta device; None if it cannot be tried there, but takes the images.

    Raises:
        ConfigError: it does not take images of that shape.
    """
    with contextlib.suppress(ConfigError):  # raised for networks that cannot be built there
        bare = skeleton(config, image_shape=shape, num_classes=num_classes).eval()
        if _refused(bare, shape) is None:
            return bare
    # Some networks cannot be tried on the meta device, so that only a real one can refuse the images.
    network = build_model(config, image_shape=shape, num_classes=num_classes, seed=0).eval()
    error = _refused(network, shape, device="cpu")
    if error is not None:
        height, width = shape[1:]
        side = height if height == width else [height, width]
        raise ConfigError(
            f"model.name '{config.name}' with model.options {config.options} does not accept the stream's images of "
            f"{height}x{width} pixels ({error}); for most of timm's transformers set model.options="
            f"{{img_size: {side}}} (and a patch_size that divides it); or set another data.image_size for shards, or "
            "another model.name"
        )
    return None


def _refused(network: nn.Module, shape: tuple[int, int, int], *, device: str = "meta") -> str | None:
    """Return why a network does not take an image of a shape; None if it does."""
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
        if out_of_memory(error):
            raise
        return _words(error)
    return None


def _words(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


# Arguments of timm.create_model that hpccl sets.
_OURS = {
    "num_classes": "the stream determines the number of classes",
    "in_chans": "the images determine the number of channels",
    "pretrained": "initial weights are read from the file model.checkpoint",
    "model_name": "set model.name instead",
}


def _timm(config: TimmModel, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    if "checkpoint_path" in config.options:
        raise ConfigError(
            f"model.options.checkpoint_path '{config.options['checkpoint_path']}' is not allowed; set "
            "model.checkpoint, which the run also records in its events"
        )
    timm = import_timm()
    if not timm.is_model(config.name):
        near = _similar(config.name, timm.list_models())
        advice = f"similar: {', '.join(near)}" if near else "timm.list_models() lists all"
        raise ConfigError(f"model.name '{config.name}' is not a timm model; {advice}")
    for key, ours in _OURS.items():
        if key in config.options:
            raise ConfigError(f"model.options.{key} = {config.options[key]!r}: {ours}; omit it")
    try:
        model: nn.Module = timm.create_model(
            config.name, pretrained=False, num_classes=num_classes, in_chans=image_shape[0], **config.options
        )
    except Exception as error:  # timm's networks may raise anything for arguments that they do not check
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"model.options {config.options} is invalid for '{config.name}': {type(error).__name__}: {_words(error)}; "
            "allowed: keyword arguments of timm.create_model and of this network, with values that it accepts"
        ) from error
    return model


def _similar(wrong: str, names: Sequence[str]) -> list[str]:
    """Return a few names that begin with a wrong one (which may be incomplete), then those of similar spelling."""
    wanted = wrong.lower().replace("-", "_")
    longer = [name for name in names if name.startswith(wanted)]
    return list(dict.fromkeys([*longer[:3], *difflib.get_close_matches(wanted, names, n=6)]))[:6]
