"""What methods leave behind for the next task and for tests: kept logits, class means, corrections; schedules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpccl.checkpoint.store import Mark
from hpccl.config.first_task import first_task_identity
from hpccl.data.protocols import training_samples
from hpccl.data.rows import Request
from hpccl.errors import ConfigError
from hpccl.memory.store import Memory
from hpccl.prior.correction import Correction
from hpccl.prior.prior import Prior
from hpccl.train.compose import Composer
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import _old_network, fit
from hpccl.train.plan import head_steps, plan_task, planned_steps
from hpccl.train.state import RunState, World
from tests.run.method import learn, make_world, merged

DER: dict[str, Any] = {
    "memory": {"size": 20, "labels": "kept"},
    "prior": {"loss": "squared", "view": "recorded", "weight": 0.2, "label_weight": 0.5, "scale_to_new": True},
}
ICARL: dict[str, Any] = {
    "train": {"head": "seen", "loss": "sigmoid"},
    "memory": {"size": 20, "selector": {"kind": "herding"}},
    "prior": {"replay": 1.0, "distill": {"weight": 1.0, "images": "all", "view": "same", "temperature": 1.0}},
    "evaluate": {"classifier": "nearest_mean"},
}


def images(samples: Tensor, world: World, split: Any = "train") -> Tensor:

    numbers = samples.numpy()
    (found,) = list(world.stream.load([Request(numbers, (0 * numbers).astype("uint64"))], split))
    return found.pixels


@pytest.mark.parametrize("head", ["own", "seen"])
def test_logits_stay_as_they_were_admitted(tmp_path: Path, head: str) -> None:
    """Buzzega et al. 2020: of the task's own end; all logits where all classes compete."""
    state, world = make_world(merged(DER, {"train": {"head": head, "epochs": 1}}), tmp_path)
    learn(state, world, 1)
    first = state.prior.memory
    expected = state.engine.predict(images(first.sample, world))
    learn_next(state, world, 1)
    memory = state.prior.memory
    assert torch.equal(memory.sample[:20], first.sample)
    assert memory.soft.shape[1] == (2 if head == "own" else 10)
    columns = memory.columns(torch.arange(20))
    torch.testing.assert_close(memory.soft[:20], expected.gather(1, columns), atol=1e-5, rtol=1e-5)
    now = state.engine.predict(images(memory.sample, world)).gather(1, memory.columns(torch.arange(40)))
    torch.testing.assert_close(memory.soft[20:], now[20:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(memory.soft[:20], now[:20], atol=1e-3)


def learn_next(state: RunState, world: World, task: int) -> None:
    from hpccl.train.consolidate import consolidate

    state.mark = Mark.at(task, "fit", 0)
    assert fit(world.stream.tasks[task], state, world)
    consolidate(world.stream.tasks[task], state, world)


def test_memory_counts_as_the_new_task(tmp_path: Path) -> None:
    """ER and DER: the mean over the task and a multiple of the mean over all memory, times N_t / (N_t + M)."""
    state, world = make_world(merged(DER, {"train": {"epochs": 1}}), tmp_path)
    learn(state, world, 2)
    task = world.stream.tasks[2]
    composer = Composer.build(
        world.config, world.stream, task, state.prior.memory, teacher=None, device=torch.device("cpu")
    )
    size = len(task.samples("train"))
    assert composer.memory_weights(torch.arange(40)).tolist() == pytest.approx([0.2 * size / 40] * 40)
    assert composer.memory_weights(torch.arange(40), composer.beta).tolist() == pytest.approx([0.5 * size / 40] * 40)


@pytest.mark.parametrize("of", ["memory", "data"])
def test_the_nearest_mean_by_hand(tmp_path: Path, of: str) -> None:
    """Rebuffi et al. 2017, alg. 1, with the mirror images of exemplars; or of all training images so far."""
    state, world = make_world(merged(ICARL, {"evaluate": {"means": of}}), tmp_path)
    learn(state, world, 2)
    memory, net = state.prior.memory, state.engine.module.eval()
    assert isinstance(net, torch.nn.Sequential)

    def feature(pixels: Tensor) -> Tensor:
        found = net[:-1](pixels).detach().double()
        unit: Tensor = found / found.norm(dim=1, keepdim=True)
        return unit

    means = []
    every = torch.from_numpy(world.stream.labels("train"))
    for label in range(4):
        kept = memory.sample[memory.label == label] if of == "memory" else (every == label).nonzero().flatten()
        own = images(kept, world)
        mean = (feature(own).mean(0) + feature(own.flip(-1)).mean(0)) / 2
        means.append(mean / mean.norm())
    tests = torch.arange(world.stream.tasks[1].samples("test").stop)
    labels = torch.from_numpy(world.stream.labels("test")[tests.numpy()])
    distances = torch.cdist(feature(images(tests, world, "test")), torch.stack(means))
    right = (distances.argmin(1) == labels).double()
    found = evaluate_all(state, world, last=1)
    for task in world.stream.tasks[:2]:
        expected = float(right[task.samples("test").start : task.samples("test").stop].mean())
        assert found[task.index]["class_incremental"]["accuracy"] == pytest.approx(expected, abs=0.02)
        assert expected > 0.5
    assert state.prior.means is not None
    torch.testing.assert_close(state.prior.means.means[:4].double(), torch.stack(means), atol=1e-5, rtol=1e-5)
    # They are those of the network that ended the task: in the midst of the next one, the head answers.
    head = evaluate_all(RunState(state.engine, Prior(memory)), world, last=2)
    assert evaluate_all(state, world, last=2) == head


def test_tests_and_the_next_teacher_are_corrected(tmp_path: Path) -> None:
    state, world = make_world(merged({"train": {"head": "seen", "epochs": 3}}), tmp_path)
    learn(state, world, 2)
    plain = evaluate_all(state, world, last=1)
    state.prior = Prior(Memory.empty(), None, state.prior.anchor, Correction(1, (2, 3), 1.0, -100.0, 9))
    found = evaluate_all(state, world, last=1)
    assert plain[1]["class_incremental"]["accuracy"] > 0.5
    assert found[1]["class_incremental"]["accuracy"] == 0.0  # new classes are never named
    assert found[1]["task_incremental"]["accuracy"] == plain[1]["task_incremental"]["accuracy"]
    pixels = images(torch.arange(3), world)
    expected = state.engine.predict(pixels)
    expected[:, 2:4] -= 100
    torch.testing.assert_close(_old_network(state)(pixels), expected, atol=1e-4, rtol=1e-5)
    assert evaluate_all(state, world, last=2) == evaluate_all(RunState(state.engine), world, last=2)


def test_soft_labels_of_a_corrected_network_are_corrected(tmp_path: Path) -> None:
    """Whatever the view: what the old network says includes its correction (Wu et al. 2019)."""
    sections = {"memory": {"total": 100}, "prior": {"correct": {"share": 0.1}}}
    state, world = make_world(merged({"train": {"head": "seen", "epochs": 3}}, sections), tmp_path)
    learn(state, world, 2)
    memory, found = state.prior.memory, state.prior.correction
    assert found is not None
    assert abs(found.alpha - 1) + abs(found.beta) > 1e-3
    plain = state.engine.predict(images(memory.sample, world))
    columns = memory.columns(torch.arange(len(memory)))
    torch.testing.assert_close(memory.soft, found(plain).gather(1, columns), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(memory.soft, plain.gather(1, columns), atol=1e-4)
    torch.testing.assert_close(_old_network(state)(images(memory.sample, world)), found(plain), atol=1e-5, rtol=1e-5)


def test_the_head_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    """Li and Hoiem 2016, section 3: warm up, then all together; each with a whole schedule."""
    changes = {"train": {"epochs": 2, "head_epochs": 1}, "log": {"every": 1}, "optim": {"schedule": "cosine"}}
    state, world = make_world(merged(changes), tmp_path)
    rates: list[float] = []
    world.log.write = lambda event, **fields: rates.append(fields["lr"]) if event == "step" else None  # type: ignore[method-assign]
    learn(state, world, 1)
    plan = plan_task(world.config, world.stream, world.stream.tasks[1], state.prior.memory)
    alone = head_steps(world.config, plan)
    assert (alone, plan.num_steps) == (plan.steps_per_epoch, 3 * plan.steps_per_epoch)
    assert planned_steps(world.config, world.stream)[:2] == [2 * plan.steps_per_epoch, plan.num_steps]
    rates.clear()
    before = state.engine.module.state_dict()["1.weight"].clone()
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    assert not torch.equal(state.engine.module.state_dict()["1.weight"], before)
    # `lr` is that of the coming step: falling to the end of each part.
    assert rates[alone - 1] == pytest.approx(0.0, abs=1e-9)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert rates[alone] > 0.9 * 3e-3  # the second step of all weights: from the peak again
    assert rates[alone:] == sorted(rates[alone:], reverse=True)
    assert rates[:alone] == sorted(rates[:alone], reverse=True)


def test_what_only_later_tasks_do_does_not_change_a_first_task() -> None:
    plain = first_task_identity(merged({}))
    for later in ({"train": {"head_epochs": 3}}, {"train": {"frozen": ["features"]}}):
        assert first_task_identity(merged(later)) == plain
    seen, task, every = (
        first_task_identity(merged({"train": {"head": "seen", "competing": competing}}))
        for competing in ("seen", "task", "all")
    )
    assert task == seen != every  # where all compete, classes to come do from the beginning
    correct: dict[str, Any] = {"train": {"head": "seen"}, "memory": {"total": 200}, "prior": {"replay": 1.0}}
    before = first_task_identity(merged(correct))
    correct["prior"]["correct"] = {"share": 0.1}
    assert first_task_identity(merged(correct)) != before  # examples are held out of it


@pytest.mark.parametrize("pattern", ["convolutions", "nothing.*"])
def test_a_pattern_that_matches_nothing(tmp_path: Path, pattern: str) -> None:
    state, world = make_world(merged({"train": {"epochs": 1, "frozen": [pattern]}}), tmp_path)
    learn(state, world, 1)
    state.mark = Mark.at(1, "fit", 0)
    with pytest.raises(ConfigError, match="matches no parameter or buffer"):
        fit(world.stream.tasks[1], state, world)


def test_frozen_convolutions_keep_their_statistics(tmp_path: Path) -> None:
    model = {"kind": "timm", "name": "resnet10t", "options": {"stem_width": 4, "layers": [1, 1, 1, 1]}}
    config = merged({"model": model, "train": {"epochs": 1, "batch_size": 128, "frozen": ["convolutions"]}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    before = {name: value.clone() for name, value in state.engine.module.state_dict().items()}
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    after = state.engine.module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("head", ["own", "seen"])
@pytest.mark.parametrize("optim", [{"name": "adamw"}, {"name": "momentum"}, {"kind": "sam"}], ids=str)
def test_weight_decay_leaves_classes_alone_that_have_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, optim: dict[str, Any]
) -> None:
    config = merged({"train": {"epochs": 1, "head": head}, "optim": {**optim, "lr": 0.1, "weight_decay": 0.5}})

    def unchanged(folder: Path) -> set[int]:
        state, world = make_world(config, folder)
        after = list(state.engine.module.state_dict().values())[-2]  # the rows themselves
        before = after.clone()
        learn(state, world, 2)
        return {row for row in range(10) if torch.equal(before[row], after[row])}

    assert unchanged(tmp_path / "held") == set(range(4, 10))
    monkeypatch.setattr("hpccl.train.hold._silent", lambda *_: set())
    assert unchanged(tmp_path / "free") == set()


DECAY = {"name": "sgd", "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("optim", "memory"),
    [
        (DECAY, {}),
        ({"kind": "vogn"}, {}),
        ({"kind": "bsam"}, {}),
        (DECAY, {"memory": {"size": 20}, "prior": {"weight": 0.0}}),  # which says nothing
    ],
    ids=str,
)
def test_a_head_that_nothing_speaks_for_is_not_worn_away(
    tmp_path: Path, optim: dict[str, Any], memory: dict[str, Any]
) -> None:
    """On frozen features the first task's logits stay what they were, to the last bit."""
    config = merged({"train": {"epochs": 3, "frozen": ["features"]}, "optim": {**optim, "lr": 0.1}}, memory)
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    first = world.stream.tasks[0]
    (images,) = world.stream.load(iter([Request(training_samples(first)[:9], np.zeros(9, dtype=np.uint64))]))
    before = state.engine.predict(images.pixels)
    learn_next(state, world, 1)
    after = state.engine.predict(images.pixels)
    own, new = list(first.classes), list(world.stream.tasks[1].classes)
    assert torch.equal(after[:, own], before[:, own])
    assert not torch.equal(after[:, new], before[:, new])


@pytest.mark.parametrize("decay", [0.0, 1e-3])
@pytest.mark.parametrize("more", [DER, {"train": {"competing": "all"}}], ids=["der", "all"])
def test_classes_to_come_learn_where_rows_speak_of_them(tmp_path: Path, more: dict[str, Any], decay: float) -> None:
    optim = {"name": "momentum", "lr": 0.1, "weight_decay": decay}
    state, world = make_world(merged({"train": {"epochs": 1, "head": "seen"}, "optim": optim}, more), tmp_path)
    learn(state, world, 1)
    rows = list(state.engine.module.state_dict().values())[-2]
    before = rows.clone()
    learn_next(state, world, 1)
    assert not any(torch.equal(before[row], rows[row]) for row in range(10))
