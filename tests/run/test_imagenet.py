"""Class-incremental ImageNet from end to end, on files laid out as they are published."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.data.shards.build import build
from hpccl.data.shards.encodings import Reencode
from hpccl.data.shards.labels import read_labels
from hpccl.train.evaluate import evaluate_all as evaluated
from tests.run.command import hpccl
from tests.run.method import learn, make_world
from tests.unit.data.tiny_images import image_bytes, per_class_tars, pixels, tar_bytes

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "configs" / "imagenet_10x100.yaml", ROOT / "configs" / "method" / "ewc+fr+replay.yaml"]
SMALL = [
    "data.image_size=32",
    "data.progressive={first: 24, begin: 0.3, end: 0.9, multiple: 8}",
    "data.test_size=40",
    "data.workers=1",
    "train.epochs=2",
    "train.batch_size=50",
    "engine.precision=fp32",
    "curvature.fraction=0.1",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def ilsvrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1000 classes with two training images and one validation image each, by way of the published tars."""
    folder = tmp_path_factory.mktemp("ilsvrc")
    wnids = [f"n{number * 7919 % 10**8:08d}" for number in range(1000)]
    images = [image_bytes(pixels(number, 40, 48)) for number in range(60)]
    train = {f"{name}/{name}_{n}.JPEG": images[(7 * k + n) % 60] for k, name in enumerate(wnids) for n in range(2)}
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 1001)]
    classes = dict(zip(names, np.random.default_rng(0).permutation(wnids).tolist(), strict=True))
    (folder / "train.tar").write_bytes(tar_bytes(per_class_tars(train)))
    (folder / "val.tar").write_bytes(tar_bytes({f"{name}.JPEG": images[n % 60] for n, name in enumerate(names)}))
    (folder / "labels.txt").write_text("".join(f"{name}.JPEG {wnid}\n" for name, wnid in classes.items()))
    encoding = Reencode(max_side=44)
    build(folder / "train.tar", folder / "shards", split="train", encoding=encoding)
    labels = read_labels(folder / "labels.txt")
    build(folder / "val.tar", folder / "shards", split="test", encoding=encoding, labels=labels)
    return folder / "shards"


def config_of(shards: Path, *settings: str, tasks: int = 10) -> RunConfig:
    return load(FILES, [f"stream.parts=[{{path: {shards}, tasks: {tasks}}}]", *SMALL, *settings])


def check_trained(config: RunConfig, folder: Path, *, tasks: int) -> list[dict[str, Any]]:
    state, world = make_world(config, folder)
    learn(state, world, tasks)
    assert len(state.prior.memory) == tasks * config.memory.size
    assert state.prior.quadratic is not None
    return evaluated(state, world, last=tasks - 1)


@pytest.mark.slow
def test_two_tasks_of_a_thousand_classes(ilsvrc: Path, tmp_path: Path) -> None:
    results = check_trained(config_of(ilsvrc, "memory.size=100"), tmp_path, tasks=2)
    assert [result["num"] for result in results] == [100] * 10
    assert all(result["class_incremental"] is not None for result in results[:2])
    assert all(np.isfinite(result["task_incremental"]["nll"]) for result in results)


@pytest.mark.slow
def test_real_images(real_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data / "imagenet-originals.zip") as archive:
        archive.extractall(tmp_path / "images")
    for split in ("train", "test"):
        build(tmp_path / "images" / "train", tmp_path / "shards", split=split, encoding=Reencode(max_side=200))
    config = config_of(tmp_path / "shards", "memory.size=20", "data.image_size=64", "data.test_size=80", tasks=3)
    results = check_trained(config, tmp_path / "run", tasks=2)
    assert [result["num"] for result in results] == [50, 50, 50]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "vit_small_patch16_224"])
def test_check_and_plan(ilsvrc: Path, model: str) -> None:
    options = "model.options={dynamic_img_size: true}" if model.startswith("vit") else "model.options={}"
    stream = f"stream.parts=[{{path: {ilsvrc}, tasks: 10}}]"
    arguments = [*map(str, FILES), stream, "memory.size=200", f"model.name={model}", options]
    code, output = hpccl("check", *arguments)
    assert code == 0, output
    code, output = hpccl("plan", *arguments, "--nodes", "4", "--nproc", "4", "--json", "--no-measure")
    assert code == 0, output
    assert json.loads(output[output.index("{") :])["num_weights"] > 11_000_000
