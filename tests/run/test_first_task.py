"""A first task that another run learned (train.first_task_from) is of the same images, or it is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.data.shards.build import build
from hpccl.errors import ConfigError
from tests.run.method import go_on, weights
from tests.unit.data.tiny_images import tiny_set, write_folder


def config_of(tmp_path: Path, name: str, *more: str) -> RunConfig:
    parts = f"stream={{kind: shards, parts: [{{path: '{tmp_path / 'shards'}', tasks: 3}}]}}"
    small = ["data={image_size: 12, workers: 0}", "model={kind: mlp, hidden: [8]}", "train={epochs: 2, batch_size: 8}"]
    rest = [
        "train.head=seen",
        "log.tensorboard=false",
        f"folder={tmp_path / name}",
        f"data.cache={tmp_path / name}-cache",
    ]
    return load([], [parts, *small, *rest, *more])


def test_a_first_task_of_other_images_is_refused(tmp_path: Path) -> None:
    build(write_folder(tmp_path / "images", tiny_set(images=9)), tmp_path / "shards")
    assert go_on(config_of(tmp_path, "first")) == "done"
    taken = f"train.first_task_from={tmp_path / 'first'}"
    assert go_on(config_of(tmp_path, "same", taken)) == "done"
    assert weights(tmp_path / "same") == weights(tmp_path / "first")

    (tmp_path / "shards").rename(tmp_path / "before")
    build(write_folder(tmp_path / "others", tiny_set(images=11)), tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"learned its first task from other data \(fingerprint .*rebuilt"):
        go_on(config_of(tmp_path, "other", taken))
