"""Distillation: heads, weights and targets against loops; the old network says the same as itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpccl.checkpoint.store import Mark
from hpccl.data.build import open_stream
from hpccl.data.rows import DISTILL, NEW, REPLAY, SIGMOID, Rows
from hpccl.dist.spread import wholes
from hpccl.train.compose import Composer, split
from hpccl.train.distill import Distilled, old_heads, record
from hpccl.train.fit import _recorded, fit
from hpccl.train.loss import weighted_nats
from hpccl.train.passes import shared_images
from hpccl.train.plan import plan_task
from hpccl.train.state import RunState, World
from tests.run.method import learn, make_world, merged

LWF: dict[str, Any] = {"train": {"head": "own"}, "prior": {"distill": {"weight": 0.5}}}
ALL: dict[str, Any] = {
    "train": {"head": "seen"},
    "memory": {"size": 20},
    "prior": {"replay": 1.0, "distill": {"weight": 1.0, "images": "all", "view": "same", "balance": "classes"}},
}


def third_task(folder: Path, *changes: dict[str, Any]) -> tuple[RunState, World]:
    state, world = make_world(merged({"train": {"epochs": 1}}, *changes), folder)
    learn(state, world, 2)
    return state, world


def composed(state: RunState, world: World) -> tuple[Rows, Composer, Tensor]:
    """Rows of the third task's first step, and the old network's logits of their images."""
    task = world.stream.tasks[2]
    teacher = state.engine.frozen(state.prior.anchor or {})
    distilled = Distilled.of(world.config, world.stream, task)
    assert distilled is not None
    composer = Composer.build(
        world.config, world.stream, task, state.prior.memory, teacher=teacher, device=torch.device("cpu"),
        distilled=distilled,
    )  # fmt: skip
    if distilled.config.view == "recorded":
        composer = _recorded(task, composer, distilled, state, world)
    plan = plan_task(world.config, world.stream, task, state.prior.memory)
    (part,) = split(plan.batch(0), world.comm, accumulate=1)
    (images,) = list(world.stream.load([composer.request(part)]))
    return composer.rows(part, images), composer, teacher(images.pixels)


def test_a_row_for_each_old_head(tmp_path: Path) -> None:
    rows, _, logits = composed(*third_task(tmp_path, LWF))
    new, old = rows.term == NEW, rows.term == DISTILL
    assert int(old.sum()) == 2 * int(new.sum())
    assert rows.kind is None  # all are cross-entropies
    for row in old.nonzero().squeeze(1).tolist():
        image, number = int(rows.image[row]), row - int(new.sum())
        classes = [0, 1] if number % 2 == 0 else [2, 3]
        assert rows.head[row].nonzero().squeeze(1).tolist() == classes
        expected = (logits[image, classes] / 2).softmax(0)
        torch.testing.assert_close(rows.target[row, classes], expected, atol=1e-5, rtol=1e-5)
        assert float(rows.weight[row]) == 0.5
        assert float(rows.temperature[row]) == 2.0


@pytest.mark.parametrize("view", ["recorded", "same"])
def test_memory_is_distilled_too_and_classes_are_weighed(tmp_path: Path, view: str) -> None:
    """Four old classes and two new ones: lambda = 2/3 (Wu et al. 2019). Without augmentation both views are one."""
    distill = {**ALL["prior"]["distill"], "view": view}
    rows, composer, logits = composed(*third_task(tmp_path, {**ALL, "prior": {"replay": 1.0, "distill": distill}}))
    hard, old = rows.term != DISTILL, rows.term == DISTILL
    assert int(hard.sum()) == int(old.sum())
    assert set(rows.term.tolist()) == {NEW, REPLAY, DISTILL}
    torch.testing.assert_close(rows.target[old][:, :4], (logits[:, :4] / 2).softmax(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.weight[hard], torch.full((int(hard.sum()),), 1 / 3))
    torch.testing.assert_close(rows.weight[old], torch.full((int(old.sum()),), 2 / 3))
    assert bool(rows.head[hard][:, :6].all())
    assert composer.distilled is not None
    assert composer.distilled.columns.tolist() == [0, 1, 2, 3]


def test_memory_that_is_not_distilled_is_weighed_as_new_images_are(tmp_path: Path) -> None:
    distill = {**ALL["prior"]["distill"], "images": "new"}
    rows, _, _ = composed(*third_task(tmp_path, {**ALL, "prior": {"replay": 1.0, "distill": distill}}))
    assert set(rows.term.tolist()) == {NEW, REPLAY, DISTILL}
    for term, weight in ((NEW, 1 / 3), (REPLAY, 1 / 3), (DISTILL, 2 / 3)):
        own = rows.weight[rows.term == term]
        torch.testing.assert_close(own, torch.full_like(own, weight))


def test_sigmoids_leave_the_old_classes_to_the_old_network(tmp_path: Path) -> None:
    """iCaRL: one target a class, and each class has one."""
    distill = {"weight": 1.0, "images": "all", "view": "same", "temperature": 1.0}
    sections = {**ALL, "train": {"head": "seen", "loss": "sigmoid"}, "prior": {"replay": 1.0, "distill": distill}}
    rows, composer, logits = composed(*third_task(tmp_path, sections))
    number = int((rows.term != DISTILL).sum())
    assert rows.kind is not None
    assert bool((rows.kind == SIGMOID).all())
    assert rows.head[:number].nonzero()[:, 1].unique().tolist() == [4, 5]
    torch.testing.assert_close(rows.target[number:, :4], logits[:, :4].sigmoid())
    z = torch.randn(number, 10, generator=torch.Generator().manual_seed(1))
    target = torch.cat([logits[:, :4].sigmoid(), rows.target[:number, 4:6]], dim=1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z[:, :6], target, reduction="none").sum(1)
    found = weighted_nats(z, rows)
    torch.testing.assert_close(found[:number] + found[number:], expected, atol=1e-5, rtol=1e-5)
    old = composer.labels[torch.from_numpy(state_samples(composer, rows))]
    assert bool((rows.target[:number][rows.term[:number] == REPLAY].sum(1) == 0).all())
    assert bool((rows.target[:number][rows.term[:number] == NEW].sum(1) == 1).all())
    assert len(old) == number


def state_samples(composer: Composer, rows: Rows) -> Any:
    return np.resize(composer.samples, int((rows.term != DISTILL).sum()))


@pytest.mark.parametrize("view", ["recorded", "same"])
def test_the_old_network_says_the_same_as_itself(tmp_path: Path, view: str) -> None:
    """No gradient from distillation where nothing has been learned yet (guards against a teacher in training mode)."""
    state, world = third_task(tmp_path, LWF, {"prior": {"distill": {"weight": 0.5, "view": view}}})
    rows, _, _ = composed(state, world)
    module = state.engine.module.eval()
    nats = weighted_nats(module(rows.pixels), rows)[rows.term == DISTILL].sum()
    gradients = torch.autograd.grad(nats, list(module.parameters()))
    assert max(float(each.abs().max()) for each in gradients) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 4e-4), ("bf16", 1.5e-3)])
def test_a_head_far_below_another_is_recorded_as_exactly(tmp_path: Path, dtype: str, bound: float) -> None:
    """Each has a softmax of its own, so that what is rounded are differences from its own largest logit."""
    state, world = third_task(tmp_path, {"memory": {"dtype": dtype}})
    heads = old_heads(world.config, world.stream, world.stream.tasks[2])
    below = torch.zeros(heads.shape[1])
    below[heads[1]] = -20.0
    samples = np.arange(64)

    def teacher(pixels: Tensor) -> Tensor:
        return 3 * state.engine.predict(pixels) + below

    found = record(samples, heads, teacher, world)
    assert found.element_size() == 2
    columns = heads.any(dim=0)
    pixels = torch.cat([seen.pixels[: len(seen.sample)] for seen in shared_images(samples, world, size=64)])
    for head in heads:
        exact = teacher(pixels)[:, head].softmax(1)
        assert float((found[:, head[columns]].float().softmax(1) - exact).abs().max()) < bound


def test_t_squared(tmp_path: Path) -> None:
    plain = {"prior": {"distill": {"weight": 0.5, "temperature": 3.0}}}
    state, world = third_task(tmp_path, LWF, plain)
    task = world.stream.tasks[2]
    squared = merged(LWF, {"prior": {"distill": {"weight": 0.5, "temperature": 3.0, "scale_t2": True}}})
    once, times = Distilled.of(world.config, world.stream, task), Distilled.of(squared, world.stream, task)
    assert once is not None
    assert times is not None
    assert times.weight == pytest.approx(9 * once.weight)
    assert Distilled.of(world.config, world.stream, world.stream.tasks[0]) is None
    assert state.prior.anchor is not None


Distances = tuple[float, float, list[float]]
ONE, OTHER = ([1.0, 1.0, 0.0], [2.0, 0.0, -2.0]), ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])  # student, teacher


@pytest.mark.parametrize("squared", [False, True])
def test_t_squared_by_hand(squared: bool) -> None:
    """Hinton et al. 2015 at T = 2, from the configuration to the gradient; three old classes."""
    cross_entropy, divergence, slope = distilled_loss(*ONE, temperature=2.0, squared=squared)
    expected = [4.012141, -0.563178, 0.277847, 0.285332] if squared else [1.003035, -0.140795, 0.069462, 0.071333]
    assert [cross_entropy, *slope] == pytest.approx(expected, abs=1e-6)
    assert divergence / (4 if squared else 1) == pytest.approx(0.170640, abs=1e-6)


def test_t_squared_as_the_temperature_grows() -> None:
    """Logits (1, 2, 3), teacher (3, 2, 1): KL and T^2 KL at T = 2, T^2 KL at T = 100, T (q - p)."""
    assert distilled_loss(*OTHER, temperature=2.0, squared=False)[1] == pytest.approx(0.3201566678, abs=1e-10)
    _, divergence, slope = distilled_loss(*OTHER, temperature=2.0, squared=True)
    assert divergence == pytest.approx(1.2806266713, abs=1e-10)
    assert slope == pytest.approx([-0.64031334, 0.0, 0.64031334], abs=1e-8)
    _, divergence, slope = distilled_loss(*OTHER, temperature=100.0, squared=True)
    assert divergence == pytest.approx(1.33331111, abs=1e-8)
    assert slope == pytest.approx([-0.66665556, 0.0, 0.66665556], abs=1e-8)


def test_t_squared_has_a_limit() -> None:
    """T -> infinity: |z - v|^2 / 2C and (z - v) / C (Hinton et al. 2015, eq. 4), here 4/3 and -2/3, 0, 2/3."""
    off = []
    for temperature in (100.0, 1000.0):
        _, divergence, slope = distilled_loss(*OTHER, temperature=temperature, squared=True)
        off.append((4 / 3 - divergence, 2 / 3 - slope[2]))
        assert slope[0] == pytest.approx(-slope[2], abs=1e-9)
    for far, near in zip(*off, strict=True):
        assert 0 < far < 1e-4
        assert near == pytest.approx(far / 100, rel=0.01)


def distilled_loss(student: list[float], teacher: list[float], *, temperature: float, squared: bool) -> Distances:
    """(cross-entropy, Kullback-Leibler divergence, gradient by the student's logits) of one image."""
    distill = {"weight": 1.0, "temperature": temperature, "scale_t2": squared}
    stream_config = {"kind": "digits", "tasks": 10}
    config = merged({"stream": stream_config, "train": {"head": "seen"}, "prior": {"distill": distill}})
    stream = open_stream(config.stream, config.data)
    distilled = Distilled.of(config, stream, stream.tasks[3])  # of one class each
    assert distilled is not None
    said, other = torch.zeros(2, 1, 10, dtype=torch.float64)
    said[0, :3], other[0, :3] = torch.tensor([teacher, student], dtype=torch.float64)
    target, head = distilled.targets(said)
    rows = Rows(
        pixels=torch.zeros(1, 1), noise=torch.zeros(1), image=torch.zeros(1, dtype=torch.int64), target=target,
        weight=torch.tensor([distilled.weight], dtype=torch.float64), head=head,
        temperature=torch.tensor([distilled.config.temperature], dtype=torch.float64), term=torch.tensor([DISTILL]),
    )  # fmt: skip
    nats = weighted_nats(other.requires_grad_(), rows).sum()
    (slope,) = torch.autograd.grad(nats, other)
    assert not bool(slope[0, 3:].any())
    least = float(weighted_nats(said, rows).sum())
    return float(nats.detach()), float(nats.detach()) - least, slope[0, :3].tolist()


NORMS: dict[str, Any] = {
    "model": {"kind": "timm", "name": "resnet10t", "options": {"stem_width": 4, "layers": [1, 1, 1, 1]}},
    "train": {"epochs": 1, "batch_size": 128},
    "prior": {"distill": {"weight": 1.0, "view": "same"}},
}


def test_the_teacher_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, statistics and answers, while the student learns (Li and Hoiem 2016; BatchNorm is what could move)."""
    state, world = make_world(merged(NORMS), tmp_path)
    learn(state, world, 1)
    asked: list[Any] = []
    frozen = state.engine.frozen

    def remembered(weights: Any) -> Any:
        asked.append(frozen(weights))
        return asked[-1]

    monkeypatch.setattr(state.engine, "frozen", remembered)
    anchor = {name: value.clone() for name, value in wholes(state.prior.anchor or {}).items()}
    pixels = torch.randn(3, *world.stream.image_shape, generator=torch.Generator().manual_seed(0))
    before = frozen(state.prior.anchor or {})(pixels)
    torch.testing.assert_close(before, state.engine.module.eval()(pixels).detach())  # by the running statistics
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    (teacher,) = asked
    assert torch.equal(teacher(pixels), before)
    assert all(torch.equal(value, anchor[name]) for name, value in wholes(state.prior.anchor or {}).items())
    moved = wholes(state.engine.gather())
    assert any(not torch.equal(moved[name], anchor[name]) for name in anchor if name.endswith("running_mean"))
