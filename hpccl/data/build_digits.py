"""A stream of the embedded digits."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from hpccl.config.data import DataConfig
from hpccl.config.stream import DigitsStream
from hpccl.data.arranged import arranged, changes_of, labelled, marked
from hpccl.data.augment import Normaliser
from hpccl.data.decoded import DecodedImages, Kept
from hpccl.data.digits import SIZE as DIGITS_SIZE
from hpccl.data.digits import TITLE, digits
from hpccl.data.layout import SPLITS, Collection
from hpccl.data.outline import Outline
from hpccl.data.protocols import Split
from hpccl.data.settings import batch_augment, evaluation_view, tested_split
from hpccl.data.stream import ImageStream

__all__ = ["open_digits", "outline_digits"]


def outline_digits(stream: DigitsStream, data: DataConfig) -> Outline:
    """See `hpccl.data.build.outline`."""
    collection, kept, numbers = _digits(stream, data)
    layout = arranged([collection], stream, data, partial(_digit_names, numbers))
    shapes = {split: _channels_first(kept[split].pixels.shape[1:]) for split in SPLITS}
    view = evaluation_view(data, "test")
    return Outline(layout, shapes["train"], view, shapes["test"], view.size in (None, DIGITS_SIZE))


def _digits(
    stream: DigitsStream, data: DataConfig
) -> tuple[Collection, dict[Split, Kept], dict[Split, npt.NDArray[np.int64]]]:
    return digits(
        tasks=stream.tasks,
        views={split: evaluation_view(data, split) for split in SPLITS},
        test_split=tested_split(data),
    )


def _digit_names(
    numbers: dict[Split, npt.NDArray[np.int64]], local: npt.NDArray[np.int64], split: Split = "train"
) -> list[str]:
    return [f"{TITLE}/{number}" for number in numbers[split][local]]


def open_digits(stream: DigitsStream, data: DataConfig) -> ImageStream:
    """See `hpccl.data.build.open_stream`."""
    collection, kept, numbers = _digits(stream, data)
    layout = arranged([collection], stream, data, partial(_digit_names, numbers))
    shapes = {split: _channels_first(kept[split].pixels.shape[1:]) for split in SPLITS}
    channels = shapes["train"][0]
    source = DecodedImages(
        parts={split: [kept[split]] for split in SPLITS},
        index=layout.index,
        augment=batch_augment(data, where="the digits"),
        normalise=Normaliser.of(data.mean, data.std, channels),
        changes=changes_of(stream),
    )

    def name_of(split: Split, sample: int) -> str:
        (name,) = _digit_names(numbers, layout.index[split].local[[sample]], split)
        return labelled(name, layout, split, sample)

    fingerprint = marked(TITLE, layout, stream, data)
    return ImageStream(layout, shapes["train"], source, name_of, fingerprint, test_shape=shapes["test"])


def _channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = shape
    return channels, height, width
