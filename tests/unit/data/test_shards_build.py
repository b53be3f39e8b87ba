from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from hpccl.data.shards.build import Progress, build
from hpccl.data.shards.decode import decode
from hpccl.data.shards.encodings import Encoding, Lossless, Original, Reencode
from hpccl.data.shards.manifest import INDEX, Manifest
from hpccl.data.shards.reader import ShardSet
from hpccl.data.shards.verify import verify
from hpccl.errors import ConfigError, DataError, FolderError
from tests.unit.data.tiny_images import (
    image_bytes,
    per_class_tars,
    pixels,
    tar_bytes,
    tiny_set,
    write_folder,
    write_zip,
)

ROOT = Path(__file__).parents[3]


def plain_webdataset(folder: Path, manifest: Manifest, decoder: str | None = None) -> list[dict[str, Any]]:
    """What webdataset itself reads from the shards."""
    data = webdataset.WebDataset([str(folder / shard.file) for shard in manifest.shards], shardshuffle=False)
    samples = list(data.decode(decoder) if decoder else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # it leaves closing its files to the garbage collector
    return samples


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(source: Path, out: Path, prelude: str = "", workers: int = 2) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from hpccl.data.shards.build import build
{prelude}
build(Path({str(source)!r}), Path({str(out)!r}), samples_per_shard=40, workers={workers},
      progress=lambda progress: print(progress.done, flush=True))
"""
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("encoding", [Original(), Reencode(max_side=10), Lossless()])
def test_plain_webdataset_reads_the_shards(tmp_path: Path, encoding: Encoding) -> None:
    files = tiny_set()
    seen: list[Progress] = []
    manifests = build(
        write_folder(tmp_path / "set", files),
        tmp_path / "out",
        encoding=encoding,
        samples_per_shard=3,
        progress=seen.append,
    )
    assert sorted(manifests) == ["test", "train"]
    assert seen[-1][:2] == (len(files), len(files))
    data = ShardSet.open(tmp_path / "out", "train")
    plain = plain_webdataset(tmp_path / "out" / "train", manifests["train"], "rgb8")
    assert len(plain) == len(data) == 5 + 6 + 7
    for number, sample in enumerate(plain):
        assert sample["cls"] == data.labels[number]
        assert data.name(number).endswith("/" + sample["__key__"])
        picture = decode(data.read(number), "x").astype(int)
        assert np.abs(sample[data.extension(number)] - picture).max() <= 1


def test_all_kinds_of_sources_make_the_same_shards(tmp_path: Path) -> None:
    files = tiny_set(splits=("",))
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "set.tar").write_bytes(tar_bytes(per_class_tars(files)))
    sources = [
        write_folder(tmp_path / "a" / "set", files),
        write_zip(tmp_path / "b" / "set.zip", files),
        tmp_path / "c" / "set.tar",
    ]
    for number, source in enumerate(sources):
        build(source, tmp_path / str(number), split="val" if number else None)
    shards = [
        {Path(name).name: data for name, data in tree(tmp_path / str(number)).items() if not name.endswith(".json")}
        for number in range(3)
    ]
    assert shards[0] == shards[1] == shards[2]
    assert len(shards[0]) == 4
    assert [sorted(path.name for path in (tmp_path / str(n)).iterdir()) for n in range(3)] == [
        ["train"],
        ["val"],
        ["val"],
    ]


@pytest.mark.parametrize("other", ["valid/class_0/a.png", "class_9/a.png"])
def test_a_folder_beside_the_splits_is_told(tmp_path: Path, other: str) -> None:
    """Or train and test would be classes."""
    source = write_folder(tmp_path / "set", {**tiny_set(), other: image_bytes(pixels(1), "png")})
    with pytest.raises(DataError, match=rf"'{other.split('/', maxsplit=1)[0]}' lies beside 'test'.*all be splits"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_splits_share_one_numbering_of_classes(tmp_path: Path) -> None:
    files = {path: data for path, data in tiny_set().items() if not path.startswith("test/class_1")}
    source = write_folder(tmp_path / "set", files)
    manifests = build(source, tmp_path / "out")
    assert manifests["test"].classes == manifests["train"].classes == ("class_0", "class_1", "class_2")
    assert set(ShardSet.open(tmp_path / "out", "test").labels) == {0, 2}
    assert sorted(build(source, tmp_path / "one", split="test")) == ["test"]
    with pytest.raises(ConfigError, match="no split 'val': it has test, train"):
        build(source, tmp_path / "none", split="val")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_difficult_names_become_unique_keys(tmp_path: Path) -> None:
    names = ["a.b.png", "a_b.png", "a b.png", "a_b-2.png", "ä.png", "ö.png", "x" * 200 + ".png", "sub/a_b.png"]
    files = {f"cat/{name}": image_bytes(pixels(seed), "png") for seed, name in enumerate(names)}
    files["dog/a_b.png"] = image_bytes(pixels(99), "png")
    manifest = build(write_folder(tmp_path / "set", files), tmp_path / "out")["train"]
    data = ShardSet.open(tmp_path / "out", "train")
    ids = data.names(np.arange(len(data)))
    assert len(set(ids)) == len(ids) == len(files)
    assert len(plain_webdataset(tmp_path / "out" / "train", manifest)) == len(files)


def test_rare_extensions_are_images_too(tmp_path: Path) -> None:
    kinds = {"jfif": "jpeg", "jpe": "jpeg", "pnm": "ppm", "pgm": "ppm"}
    array = pixels(0)
    files = {f"cat/{suffix}.{suffix.upper()}": image_bytes(array, kind) for suffix, kind in kinds.items()}
    files["cat/pbm.pbm"] = b"P4 8 2 \xff\x00"
    build(write_folder(tmp_path / "set", files), tmp_path / "out")
    data = ShardSet.open(tmp_path / "out", "train")
    found = {data.name(sample).split("/")[1]: decode(data.read(sample), "x") for sample in range(len(data))}
    assert {key: image.shape for key, image in found.items()} == {**dict.fromkeys(kinds, array.shape), "pbm": (2, 8, 3)}
    assert found["pbm"][0].max() == 0
    assert found["pbm"][1].min() == 255


def test_many_processes_and_kill_9_change_no_byte(tmp_path: Path) -> None:
    files = tiny_set(images=120, classes=5)
    source = write_zip(tmp_path / "set.zip", files)
    build(source, tmp_path / "whole", samples_per_shard=40)

    process = start(source, tmp_path / "killed")
    assert process.stdout is not None
    process.stdout.readline()
    children = [int(child) for child in children_of(process.pid)]
    process.kill()
    process.communicate()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    assert not (tmp_path / "killed" / "test" / "manifest.json").exists()
    stored = len(list((tmp_path / "killed" / "train" / ".build").glob("c*.json")))
    assert stored >= 1
    (tmp_path / "killed" / "train" / ".c0000-000.tar.1.part").write_bytes(b"half")
    (tmp_path / "killed" / "train" / "c0004-000.tar").write_bytes(b"without a note")

    seen: list[Progress] = []
    build(source, tmp_path / "killed", samples_per_shard=40, progress=seen.append)
    assert seen[0].shard is None
    assert seen[0].done > 0
    assert seen[-1].done == seen[-1].total == len(files)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_a_finished_build_is_left_alone(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", tiny_set())
    manifests = build(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert build(source, tmp_path / "out") == manifests
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "train" / INDEX).unlink()
    with pytest.raises(DataError, match=r"index.* missing or truncated: delete"):
        build(source, tmp_path / "out")


def test_lost_shards_of_a_finished_build_are_written_anew(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", tiny_set()), tmp_path / "out"
    manifests, before = build(source, out), tree(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    whole = (out / "train" / "c0000-000.tar").read_bytes()
    (out / "train" / "c0000-000.tar").write_bytes(whole[:-5])
    (out / "test" / "c0001-000.tar").unlink()
    assert build(source, out) == manifests
    assert tree(out) == before
    assert verify(out) == []
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"c0000-000.tar", "c0001-000.tar"}


def test_a_shard_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    """Its images changed, though not their sizes."""
    files = tiny_set()
    source, out = write_folder(tmp_path / "set", files), tmp_path / "out"
    build(source, out)
    name, data = next((name, data) for name, data in files.items() if name.startswith("train/class_0/"))
    position = len(data) - 20  # in the pixels of the JPEG
    (source / name).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    (out / "train" / "c0000-000.tar").unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=r"c0000-000.tar' was rewritten with other content"):
            build(source, out)
        assert not (out / "train" / "c0000-000.tar").exists()


def test_another_source_or_encoding_says_what_differs(tmp_path: Path) -> None:
    files = tiny_set()
    source = write_folder(tmp_path / "set", files)
    out = tmp_path / "out"
    build(source, out)
    with pytest.raises(DataError, match=r"encoding is kind=original there and kind=lossless now"):
        build(source, out, encoding=Lossless())
    with pytest.raises(DataError, match=r"samples_per_shard is 2500 there and 7 now"):
        build(source, out, samples_per_shard=7)
    with pytest.raises(DataError, match=r"source is 'set' there and 'set.zip' now"):
        build(write_zip(tmp_path / "set.zip", files), out)
    more = {**files, "train/new/img.png": files["train/class_0/img_01.png"]}
    with pytest.raises(DataError, match=r"classes is 3 \(class_0, class_1, class_2\) there and 4"):
        build(write_folder(tmp_path / "more" / "set", more), out)
    write_folder(tmp_path / "other", {"train/mine.txt": b"keep"})
    with pytest.raises(DataError, match="not empty and was not written by this command"):
        build(source, tmp_path / "other")
    assert (tmp_path / "other" / "train" / "mine.txt").read_bytes() == b"keep"


def test_an_interrupted_build_refuses_another_encoding(tmp_path: Path) -> None:
    files = {**tiny_set(), "train/class_2/bad.jpg": b"not an image"}
    source = write_folder(tmp_path / "set", files)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        build(source, tmp_path / "out", samples_per_shard=2)
    with pytest.raises(DataError, match="encoding is"):
        build(source, tmp_path / "out", samples_per_shard=2, encoding=Lossless())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_undecodable_images_stop_or_are_noted(tmp_path: Path, workers: int) -> None:
    files = tiny_set()
    files["train/class_1/bad.jpg"] = files["train/class_1/img_00.JPEG"][:200]
    files["train/only_bad/bad.png"] = b"not an image"
    source = write_folder(tmp_path / "set", files)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"image 'train/.*bad\..* cannot be decoded .*--skip-bad"):
        build(source, out, workers=workers)
    manifest = build(source, out, bad_images="skip", workers=workers)["train"]
    assert [skipped.name for skipped in manifest.skipped] == ["train/class_1/bad.jpg", "train/only_bad/bad.png"]
    assert manifest.samples == 5 + 6 + 7
    assert [shard.class_name for shard in manifest.shards] == ["class_0", "class_1", "class_2"]
    assert manifest == Manifest.load(out / "train")
    assert verify(out) == []
    assert len(ShardSet.open(out, "train")) == 18
    with pytest.raises(DataError, match="--skip-bad"):
        build(source, out)


@pytest.mark.parametrize("finished", [False, True])
def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path, finished: bool) -> None:
    source = write_folder(tmp_path / "set", tiny_set())
    (tmp_path / "out" / "train" / ".build").mkdir(parents=True)
    if finished:
        build(source, tmp_path / "out")
        (tmp_path / "out" / "train" / "c0000-000.tar").unlink()
    code = f"""
import fcntl, time
file = open({str(tmp_path / "out" / "train" / ".lock")!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(DataError, match="another process is building"):
            build(source, tmp_path / "out")
        other.kill()
    build(source, tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "set.zip", tiny_set(images=300, classes=4))
    process = start(source, tmp_path / "out")
    assert process.stdout is not None
    process.stdout.readline()
    for child in children_of(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "a process that wrote shards died" in error


def test_a_file_that_cannot_grow_is_one_clear_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", tiny_set())
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    process = start(source, tmp_path / "out", prelude, workers=1)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert FolderError.__name__ in error
    assert os.strerror(errno.EFBIG) in error
    assert not list((tmp_path / "out").rglob("*.part"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


def test_a_full_disk_is_one_clear_error_and_can_be_resumed(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "set.zip", tiny_set(images=60))
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here (no user namespaces)")
    code = f"""
from pathlib import Path
from hpccl.data.shards.build import build
build(Path({str(source)!r}), Path({str(disk)!r}) / "out", samples_per_shard=40)
"""
    (tmp_path / "once.py").write_text(code)
    build_once = f"PYTHONPATH=. {sys.executable} {tmp_path}/once.py"
    script = f"""
mount -t tmpfs -o size=300k tmpfs {disk} || exit 77
{build_once}; echo "first: $?"
mount -o remount,size=30m {disk}
{build_once}; echo "second: $?"
cp -r {disk}/out {tmp_path}/copied
"""
    done = subprocess.run([unshare, "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("a small disk cannot be mounted here")
    assert "first: 1" in done.stdout
    assert "second: 0" in done.stdout, done.stderr
    assert "the disk is full: free some space and run the same command again" in done.stderr
    build(source, tmp_path / "whole", samples_per_shard=40)
    assert tree(tmp_path / "copied") == tree(tmp_path / "whole")


def test_real_images_keep_their_bytes_and_counts(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "cifar100-first50.zip"
    if not source.exists():
        pytest.skip(f"no '{source}'")
    manifest = build(source, tmp_path / "out", split="test")["test"]
    data = ShardSet.open(tmp_path / "out", "test")
    assert (len(data), len(data.classes), manifest.source) == (5000, 50, "cifar100-first50.zip")
    assert np.bincount(data.labels).tolist() == [100] * 50
    assert (data.sizes == 32).all()
    assert data.classes[:2] == ("apple", "aquarium_fish")
    assert decode(data.read(4999), "x").shape == (32, 32, 3)
