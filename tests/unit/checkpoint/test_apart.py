"""Tensors in files of their own: named by checkpoints, found again wherever the run folder is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hpccl.checkpoint.apart import Apart, read_apart, write_apart
from hpccl.checkpoint.store import Content, Mark, load, save
from hpccl.checkpoint.tree import read_tree, write_tree
from hpccl.errors import CheckpointError

VALUES = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    value = VALUES[:rows].to(dtype)
    where = write_apart(tmp_path, "memory/soft/task-000", value)
    found = read_apart(tmp_path, where)
    assert (found.dtype, found.shape) == (dtype, value.shape)
    assert torch.equal(found, value)
    assert write_apart(tmp_path, "memory/soft/task-000", value) == where


def test_a_repetition_replaces_what_no_checkpoint_names(tmp_path: Path) -> None:
    other = write_apart(tmp_path, "soft/task-001", VALUES)
    first = write_apart(tmp_path, "soft/task-000", VALUES)
    again = write_apart(tmp_path, "soft/task-000", VALUES + 1)
    assert first != again
    assert sorted(path.name for path in (tmp_path / "soft").iterdir()) == sorted(
        Path(each.path).name for each in (again, other)
    )


def test_checkpoints_name_it_and_the_folder_may_move(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    (run / "checkpoints").mkdir(parents=True)
    where, mark = write_apart(run, "memory/soft/task-000", VALUES), Mark.at(0, "done", 5)
    save(run / "checkpoints", mark, Content({"memory": {"soft": where, "few": VALUES[:1]}}), keep=1)
    folder = run / "checkpoints" / mark.name
    assert all(b"soft" not in path.read_bytes() for path in folder.glob("*.safetensors"))
    run.rename(moved)
    found = load(moved / "checkpoints", mark)["memory"]
    assert torch.equal(found["soft"], VALUES)
    assert torch.equal(found["few"], VALUES[:1])


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_file_that_is_gone_is_named(tmp_path: Path, damage: str) -> None:
    where = write_apart(tmp_path, "memory/soft/task-000", VALUES)
    path = tmp_path / where.path
    if damage == "missing":
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"task-000-[0-9a-f]{16}\.safetensors', which a checkpoint of this run"):
        read_apart(tmp_path, Apart(where.path))


def test_a_checkpoint_reads_nothing_outside_of_its_run(tmp_path: Path) -> None:
    where = write_apart(tmp_path, "other/soft", VALUES)
    with pytest.raises(CheckpointError, match="refers to a file outside it"):
        read_apart(tmp_path / "run", Apart(f"../{where.path}"))


def test_a_tree_that_has_no_files_apart_names_none(tmp_path: Path) -> None:
    """Such as an export's, which may come from anywhere."""
    where = write_apart(tmp_path, "other/soft", VALUES)
    (tmp_path / "export" / "one").mkdir(parents=True)
    write_tree(tmp_path / "export" / "one", {"value": where}, header={})
    assert torch.equal(read_tree(tmp_path / "export" / "one", apart=tmp_path)[1]["value"], VALUES)
    with pytest.raises(CheckpointError, match=r"it refers to another file, 'other/soft"):
        read_tree(tmp_path / "export" / "one")
