"""Images per second that one core loads: hpccl from shards, compared with other ways to make the same batches.

All make augmented, normalised float32 batches of the same images in one process with one thread:

    small       32-px images, zero-padded crop and mirror; decoded once (when the stream is opened: that time is not in
                the rate but in `opening_seconds`, for both splits) against ImageFolder + Pillow for every image
    originals   ImageNet's JPEGs, random resized crop of 224 px (bicubic) and mirror: ImageFolder + Pillow; webdataset +
                torchvision's transforms, from the same shards; OpenCV (bilinear: its bicubic does not antialias)
    reencoded   the same from shards whose longer side is at most 400 px (hpccl's, webdataset's), against ImageFolder +
                Pillow from originals
    resume      a stream of ImageNet's size (1.28 M images, 1000 classes; its shards repeat a few images) is opened and
                the first batch from the middle of an epoch is made, by two decoding processes

The files are in the page cache for both. Images come from --data, HPCCL_DATA or ../shared/data; where they are missing,
similar ones are generated, which the result notes.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks._common import interleaved, median_ratio, print_result
from hpccl.compat import import_timm
from hpccl.config.data import CropFlip, DataConfig, TimmAugment
from hpccl.config.stream import Part, ShardStream
from hpccl.data.build import open_stream
from hpccl.data.order import BatchPlan, mix, permutation
from hpccl.data.rows import Request
from hpccl.data.shards.build import build
from hpccl.data.shards.encodings import Original, Reencode
from hpccl.data.shards.manifest import Index, Manifest

Run = Callable[[], int]
ROOT = Path(__file__).parents[1]
BATCH = 64


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and turns")
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and imagenet-originals.zip")
    options = parser.parse_args()
    data = options.data or Path(os.environ.get("HPCCL_DATA", ROOT.parent / "shared" / "data"))
    torch.set_num_threads(1)
    import_timm()
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        measure(Path(folder), data, quick=options.quick)


def measure(folder: Path, data: Path, *, quick: bool) -> None:
    """Run all comparisons and print the result."""
    small, small_real = images_of(folder / "small", data / "cifar10.zip", 500 if quick else 2000, small_image)
    large, large_real = images_of(folder / "originals", data / "imagenet-originals.zip", 150, large_image)
    rates = {}
    opening = {}
    for name, images in (("small", small), ("originals", large), ("reencoded", large)):
        for split in ("train", "test"):
            encoding = Reencode() if name == "reencoded" else Original()
            build(images, folder / "shards" / name, split=split, encoding=encoding)
        start = time.perf_counter()
        ours = from_shards(folder, name)
        opening[name] = time.perf_counter() - start
        runs = {"hpccl": ours, "image_folder": from_image_folder(images, name)}
        if name != "small":
            runs |= {"webdataset": from_webdataset(folder / "shards" / name / "train")}
        if name == "originals":
            runs |= from_opencv(images)
        with one_core():
            rates[name] = interleaved(runs, 3 if quick else 7)
    for name, found in rates.items():
        for run, values in found.items():
            print(f"{name:10} {run:13} {median(values):10,.0f} images/s/core")
    resume = resumed(folder, large, quick=quick)
    print_result(
        "data_loading",
        {
            "small_over_imagefolder": median_ratio(rates["small"], "hpccl", "image_folder"),
            "originals_over_pillow": median_ratio(rates["originals"], "hpccl", "image_folder"),
            "originals_over_webdataset": median_ratio(rates["originals"], "hpccl", "webdataset"),
            **(
                {"originals_over_opencv": median_ratio(rates["originals"], "hpccl", "opencv")}
                if "opencv" in rates["originals"]
                else {}
            ),
            "reencoded_over_pillow": median_ratio(rates["reencoded"], "hpccl", "image_folder"),
            "reencoded_over_webdataset": median_ratio(rates["reencoded"], "hpccl", "webdataset"),
            "resume_first_batch_seconds": sum(resume.values()),
        },
        resume_seconds={name: round(seconds, 3) for name, seconds in resume.items()},
        load_average=os.getloadavg()[0],
        images_per_second_per_core={
            name: {run: round(median(values), 1) for run, values in found.items()} for name, found in rates.items()
        },
        opening_seconds={name: round(seconds, 3) for name, seconds in opening.items()},
        real_images={"small": small_real, "originals": large_real},
        quick=quick,
    )


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, its background thread included, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# ---------------------------------------------------------------- images


def images_of(
    folder: Path, archive: Path, count: int, generate: Callable[[int], tuple[bytes, str]]
) -> tuple[Path, bool]:
    """Return an image folder `<class>/<image>` of `count` images, and whether they are real."""
    if archive.is_file():
        with zipfile.ZipFile(archive) as source:
            names = [name for name in source.namelist() if name.startswith("train/") and not name.endswith("/")]
            # Spread over all classes.
            chosen = names[:: max(len(names) // count, 1)][:count]
            for name in chosen:
                write(folder / name.removeprefix("train/"), source.read(name))
        return folder, True
    for number in range(count):
        data, suffix = generate(number)
        write(folder / f"class_{number % 10}" / f"{number:05d}.{suffix}", data)
    return folder, False


def write(path: Path, data: bytes) -> None:
    """Write a file, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def small_image(number: int) -> tuple[bytes, str]:
    """Generate a 32 x 32 lossless WebP."""
    return encoded(number, 32, 32, 8, format="WEBP", lossless=True), "webp"


def large_image(number: int) -> tuple[bytes, str]:
    """Generate a 500 x 400 JPEG of about 110 KB."""
    return encoded(number, 500, 400, 180, format="JPEG", quality=90), "JPEG"


def encoded(number: int, width: int, height: int, detail: int, *, format: str, **options: int) -> bytes:  # noqa: A002 (Pillow's word)
    """Encode a smooth image interpolated from `detail` x `detail` random values."""
    values = np.random.default_rng(number).integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- loaders


def from_shards(folder: Path, name: str) -> Run:
    """Load every image once in random order by hpccl."""
    small = name == "small"
    data = DataConfig(
        cache=str(folder / "cache"),
        storage="decoded" if small else "encoded",
        image_size=None if small else 224,
        augment=CropFlip() if small else TimmAugment(),
        workers=0,
    )
    stream = open_stream(ShardStream(parts=(Part(path=str(folder / "shards" / name)),)), data)
    order = permutation(len(stream.labels("train")), 0)
    repeat = 20 if small else 1  # otherwise too short to measure

    def run() -> int:
        requests = (
            Request(order[start : start + BATCH], mix(turn, order[start : start + BATCH]))
            for turn in range(repeat)
            for start in range(0, len(order), BATCH)
        )
        return sum(len(images.pixels) for images in stream.load(requests))

    return run


def from_image_folder(folder: Path, name: str) -> Run:
    """Load every image once in random order by torchvision and Pillow."""
    from torchvision import datasets, transforms

    if name == "small":
        augment = [transforms.RandomCrop(32, padding=4)]
    else:
        bicubic = transforms.InterpolationMode.BICUBIC
        augment = [transforms.RandomResizedCrop(224, interpolation=bicubic)]
    after = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    images = datasets.ImageFolder(str(folder), transforms.Compose([*augment, *after]))
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=0)
    return lambda: sum(len(batch) for batch, _ in loader)


def from_webdataset(shards: Path) -> Run:
    """Load every image of hpccl's own shards once by webdataset and torchvision's transforms, as its users do."""
    import webdataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    urls = sorted(str(path) for path in shards.glob("*.tar"))

    def run() -> int:
        images = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).decode("pil").to_tuple("jpg", "cls")
        loader = DataLoader(images.map_tuple(transform, int).batched(BATCH), batch_size=None, num_workers=0)
        return sum(len(batch) for batch, _ in loader)

    return run


def from_opencv(folder: Path) -> dict[str, Run]:
    """Load every image once by OpenCV, if it is installed."""
    try:
        import cv2
    except ImportError:
        return {}
    from torchvision import transforms

    cv2.setNumThreads(1)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())

    def view(path: Path) -> torch.Tensor:
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        shape = torch.empty(1).expand(1, *pixels.shape[:2])
        top, left, rows, columns = transforms.RandomResizedCrop.get_params(shape, [0.08, 1.0], [0.75, 1.3333])
        crop = cv2.resize(pixels[top : top + rows, left : left + columns], (224, 224), interpolation=cv2.INTER_LINEAR)
        mirrored = crop[:, ::-1] if random.random() < 0.5 else crop
        floats = (mirrored.astype(np.float32) / 255 - 0.5) / 0.5
        return torch.from_numpy(floats).permute(2, 0, 1)

    def run() -> int:
        order = random.sample(paths, len(paths))
        batches = (order[start : start + BATCH] for start in range(0, len(order), BATCH))
        return sum(len(torch.stack([view(path) for path in batch])) for batch in batches)

    return {"opencv": run}


# ---------------------------------------------------------------- resuming


def resumed(folder: Path, images: Path, *, quick: bool) -> dict[str, float]:
    """Return the seconds to open a stream of ImageNet's size, to plan, and to the first batch in mid-epoch."""
    shards = folder / "shards" / "large"
    for split, count in (("train", 128 if quick else 1281), ("test", 50)):
        repeated(folder / "shards" / "originals" / "train", shards / split, classes=1000, count=count)
    data = DataConfig(image_size=224, augment=TimmAugment(), workers=2, shuffle_window=64)
    start = time.perf_counter()
    stream = open_stream(ShardStream(parts=(Part(path=str(shards), tasks=10),), order="random"), data)
    opened = time.perf_counter()
    new = stream.tasks[3].samples("train")
    groups = stream.groups("train")[new.start : new.stop]
    plan = BatchPlan(len(new), 0, BATCH, 16, seed=0, task=3, window=64, groups=groups)
    first = plan.num_steps // 2 + 7
    batches = (plan.batch(step) for step in range(first, plan.num_steps))
    loaded = stream.load(Request(new.start + batch.new, batch.view) for batch in batches)
    next(loaded)
    end = time.perf_counter()
    loaded.close()
    return {"open": opened - start, "first_batch": end - opened}


def repeated(source: Path, out: Path, *, classes: int, count: int) -> None:
    """Make shards of `classes` classes with `count` images each, all copies of the one image of a shard of `source`."""
    manifest = Manifest.load(source)
    index = Index.load(source, manifest)
    out.mkdir(parents=True)
    shards, rows = [], []
    for label in range(classes):
        number = label % len(manifest.shards)
        shard = manifest.shards[number]
        os.link(source / shard.file, out / f"c{label:04d}-000.tar")
        shards.append(replace(shard, file=f"c{label:04d}-000.tar", class_name=f"n{label:04d}", samples=count))
        width, height = index.size[number].tolist()
        where = (index.extension[number].decode(), int(index.offset[number]), int(index.length[number]), width, height)
        rows += [(f"n{label:04d}_{image}", *where) for image in range(count)]
    num_bytes, digest = Index.of(rows).save(out)
    names = tuple(f"n{label:04d}" for label in range(classes))
    changed = replace(manifest, classes=names, shards=tuple(shards), index_bytes=num_bytes, index_sha256=digest)
    replace(changed, split=out.name).save(out)


if __name__ == "__main__":
    main()
