"""A run that begins with the weights of another run's export."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpccl.checkpoint.store import latest, load
from hpccl.cluster.prepare import prepare
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.errors import DataError, FolderError
from hpccl.folder import RunFolder
from hpccl.report.events import read_events
from hpccl.tools.export import export
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.run.method import merged


def trained(folder: Path, *changes: dict[str, Any]) -> RunConfig:
    config = merged({"stream": {"kind": "digits", "tasks": 2}, "train": {"epochs": 1}, "folder": str(folder)}, *changes)
    prepare(config, ["test"])
    assert run(config, Comm.solo(), Stop(), quiet=True) == "done"
    return config


def test_an_export_is_the_start_of_another_run(tmp_path: Path) -> None:
    trained(tmp_path / "first")
    file = tmp_path / "exported" / "model.safetensors"
    export(tmp_path / "first", tmp_path / "exported")
    config = trained(tmp_path / "second", {"model": {"checkpoint": str(file)}, "optim": {"lr": 1e-12}})
    (start,) = [event for event in read_events(tmp_path / "second" / "events.jsonl") if event["event"] == "start"]
    assert start["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert start["fresh"] == []
    weights = safetensors.torch.load_file(file)
    checkpoints = RunFolder(tmp_path / "second").checkpoints
    mark = latest(checkpoints)
    assert mark is not None
    for name, value in load(checkpoints, mark)["engine"]["weights"].items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9)

    file.rename(tmp_path / "moved.safetensors")  # what a run knows of its start is in its checkpoints
    assert run(config, Comm.solo(), Stop(), quiet=True) == "done"
    with pytest.raises(FolderError, match=r"model.checkpoint: .* there, None here"):
        prepare(config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": None})}), ["test"])


def test_a_network_that_restarts_needs_the_file_again(tmp_path: Path) -> None:
    trained(tmp_path / "first")
    export(tmp_path / "first", tmp_path / "exported")
    file = tmp_path / "exported" / "model.safetensors"
    config = trained(tmp_path / "second", {"model": {"checkpoint": str(file)}, "train": {"restart": True}})
    file.unlink()
    shutil.rmtree(max((tmp_path / "second" / "checkpoints").iterdir()))  # so that there is something left to learn
    with pytest.raises(DataError, match="cannot be read"):
        run(config, Comm.solo(), Stop(), quiet=True)
