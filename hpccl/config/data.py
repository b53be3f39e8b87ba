"""How examples become tensors: sizes, augmentation, caches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpccl.config.base import Floats, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

__all__ = ["CropFlip", "DataConfig", "NoAugment", "Progressive", "TimmAugment"]


class NoAugment(Section):
    """The evaluation view, always."""

    kind: Literal["none"] = "none"


class CropFlip(Section):
    """Zero-pad by `padding` pixels, crop back at random, mirror with probability 1/2."""

    kind: Literal["crop_flip"] = "crop_flip"
    padding: NonNegativeInt = 4  # pixels on each side
    flip: bool = True  # mirror left and right


class TimmAugment(Section):
    """timm.data.create_transform for training; see timm for the meaning of each."""

    kind: Literal["timm"] = "timm"
    scale: Floats = (0.08, 1.0)  # smallest and largest share of the picture's area that is cut out
    ratio: Floats = (0.75, 1.3333)  # smallest and largest width over height of the cut
    hflip: Fraction = 0.5  # probability of mirroring left and right
    color_jitter: NonNegativeFloat = 0.0  # strength of random brightness, contrast and saturation
    auto_augment: str | None = None  # timm's policy, such as rand-m9-mstd0.5
    random_erase: Fraction = 0.0  # probability of erasing a rectangle
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"  # of resizing


class Progressive(Section):
    """Training views that grow during a task: cheap epochs first (Touvron et al. 2019; FFCV's recipes).

    A side is linear between the epochs at `begin` and `end`, rounded to a multiple. The last epoch has image_size.
    """

    first: PositiveInt  # side of the first epochs' views, in pixels
    begin: Fraction = 0.6  # share of a task's epochs after which sides grow
    end: Fraction = 0.85  # share of a task's epochs after which they have data.image_size
    multiple: PositiveInt = 32  # of which the sides in between are multiples

    def side(self, epoch: int, epochs: int, last: int) -> int:
        """Side of the views in epoch `epoch` of `epochs`, where the last one has `last` pixels."""
        share = 1.0 if epochs <= 1 else epoch / (epochs - 1)
        if share >= self.end:
            return last
        if share <= self.begin:
            return self.first
        between = self.first + (last - self.first) * (share - self.begin) / (self.end - self.begin)
        return min(max(round(between / self.multiple) * self.multiple, self.first), last)

    def sides(self, last: int) -> tuple[int, ...]:
        """All that `side` may say, ascending."""
        start = -(-self.first // self.multiple) * self.multiple
        return tuple(sorted({self.first, *range(start, last, self.multiple), last}))


class DataConfig(Section):
    """How examples become tensors."""

    image_size: PositiveInt | None = None  # null: as stored (all images must then have one size)
    test_size: PositiveInt | None = None  # of test images; null: image_size
    progressive: Progressive | None = None  # training views that grow up to image_size; null: all have image_size
    # share of each class's training images that is tested on in place of test images, and not trained on: to choose by
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: shorter side becomes its size / crop_pct
    mean: Floats = (0.5,)  # one for all channels, or one a channel; of pixels in [0, 1]
    std: Floats = (0.5,)  # as mean
    augment: Annotated[NoAugment | CropFlip | TimmAugment, Field(discriminator="kind")] = NoAugment()  # training
    storage: Literal["auto", "decoded", "encoded"] = "auto"  # decoded: once, kept as uint8 in a memory-mapped cache
    cache: str | None = None  # folder of decoded images; null: the user's cache folder
    shard_cache: str | None = None  # folder of shards fetched from URLs; null: the user's cache folder
    shard_gib: PositiveFloat = 100.0  # of them that are kept; those not used for longest go first
    retries: PositiveInt = 5  # attempts to fetch a shard, with growing pauses
    workers: NonNegativeInt = 2  # decoding processes per rank for storage=encoded
    # seconds that a step waits for a decoding process before the run ends; no limit with shards at URLs, whose
    # downloads may take long
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    shuffle_window: NonNegativeInt = 0  # shuffle within so many shards at a time; 0: over all (random reads)
    bad_images: Literal["stop", "skip"] = "stop"  # what an undecodable image does; skips are counted in the report

    def sides(self) -> tuple[int, ...]:
        """All sides that views may have, ascending; none where images have their own size."""
        if self.image_size is None:
            return ()
        training = (self.image_size,) if self.progressive is None else self.progressive.sides(self.image_size)
        return tuple(sorted({*training, self.test_size or self.image_size}))
