"""Shards in an object store: the same images; failures that pass, failures that do not; a cache that stays bounded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from hpccl.config.data import DataConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.data.build import open_stream
from hpccl.data.rows import Request
from hpccl.data.shards import reader
from hpccl.data.shards.build import build
from hpccl.data.shards.reader import ShardSet
from hpccl.data.shards.remote import ShardCache, load_manifest
from hpccl.errors import DataError
from tests.unit.data.tiny_images import tiny_set, write_folder


class Flaky(LocalFileSystem):  # type: ignore[misc] # fsspec has no types
    """A store that fails now and then: opening counts down `failures`, and is written down."""

    protocol = "flaky"
    failures: ClassVar[int] = 0
    cut: ClassVar[int] = 0
    opened: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").lstrip("/")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        type(self).opened.append(os.path.basename(path))
        if self.failures > 0:
            type(self).failures -= 1
            raise ConnectionResetError("the store is busy")
        file = super()._open(path, mode, block_size, **options)
        if self.cut > 0 and path.endswith(".tar"):
            type(self).cut -= 1
            file.seek(100)
        return file


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def reset() -> None:
    Flaky.failures, Flaky.cut, Flaky.opened = 0, 0, []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    build(write_folder(folder / "images", tiny_set()), folder / "shards", samples_per_shard=3)
    return folder / "shards"


def cache_in(folder: Path, **settings: Any) -> ShardCache:
    return ShardCache(**{"folder": folder / "cache", "pause": 0.001, **settings})


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("protocol", ["file", "memory", "flaky"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_the_same_from_a_url(shards: Path, tmp_path: Path, protocol: str, workers: int) -> None:
    url = f"{protocol}://{shards}"
    if protocol == "memory":
        for path in shards.rglob("*.*"):
            fsspec.filesystem("memory").pipe(str(path), path.read_bytes())
    data = DataConfig(image_size=8, storage="encoded", workers=workers, shard_cache=str(tmp_path))
    streams = [open_stream(ShardStream(parts=(Part(path=path),)), data) for path in (str(shards), url)]
    assert streams[0].fingerprint == streams[1].fingerprint
    request = Request(np.arange(18), np.arange(18, dtype=np.uint64))
    first, second = (torch.cat([images.pixels for images in stream.load([request])]) for stream in streams)
    assert torch.equal(first, second)
    assert streams[0].sample_names("train", np.arange(18)) == streams[1].sample_names("train", np.arange(18))
    assert load_manifest(url, "train") == load_manifest(str(shards), "train")


def test_failures_that_pass_are_not_noticed(shards: Path, tmp_path: Path) -> None:
    Flaky.failures, Flaky.cut = 3, 2
    data = ShardSet.open(f"flaky://{shards}", "train", cache_in(tmp_path))
    Flaky.failures = 2
    assert data.read(0) == ShardSet.open(shards, "train").read(0)
    assert Flaky.failures == Flaky.cut == 0


def test_a_store_that_stays_away_is_named(shards: Path, tmp_path: Path) -> None:
    Flaky.failures = 99
    with pytest.raises(DataError, match=r"could not be read in 3 attempts \(ConnectionResetError: the store is busy\)"):
        ShardSet.open(f"flaky://{shards}", "train", cache_in(tmp_path, tries=3))
    assert Flaky.failures == 96


def test_what_is_missing_is_not_tried_again(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/val/manifest.json' does not exist: check stream.parts"):
        ShardSet.open(f"flaky://{shards}", "val", cache_in(tmp_path))
    assert Flaky.opened == ["manifest.json"]
    with pytest.raises(DataError, match="cannot be read: Protocol not known: nonsense"):
        ShardSet.open("nonsense://shards", "train", cache_in(tmp_path))


def test_altered_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    data = ShardSet.open(f"flaky://{shards}", "train", cache_in(tmp_path, tries=2))
    Flaky.cut = 99
    with pytest.raises(DataError, match=r"c0000-000.tar' could not be read in 2 attempts.*not the checksum"):
        data.read(0)
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".part")] == []
    assert len(kept(tmp_path)) == 1  # the index


def test_a_copy_that_was_altered_since_is_not_decoded(shards: Path, tmp_path: Path) -> None:
    stream = ShardStream(parts=(Part(path=f"file://{shards}"),))
    decoded = tmp_path / "decoded"
    data = DataConfig(cache=str(decoded), shard_cache=str(tmp_path / "cache"), storage="decoded", image_size=8)
    open_stream(stream, data)
    copy = next(path for path in kept(tmp_path) if path.read_bytes()[:2] != b"PK")  # not an index
    content = bytearray(copy.read_bytes())
    content[600] ^= 1
    copy.write_bytes(content)
    for pixels in decoded.glob("*.npy"):
        pixels.unlink()
    with pytest.raises(
        DataError, match=rf"'{copy}', the local copy of 'file://.*.tar', was altered since.*; delete it"
    ):
        open_stream(stream, data)
    copy.unlink()
    assert not open_stream(stream, data).skipped()


def test_the_cache_stays_bounded_and_forgets_what_was_not_used(shards: Path, tmp_path: Path) -> None:
    plain = ShardSet.open(shards, "train")
    sizes = [shard.bytes for shard in plain.manifest.shards]
    bound = plain.manifest.index_bytes + 3 * max(sizes)
    data = ShardSet.open(f"flaky://{shards}", "train", cache_in(tmp_path, max_bytes=bound))
    first = [int(np.flatnonzero(data.shard_of == number)[0]) for number in range(len(sizes))]
    assert len(sizes) > 4
    for turn in range(2):
        for sample in first:
            reader.close_files()
            assert data.read(sample) == plain.read(sample), turn
            assert data.read(first[0]) == plain.read(first[0])
            assert sum(path.stat().st_size for path in kept(tmp_path)) <= bound
    fetched = [name for name in Flaky.opened if name.endswith(".tar")]
    assert fetched.count("c0000-000.tar") == 1  # used all the time
    assert len(fetched) > len(sizes)


def test_deleted_shards_do_not_stay_open(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file takes up disk space, which max_bytes is to bound, however often it was deleted."""
    monkeypatch.setattr(reader, "_fetched", lru_cache(maxsize=2)(reader._fetched.__wrapped__))
    largest = max(shard.bytes for shard in ShardSet.open(shards, "train").manifest.shards)
    data = ShardSet.open(f"flaky://{shards}", "train", cache_in(tmp_path, max_bytes=2 * largest))
    for number in range(len(data.manifest.shards)):
        data.read(int(np.flatnonzero(data.shard_of == number)[0]))
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len([link for link in links if link.startswith(str(tmp_path))]) <= 2
    reader.close_files()
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [link for link in links if link.startswith(str(tmp_path)) and link.endswith("(deleted)")]


def fetch(cache: ShardCache, source: Path, barrier: Any) -> None:
    barrier.wait()
    data = source.read_bytes()
    cache.fetch(f"file://{source}", len(data), hashlib.sha256(data).hexdigest())


def test_the_cache_is_bounded_when_processes_come_together(tmp_path: Path) -> None:
    """Also where more is coming at a time than may stay; files of others are left alone, however large."""
    cache = cache_in(tmp_path, max_bytes=2000)
    cache.folder.mkdir(parents=True)
    (cache.folder / "thesis.doc").write_bytes(bytes(3000))
    (cache.folder / "results").mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    for number in range(30):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 900)

    def come_again(rank: int) -> None:  # one fetch each rarely meets another at its worst moment
        try:
            for turn in range(100):
                fetch(cache, tmp_path / str((7 * rank + turn) % 30), barrier)
        except BaseException:
            barrier.abort()  # or the others would wait for ever
            raise

    ranks = [context.Process(target=come_again, args=(number,)) for number in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 6
    ours = {path.name: path.stat().st_size for path in kept(tmp_path) if len(path.name) == 64}
    assert list(ours.values()) == [900, 900]
    assert (cache.folder / "thesis.doc").stat().st_size == 3000
    assert not [path for path in cache.folder.iterdir() if path.name.endswith(".part")]


def test_half_a_download_of_a_killed_process_gives_its_room_back(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=2000)
    cache.folder.mkdir(parents=True)
    (cache.folder / f".{'0' * 64}.1.part").write_bytes(bytes(1500))
    for number in range(2):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 900)
        fetch(cache, tmp_path / str(number), multiprocessing.Barrier(1))
    assert [path.stat().st_size for path in kept(tmp_path)] == [900, 900]
    assert not [path for path in cache.folder.iterdir() if path.name.endswith(".part")]


def test_what_may_not_be_deleted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of another user in a folder like /tmp; what was fetched is fetched once."""
    cache = cache_in(tmp_path, max_bytes=1000)
    unlink = Path.unlink

    def denied(path: Path, missing_ok: bool = False) -> None:
        if len(path.name) == 64:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", denied)
    for number in range(2):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 900)
        data = (tmp_path / str(number)).read_bytes()
        cache.fetch(f"flaky://{tmp_path / str(number)}", len(data), hashlib.sha256(data).hexdigest())
    assert len(kept(tmp_path)) == 2
    assert Flaky.opened == ["0", "1"]


def test_a_shard_that_cannot_fit_and_a_folder_that_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than the 10 that data.shard_gib allows in all"):
        ShardSet.open(f"file://{shards}", "train", cache_in(tmp_path, max_bytes=10))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept in .*set data.shard_cache"):
        ShardSet.open(f"file://{shards}", "train", cache_in(tmp_path / "file"))


def read_all(shards: Path, folder: Path, results: Any) -> None:
    Flaky.opened = []
    data = ShardSet.open(f"flaky://{shards}", "train", cache_in(folder))
    digest = hashlib.sha256(b"".join(data.read(sample) for sample in range(len(data)))).hexdigest()
    results.put((digest, [name for name in Flaky.opened if name.endswith(".tar")]))


def test_ranks_of_a_machine_fetch_a_shard_once(shards: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=read_all, args=(shards, tmp_path, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [results.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len({digest for digest, _ in found}) == 1
    fetched = sorted(name for _, names in found for name in names)
    assert fetched == sorted(shard.file for shard in ShardSet.open(shards, "train").manifest.shards)
