"""Curvature in checkpoints: written by some ranks, read by others; damage is found; what is unchanged is linked."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint import store, tree
from hpccl.checkpoint.store import Content, Mark, Shard, latest, load, open_shards, save
from hpccl.config.curvature import ListedTasks
from hpccl.curvature.build import precision_from_state
from hpccl.curvature.kfac import EkfacEstimator, KroneckerEstimator
from hpccl.curvature.protocols import Estimator, Precision
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, HpcclError
from tests.dist.test_kronecker import COUNT, KFAC, Asking, assert_equal, assert_same, build, pixels
from tests.dist.world import Result, run_in_world
from tests.unit.curvature.oracle import examples

# The first is cut into parts on several ranks, the second never, the third holds few eigenvectors.
ESTIMATORS: dict[str, Estimator] = {
    "kronecker": KroneckerEstimator(KFAC, ListedTasks()),
    "ekfac": EkfacEstimator(KFAC),
    "low rank": KroneckerEstimator(KFAC, ListedTasks(), keep_trace=0.9),
}
FIRST, SECOND, THIRD, LAST = (Mark.at(0, "fit", step) for step in (1, 2, 3, 4))


def written(folder: Path, mark: Mark, precision: Precision, comm: Comm, shard: Shard) -> int:
    own, whole = precision.shard_dict(), {"precision": precision.state_dict()}
    return save(folder, mark, Content(whole, precision, own), keep=9, comm=comm, shard=shard).num_bytes


def read(folder: Path, mark: Mark, comm: Comm) -> Precision:
    return precision_from_state(load(folder, mark)["precision"], open_shards(folder, mark), comm)


def four(comm: Comm, place: str) -> Result:
    """Four ranks save: anew, unchanged, unchanged where links are impossible, and with a full disk on one rank."""
    found: Result = {}
    data = Asking(examples(pixels(COUNT)), comm)
    shards = {kind: Shard() for kind in ESTIMATORS}
    precisions = {kind: estimator.estimate(build("wide"), data, comm) for kind, estimator in ESTIMATORS.items()}
    for kind, precision in precisions.items():
        folder = Path(place) / kind
        folder.mkdir(exist_ok=True)
        found[kind] = [written(folder, mark, precision, comm, shards[kind]) for mark in (FIRST, SECOND)]
    folder, same, shard = Path(place) / "low rank", precisions["low rank"], shards["low rank"]
    found["no links"] = instead(os, "link", unlinked, lambda: written(folder, THIRD, same, comm, shard))
    try:
        write = no_space if comm.rank == 2 else tree.write_tree
        other = same.times(1.0)
        instead(store, "write_tree", write, lambda: written(folder, LAST, other, comm, shard))
    except HpcclError as error:
        found["full"] = {"kind": type(error).__name__, "message": str(error)}
    return found


def instead(owner: Any, name: str, other: Callable[..., Any], run: Callable[[], Any]) -> Any:
    former = getattr(owner, name)
    setattr(owner, name, other)
    try:
        return run()
    finally:
        setattr(owner, name, former)


def unlinked(*_: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def no_space(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def again(comm: Comm, place: str, target: str) -> Result:
    """Read what others wrote, and save it once more."""
    for kind in ESTIMATORS:
        folder = Path(target) / kind
        folder.mkdir(exist_ok=True)
        written(folder, FIRST, read(Path(place) / kind, FIRST, comm), comm, Shard())
    return {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    place = tmp_path_factory.mktemp("saved")
    return place, run_in_world(four, 4, tmp_path_factory.mktemp("four"), str(place))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_another_number_of_ranks_reads_the_same_and_writes_it_back(
    saved: tuple[Path, list[Result]], tmp_path: Path, size: int
) -> None:
    place, _ = saved
    run_in_world(again, size, tmp_path, str(place), str(tmp_path))
    for kind in ESTIMATORS:
        before, after = (read(folder / kind, FIRST, Comm.solo()) for folder in (place, tmp_path))
        assert_same(after, before, 0.0)
        assert_equal(after.state_dict(), before.state_dict())
        assert len(list((tmp_path / kind / FIRST.name).glob("curvature-*.safetensors"))) == size
        # Back on four ranks, each finds what it had.
        for rank in range(4):
            there = Comm(rank, 4, torch.device("cpu"))
            one, other = (read(folder / kind, FIRST, there).shard_dict() for folder in (place, tmp_path))
            assert one.keys() == other.keys()
            for layer, states in one.items():
                for state, same in zip(states, other[layer], strict=True):
                    assert_equal(state, same)


def files(folder: Path, mark: Mark) -> list[Path]:
    return sorted((folder / mark.name).glob("curvature-*"))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_what_is_unchanged_is_linked(saved: tuple[Path, list[Result]], tmp_path: Path, kind: str) -> None:
    place, ranks = saved
    first, second = (files(place / kind, mark) for mark in (FIRST, SECOND))
    assert len(first) == len(second) == 8
    assert [path.stat().st_ino for path in first] == [path.stat().st_ino for path in second]
    shards = sum(path.stat().st_size for path in first)
    for rank in ranks:
        assert rank[kind][0] - rank[kind][1] == pytest.approx(shards, abs=8)  # but for the length of a mark
    shutil.copytree(place / kind / SECOND.name, tmp_path / SECOND.name)  # needs no other
    assert_same(read(tmp_path, SECOND, Comm.solo()), read(place / kind, FIRST, Comm.solo()), 0.0)


def test_it_is_written_anew_where_links_are_impossible(saved: tuple[Path, list[Result]]) -> None:
    place, ranks = saved
    second, third = (files(place / "low rank", mark) for mark in (SECOND, THIRD))
    assert not {path.stat().st_ino for path in second} & {path.stat().st_ino for path in third}
    assert all(rank["no links"] == ranks[0]["low rank"][0] for rank in ranks)
    before, after = (read(place / "low rank", mark, Comm.solo()) for mark in (SECOND, THIRD))
    assert_same(after, before, 0.0)


def test_a_full_disk_on_one_rank_ends_all_and_harms_nothing(saved: tuple[Path, list[Result]]) -> None:
    place, ranks = saved
    assert [rank["full"]["kind"] for rank in ranks] == ["WorldError", "WorldError", "FolderError", "WorldError"]
    assert "the disk is full: free some space" in ranks[2]["full"]["message"]
    assert "the checkpoints before it are untouched" in ranks[2]["full"]["message"]
    assert "another rank could not write" in ranks[0]["full"]["message"]
    assert latest(place / "low rank") == THIRD
    assert sorted(path.name for path in (place / "low rank").iterdir()) == [FIRST.name, SECOND.name, THIRD.name]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "of another checkpoint"])
def test_damaged_shards_are_refused(saved: tuple[Path, list[Result]], tmp_path: Path, damage: str, suffix: str) -> None:
    folder, other = tmp_path / "kronecker", saved[0] / "low rank" / FIRST.name
    shutil.copytree(saved[0] / "kronecker" / FIRST.name, folder / FIRST.name)
    victim = folder / FIRST.name / f"curvature-00002-of-00004.{suffix}"
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    else:
        for ending in ("json", "safetensors"):
            name = f"curvature-00002-of-00004.{ending}"
            shutil.copy(other / name, folder / FIRST.name / name)
    for rank in range(2):  # whatever a rank needs of it
        with pytest.raises(CheckpointError) as error:
            read(folder, FIRST, Comm(rank, 2, torch.device("cpu")))
        assert "curvature-00002-of-00004" in str(error.value)
        assert "to continue from the one before" in str(error.value)
        assert ("another checkpoint" in str(error.value)) == (damage == "of another checkpoint")
