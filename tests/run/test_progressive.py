"""Stopping and going on in the middle of epochs whose views have other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpccl.cluster.prepare import prepare
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.data.shards.build import build
from hpccl.dist.comm import Comm
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.run.command import events
from tests.run.method import go_on, weights
from tests.unit.data.tiny_images import tiny_set, write_folder

EPOCHS, STEPS = 4, 6  # of the first task; its steps an epoch


class AtPoll(Stop):
    """A wish to stop at the n-th time that ranks ask each other within a task's steps."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def requested(self, comm: Comm) -> bool:
        self.number -= 1
        if self.number == 0:
            self.request("enough")
        return super().requested(comm)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    build(write_folder(tmp_path / "images", tiny_set(classes=4, images=8)), tmp_path / "shards")
    return tmp_path / "shards"


def config_of(shards: Path, folder: Path) -> RunConfig:
    settings = [
        f"stream={{kind: shards, parts: [{{path: {shards}, tasks: 2}}]}}",
        "data={image_size: 32, workers: 0, augment: {kind: timm}}",
        "data.progressive={first: 16, begin: 0.3, end: 0.9, multiple: 8}",
        "model={kind: timm, name: test_resnet}",
        f"train={{epochs: {EPOCHS}, batch_size: 3}}",
        "memory.size=4",
        "prior={replay: 0.5, quadratic: {weight: 1.0}}",
        "curvature.kind=diagonal",
        "checkpoint.every=0",
        "log.tensorboard=false",
        f"folder={folder}",
    ]
    return load([], settings)


def test_a_stop_within_an_epoch_of_every_size_changes_nothing(shards: Path, tmp_path: Path) -> None:
    whole, config = config_of(shards, tmp_path / "whole"), config_of(shards, tmp_path / "run")
    assert go_on(whole) == "done"
    for polls in (2, 1, 1):  # every five steps
        prepare(config, [])
        assert run(config, Comm.solo(), AtPoll(polls), quiet=True) == "stopped"
    stops = [event["step"] for event in events(tmp_path / "run", "stop")]
    grows = config.data.progressive
    assert grows is not None
    assert config.data.image_size is not None
    assert stops == [10, 15, 20]
    assert [step % STEPS for step in stops] == [4, 3, 2]  # in the middle of an epoch
    assert [grows.side(step // STEPS, EPOCHS, config.data.image_size) for step in stops] == [16, 24, 32]
    assert go_on(config) == "done"
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
