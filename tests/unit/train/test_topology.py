from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpccl.checkpoint.store import Mark
from hpccl.data.rows import ANCHOR, PULL, PUSH, FeatureRows
from hpccl.dist.spread import wholes
from hpccl.memory.gas import Gas
from hpccl.memory.means import ClassMeans
from hpccl.train.compose import Composer, split
from hpccl.train.consolidate import consolidate
from hpccl.train.end_of_task import featuring
from hpccl.train.fit import fit
from hpccl.train.loss import feature_losses
from hpccl.train.plan import plan_task
from hpccl.train.state import RunState, World
from hpccl.train.topology import ASKED_BY, Topology, begin_session
from tests.run.method import learn, make_world, merged

FEW: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 3, "scenario": {"kind": "few_shot", "base": 5, "way": 2, "shots": 5}},
    "train": {"head": "seen", "epochs": [6, 12], "batch_size": 64},
    "prior": {"topology": {"nodes": 30}},
}


def said(kind: int, feature: list[float], target: list[float], **settings: float) -> torch.Tensor:
    """Of one row with stiffness 1 / variance."""
    width = len(feature)
    variance = torch.tensor(settings.pop("variance", [1.0] * width), dtype=torch.float64)
    rows = FeatureRows(
        image=torch.tensor([0]),
        target=torch.tensor([target], dtype=torch.float64),
        weight=torch.tensor([settings.get("weight", 1.0)], dtype=torch.float64),
        kind=torch.tensor([kind]),
        stiff=1 / variance[None] if kind == ANCHOR else torch.zeros(1, width, dtype=torch.float64),
        margin=torch.tensor([settings.get("margin", 0.0)], dtype=torch.float64),
        layer="head",
        normalised=False,
    )
    return feature_losses(torch.tensor([feature], dtype=torch.float64), rows).sum()


def test_the_anchor_loss_is_a_mahalanobis_distance() -> None:
    assert said(ANCHOR, [1.5, 1.0], [1.0, 2.0], variance=[0.25, 1.0]) == 2.0  # type: ignore[arg-type]


def test_the_min_max_loss_pulls_to_the_node_and_pushes_near_rivals() -> None:
    """The node at (0, 0), whose rivals are 0.5 and 2 away, where 1 is enough."""
    pulled = said(PULL, [1.0, 0.0], [0.0, 0.0])
    pushed = said(PUSH, [0.0, 0.0], [0.3, 0.4], margin=1.0) + said(PUSH, [0.0, 0.0], [2.0, 0.0], margin=1.0)
    assert float(pulled + pushed) == pytest.approx(1.5)
    assert float(pushed) == pytest.approx(0.5)


def test_feature_losses_have_the_gradient_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = FeatureRows(
        image=torch.tensor([0, 0, 1, 4, 3]),
        target=torch.randn(5, 4, generator=generator, dtype=torch.float64),
        weight=torch.rand(5, generator=generator, dtype=torch.float64),
        kind=torch.tensor([ANCHOR, PULL, PUSH, PUSH, PULL]),
        stiff=torch.rand(5, 4, generator=generator, dtype=torch.float64),
        margin=torch.tensor([0.0, 0.0, 9.0, 0.01, 0.0], dtype=torch.float64),
        layer="head",
    )
    (found,) = torch.autograd.grad(feature_losses(features, rows).sum(), features)
    expected = torch.zeros(())
    for q in range(5):
        phi = features[rows.image[q]] / features[rows.image[q]].norm()
        apart = phi - rows.target[q]
        loss = (rows.stiff[q] * apart**2).sum()
        if rows.kind[q] != ANCHOR:
            loss = apart.norm() if rows.kind[q] == PULL else torch.relu(rows.margin[q] - apart.norm())
        expected = expected + rows.weight[q] * loss
    torch.testing.assert_close(found, torch.autograd.grad(expected, features)[0])
    assert bool((found[2] == 0).all())


@pytest.mark.parametrize("off", [0.0, 1e-7])
def test_an_image_at_its_node_has_no_gradient_that_rounding_could_choose(off: float) -> None:
    feature = torch.tensor([[0.6 + off, 0.8 - off]], requires_grad=True)
    target, one, zeros = torch.tensor([[0.6, 0.8]]), torch.ones(1), torch.zeros(1, 2)
    for kind in (PULL, PUSH):
        rows = FeatureRows(torch.tensor([0]), target, one, torch.tensor([kind]), zeros, one, "head", normalised=False)
        loss = feature_losses(feature, rows).sum()
        (gradient,) = torch.autograd.grad(loss, feature)
        assert bool((gradient == 0).all())
        assert float(loss.detach()) == (1.0 if kind == PUSH else 0.0)


def session(folder: Path, changes: dict[str, Any] | None = None) -> tuple[RunState, World]:
    """A base task learned, and the first session begun."""
    config = merged(FEW, changes or {})
    state, world = make_world(config, folder)
    learn(state, world, 1)
    begin_session(world.stream.tasks[1], state, world)
    return state, world


def composer_of(state: RunState, world: World) -> Composer:
    task = world.stream.tasks[1]
    return Composer.build(
        world.config,
        world.stream,
        task,
        state.prior.memory,
        teacher=None,
        device=state.engine.device,
        topology=Topology.of(state.prior.gas, world.config.prior.topology, "head"),
    )


def test_a_step_s_parts_say_what_the_definition_says(tmp_path: Path) -> None:
    """AL as a mean over old nodes, MML as one over the batch, from the parts of a step together."""
    state, world = session(tmp_path, {"prior": {"topology": {"nodes": 30, "minmax": 0.25, "margin": 0.8}}})
    gas = state.prior.gas
    assert gas is not None
    composer = composer_of(state, world)
    plan = plan_task(world.config, world.stream, world.stream.tasks[1], state.prior.memory)
    totals, shown = {ANCHOR: 0.0, PULL: 0.0, PUSH: 0.0}, []
    with featuring(state, world, asked_by=ASKED_BY) as features:
        for part in split(plan.batch(0), world.comm, accumulate=3, anchors=composer.num_anchors):
            (images,) = world.stream.load([composer.request(part)])
            rows = composer.rows(part, images)
            assert rows.features is not None
            assert len(rows.noise) == len(rows.pixels)
            loss = feature_losses(features(rows.pixels), rows.features)
            for kind in totals:
                totals[kind] += float(loss[rows.features.kind == kind].sum())
            shown.append(composer.request(part).sample[len(part.rows) :])
        np.testing.assert_array_equal(np.concatenate(shown), gas.sample[:30].numpy())
        every = gas.sample.numpy()
        (images,) = world.stream.load([_request(np.concatenate([every, gas.shot.numpy()]))])
        phi = torch.nn.functional.normalize(features(images.pixels).double(), dim=1)
    nodes, shots = phi[: len(every)], phi[len(every) :]
    anchored = [((nodes[j] - gas.nodes[j]) ** 2 / gas.variance[j]).sum() for j in range(gas.old)]
    assert totals[ANCHOR] == pytest.approx(0.5 * float(sum(anchored)) / 30, rel=1e-5)
    pulls = [(shot - gas.nodes[node]).norm() for shot, node in zip(shots, gas.shot_node, strict=True)]
    assert totals[PULL] == pytest.approx(0.25 * float(sum(pulls)) / 10, rel=1e-5)
    pushes = [
        max(0.0, 0.8 - float((nodes[j] - gas.nodes[i]).norm()))
        for j in range(gas.old, len(gas))
        for i in range(len(gas))
        if gas.ages[i, j] > 0 and gas.label[i] != gas.label[j]
    ]
    assert pushes
    assert totals[PUSH] == pytest.approx(0.25 * sum(pushes) / 10, rel=1e-5)


@pytest.mark.parametrize("target", ["image", "centroid"])
def test_the_anchor_loss_begins_at_0_where_its_target_is_the_last_image(tmp_path: Path, target: str) -> None:
    state, world = session(tmp_path, {"prior": {"topology": {"nodes": 30, "target": target}}})
    composer = composer_of(state, world)
    plan = plan_task(world.config, world.stream, world.stream.tasks[1], state.prior.memory)
    (part,) = split(plan.batch(0), world.comm, accumulate=1, anchors=composer.num_anchors)
    (images,) = world.stream.load([composer.request(part)])
    rows = composer.rows(part, images)
    assert rows.features is not None
    with featuring(state, world, asked_by=ASKED_BY) as features:
        loss = feature_losses(features(rows.pixels), rows.features)[rows.features.kind == ANCHOR]
    assert len(loss) == 30
    assert (float(loss.sum()) < 1e-6) == (target == "image")


def _request(samples: np.ndarray) -> Any:
    from hpccl.data.rows import Request

    return Request(samples, np.zeros(len(samples), dtype=np.uint64))


def test_the_anchor_loss_keeps_old_images_where_they_were(tmp_path: Path) -> None:
    drifts = []
    for weight in (5.0, 0.0):
        topology = {"nodes": 30, "anchor": weight, "minmax": 0.005}
        state, world = session(tmp_path / str(weight), {"prior": {"topology": topology}})
        task, gas = world.stream.tasks[1], state.prior.gas
        assert gas is not None
        state.mark = Mark.at(1, "fit", 0)
        assert fit(task, state, world)
        consolidate(task, state, world)
        after = state.prior.gas
        assert after is not None
        drifts.append(float((after.image[: gas.old] - gas.image[: gas.old]).norm()))
    assert drifts[0] < 0.5 * drifts[1]


def test_a_net_survives_a_checkpoint(tmp_path: Path) -> None:
    state, _ = session(tmp_path)
    gas = state.prior.gas
    assert gas is not None
    again = Gas(**gas.state_dict())
    for name, value in vars(gas).items():
        other = getattr(again, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_old_rows_of_the_head_stay(tmp_path: Path) -> None:
    state, world = session(tmp_path, {"train": {"frozen": ["old_classes"], "epochs": [1, 3]}})
    before = {name: value.clone() for name, value in wholes(state.engine.gather()).items()}
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    after = wholes(state.engine.gather())
    (weight,) = (name for name, value in before.items() if value.shape == (9, 16))
    assert torch.equal(after[weight][:5], before[weight][:5])
    assert bool((after[weight][5:7] != before[weight][5:7]).any())


@pytest.mark.parametrize("norms", ["running", "batch"])
def test_running_statistics_stand_still_in_sessions_if_asked_to(tmp_path: Path, norms: str) -> None:
    model = {"kind": "timm", "name": "test_resnet"}
    train = {"head": "seen", "epochs": [1, 3], "batch_size": 256, "norms": norms}
    state, world = session(tmp_path, {"model": model, "train": train, "data": {"image_size": 32}})
    before = {name: value.clone() for name, value in wholes(state.engine.gather()).items()}
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    after = wholes(state.engine.gather())
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(after[name], before[name]) == (norms == "running") for name in statistics)
    weights = [name for name in before if name.endswith("conv1.weight")]  # which learn all the same
    assert any(not torch.equal(after[name], before[name]) for name in weights)


def test_prototypes_are_means_of_the_classes_when_they_were_learned(tmp_path: Path) -> None:
    few = {name: value for name, value in FEW.items() if name != "prior"}
    train = {"head": "seen", "frozen": ["features"], "epochs": 2}
    config = merged(few, {"train": train, "evaluate": {"classifier": "prototype"}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    means = state.prior.means
    assert means is not None
    labels = world.stream.labels("train")
    with featuring(state, world) as features:
        (images,) = world.stream.load([_request(np.arange(world.stream.tasks[1].samples("train").stop))])
        phi = torch.nn.functional.normalize(features(images.pixels).double(), dim=1)
    for label in range(9):
        own = phi[torch.from_numpy(labels[: len(phi)] == label)]
        expected = torch.nn.functional.normalize(own.sum(dim=0), dim=0) if len(own) else torch.zeros(16)
        torch.testing.assert_close(means.means[label].double(), expected.double(), atol=1e-6, rtol=1e-6)
    # The nearest of means at norm 1 is the one of the largest cosine.
    cosine = phi[:50] @ means.means[:7].double().T
    assert torch.equal(means.scores(phi[:50].float())[:, :7].argmax(dim=1), cosine.argmax(dim=1))


def test_later_means_join_earlier_ones() -> None:
    earlier = ClassMeans(0, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    joined = earlier.joined(ClassMeans(1, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.8, 0.6]])))
    assert joined.task == 1
    assert joined.means.tolist() == [[1.0, 0.0], *ClassMeans(1, torch.tensor([[0.6, 0.8], [0.8, 0.6]])).means.tolist()]
