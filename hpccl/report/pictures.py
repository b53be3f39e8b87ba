"""Picture grids of the memory, from memory/task-*.npz, as PNG or JPEG data for a page."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpccl.folder import RunFolder

__all__ = ["Grid", "data_url", "memory_grids", "picture_sheet", "small_picture"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
_MAX_PICTURES = 1200  # per page
_COLUMNS = 20
_SIDE = 64  # pixels; larger images are shrunk


@dataclass(frozen=True)
class Grid:
    """The memory of one task as one picture."""

    task: int
    shown: int
    stored: int
    data: str  # a data: URL; empty if the file cannot be shown
    width: int
    height: int
    problem: str | None = None


def memory_grids(folder: Path) -> list[Grid]:
    """Return one grid per task, in order; a damaged file yields a grid with its `problem`."""
    found = {}
    for path in RunFolder(folder).memory.glob("task-*.npz"):
        if match := re.fullmatch(r"task-(\d+)\.npz", path.name):
            found[int(match[1])] = path
    most = max(_COLUMNS, min(3 * _COLUMNS, _MAX_PICTURES // max(1, len(found)) // _COLUMNS * _COLUMNS))
    return [_grid(task, found[task], most) for task in sorted(found)]


def _grid(task: int, path: Path, most: int) -> Grid:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in {1, 3} or len(labels) != len(images):
            raise ValueError(f"images are {images.dtype} {list(images.shape)} instead of uint8 [n, h, w, 1 or 3]")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return Grid(task, 0, 0, "", 0, 0, f"{path.name} cannot be shown: {error}")
    chosen = _spread(labels, most)
    if not len(chosen):
        return Grid(task, 0, 0, "", 0, 0)
    sheet = picture_sheet([small_picture(images[index]) for index in chosen])
    return Grid(task, len(chosen), len(images), data_url(sheet), sheet.width, sheet.height)


def _spread(labels: npt.NDArray[Any], most: int) -> npt.NDArray[np.int64]:
    """Return at most `most` positions, evenly spaced after sorting by label, so that every class is shown."""
    order = np.argsort(labels, kind="stable")
    return (
        order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).astype(np.int64))]
        if len(order)
        else order
    )


def small_picture(image: Pixels) -> Image.Image:
    """Return an RGB picture of at most _SIDE pixels a side."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def picture_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Arrange pictures row by row, one pixel apart, on a transparent background."""
    columns = min(_COLUMNS, len(pictures))
    width, height = (1 + max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    sheet = Image.new("RGBA", (columns * width - 1, -(-len(pictures) // columns) * height - 1))
    for position, picture in enumerate(pictures):
        sheet.paste(picture, (position % columns * width, position // columns * height))
    return sheet


def data_url(sheet: Image.Image) -> str:
    """Return a picture as a data URL for a page."""
    buffer = io.BytesIO()
    small = max(sheet.size) <= _COLUMNS * 40
    # PNG keeps small images exact; WebP makes larger photographs ten times smaller.
    sheet.save(buffer, format="PNG" if small else "WEBP", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
