"""What is held out is never learned from, and as many of each class; what is kept is what the budget says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpccl.errors import ConfigError
from hpccl.memory.balance import greedy_balance
from hpccl.tools.plan.build import make_plan
from hpccl.train import kept
from hpccl.train.checks import check_memory
from hpccl.train.compose import Composer
from hpccl.train.consolidate import admit_first
from hpccl.train.end_of_task import correction
from hpccl.train.kept import held_out, kept_of_tasks, validation
from hpccl.train.plan import new_samples, plan_task, planned_steps
from hpccl.train.run import weights_sha256
from hpccl.train.state import World
from tests.run.method import learn, make_world, merged

BIC: dict[str, Any] = {
    "train": {"head": "seen", "epochs": 1},
    "memory": {"total": 200, "selector": {"kind": "herding"}},
    "prior": {
        "replay": 1.0,
        "correct": {"share": 0.1},
        "distill": {"weight": 1.0, "images": "all", "view": "same", "balance": "classes"},
    },
}
GDUMB: dict[str, Any] = {
    "train": {"data": "memory", "restart": True, "epochs": 1},
    "memory": {"total": 50, "selector": {"kind": "greedy"}},
    "prior": {"replay": 1.0},
}


def test_held_out_examples(tmp_path: Path) -> None:
    state, world = make_world(merged(BIC), tmp_path)
    labels, config, stream = world.stream.labels("train"), world.config, world.stream
    # floor(0.1 * 200 / s) of each class: 10, then 10, 5, 3, 2.
    for task, number in zip(stream.tasks, [10, 10, 5, 3, 2], strict=True):
        held = held_out(config, stream, task)
        assert np.unique(labels[held], return_counts=True)[1].tolist() == [number] * 2
        new = new_samples(config, stream, task, state.prior.memory)
        assert len(np.intersect1d(new, held)) == 0
        assert len(new) + len(held) == len(task.samples("train"))
        if task.index > 0:
            found = validation(config, stream, task)
            seen = 2 * (task.index + 1)
            assert np.unique(labels[found], return_counts=True)[1].tolist() == [number] * seen
            every = np.concatenate([held_out(config, stream, other) for other in stream.tasks[: task.index + 1]])
            assert np.isin(found, every).all()


def test_kept_and_held_out_examples_are_others(tmp_path: Path) -> None:
    state, world = make_world(merged(BIC), tmp_path)
    learn(state, world, 2)
    memory = state.prior.memory
    # ceil(200 / 4) - ceil(0.1 * 200 / 4) of each of four classes.
    assert torch.bincount(memory.label).tolist() == [45] * 4
    assert memory.per_task(2) == kept_of_tasks(world.config, world.stream, 2)
    held = np.concatenate([held_out(world.config, world.stream, task) for task in world.stream.tasks])
    assert not np.isin(memory.sample.numpy(), held).any()
    assert plan_task(world.config, world.stream, world.stream.tasks[2], memory).num_steps == steps_of(world)[2]


def steps_of(world: World) -> list[int]:
    return planned_steps(world.config, world.stream)


def test_a_correction_leaves_the_network_alone(tmp_path: Path) -> None:
    state, world = make_world(merged(BIC), tmp_path)
    learn(state, world, 1)
    assert state.prior.correction is None
    learn_second(state, world)
    before = digest(state)
    found = correction(world.stream.tasks[1], state, world)
    assert digest(state) == before
    assert found is not None
    assert (found.task, found.classes, found.num) == (1, (2, 3), 40)
    assert found.alpha > 0


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_memory_that_counts_as_much_as_the_new_task_counts_what_is_learned_of_it(tmp_path: Path, share: float) -> None:
    changes = {"prior": {"correct": {"share": share}, "scale_to_new": True, "distill": {"weight": 0.0}}}
    state, world = make_world(merged(BIC, changes), tmp_path)
    learn(state, world, 1)
    task, memory = world.stream.tasks[1], state.prior.memory
    composer = Composer.build(world.config, world.stream, task, memory, teacher=None, device=torch.device("cpu"))
    new = len(new_samples(world.config, world.stream, task, memory))
    assert new < len(task.samples("train"))
    assert float(composer.memory_weights(torch.arange(len(memory))).sum()) == pytest.approx(new, rel=1e-5)


def test_a_correction_leaves_norms_alone(tmp_path: Path) -> None:
    model = {"kind": "timm", "name": "resnet10t", "options": {"stem_width": 4, "layers": [1, 1, 1, 1]}}
    state, world = make_world(merged(BIC, {"model": model, "train": {"epochs": 1, "batch_size": 128}}), tmp_path)
    learn(state, world, 1)
    learn_second(state, world)
    before = {name: value.clone() for name, value in state.engine.module.state_dict().items()}
    assert any("running" in name for name in before)
    assert correction(world.stream.tasks[1], state, world) is not None
    assert all(torch.equal(value, before[name]) for name, value in state.engine.module.state_dict().items())


def learn_second(state: Any, world: World) -> None:
    from hpccl.train.fit import fit

    state.mark = type(state.mark).at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)


def digest(state: Any) -> str:
    return weights_sha256(sorted(state.engine.gather().items()))


def test_a_memory_too_small_to_hold_anything_out(tmp_path: Path) -> None:
    _, world = make_world(merged(BIC), tmp_path)
    check_memory(world.config, world.stream)
    with pytest.raises(ConfigError, match=r"prior.correct.share=0.1 with memory.total=60 leaves some of the"):
        check_memory(merged(BIC, {"memory": {"total": 60}}), world.stream)


@pytest.mark.parametrize("budget", [{"total": 50}, {"total": 0, "size": 13}, {"total": 0, "fraction": 0.05}])
def test_a_memory_that_is_all_that_is_learned_from(tmp_path: Path, budget: dict[str, Any]) -> None:
    state, world = make_world(merged(GDUMB, {"memory": budget}), tmp_path)
    for task in world.stream.tasks[:3]:
        admit_first(task, state, world)
        memory = state.prior.memory
        assert memory.per_task(task.index + 1) == kept_of_tasks(world.config, world.stream, task.index + 1)
        counts = torch.bincount(memory.label)
        assert len(counts) == 2 * (task.index + 1)
        assert int(counts.max() - counts.min()) <= 1
        plan = plan_task(world.config, world.stream, task, memory)
        assert (plan.num_new, plan.num_memory) == (len(memory), 0)
        assert plan.num_steps == steps_of(world)[task.index]
        samples = new_samples(world.config, world.stream, task, memory)
        assert sorted(samples.tolist()) == sorted(memory.sample.tolist())
    learned = sum(len(task.samples("train")) for task in world.stream.tasks[:3])
    most = budget["total"] or 3 * budget.get("size", 0) or budget.get("fraction", 0.0) * learned + 3
    assert len(state.prior.memory) <= most


def test_gdumb_is_planned_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, world = make_world(merged(GDUMB), tmp_path)
    calls: list[int] = []

    def counted(before: Any, arriving: Any, **options: Any) -> Any:
        calls.append(len(arriving))
        return greedy_balance(before, arriving, **options)

    monkeypatch.setattr(kept, "greedy_balance", counted)
    assert len(steps_of(world)) == 5
    assert calls == [len(task.samples("train")) for task in world.stream.tasks]


@pytest.mark.parametrize("method", [BIC, GDUMB, {"train": {"head_epochs": 2}}], ids=["bic", "gdumb", "head epochs"])
def test_a_plan_counts_the_steps_that_are_taken(tmp_path: Path, method: dict[str, Any]) -> None:
    _, world = make_world(merged(method), tmp_path)
    assert make_plan(world.config, nodes=1, nproc=1, measured=False).steps == sum(steps_of(world))
