"""Thumbnails of the memory's images, for reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from hpccl.data.protocols import Task
from hpccl.errors import DataError, FolderError
from hpccl.folder import replacing
from hpccl.train.state import World

__all__ = ["keep_pictures", "stacked", "thumbnail"]

Ints = npt.NDArray[np.int64]

_PICTURES = 100
_THUMBNAIL = 64


def thumbnail(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a small image unchanged, and the centre of a large one resized to 64 x 64 pixels."""
    if max(picture.shape[:2]) <= _THUMBNAIL or picture.shape[2] != 3:
        return picture
    fitted = ImageOps.fit(Image.fromarray(picture), (_THUMBNAIL, _THUMBNAIL))
    return np.asarray(fitted)


def keep_pictures(task: Task, sample: Ints, label: Ints, world: World) -> None:
    """Save thumbnails of some of the chosen images for the report's picture grid."""
    few = np.linspace(0, len(sample) - 1, num=min(len(sample), _PICTURES)).astype(np.int64)
    pictures, shown = [], []
    for number in few:
        try:
            pictures.append(thumbnail(world.stream.raw(int(sample[number]))))
            shown.append(number)
        except DataError:  # already reported; data.bad_images is `skip`
            continue
    names = world.stream.sample_names("train", sample[shown])
    try:
        with replacing(world.folder.memory / f"task-{task.index}.npz") as path, open(path, "wb") as file:
            images, number = stacked(pictures), np.array(task.index)
            np.savez(file, images=images, labels=label[shown], names=np.array(names), task=number)
    except FolderError as error:  # they are for the report alone, and other ranks do not wait here
        world.progress.message(f"the report will show no pictures of the memory: {error}")


def stacked(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Stack pictures to [n, h, w, channels]; smaller ones are padded with black at the right and below."""
    if not pictures:
        return np.zeros((0, 1, 1, 3), np.uint8)
    height, width, channels = np.max([picture.shape for picture in pictures], axis=0)
    found = np.zeros((len(pictures), height, width, channels), np.uint8)
    for place, picture in zip(found, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return found
