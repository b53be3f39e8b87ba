"""Initial weights from a file: the body of a network, and its head if the number of classes agrees."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hpccl.errors import ConfigError, DataError
from hpccl.machine import out_of_memory

__all__ = ["Start", "start_from"]

_PICKLED = (".pth", ".pt", ".bin", ".tar")
_COUNTER = ".num_batches_tracked"
# Keys under which training programs save weights; averaged ones first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes that wrappers of a network add to the names of its weights.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Start:
    """The file of the initial weights; `fresh` names the weights of the head that kept their random initialisation."""

    path: str
    fresh: tuple[str, ...]


def start_from(model: nn.Module, path: Path) -> Start:
    """Replace a network's weights and buffers by those in a file.

    The head is replaced as well, or stays as it is if the file has another number of classes, or no head. Files older
    than BatchNorm's counters, such as torchvision's first ones, may lack these, which change nothing.

    Args:
        model: changed in place.
        path: .safetensors, or a file of weights alone by torch.save (.pth, .pt, .bin, .tar); no code in it is run.

    Raises:
        ConfigError: the file has an unknown ending.
        DataError: the file cannot be read, or is of another network; the network is unchanged.
    """
    given, own = _read(path), model.state_dict()
    head = [name for name in own if name.startswith(_head(model))]
    foreign = {name for name in given if name.startswith(_head(model))}
    same = foreign == set(head) and all(given[name].shape == own[name].shape for name in head)
    body = own.keys() - set(head)
    counters = {name for name in body - given.keys() if name.endswith(_COUNTER)}
    wrong = {
        "missing": sorted(body - given.keys() - counters),
        "unexpected": sorted(given.keys() - own.keys() - foreign),
        "of another shape": [
            f"{name} ({_sides(given[name])} there, {_sides(own[name])} here)"
            for name in own
            if name in body and name in given and given[name].shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        other = ", or, for images of another size, model.options={dynamic_img_size: true} where the network takes it"
        sized = all(name.startswith("pos_embed") for name in wrong["of another shape"])
        sized = sized and not (wrong["missing"] or wrong["unexpected"])
        raise DataError(
            f"model.checkpoint '{path}' is of another network: {'; '.join(_few(*each) for each in wrong.items())}; "
            "only the head may differ: choose the model that it was trained with, and the same model.options"
            f"{other * sized}"
        )
    with torch.no_grad():
        for name in own:
            if (name in body or same) and name not in counters:
                own[name].copy_(given[name])
    return Start(str(path), () if same else tuple(head))


def _head(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the head's weights: of the classifier according to timm, else of the last linear layer."""
    known = getattr(model, "default_cfg", None) or {}
    classifiers = (
        known.get("classifier")
        or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    )
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return tuple(f"{name}." for name in names)


def _few(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind}: {', '.join(names[:3]) or 'none'}{more}"


def _sides(value: Tensor) -> str:
    return "x".join(str(side) for side in value.shape) or "one number"


# ---------------------------------------------------------------- reading


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU."""
    if path.suffix != ".safetensors" and path.suffix not in _PICKLED:
        raise ConfigError(
            f"model.checkpoint '{path}' has an unknown suffix; allowed: .safetensors, {', '.join(_PICKLED)}"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"model.checkpoint '{path}' is damaged or contains more than weights, which could run code when read; "
            "save only its weights, preferably as .safetensors"
        ) from error
    except OSError as error:
        raise DataError(f"model.checkpoint '{path}' cannot be read: {error}") from error
    except Exception as error:  # the unpickler may raise anything for bytes that are no pickle
        if out_of_memory(error):
            raise
        kind = "a safetensors file" if path.suffix == ".safetensors" else "a file of torch.save"
        raise DataError(
            f"model.checkpoint '{path}' cannot be read: it is damaged, or not {kind} "
            f"({type(error).__name__}: {error}); give a file of weights"
        ) from error
    return _weights(found, path)


def _weights(found: Any, path: Path) -> dict[str, Tensor]:
    """Take the weights out of the dictionaries in which training programs save them."""
    if isinstance(found, Mapping):
        found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), found)
    if not (isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values())):
        raise DataError(
            f"model.checkpoint '{path}' contains no named weights; allowed: a dictionary of tensors, top-level or "
            f"under one of {', '.join(_WRAPPERS)}"
        )
    return {_plain(name): value for name, value in found.items()}


def _plain(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name
