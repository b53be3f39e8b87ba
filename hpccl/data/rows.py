"""The data types between data and loss: requests for images, images, and rows.

Shapes: n images, r rows, C classes of the whole stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "ANCHOR",
    "CROSS_ENTROPY",
    "DISTILL",
    "NEW",
    "PULL",
    "PUSH",
    "REPLAY",
    "SIGMOID",
    "SOFT",
    "SQUARED",
    "FeatureRows",
    "Images",
    "Request",
    "Rows",
    "Views",
]

# The term of the objective that a row belongs to.
NEW, SOFT, REPLAY, DISTILL = 0, 1, 2, 3
# The loss of a row, which compares its target with the logits: see hpccl.train.loss.
CROSS_ENTROPY, SQUARED, SIGMOID = 0, 1, 2
# The loss of a feature row: see hpccl.train.loss.
ANCHOR, PULL, PUSH = 0, 1, 2


@dataclass(frozen=True)
class Request:
    """Which images to make, in this order.

    sample: [n] int64, position in the stream's training (or test) data, counted over all tasks.
    key:    [n] uint64, seeds the augmentation of one image; 0 for the evaluation view.
    size:   side of the views in pixels; None for the stream's own.
    """

    sample: npt.NDArray[np.int64]
    key: npt.NDArray[np.uint64]
    size: int | None = None

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class Views:
    """Images as a source makes them: one byte per value, so that little is sent between processes and to the device.

    pixels: [n, h, w, channels] uint8, contiguous
    valid:  [n] bool, False where an image could not be decoded
    erased: [n, h, w] bool, pixels that become zero after normalisation (random erasing); None if there are none
    """

    pixels: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.bool_]
    erased: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Images:
    """Images as the network gets them.

    pixels: [n, channels, h, w] float32, normalised
    valid:  [n] bool, False where an image could not be decoded and `data.bad_images` is `skip` (its pixels are zero and
        nothing may be learned from it)
    """

    pixels: Tensor
    valid: Tensor


@dataclass(frozen=True)
class FeatureRows:
    """Losses on features, the inputs of the last layer: points that they should be close to, or keep away from.

    image:  [q] int64, index of the image that a row is about
    target: [q, d] a point in feature space
    weight: [q]; sum over a step of weight * loss is added to the objective per training example
    kind:   [q] int64, ANCHOR, PULL or PUSH
    stiff:  [q, d] for ANCHOR, the cost of a squared difference; 0 elsewhere
    margin: [q] for PUSH, the distance that is enough; 0 elsewhere
    layer:  name of the last layer, whose input they are
    normalised: whether features are compared at norm 1
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    kind: Tensor
    stiff: Tensor
    margin: Tensor
    layer: str
    normalised: bool = True

    def to(self, device: torch.device) -> FeatureRows:
        """The same rows on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return FeatureRows(**moved, layer=self.layer, normalised=self.normalised)


@dataclass(frozen=True)
class Rows:
    """Images and their targets: the rows of one weighted loss, nearly always a cross-entropy.

    pixels:      [n, channels, h, w]
    noise:       [n] int64, seeds the randomness inside the network (dropout) for one image
    image:       [r] int64, index of the image that a row is about
    target:      [r, C] probabilities of the competing classes, 0 elsewhere; logits where `kind` is SQUARED
    weight:      [r]; sum over a global batch of weight * nats / batch_size estimates the objective per training example
    head:        [r, C] bool, the classes that compete
    temperature: [r], divides the logits
    term:        [r] int64, NEW, SOFT, REPLAY or DISTILL
    kind:        [r] int64, CROSS_ENTROPY, SQUARED or SIGMOID; None: all are CROSS_ENTROPY
    features:    losses on features, or None
    """

    pixels: Tensor
    noise: Tensor
    image: Tensor
    target: Tensor
    weight: Tensor
    head: Tensor
    temperature: Tensor
    term: Tensor
    kind: Tensor | None = None
    features: FeatureRows | None = None

    def image_weights(self) -> Tensor:
        """[n] the sum of the weights of an image's rows."""
        return self.weight.new_zeros(len(self.pixels)).index_add_(0, self.image, self.weight)

    def appended(
        self, image: Tensor, target: Tensor, head: Tensor, *, weight: Tensor, temperature: float, term: int, kind: int
    ) -> Rows:
        """Return the rows with q more of the images `image` [q] (indices); target, head: [q, C]; weight: [q]."""
        assert self.kind is not None or kind == CROSS_ENTROPY, "other kinds are known from the first row on"
        count = len(image)
        return replace(
            self,
            image=torch.cat([self.image, image]),
            target=torch.cat([self.target, target]),
            weight=torch.cat([self.weight, weight]),
            head=torch.cat([self.head, head]),
            temperature=torch.cat([self.temperature, self.temperature.new_full((count,), temperature)]),
            term=torch.cat([self.term, self.term.new_full((count,), term)]),
            kind=None if self.kind is None else torch.cat([self.kind, self.kind.new_full((count,), kind)]),
        )

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        there = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return Rows(**there, features=None if self.features is None else self.features.to(device))
