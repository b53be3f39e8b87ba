"""Views of several sizes: a schedule over a task's epochs, and test images of a size of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpccl.config.data import CropFlip, DataConfig, NoAugment, Progressive, TimmAugment
from hpccl.config.load import load
from hpccl.config.model import TimmModel
from hpccl.config.stream import Part, ShardStream
from hpccl.data.build import open_stream, outline
from hpccl.data.decoded import DecodedImages
from hpccl.data.rows import Request
from hpccl.data.shards.build import build
from hpccl.data.stream import ImageStream
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError
from hpccl.memory.store import Memory
from hpccl.models.build import build_model, refuse_sizes
from hpccl.tools.plan.build import make_plan
from hpccl.train.compose import Composer, split
from hpccl.train.plan import plan_task
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.unit.data.tiny_images import hash_of, image_bytes, pixels, write_folder

GROWS = Progressive(first=16, begin=0.25, end=0.75, multiple=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    files = {}
    for part, count in (("train", 8), ("test", 3)):
        for name in "abcd":
            for number in range(count):
                path = f"{part}/{name}/{number}.jpeg"
                files[path] = image_bytes(pixels(hash_of(path), 60, 50 + number), "jpeg")
    build(write_folder(folder / "images", files), folder / "shards")
    return folder / "shards"


def stream_of(shards: Path, **data: Any) -> ImageStream:
    stream = ShardStream(parts=(Part(path=str(shards), tasks=2),))
    return open_stream(stream, DataConfig(**{"workers": 0, "image_size": 32, **data}))


def loaded(stream: ImageStream, request: Request, split: Any = "train") -> Tensor:
    (images,) = stream.load([request], split)
    return images.pixels


def test_the_schedule() -> None:
    sides = [GROWS.side(epoch, 9, 32) for epoch in range(9)]
    assert sides == [16, 16, 16, 20, 24, 28, 32, 32, 32]
    assert set(sides) <= set(GROWS.sides(32))
    assert GROWS.side(0, 1, 32) == 32  # a single epoch is the last one
    assert Progressive(first=160, begin=0.5, end=0.5).side(5, 11, 192) == 192
    assert Progressive(first=150).sides(200) == (150, 160, 192, 200)


@pytest.mark.parametrize("epochs", [2, 7, 40])
def test_sides_only_grow_and_are_all_announced(epochs: int) -> None:
    for first, last, multiple in ((150, 200, 32), (160, 192, 32), (31, 33, 1), (64, 64, 32)):
        grows = Progressive(first=first, multiple=multiple, begin=0.1, end=0.9)
        sides = [grows.side(epoch, epochs, last) for epoch in range(epochs)]
        assert sides == sorted(sides)
        assert (sides[0], sides[-1]) == (first, last)
        assert set(sides) <= set(grows.sides(last))


@pytest.mark.parametrize("augment", [NoAugment(), CropFlip(), TimmAugment(auto_augment="rand-m5", random_erase=0.5)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_of_a_size_is_a_stream_of_that_size(shards: Path, augment: Any, workers: int) -> None:
    samples, keys = np.arange(6), np.array([0, 5, 7, 9, 0, 11], dtype=np.uint64)
    grown = stream_of(shards, augment=augment, progressive=GROWS, workers=workers)
    for side in (16, 24, 32):
        plain = stream_of(shards, augment=augment, image_size=side)
        assert torch.equal(loaded(grown, Request(samples, keys, side)), loaded(plain, Request(samples, keys)))


def test_test_images_have_a_size_of_their_own(shards: Path, tmp_path: Path) -> None:
    request = Request(np.arange(5), np.zeros(5, dtype=np.uint64))
    stream = stream_of(shards, test_size=40)
    assert (stream.image_shape, stream.shape("train"), stream.shape("test")) == ((3, 32, 32), (3, 32, 32), (3, 40, 40))
    assert torch.equal(loaded(stream, request, "test"), loaded(stream_of(shards, image_size=40), request, "test"))
    assert loaded(stream, request).shape[2:] == (32, 32)
    kept = stream_of(shards, test_size=40, storage="decoded", cache=str(tmp_path))
    assert isinstance(kept.source, DecodedImages)
    for which in ("train", "test"):
        assert torch.equal(loaded(kept, request, which), loaded(stream, request, which))
    part = ShardStream(parts=(Part(path=str(shards)),))
    found = outline(part, DataConfig(image_size=32, test_size=40))
    assert (found.image_shape, found.test_shape, found.view.size) == ((3, 32, 32), (3, 40, 40), 40)


@pytest.mark.parametrize("view", ["stored", "recorded", "teacher"])
def test_every_kind_of_row_has_the_epochs_size_on_any_number_of_ranks(shards: Path, view: str) -> None:
    """New, soft and replayed rows of a step are one batch; sizes and keys are functions of the step alone."""
    settings = [
        f"stream={{kind: shards, parts: [{{path: {shards}, tasks: 2}}]}}",
        "model={kind: timm, name: resnet18}",
        "data={image_size: 32, workers: 0, progressive: {first: 16, begin: 0.25, end: 0.75, multiple: 4}}",
        "data.augment.kind=timm",
        "train={epochs: 5, batch_size: 10}",
        "memory.size=4",
        f"prior={{replay: 0.5, view: {view}}}",
    ]
    config = load([], settings)
    stream = open_stream(config.stream, config.data)
    memory = Memory.empty().admit(
        task=0,
        sample=torch.tensor([1, 9, 4, 12]),
        label=torch.tensor([0, 1, 0, 1]),
        replay=torch.tensor([True, True, False, False]),
    )
    task = stream.tasks[1]
    plan = plan_task(config, stream, task, memory)
    composer = Composer.build(config, stream, task, memory, teacher=None, device=torch.device("cpu"))
    assert plan.steps_per_epoch == 2
    sides = []
    for step in range(plan.num_steps):
        whole = [composer.request(part) for part in split(plan.batch(step), Comm.solo(), accumulate=1)]
        ranks = [
            composer.request(part)
            for rank in range(3)
            for part in split(plan.batch(step), Comm(rank, 3, torch.device("cpu")), accumulate=1)
        ]
        assert {request.size for request in ranks} == {whole[0].size}
        together = torch.cat([images.pixels for images in stream.load(ranks)])
        alone = torch.cat([images.pixels for images in stream.load(whole)])
        assert torch.equal(together, alone)
        sides.append(alone.shape[-1])
    assert sides == [16, 16, 16, 16, 24, 24, 32, 32, 32, 32]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.progressive.first=16"], "with data.image_size = null: needs data.image_size"),
        (["data.test_size=16"], "data.test_size = 16 with data.image_size = null: needs"),
        (["data.image_size=32", "data.progressive.first=40", "model.name=resnet18"], "is above 32; views only grow"),
        (["data.image_size=32", "data.progressive={first: 16, begin: 0.9}"], "is above 0.85; views only grow"),
        (["data.image_size=32", "data.progressive.first=16", "data.storage=decoded"], "needs the full images"),
        (["data.image_size=32", "data.test_size=40", "model={kind: mlp}"], "mlp is built for one"),
        (
            [
                "data={image_size: 32, test_size: 40}",
                "model={kind: timm, name: vit_tiny_patch16_224, options: {img_size: 32}}",
            ],
            "gives images of several sizes, but vit_tiny_patch16_224 takes one; add dynamic_img_size: true",
        ),
        (
            [
                "data={image_size: 32, progressive: {first: 16}}",
                "model={kind: timm, name: swin_tiny_patch4_window7_224}",
            ],
            "add dynamic_img_size: true",
        ),
    ],
)
def test_what_cannot_be(shards: Path, settings: list[str], words: str) -> None:
    stream = f"stream={{kind: shards, parts: [{{path: {shards}}}]}}"
    with pytest.raises(ConfigError) as caught:
        load([], [stream, "model={kind: timm, name: resnet18}", *settings])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("test_vit", {"img_size": 32, "dynamic_img_size": True}), ("test_convnext", {})],
)
def test_networks_that_take_several_sizes(name: str, options: dict[str, Any]) -> None:
    model = TimmModel(kind="timm", name=name, options=options)
    refuse_sizes(model, image_shape=(3, 32, 32), num_classes=4, sides=(32, 48, 64))


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [("test_vit", {"img_size": 32, "dynamic_img_size": False}, 48), ("mixer_s32_224", {"img_size": 64}, 96)],
)
def test_networks_that_do_not_are_refused_before_anything_is_trained(
    name: str, options: dict[str, Any], side: int
) -> None:
    model, shape = TimmModel(kind="timm", name=name, options=options), (3, options["img_size"], options["img_size"])
    refuse_sizes(model, image_shape=shape, num_classes=4, sides=(options["img_size"],))
    with pytest.raises(
        ConfigError, match=rf"images of {side} pixels, which '{name}' does not accept .*dynamic_img_size"
    ):
        refuse_sizes(model, image_shape=shape, num_classes=4, sides=(options["img_size"], side))


def test_a_run_asks_its_network_first(shards: Path, tmp_path: Path) -> None:
    config = load(
        [],
        [
            f"stream={{kind: shards, parts: [{{path: {shards}, tasks: 2}}]}}",
            "data={image_size: 64, test_size: 96, workers: 0}",
            "model={kind: timm, name: mixer_s32_224, options: {img_size: 64}}",
            f"folder={tmp_path / 'run'}",
        ],
    )
    with pytest.raises(ConfigError, match="'mixer_s32_224' does not accept"):
        run(config, Comm.solo(), Stop(), quiet=True)
    with pytest.raises(ConfigError, match="'mixer_s32_224' does not accept"):
        make_plan(config, nodes=1, nproc=1, measured=False)


@pytest.mark.parametrize("mix", ["{kind: natural}", "{kind: stratified, share: 0.25}"])
def test_a_plan_counts_each_epoch_at_its_own_size(shards: Path, mix: str) -> None:
    """Against the images that the steps of a run ask for, and the arithmetic of their convolutions one by one."""
    config = load(
        [],
        [
            f"stream={{kind: shards, parts: [{{path: {shards}, tasks: 2}}]}}",
            "data={image_size: 32, workers: 0, progressive: {first: 16, begin: 0.25, end: 0.75, multiple: 8}}",
            "model={kind: timm, name: test_resnet}",
            "train={epochs: [5, 3], batch_size: 6}",
            f"memory={{size: 8, mix: {mix}}}",
        ],
    )
    plan = make_plan(config, nodes=1, nproc=1)
    expected = steps_by_side(config)
    assert {each.side: each.steps for each in plan.views} == expected
    network = build_model(config.model, image_shape=(3, 32, 32), num_classes=4, seed=0).eval()
    for each in plan.views:
        assert each.cost == pytest.approx(arithmetic(network, each.side) / arithmetic(network, 32), rel=1e-6)
    assert plan.views[0].cost == pytest.approx(1 / 4, rel=0.25)  # half the side, and a last layer of one size
    assert plan.steps == sum(expected.values())
    assert plan.step_seconds is not None
    (passes,) = (each.seconds for each in plan.spent if each.name == "forward and backward pass")
    by_hand = sum(each.steps * (plan.step_seconds - passes * (1 - each.cost)) for each in plan.views)
    assert plan.run_seconds == pytest.approx(by_hand)
    same = make_plan(load([], ["train.epochs=2"]), nodes=1, nproc=1)
    assert same.step_seconds is not None
    assert (same.views, same.run_seconds) == ((), same.steps * same.step_seconds)


def steps_by_side(config: Any) -> dict[int, int]:
    """What the composer asks for in every step of every task."""
    stream, memory = open_stream(config.stream, config.data), Memory.empty()
    found: Counter[int] = Counter()
    for task in stream.tasks:
        plan = plan_task(config, stream, task, memory)
        composer = Composer.build(config, stream, task, memory, teacher=None, device=torch.device("cpu"))
        for step in range(plan.num_steps):
            (part,) = split(plan.batch(step), Comm.solo(), accumulate=1)
            found[composer.request(part).size or 0] += 1
        samples = torch.arange(task.samples("train").start, task.samples("train").stop)[
            :: len(task.samples("train")) // 8
        ]
        labels = torch.from_numpy(stream.labels("train"))[samples]
        memory = memory.admit(task=task.index, sample=samples, label=labels, replay=torch.zeros(len(samples)).bool())
    return dict(found)


def arithmetic(network: nn.Module, side: int) -> int:
    """Two for every weight and place that it is used at."""
    total = 0

    def count(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        total += 2 * layer.weight.numel() * (out[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1)

    handles = [
        each.register_forward_hook(count) for each in network.modules() if isinstance(each, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return total
