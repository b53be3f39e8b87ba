"""Small generated images, as folders and archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def pixels(seed: int, height: int = 12, width: int = 16) -> npt.NDArray[np.uint8]:
    """[height, width, 3]: a smooth picture, so that JPEG keeps it recognisable."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def image_bytes(array: npt.NDArray[np.uint8], kind: str = "jpeg") -> bytes:
    """An image file's bytes; `webp` is lossless."""
    buffer = io.BytesIO()
    options: dict[str, int] = {"jpeg": {"quality": 95}, "webp": {"lossless": 1, "exact": 1}}.get(kind, {})
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def tiny_set(*, splits: tuple[str, ...] = ("train", "test"), classes: int = 3, images: int = 5) -> dict[str, bytes]:
    """Path -> bytes of a mixed data set; class k has `images` + k images."""
    files = {}
    for split in splits:
        for label in range(classes):
            for number in range(images + label):
                kind, suffix = (("jpeg", "JPEG"), ("png", "png"), ("webp", "webp"))[number % 3]
                path = "/".join(part for part in (split, f"class_{label}", f"img_{number:02d}.{suffix}") if part)
                files[path] = image_bytes(pixels(hash_of(path), 10 + label, 12 + number), kind)
    return files


def hash_of(path: str) -> int:
    """A seed, the same in every run."""
    return sum(position * byte for position, byte in enumerate(path.encode(), 1))


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def per_class_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    """`<class>/<image>` -> `<class>.tar`, as ILSVRC packs them."""
    by_class: dict[str, dict[str, bytes]] = {}
    for path, data in files.items():
        folder, name = path.rsplit("/", 1)
        by_class.setdefault(folder, {})[name] = data
    return {f"{folder}.tar": tar_bytes(inside) for folder, inside in by_class.items()}
