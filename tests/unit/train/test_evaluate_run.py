"""Evaluating a run takes one process, whatever it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpccl.checkpoint.store import Mark
from hpccl.config.load import dump
from hpccl.errors import CheckpointError
from hpccl.folder import RunFolder
from hpccl.train import evaluate_run as module
from hpccl.train.evaluate import evaluate_all
from hpccl.train.evaluate_run import evaluate_run, newest_tree
from tests.run.method import learn, make_world, merged


@pytest.mark.parametrize("engine", [{"kind": "fsdp2", "shard_size": 8}, {"kind": "deepspeed", "stage": 3}])
def test_a_run_of_many_ranks_is_evaluated_by_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    state, world = make_world(merged({"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 1)
    expected = evaluate_all(state, world, last=0)[0]["task_incremental"]["accuracy"]
    world.save(state, Mark.at(0, "done", state.mark.step))
    world.folder.config.write_text(dump(merged({"train": {"epochs": 1}, "engine": engine})))
    assert evaluate_run(tmp_path)["average_accuracy"] == expected


def test_a_checkpoint_that_a_run_has_just_replaced_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, world = make_world(merged({"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 1)
    new = Mark.at(0, "done", state.mark.step)
    world.save(state, new)
    world.folder.config.write_text(dump(world.config))
    listed = iter([Mark.at(0, "fit", 1), new])  # the first went between the list and the reading
    monkeypatch.setattr(module, "find_checkpoint", lambda *_: next(listed))
    mark, tree = newest_tree(RunFolder(tmp_path), None)
    assert mark == new
    assert tree["engine"]["weights"]

    (tmp_path / "checkpoints" / new.name / "state.json").unlink()  # one that is there, and damaged, is not passed over
    monkeypatch.setattr(module, "find_checkpoint", lambda *_: new)
    with pytest.raises(CheckpointError):
        newest_tree(RunFolder(tmp_path), None)
