"""The papers' small networks and a multilayer perceptron.

CifarNet and the small VGG follow the layer lists of Daxberger et al. (TMLR 2023); their sizes are checked against the
parameter counts of the released code (1,276,508 and 3,608,328).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from hpccl.errors import ConfigError
from hpccl.models.dropout import KeyedDropout

__all__ = ["cifarnet", "mlp", "vgg_small"]


def cifarnet(image_shape: tuple[int, int, int], num_classes: int, *, dropout: bool = True) -> nn.Sequential:
    """Four 3x3 convolutions (every second one unpadded), two poolings, two linear layers.

    Raises:
        ConfigError: the image is smaller than 12 pixels.
    """
    channels, height, width = image_shape
    rates = (0.25, 0.25, 0.5) if dropout else (0.0, 0.0, 0.0)
    layers: list[nn.Module] = []
    for block, out in enumerate((32, 64)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3), nn.ReLU()]
        layers += [nn.MaxPool2d(2), KeyedDropout(rates[block], layer=block)]
        channels, height, width = out, (height - 2) // 2, (width - 2) // 2
    _check_size("cifarnet", image_shape, height, width, smallest=12)
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 512), nn.ReLU(), KeyedDropout(rates[2], layer=2)]
    return nn.Sequential(*layers, nn.Linear(512, num_classes))


def vgg_small(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Six 3x3 convolutions in four pooled stages, three linear layers; no normalisation, no dropout.

    Raises:
        ConfigError: the image is smaller than 16 pixels.
    """
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    for stage in ((64,), (64,), (128, 128), (256, 256)):
        for out in stage:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    _check_size("vgg_small", image_shape, height, width, smallest=16)
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, num_classes))


def mlp(image_shape: tuple[int, int, int], num_classes: int, *, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    channels, height, width = image_shape
    sizes = [channels * height * width, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def _check_size(name: str, image_shape: tuple[int, int, int], height: int, width: int, *, smallest: int) -> None:
    if min(height, width) < 1:
        size = f"{image_shape[1]}x{image_shape[2]}"
        raise ConfigError(
            f"model.kind={name} needs images of at least {smallest} pixels, the stream has {size}; "
            f"set data.image_size={smallest} or more, or model.kind=mlp"
        )
