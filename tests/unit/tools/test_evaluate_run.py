"""Evaluating a run takes one process, whatever it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hpccl.checkpoint.store import Mark, load, open_shards
from hpccl.config.load import dump
from hpccl.errors import CheckpointError
from hpccl.folder import RunFolder
from hpccl.tools.evaluate_run import evaluate_run, find_checkpoint, with_newest
from hpccl.train.evaluate import evaluate_all
from hpccl.train.run import fresh_state
from tests.run.method import learn, make_world, merged


@pytest.mark.parametrize("engine", [{"kind": "fsdp2", "shard_size": 8}, {"kind": "deepspeed", "stage": 3}])
def test_a_run_of_many_ranks_is_evaluated_by_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    state, world = make_world(merged({"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 1)
    expected = evaluate_all(state, world, last=0)[0]["task_incremental"]["accuracy"]
    world.save(state, Mark.at(0, "done", state.mark.step))
    world.folder.config.write_text(dump(merged({"train": {"epochs": 1}, "engine": engine})))
    assert evaluate_run(tmp_path)["average_accuracy"] == expected


def test_a_checkpoint_that_a_run_replaces_while_it_is_read_is_passed_over(tmp_path: Path) -> None:
    state, world = make_world(merged({"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 1)
    world.folder.config.write_text(dump(world.config))
    folder, looked = RunFolder(tmp_path), list[Mark]()
    old, new = find_checkpoint(folder, None), Mark.at(0, "done", state.mark.step)

    def read(mark: Mark) -> None:
        looked.append(mark)
        tree = load(folder.checkpoints, mark)
        if mark == old:
            world.save(state, new)
            shutil.rmtree(folder.checkpoints / old.name)
        assert tree["engine"]["weights"]
        other = fresh_state(world.config, world.stream, world.comm)
        other.load_state_dict(load(folder.checkpoints, mark), mark, open_shards(folder.checkpoints, mark), world.comm)

    with_newest(folder, None, read)
    assert looked == [old, new]


def test_a_checkpoint_that_is_there_and_damaged_is_not_passed_over(tmp_path: Path) -> None:
    state, world = make_world(merged({"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 1)
    world.save(state, Mark.at(0, "done", state.mark.step))
    world.folder.config.write_text(dump(world.config))
    (tmp_path / "checkpoints" / state.mark.name / "state.json").unlink()
    with pytest.raises(CheckpointError):
        evaluate_run(tmp_path)
