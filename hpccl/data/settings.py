"""Views and augmentation as the section `data` of a configuration sets them."""

from __future__ import annotations

from typing import assert_never

from hpccl.config.data import CropFlip, DataConfig, NoAugment, TimmAugment
from hpccl.data.augment import BatchAugment
from hpccl.data.protocols import Split
from hpccl.data.views import EvaluationView
from hpccl.errors import ConfigError

__all__ = ["batch_augment", "evaluation_view", "tested_split"]


def tested_split(data: DataConfig) -> Split:
    """Return the stored split that test images are taken from."""
    return "test" if data.validation is None else "train"


def evaluation_view(data: DataConfig, split: Split) -> EvaluationView:
    """Return the view of a split's images without augmentation."""
    filters = data.augment.interpolation if isinstance(data.augment, TimmAugment) else "bicubic"
    size = data.image_size if split == "train" else data.test_size or data.image_size
    return EvaluationView(size, data.crop_pct, "bilinear" if filters == "bilinear" else "bicubic")


def batch_augment(data: DataConfig, *, where: str) -> BatchAugment:
    """Return the augmentation of decoded training images, a batch at a time.

    where: what the images are called in the message.

    Raises:
        ConfigError: the augmentation starts from the whole image (timm).
    """
    match data.augment:
        case NoAugment():
            return BatchAugment()
        case CropFlip(padding=padding, flip=flip):
            return BatchAugment(padding, flip)
        case TimmAugment():
            raise ConfigError(f"data.augment.kind is timm, which {where} cannot have; set it to crop_flip or none")
        case _:
            assert_never(data.augment)
