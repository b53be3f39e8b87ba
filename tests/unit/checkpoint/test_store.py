"""Checkpoints appear whole or not at all, are pruned, and refuse what they do not know."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint import store
from hpccl.checkpoint.store import Content, Mark, latest, load, open_shards, refuse_torn, save
from hpccl.dist.spread import whole
from hpccl.errors import CheckpointError, FolderError, WorldError

TREE: dict[str, Any] = {"a": torch.arange(3), "b": {"c": [torch.ones(2, 2), None, 1.5], "d": "text"}, "e": {}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    mark = Mark.at(2, "fit", 30)
    saved = save(tmp_path, mark, Content(TREE), keep=1)
    tree = load(tmp_path, mark)
    assert torch.equal(tree["a"], TREE["a"])
    assert torch.equal(tree["b"]["c"][0], torch.ones(2, 2))
    assert tree["b"]["c"][1:] == [None, 1.5]
    assert tree["b"]["d"] == "text"
    assert tree["e"] == {}
    assert saved.num_bytes == sum(path.stat().st_size for path in (tmp_path / mark.name).iterdir())


def test_tensors_lie_in_memory_as_new_ones_do(tmp_path: Path) -> None:
    """Products of matrices that begin elsewhere, as they do in the file, are rounded otherwise."""
    mark = Mark.at(0, "fit", 1)
    save(tmp_path, mark, Content({str(length): torch.ones(length) for length in range(1, 9)}), keep=1)
    assert {value.data_ptr() % 64 for value in load(tmp_path, mark).values()} == {0}


def test_no_pickle_is_written(tmp_path: Path) -> None:
    save(tmp_path, Mark.at(0, "fit", 1), Content(TREE), keep=1)
    assert names(tmp_path / "task-000-fit-00000001") == ["state.json", "state.safetensors"]


def test_latest_follows_the_order_of_a_run(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    for task, phase, step in [(0, "fit", 9), (0, "fitted", 10), (0, "done", 10), (1, "fit", 2)]:
        save(tmp_path, Mark.at(task, phase, step), Content(TREE), keep=3)
    assert latest(tmp_path) == Mark.at(1, "fit", 2)


def test_pruning_keeps_ends_and_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, Mark.at(0, "fit", step), Content(TREE), keep=2)
    assert names(tmp_path) == ["task-000-fit-00000002", "task-000-fit-00000003"]
    save(tmp_path, Mark.at(0, "fitted", 4), Content(TREE), keep=2)
    save(tmp_path, Mark.at(0, "done", 4), Content(TREE), keep=2)
    assert names(tmp_path) == ["task-000-done-00000004", "task-000-fitted-00000004"]
    save(tmp_path, Mark.at(1, "fitted", 5), Content(TREE), keep=2)
    save(tmp_path, Mark.at(1, "done", 5), Content(TREE), keep=2)
    assert names(tmp_path)[2:] == ["task-001-done-00000005"]


def test_unknown_format(tmp_path: Path) -> None:
    mark = Mark.at(0, "fit", 1)
    save(tmp_path, mark, Content(TREE), keep=1)
    state = tmp_path / mark.name / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99, this version reads 1"):
        load(tmp_path, mark)


@pytest.mark.parametrize("victim", ["state.json", "state.safetensors"])
def test_torn_file(tmp_path: Path, victim: str) -> None:
    mark = Mark.at(0, "fit", 1)
    save(tmp_path, mark, Content(TREE), keep=1)
    path = tmp_path / mark.name / victim
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"cannot be read.*continue from the one before"):
        load(tmp_path, mark)


def test_a_torn_file_of_tensors_is_found_without_reading_them(tmp_path: Path) -> None:
    mark = Mark.at(0, "done", 1)
    save(tmp_path, mark, Content(TREE), keep=1)
    refuse_torn(tmp_path, mark)
    path = tmp_path / mark.name / "curvature-00000-of-00001.safetensors"  # as a rank leaves it
    whole_file = (tmp_path / mark.name / "state.safetensors").read_bytes()
    path.write_bytes(whole_file[:-1])
    with pytest.raises(CheckpointError, match=r"cannot be read \(curvature-00000-of-00001: .*the one before"):
        refuse_torn(tmp_path, mark)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_altered_tensor_is_noticed(tmp_path: Path, lazy: bool) -> None:
    mark = Mark.at(0, "done", 1)
    save(tmp_path, mark, Content({"weights": {"a": torch.ones(4), "b": torch.zeros(2, dtype=torch.bool)}}), keep=1)
    path = tmp_path / mark.name / "state.safetensors"
    content = path.read_bytes()
    at = content.index(torch.ones(4).numpy().tobytes())
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"cannot be read.*'/weights/a' was altered since it was written"):
        whole(load(tmp_path, mark, lazy=lazy)["weights"]["a"])


def test_what_an_earlier_version_wrote_without_checksums_is_read(tmp_path: Path) -> None:
    mark = Mark.at(0, "done", 1)
    save(tmp_path, mark, Content(TREE), keep=1)
    state = tmp_path / mark.name / "state.json"
    content = json.loads(state.read_text())
    del content["crc32"]
    state.write_text(json.dumps(content))
    assert load(tmp_path, mark).keys() == TREE.keys()


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 1}', '{"tree": []}', '{"format": 1, "tree": {"a": 3'])
def test_json_of_another_kind(tmp_path: Path, content: str) -> None:
    mark = Mark.at(0, "fit", 1)
    shard = {"layer": [{"a": torch.ones(2)}]}
    save(tmp_path, mark, Content(TREE, source=TREE, own=shard), keep=1)
    assert open_shards(tmp_path, mark)(lambda layer: True)["layer"]
    (tmp_path / mark.name / "curvature-00000-of-00001.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|belongs to another"):
        open_shards(tmp_path, mark)(lambda layer: True)
    (tmp_path / mark.name / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|has format None"):
        load(tmp_path, mark)


def test_full_disk_leaves_the_older_ones(tmp_path: Path) -> None:
    """A real full disk is tried in tests/run; here only that any failing write cleans up after itself."""
    save(tmp_path, Mark.at(0, "fit", 1), Content(TREE), keep=1)
    with pytest.raises(FolderError, match="checkpoints before it are untouched"):
        save(Path("/dev/full"), Mark.at(0, "fit", 2), Content(TREE), keep=1)
    assert names(tmp_path) == ["task-000-fit-00000001"]
    assert os.strerror(errno.ENOSPC)


def test_a_server_that_fails_over_is_no_reason_to_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WorldError: a job of SLURM is queued again."""

    def stale(folder: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("hpccl.checkpoint.store.sync", stale)
    with pytest.raises(WorldError, match=r"Stale file handle .*the checkpoints before it are untouched"):
        save(tmp_path, Mark.at(0, "fit", 2), Content(TREE), keep=1)
    assert names(tmp_path) == []


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".task-000-fit-00000001.123.part"
    left.mkdir()
    (left / "state.json").write_text("{")
    assert latest(tmp_path) is None
    save(tmp_path, Mark.at(0, "fit", 2), Content(TREE), keep=1)
    assert names(tmp_path) == ["task-000-fit-00000002"]
    assert store.FORMAT == 1
