"""Streams of shards: the same images whatever the storage, the batches, the workers; and what happens to bad ones."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from torch import Tensor

from hpccl.config.data import CropFlip, DataConfig, NoAugment, TimmAugment
from hpccl.config.stream import Part, ShardStream
from hpccl.data.build import open_stream
from hpccl.data.decoded import DecodedImages, Kept, keep_decoded
from hpccl.data.encoded import EncodedImages
from hpccl.data.order import permutation
from hpccl.data.rows import Images, Request
from hpccl.data.shards.build import build
from hpccl.data.shards.copies import copy_images
from hpccl.data.shards.decode import decode
from hpccl.data.shards.manifest import Manifest, file_sha256
from hpccl.data.shards.reader import ShardSet
from hpccl.data.stream import ImageStream
from hpccl.errors import ConfigError, DataError
from tests.unit.data.tiny_images import hash_of, image_bytes, pixels, write_folder

ROOT = Path(__file__).parents[3]


def files_of(names: Sequence[str], *, train: int, test: int, height: int, width: int, kind: str) -> dict[str, bytes]:
    files = {}
    for split, count in (("train", train), ("test", test)):
        for name in names:
            for number in range(count):
                path = f"{split}/{name}/{number:02d}.{kind}"
                files[path] = image_bytes(pixels(hash_of(path), height, width), kind)
    return files


SMALL = files_of("abcd", train=6, test=3, height=16, width=16, kind="webp")
OTHER = files_of("de", train=5, test=2, height=16, width=16, kind="png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    large = files_of("xy", train=4, test=2, height=60, width=80, kind="jpeg")
    large["train/x/99.jpeg"] = image_bytes(pixels(99, 70, 50), "jpeg")
    for name, files in {"small": SMALL, "other": OTHER, "large": large}.items():
        build(write_folder(folder / "images" / name, files), folder / name, samples_per_shard=4)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def stream_of(root: Path, data: DataConfig, *names: str, **settings: Any) -> ImageStream:
    parts = tuple(Part(path=str(root / name)) for name in names or ("small",))
    return open_stream(ShardStream(parts=parts, **settings), data)


def request(samples: Sequence[int] | range, keys: Sequence[int] | range | None = None) -> Request:
    count = len(samples)
    return Request(np.array(samples), np.array(keys if keys is not None else [0] * count, dtype=np.uint64))


def all_pixels(images: Iterator[Images]) -> Tensor:
    return torch.cat([batch.pixels for batch in images])


def closed(images: Iterator[Images]) -> None:
    cast("Generator[Images]", images).close()


def files_in(root: Path, split: str) -> list[npt.NDArray[np.uint8]]:
    """Expected pixels by sample position, from the names of the files."""
    return [pixels(hash_of(path), 16, 16) for path in sorted(SMALL) if path.startswith(split)]


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=0, rtol=0)


# ---------------------------------------------------------------- what is in a stream


def test_names_labels_groups_and_shapes(root: Path, cache: str) -> None:
    parts = (Part(path=str(root / "small"), tasks=2), Part(path=str(root / "other")))
    stream = open_stream(ShardStream(parts=parts), DataConfig(cache=cache))
    assert [task.name for task in stream.tasks] == ["small[1/2]", "small[2/2]", "other"]
    assert stream.class_names == ("a", "b", "c", "small/d", "other/d", "e")
    assert stream.image_shape == (3, 16, 16)
    np.testing.assert_array_equal(stream.labels("train"), np.repeat(np.arange(6), [6, 6, 6, 6, 5, 5]))
    assert (np.diff(stream.groups("train")) >= 0).all()
    assert len(np.unique(stream.groups("train"))) == 12  # at most 4 images a shard: two a class
    names = stream.sample_names("train", np.arange(34))
    assert len(set(names)) == 34
    assert names[0] == "small/c0000-000/00"
    assert names[-1].startswith("other/c0001-")


@pytest.mark.parametrize("storage", ["decoded", "encoded"])
def test_key_0_is_the_image_itself(root: Path, cache: str, storage: Any) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    data = DataConfig(cache=cache, storage=storage, workers=0, mean=mean, std=std, augment=CropFlip())
    stream = stream_of(root, data)
    for split in ("train", "test"):
        stored = np.stack(files_in(root, split))
        result = all_pixels(stream.load([request(range(len(stored)))], split))
        expected = (stored / 255 - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(result.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
        assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(stream.raw(3), files_in(root, "train")[3])


@pytest.mark.parametrize("size", [None, 12, 20])
@pytest.mark.parametrize("augment", [NoAugment(), CropFlip(padding=3)])
def test_storage_does_not_change_a_bit(root: Path, cache: str, size: int | None, augment: Any) -> None:
    wanted = request([5, 23, 0, 30, 5], [1, 2**64 - 1, 0, 77, 3])
    results = []
    for storage in ("decoded", "encoded"):
        data = DataConfig(cache=cache, storage=storage, image_size=size, augment=augment, workers=0)
        stream = stream_of(root, data, "small", "other", order="random")
        results.append(all_pixels(stream.load([wanted])))
    assert_same(*results)
    if isinstance(augment, NoAugment):
        assert_same(results[0][0], results[0][4])  # the same image by two keys


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("small", {"storage": "decoded", "augment": CropFlip()}),
        ("small", {"storage": "encoded", "augment": CropFlip()}),
        ("large", {"image_size": 24, "augment": TimmAugment(auto_augment="rand-m5", random_erase=0.5)}),
    ],
    ids=["decoded", "encoded", "timm"],
)
def test_batches_and_workers_do_not_matter(root: Path, cache: str, name: str, settings: dict[str, Any]) -> None:
    samples, keys = [3, 1, 8, 2, 0, 3, 7, 5], range(8)
    reference = None
    for workers in (0, 2):
        stream = stream_of(root, DataConfig(cache=cache, workers=workers, **settings), name)
        for size in (1, 3, 8):
            requests = [request(samples[i : i + size], keys[i : i + size]) for i in range(0, 8, size)]
            result = all_pixels(stream.load(requests))
            reference = result if reference is None else reference
            assert_same(result, reference)
            # Starting in the middle is the tail of the whole.
            assert_same(all_pixels(stream.load(requests[-1:])), reference[-len(requests[-1]) :])
    assert not multiprocessing.active_children()


def test_auto_decodes_small_images_only(root: Path, cache: str) -> None:
    small = stream_of(root, DataConfig(cache=cache))
    large = stream_of(root, DataConfig(cache=cache, image_size=24))
    assert isinstance(small.source, DecodedImages)
    assert isinstance(large.source, DecodedImages)
    assert isinstance(stream_of(root, DataConfig(cache=cache, image_size=24), "large").source, EncodedImages)
    assert isinstance(stream_of(root, DataConfig(cache=cache, image_size=128)).source, EncodedImages)
    timm = DataConfig(cache=cache, image_size=16, augment=TimmAugment())
    assert isinstance(stream_of(root, timm).source, EncodedImages)


# ---------------------------------------------------------------- the trainer's surroundings


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainers_generators_are_left_alone(root: Path, workers: int) -> None:
    data = DataConfig(image_size=16, augment=TimmAugment(auto_augment="rand-m5"), workers=workers)
    stream = stream_of(root, data)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    list(stream.load([request([0, 1], [5, 6]), request([2], [7])]))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected  # noqa: NPY002


def test_closing_ends_the_workers(root: Path) -> None:
    stream = stream_of(root, DataConfig(storage="encoded", workers=2))
    images = stream.load(request([number % 24]) for number in range(1000))
    next(images)
    assert len(multiprocessing.active_children()) == 2
    closed(images)
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_main_process(root: Path) -> None:
    stream = stream_of(root, DataConfig(storage="encoded", workers=2))
    images = stream.load(request([number % 24]) for number in range(50))
    next(images)
    for child in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            os.kill(cast("int", child.pid), number)
    assert len(list(images)) == 49


def test_workers_die_with_a_killed_process(root: Path) -> None:
    script = textwrap.dedent(f"""
        import multiprocessing, time
        import numpy as np
        from hpccl.config.data import DataConfig
        from hpccl.config.stream import Part, ShardStream
        from hpccl.data.build import open_stream
        from hpccl.data.rows import Request
        stream = open_stream(ShardStream(parts=(Part(path={str(root / "small")!r}),)), DataConfig(storage="encoded"))
        images = stream.load(Request(np.array([0]), np.array([1], dtype=np.uint64)) for _ in range(1000))
        next(images)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = [int(number) for number in main.stdout.readline().split()]
        main.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 3
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------- bad input


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Path:
    """The small set with images 0 and 9 of `train` built of bytes that are none, and whole shards of them."""
    folder = tmp_path / "small"
    shutil.copytree(root / "small", folder)
    overwrite(folder, 0, 9)
    manifest = Manifest.load(folder / "train")
    entries = [replace(each, sha256=file_sha256(folder / "train" / each.file)) for each in manifest.shards]
    replace(manifest, shards=tuple(entries)).save(folder / "train")
    return tmp_path


def overwrite(folder: Path, *numbers: int) -> None:
    """Images of `train`, in place: their shards stay as long as they are."""
    shards = ShardSet.open(folder, "train")
    for number in numbers:
        file = folder / "train" / shards.manifest.shards[shards.shard_of[number]].file
        with file.open("r+b") as tar:
            tar.seek(int(shards.index.offset[number]) + 4)
            tar.write(b"?" * (int(shards.index.length[number]) - 4))


@pytest.mark.parametrize(("storage", "workers"), [("decoded", 0), ("encoded", 0), ("encoded", 1)])
def test_an_undecodable_image_stops(damaged: Path, cache: str, storage: Any, workers: int) -> None:
    data = DataConfig(cache=cache, storage=storage, workers=workers)
    with pytest.raises(DataError, match=r"c0000-000/00.*cannot be decoded.*data.bad_images( to |=)skip"):
        list(stream_of(damaged, data).load([request(range(4))]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("storage", "workers"), [("decoded", 0), ("encoded", 0), ("encoded", 2)])
def test_an_undecodable_image_is_skipped(damaged: Path, cache: str, storage: Any, workers: int) -> None:
    data = DataConfig(cache=cache, storage=storage, workers=workers, bad_images="skip")
    stream = stream_of(damaged, data)
    for _ in range(2):
        images = list(stream.load([request([9, 1]), request([2, 0])]))
        assert [batch.valid.tolist() for batch in images] == [[False, True], [True, False]]
        assert not images[0].pixels[0].any()
        assert images[0].pixels[1].any()
    assert [(split, sample, name) for split, sample, name, _ in stream.skipped()] == [
        ("train", 0, "small/c0000-000/00"),
        ("train", 9, "small/c0001-001/03"),
    ]
    assert all("cannot be decoded" in reason for *_, reason in stream.skipped())


def test_a_bad_image_of_an_unused_class_does_not_matter(damaged: Path, cache: str) -> None:
    parts = (Part(path=str(damaged / "small"), classes=1),)
    seed = next(seed for seed in range(99) if permutation(4, seed, 0)[0] in {2, 3})
    stream = open_stream(ShardStream(parts=parts, order="random", order_seed=seed), DataConfig(cache=cache))
    assert stream.class_names in {("c",), ("d",)}
    assert not stream.skipped()


def test_a_shard_that_was_cut_short_meanwhile_is_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "small", tmp_path / "small")
    stream = stream_of(tmp_path, DataConfig(storage="encoded", workers=1))
    os.truncate(tmp_path / "small" / "train" / "c0002-000.tar", 600)
    with pytest.raises(DataError, match=r"c0002-000.tar' cannot be read") as caught:
        list(stream.load([request(range(24))]))
    assert "Traceback" not in str(caught.value)


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    files = {path: data for path, data in SMALL.items() if not path.startswith(("test/a", "train/c"))}
    build(write_folder(tmp_path / "images", files), tmp_path / "uneven")
    with pytest.raises(
        DataError, match=r"of 3 classes in split 'train' and of 3 in 'test'.*only in train: a; only in test: c"
    ):
        stream_of(tmp_path, DataConfig(), "uneven")


def test_several_sizes_need_image_size(root: Path, cache: str) -> None:
    with pytest.raises(ConfigError, match=r"images have 2 sizes \(50 x 70, 80 x 60\); set data.image_size"):
        stream_of(root, DataConfig(cache=cache), "large")
    with pytest.raises(ConfigError, match=r"images have 3 sizes"):
        stream_of(root, DataConfig(cache=cache), "large", "small")


def test_timm_needs_the_full_image(root: Path, cache: str) -> None:
    with pytest.raises(ConfigError, match=r"data.storage is decoded but data.augment.kind is timm"):
        stream_of(root, DataConfig(cache=cache, storage="decoded", image_size=16, augment=TimmAugment()))


# ---------------------------------------------------------------- the cache


def test_decoded_once_for_all_orders(root: Path, cache: str) -> None:
    stream_of(root, DataConfig(cache=cache))
    before = {file.name: file.stat().st_mtime_ns for file in Path(cache).iterdir()}
    stream_of(root, DataConfig(cache=cache, augment=CropFlip()), order="random", order_seed=2)
    assert {file.name: file.stat().st_mtime_ns for file in Path(cache).iterdir()} == before
    stream_of(root, DataConfig(cache=cache, image_size=8))
    assert len(list(Path(cache).glob("*.npy"))) == 4  # two splits in two sizes


def test_a_damaged_cache_is_made_again(root: Path, cache: str) -> None:
    expected = all_pixels(stream_of(root, DataConfig(cache=cache)).load([request(range(24))]))
    for file in Path(cache).glob("*.npy"):
        os.truncate(file, 300)
    assert_same(all_pixels(stream_of(root, DataConfig(cache=cache)).load([request(range(24))])), expected)


def test_a_cache_that_cannot_be_made(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"decoded images cannot be kept in .*file/cache.*set data.cache to a folder"):
        stream_of(root, DataConfig(cache=str(tmp_path / "file" / "cache"), storage="decoded"))


def test_a_full_disk_leaves_nothing_behind(root: Path, cache: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError, match=r"decoded images cannot be kept.*File too large; set data.cache"):
            stream_of(root, DataConfig(cache=cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [file for file in Path(cache).iterdir() if file.suffix != ".lock"]
    stream_of(root, DataConfig(cache=cache))


def test_a_shard_that_cannot_be_read_is_not_remembered(root: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "small", tmp_path / "cache" / "images.npy"
    shutil.copytree(root / "small", folder)
    shards = ShardSet.open(folder, "train")
    lost = folder / "train" / "c0002-000.tar"
    lost.unlink()

    def kept() -> Kept:
        return keep_decoded(
            path,
            shape=(len(shards), 16, 16, 3),
            read=shards.read,
            decode=lambda data, number: decode(data, shards.name(number)),
        )

    with pytest.raises(DataError, match=r"c0002-000.tar' cannot be read \(No such file or directory\)"):
        kept()
    assert not [file for file in path.parent.iterdir() if file.suffix != ".lock"]
    shutil.copy(root / "small" / "train" / lost.name, lost)
    assert not kept().bad


def test_a_server_that_fails_over_is_asked_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle stays so: the file is opened anew. What will not pass is told at once."""
    shards = ShardSet.open(root / "small", "train")
    expected, usual, asked = shards.read(0), os.pread, [0]
    slept: list[float] = []

    def failing(number: int, length: int, offset: int) -> bytes:
        asked[0] += 1
        if asked[0] <= 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return usual(number, length, offset)

    monkeypatch.setattr("os.pread", failing)
    monkeypatch.setattr("time.sleep", slept.append)
    assert shards.read(0) == expected
    assert slept == [1.0, 2.0, 4.0]
    asked[0] = -100
    with pytest.raises(DataError, match=r"cannot be read \(Stale file handle\)"):
        shards.read(0)
    assert len(slept) == 3 + 5
    monkeypatch.setattr("os.pread", denied)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        shards.read(0)
    assert len(slept) == 3 + 5


def denied(number: int, length: int, offset: int) -> bytes:
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("bad_images", ["stop", "skip"])
def test_shards_that_were_altered_are_not_decoded(root: Path, tmp_path: Path, cache: str, bad_images: Any) -> None:
    shutil.copytree(root / "small", tmp_path / "small")
    overwrite(tmp_path / "small", 9)
    data = DataConfig(cache=cache, bad_images=bad_images)
    with pytest.raises(
        DataError, match=r"c0001-001.tar' was altered: its checksum differs from the manifest's.*shards verify"
    ):
        stream_of(tmp_path, data)
    assert not [file for file in Path(cache).iterdir() if file.suffix != ".lock"]
    shutil.copy(root / "small" / "train" / "c0001-001.tar", tmp_path / "small" / "train")
    stream = stream_of(tmp_path, data)
    assert not stream.skipped()
    assert stream.raw(9).any()


def test_altered_copies_are_not_decoded(root: Path, tmp_path: Path, cache: str) -> None:
    folder, copies = tmp_path / "small", tmp_path / "copies"
    shutil.copytree(root / "small", folder)
    copy_images(copies, "task-000-000002", ShardSet.open(folder, "train"), np.array([1, 4]), part=0)
    copied = copies / "task-000-000002" / "c0000-001.tar"
    content = bytearray(copied.read_bytes())
    content[600] ^= 1
    copied.write_bytes(content)
    stream = ShardStream(parts=(Part(path=str(folder)),))
    with pytest.raises(DataError, match=r"task-000-000002/c0000-001.tar' was altered"):
        open_stream(stream, DataConfig(cache=cache), copies=copies)
    assert not list(Path(cache).glob("*.npy"))


def test_images_are_decoded_afresh_as_the_message_says(damaged: Path, cache: str) -> None:
    """The list of bad ones is made up: as if what decodes them had been mended since."""
    with pytest.raises(DataError, match=r"c0000-000/00.*cannot be decoded") as caught:
        stream_of(damaged, DataConfig(cache=cache))
    notes = Path(str(caught.value).split("decode them again, delete '")[1].split("'")[0])
    assert set(json.loads(notes.read_text())) == {"0", "9"}
    whole = notes.with_name(notes.name.replace(".bad.json", ".npy"))
    made = whole.stat().st_mtime_ns
    notes.unlink()
    with pytest.raises(DataError, match=r"cannot be decoded"):
        stream_of(damaged, DataConfig(cache=cache))
    assert whole.stat().st_mtime_ns > made


def decode_slowly(folder: str, number: int) -> npt.NDArray[np.uint8]:
    """Leaves a file for every decoded image."""
    time.sleep(0.01)
    (Path(folder) / f"{os.getpid()}-{number}").touch()
    return np.full((2, 2, 3), number, dtype=np.uint8)


def keep(path: str, folder: str) -> None:
    kept = keep_decoded(
        Path(path),
        shape=(30, 2, 2, 3),
        read=lambda _: b"",
        decode=lambda _, number: decode_slowly(folder, number),
    )
    np.testing.assert_array_equal(kept.pixels[:, 0, 0, 0], np.arange(30))


def test_halves_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path, folder = tmp_path / "cache" / "images.npy", tmp_path / "decoded"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=keep, args=(str(path), str(folder)))
    process.start()
    while not any(folder.iterdir()):
        time.sleep(0.001)
    process.kill()
    process.join(30)
    assert any(file.suffix == ".part" for file in path.parent.iterdir())
    keep(str(path), str(folder))
    assert sorted(file.name for file in path.parent.iterdir()) == ["images.bad.json", "images.lock", "images.npy"]


def test_processes_that_race_decode_once(tmp_path: Path) -> None:
    path, folder = tmp_path / "cache" / "images.npy", tmp_path / "decoded"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keep, args=(str(path), str(folder))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(list(folder.iterdir())) == 30
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("storage", ["decoded", "encoded"])
def test_held_out_training_images_stand_in_for_the_test_images(
    root: Path, cache: str, storage: Literal["decoded", "encoded"]
) -> None:
    plain = stream_of(root, DataConfig(cache=cache, storage=storage, workers=0), "small", "other")
    data = DataConfig(cache=cache, storage=storage, workers=0, validation=0.34)
    stream = stream_of(root, data, "small", "other")
    assert stream.fingerprint != plain.fingerprint  # a run of one cannot go on with the other
    names = {split: stream.sample_names(split, np.arange(len(stream.labels(split)))) for split in ("train", "test")}
    known = plain.sample_names("train", np.arange(len(plain.labels("train"))))
    assert sorted(names["train"] + names["test"]) == sorted(known)
    assert len(names["test"]) == 4 * 2 + 2 * 2  # a third of 6 and of 5 images
    for split in ("train", "test"):
        shown = all_pixels(stream.load([request(range(len(names[split])))], split))
        places = [known.index(name) for name in names[split]]
        torch.testing.assert_close(shown, all_pixels(plain.load([request(places)])), rtol=0, atol=0)
        np.testing.assert_array_equal(stream.labels(split), plain.labels("train")[places])
