from __future__ import annotations

import json
import os
import pickle
import resource
import tarfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from hpccl.data.shards import reader
from hpccl.data.shards.build import build
from hpccl.data.shards.decode import image_size
from hpccl.data.shards.manifest import Manifest
from hpccl.data.shards.reader import ShardSet
from hpccl.data.shards.verify import verify
from hpccl.errors import DataError
from tests.unit.data.tiny_images import tiny_set, write_folder

FILES = tiny_set(images=4)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    build(write_folder(tmp_path / "set", FILES), tmp_path / "shards", samples_per_shard=3)
    return tmp_path / "shards"


def test_reads_every_image_by_number(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    expected = [
        (path.split("/")[1], path, bytes_) for path, bytes_ in sorted(FILES.items()) if path.startswith("train")
    ]
    assert len(data) == len(expected) == 4 + 5 + 6
    assert data.classes == ("class_0", "class_1", "class_2")
    assert (np.diff(data.shard_of) >= 0).all()
    for sample, (name, path, content) in enumerate(expected):
        assert data.read(sample) == content
        assert data.classes[data.labels[sample]] == name
        assert data.name(sample).split("/")[1] == Path(path).stem
        assert data.extension(sample) == {".JPEG": "jpg", ".png": "png", ".webp": "webp"}[Path(path).suffix]
        assert tuple(data.sizes[sample]) == image_size(content, path)
    assert data.names(np.array([0, 4])) == ["c0000-000/img_00", "c0001-000/img_00"]
    assert data.labels.dtype == data.shard_of.dtype == np.int64


def test_a_shard_holds_one_class(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    for shard in range(len(data.manifest.shards)):
        assert len(np.unique(data.labels[data.shard_of == shard])) == 1
    assert [entry.samples for entry in data.manifest.shards] == [2, 2, 2, 3, 3, 3]


def test_offsets_are_those_of_the_tar(shards: Path) -> None:
    data = ShardSet.open(shards, "test")
    for number, entry in enumerate(data.manifest.shards):
        with tarfile.open(shards / "test" / entry.file) as archive:
            offsets = [m.offset_data for m in archive.getmembers() if not m.name.endswith(".cls")]
        assert data.index.offset[data.shard_of == number].tolist() == offsets


def few_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(reader, "_lasting", lru_cache(maxsize=number)(reader._lasting.__wrapped__))


@pytest.mark.parametrize(("soft", "hard", "asked"), [(1024, 1 << 20, 4096), (1024, -1, 4096), (256, 300, 300)])
def test_limit_of_open_files_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, asked: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    for _ in range(2):
        reader._allow_files(reader._most_files())
    assert limits == [(soft, hard), (asked, hard)]


def test_few_files_are_open_however_many_splits_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_open(monkeypatch, 3)
    before = len(os.listdir("/proc/self/fd"))
    sets = [ShardSet.open(shards, split) for split in ("train", "test", "train", "test")]
    for data in sets:
        for sample in range(len(data)):
            data.read(sample)
    assert sum(len(data.manifest.shards) for data in sets) > 10
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_survives_pickling_forks_and_threads_with_few_open_files(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_open(monkeypatch, 2)
    data = ShardSet.open(shards, "train")
    wanted = [data.read(sample) for sample in range(len(data))]
    copy = pickle.loads(pickle.dumps(data))
    assert [copy.read(sample) for sample in range(len(data))] == wanted
    assert copy.fingerprint == data.fingerprint

    wrong: list[int] = []

    def read_all(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(data))
        wrong.extend(sample for sample in np.tile(order, 20) if data.read(sample) != wanted[sample])

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    child = os.fork()
    if child == 0:
        os._exit(0 if [data.read(sample) for sample in range(len(data))] == wanted else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [data.read(sample) for sample in range(len(data))] == wanted


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "what", "opens"),
    [(cut, "truncated", False), (flip, "altered", True), (grow, "altered", False), (Path.unlink, "missing", False)],
)
def test_damaged_shards_are_found_by_name(shards: Path, damage: Callable[[Path], None], what: str, opens: bool) -> None:
    assert verify(shards) == []
    damage(shards / "train" / "c0001-000.tar")
    problems = verify(shards)
    assert [problem.file for problem in problems] == ["train/c0001-000.tar"]
    assert problems[0].what.startswith(what)
    assert verify(shards, "test") == []
    if opens:
        ShardSet.open(shards, "train")
    else:
        with pytest.raises(DataError, match=r"c0001-000\.tar .*hpccl shards verify"):
            ShardSet.open(shards, "train")


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_index_is_found_by_name(shards: Path, damage: Callable[[Path], None]) -> None:
    damage(shards / "test" / "index.npz")
    assert [problem.file for problem in verify(shards)] == ["test/index.npz"]
    with pytest.raises(DataError, match=r"index\.npz"):
        ShardSet.open(shards, "test")


def test_extra_shards_and_unfinished_builds_are_found(shards: Path) -> None:
    (shards / "train" / "c0009-000.tar").write_bytes(b"")
    (shards / "val" / ".build").mkdir(parents=True)
    assert verify(shards) == [
        ("train/c0009-000.tar", "extra: it is not in the manifest"),
        ("val/.build", "a build was not finished: run the same command again"),
    ]
    (shards / "test" / ".build").mkdir()  # killed after the manifest was written, before the notes were deleted
    (shards / "test" / "c0000-000.tar").unlink()
    assert [problem.file for problem in verify(shards, "test")] == ["test/.build", "test/c0000-000.tar"]
    with pytest.raises(DataError, match="no shards"):
        verify(shards / "train")


@pytest.mark.parametrize("left", [["c0000-000.tar"], ["index.npz"], [".lock"]])
def test_a_split_without_its_manifest_is_found(shards: Path, left: list[str]) -> None:
    """Where a copy was not finished, or a build was killed before it had planned anything."""
    for file in (shards / "test").iterdir():
        if file.name not in left:
            file.unlink()
    (problem,) = verify(shards)
    assert problem.file == "test/manifest.json"
    assert "has no manifest.json: it is not a finished folder of shards" in problem.what
    with pytest.raises(DataError, match="no shards"):
        verify(shards / "train")


def test_a_folder_that_does_not_exist_is_told_from_one_without_a_split(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there in (lambda path: ShardSet.open(path, "train"), verify):
        with pytest.raises(DataError, match=r"shard' does not exist; did you mean '.*/shards'\?$"):
            there(shards.with_name("shard"))
        with pytest.raises(DataError, match=r"/cifar' does not exist; check the path, or see `hpccl shards build`"):
            there(shards.with_name("cifar"))
        with pytest.raises(DataError, match=r"manifest.json' is a file, not a folder of shards"):
            there(shards / "train" / "manifest.json")
    monkeypatch.chdir(shards)
    with pytest.raises(DataError, match=f"'trains' does not exist, seen from '{shards}'; did you mean 'train'"):
        ShardSet.open(Path("trains"), "train")


def test_a_missing_split_and_unknown_formats_say_so(shards: Path) -> None:
    with pytest.raises(
        DataError, match=r"no split 'val' \(found: test, train; set stream.train_split and stream.test_split to"
    ):
        ShardSet.open(shards, "val")
    path = shards / "train" / "manifest.json"
    document = json.loads(path.read_text())
    for text, message in {
        json.dumps({**document, "format": 99}): "format 99, but .* format 1",
        json.dumps({**document, "shards": [{"file": "x"}]}): "damaged",
        json.dumps({**document, "shards": [{**document["shards"][0], "file": "../x.tar"}]}): "outside of its folder",
        json.dumps({**document, "shards": [{**document["shards"][0], "file": ".."}]}): "outside of its folder",
        json.dumps(
            {**document, "shards": [{**document["shards"][0], "sha256": "/etc/passwd"}]}
        ): "instead of a SHA-256",
        json.dumps({**document, "index": {**document["index"], "sha256": f"../{'0' * 64}"}}): "instead of a SHA-256",
        json.dumps({**document, "shards": [{**document["shards"][0], "class": "x"}]}): "does not list the class 'x'",
        "[]": "format None",
        "{": "cannot be read",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            ShardSet.open(shards, "train")
    path.unlink()
    with pytest.raises(DataError, match="not a finished folder of shards"):
        ShardSet.open(shards, "train")


def test_a_shard_that_vanishes_later_is_named(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    (shards / "train" / "c0000-000.tar").unlink()
    with pytest.raises(DataError, match=r"c0000-000\.tar"):
        data.read(0)


def test_fingerprints_tell_data_apart(shards: Path, tmp_path: Path) -> None:
    prints = {ShardSet.open(shards, split).fingerprint for split in ("train", "test")}
    build(tmp_path / "set", tmp_path / "again", samples_per_shard=3)
    prints |= {ShardSet.open(tmp_path / "again", split).fingerprint for split in ("train", "test")}
    assert len(prints) == 2
    assert Manifest.load(shards / "train") == Manifest.load(tmp_path / "again" / "train")
