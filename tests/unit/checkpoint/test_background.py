"""Checkpoints that are written while training goes on: a copy of the moment, all or nothing, failures told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint import store
from hpccl.checkpoint.store import Content, Mark, Shard, Writing, latest, load, save
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Slab, Span, whole
from hpccl.errors import FolderError
from hpccl.train.state import _copied
from tests.run.method import learn, make_world, merged

FIRST, SECOND = Mark.at(0, "fit", 1), Mark.at(0, "fit", 2)


def begin(folder: Path, mark: Mark, tree: dict[str, Any]) -> Writing:
    return Writing.begin(folder, mark, Content(tree), keep=2, comm=Comm.solo(), shard=Shard(), wait=False)


def test_training_goes_on_in_what_is_being_written(tmp_path: Path) -> None:
    """Through the state of a real run: weights, moments and memory are those of the moment."""
    config = merged({"checkpoint": {"background": True}, "train": {"epochs": 1}, "memory": {"size": 10}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    then = {name: value.clone() for name, value in state.engine.gather().items() if isinstance(value, torch.Tensor)}
    world.save(state, SECOND)
    writing = state.writing
    assert writing is not None
    state.engine.put({name: torch.full_like(value, 7) for name, value in then.items()})
    world.settle(state)
    assert state.writing is None
    found = load(world.folder.checkpoints, SECOND)["engine"]["weights"]
    assert found.keys() == then.keys()
    for name, value in then.items():
        assert torch.equal(found[name], value)


def test_everything_that_may_change_is_copied() -> None:
    value, part = torch.zeros(3), torch.zeros(2)
    tree = {"a": [value, {"b": Slab(part, Span((2,), 0, 2))}], "c": "text"}
    copied, elsewhere = _copied(tree, whole=True), _copied(tree, whole=False)
    assert elsewhere["a"][0].numel() == 0, "only the leader writes what all ranks have"
    value.fill_(1)
    part.fill_(1)
    assert copied["a"][0].tolist() == [0, 0, 0]
    assert copied["a"][1]["b"].local.tolist() == elsewhere["a"][1]["b"].local.tolist() == [0, 0]
    assert (copied["a"][1]["b"].span, copied["c"]) == (Span((2,), 0, 2), "text")


def test_it_appears_when_it_is_finished(tmp_path: Path) -> None:
    save(tmp_path, FIRST, Content({"a": torch.zeros(1)}), keep=2)
    writing = begin(tmp_path, SECOND, {"a": torch.ones(1), "w": Slab(torch.arange(4.0), Span((2, 2), 0, 4))})
    assert writing.thread is not None
    writing.thread.join()
    assert writing.written
    assert latest(tmp_path) == FIRST
    saved = writing.finish()
    assert latest(tmp_path) == SECOND
    assert saved.num_bytes == sum(path.stat().st_size for path in (tmp_path / SECOND.name).iterdir())
    assert torch.equal(whole(load(tmp_path, SECOND)["w"]), torch.arange(4.0).view(2, 2))


def test_a_write_that_fails_is_told_at_the_end(tmp_path: Path) -> None:
    """A file that is in the way stands for a disk that is full."""
    save(tmp_path, FIRST, Content({"a": torch.zeros(1)}), keep=2)
    gate = threading.Event()

    class Slow(Writing):
        def _write(self) -> None:
            gate.wait(10)
            super()._write()

    writing = Slow.begin(
        tmp_path, SECOND, Content({"a": torch.ones(1)}), keep=2, comm=Comm.solo(), shard=Shard(), wait=False
    )
    (writing.beside / "state.safetensors").mkdir()
    gate.set()
    with pytest.raises(FolderError, match=r"cannot be written: .*the checkpoints before it are untouched") as caught:
        writing.finish()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EISDIR
    assert sorted(os.listdir(tmp_path)) == [FIRST.name]
    assert torch.equal(load(tmp_path, FIRST)["a"], torch.zeros(1))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from hpccl.checkpoint.store import Content, Mark, Shard, Writing, save
from hpccl.dist.comm import Comm
folder = Path(sys.argv[1])
save(folder, Mark.at(0, "fit", 1), Content({"a": torch.zeros(1)}), keep=1)
writing = Writing.begin(
    folder, Mark.at(0, "fit", 2), Content({"a": torch.ones(1)}), keep=1, comm=Comm.solo(), shard=Shard(), wait=False
)
writing.thread.join()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_before_the_end_leaves_the_one_before(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert len(os.listdir(tmp_path)) == 2  # what was written lies beside
    assert latest(tmp_path) == FIRST
    assert torch.equal(load(tmp_path, FIRST)["a"], torch.zeros(1))
    save(tmp_path, SECOND, Content({"a": torch.ones(1)}), keep=1)
    assert os.listdir(tmp_path) == [SECOND.name]


def test_a_thread_that_ends_in_any_way_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that finds no memory for its copies: half a folder must not take the place of a whole one."""

    def without_memory(*_: object, **__: object) -> int:
        raise MemoryError("no room")

    save(tmp_path, FIRST, Content({"a": torch.zeros(1)}), keep=1)
    monkeypatch.setattr(store, "write_tree", without_memory)
    writing = Writing.begin(
        tmp_path, SECOND, Content({"a": torch.ones(1)}), keep=1, comm=Comm.solo(), shard=Shard(), wait=False
    )
    with pytest.raises(MemoryError, match="no room"):
        writing.finish()
    assert latest(tmp_path) == FIRST
    assert [path.name for path in tmp_path.iterdir()] == [FIRST.name]
