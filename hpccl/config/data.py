"""How images are read, resized and augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpccl.config.base import Floats, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

__all__ = ["CropFlip", "DataConfig", "NoAugment", "Progressive", "TimmAugment"]


class NoAugment(Section):
    """No augmentation: training uses the evaluation view."""

    kind: Literal["none"] = "none"


class CropFlip(Section):
    """Zero-pad by `padding` pixels, crop to the original size at a random position, mirror with probability 1/2."""

    kind: Literal["crop_flip"] = "crop_flip"
    padding: NonNegativeInt = 4  # pixels added on each side
    flip: bool = True  # mirror left-right with probability 1/2


class TimmAugment(Section):
    """timm.data.create_transform for training; see timm's documentation of these parameters."""

    kind: Literal["timm"] = "timm"
    scale: Floats = (0.08, 1.0)  # smallest and largest share of the image's area that is cropped
    ratio: Floats = (0.75, 1.3333)  # smallest and largest aspect ratio (width / height) of the crop
    hflip: Fraction = 0.5  # probability of mirroring left-right
    color_jitter: NonNegativeFloat = 0.0  # strength of random brightness, contrast and saturation
    auto_augment: str | None = None  # timm's policy, such as rand-m9-mstd0.5
    random_erase: Fraction = 0.0  # probability of erasing a rectangle
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"  # interpolation when resizing


class Progressive(Section):
    """Training views that grow during a task, so that early epochs are cheap (Touvron et al. 2019; FFCV's recipes).

    The side grows linearly from `begin` to `end`, rounded to multiples. The last epoch has data.image_size.
    """

    first: PositiveInt  # side of the views in the first epochs, in pixels
    begin: Fraction = 0.6  # share of a task's epochs after which the side grows
    end: Fraction = 0.85  # share of a task's epochs after which the side is data.image_size
    multiple: PositiveInt = 32  # sides in between are multiples of this number

    def side(self, epoch: int, epochs: int, last: int) -> int:
        """Side of the views in epoch `epoch` (from 0) of `epochs`; `last` is that of the last epoch, in pixels."""
        share = 1.0 if epochs <= 1 else epoch / (epochs - 1)
        if share >= self.end:
            return last
        if share <= self.begin:
            return self.first
        between = self.first + (last - self.first) * (share - self.begin) / (self.end - self.begin)
        return min(max(round(between / self.multiple) * self.multiple, self.first), last)

    def sides(self, last: int) -> tuple[int, ...]:
        """All values that `side` can return, ascending."""
        start = -(-self.first // self.multiple) * self.multiple
        return tuple(sorted({self.first, *range(start, last, self.multiple), last}))


class DataConfig(Section):
    """How images are read, resized and augmented."""

    image_size: PositiveInt | None = None  # side in pixels; null: as stored (all images must then have one size)
    test_size: PositiveInt | None = None  # side of test images; null: image_size
    progressive: Progressive | None = None  # training views that grow up to image_size; null: always image_size
    # share of each class's training images that is held out and tested on in place of the test images, to choose
    # settings; null: none
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation view: shorter side is resized to size / crop_pct
    mean: Floats = (0.5,)  # mean of pixels in [0, 1]: one number for all channels, or one per channel
    std: Floats = (0.5,)  # standard deviation, like mean
    # augmentation of training images
    augment: Annotated[NoAugment | CropFlip | TimmAugment, Field(discriminator="kind")] = NoAugment()
    # decoded: images are decoded once and kept as uint8 in a memory-mapped cache; encoded: decoded at each use; auto:
    # decoded if all have one small size, training does not need the full images and the disk has room
    storage: Literal["auto", "decoded", "encoded"] = "auto"
    cache: str | None = None  # folder for decoded images; null: the user's cache folder
    shard_cache: str | None = None  # folder for shards fetched from URLs; null: the user's cache folder
    shard_gib: PositiveFloat = 100.0  # GiB of fetched shards that are kept; the least recently used are deleted first
    retries: PositiveInt = 5  # attempts to fetch a shard, with growing pauses in between
    workers: NonNegativeInt = 2  # decoding processes per rank, for storage=encoded
    # seconds that a step waits for a decoding process before the run ends; no limit if shards are at URLs, whose
    # downloads may take long
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    # shuffle within windows of as many images as this many shards have: runs of 32 neighbours, drawn from all shards;
    # 0: shuffle all images of an epoch
    shuffle_window: NonNegativeInt = 0
    bad_images: Literal["stop", "skip"] = "stop"  # what to do about an undecodable image; the report counts skips

    def sides(self) -> tuple[int, ...]:
        """All sides that views may have, ascending; none if images keep their stored size."""
        if self.image_size is None:
            return ()
        training = (self.image_size,) if self.progressive is None else self.progressive.sides(self.image_size)
        return tuple(sorted({*training, self.test_size or self.image_size}))
