"""The acceptance tests of the method that need a trained network; the others are in tests/unit and tests/dist.

Each would have caught a bug of the released code (numbers as in the method's specification).
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpccl.config.load import dump
from hpccl.data.order import BatchPlan
from hpccl.data.rows import Request
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.errors import ConfigError, CoverageError
from hpccl.prior.prior import Prior
from hpccl.report.events import read_events
from hpccl.train.compose import Composer, split
from hpccl.train.fit import fit
from hpccl.train.loss import row_nats, weighted_nats
from hpccl.train.measure import measure
from hpccl.train.plan import plan_task
from hpccl.train.reconstruction import prior_gradients, true_gradient
from hpccl.train.run import run
from hpccl.train.soft_labels import relabel
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop
from hpccl.train.task_pass import TaskPass
from tests.run.method import learn, make_world, merged


def objective_gradient(state: RunState, world: World, task: int, *, epochs: int = 1) -> dict[str, Tensor]:
    """Mean over the plan's steps of the gradient of a step's data terms, in evaluation mode."""
    config, stream = world.config, world.stream
    chosen = stream.tasks[task]
    plan: BatchPlan = plan_task(config, stream, chosen, state.prior.memory)
    composer = Composer.build(config, stream, chosen, state.prior.memory, teacher=None, device=torch.device("cpu"))
    total = {name: torch.zeros_like(value) for name, value in state.engine.module.named_parameters()}
    num_steps = epochs * plan.steps_per_epoch
    parts = [split(plan.batch(step), world.comm, accumulate=1)[0] for step in range(num_steps)]
    for part, images in zip(parts, stream.load(composer.request(part) for part in parts), strict=True):
        rows = composer.rows(part, images)
        nats = weighted_nats(state.engine.module.eval()(rows.pixels), rows).sum() / len(part.batch) / num_steps
        gradients = torch.autograd.grad(nats, list(state.engine.module.parameters()))
        torch._foreach_add_(list(total.values()), gradients)
    return total


def test_2_whole_tasks_in_replay_memory_give_the_joint_gradient(tmp_path: Path) -> None:
    """M = D_s with true labels, tau = 1, lambda = 0: the same gradient as joint training on all tasks so far."""
    # One batch holds everything, so that the two gradients are sums over the same examples.
    config = merged({"memory": {"size": 200}, "prior": {"replay": 1.0}, "train": {"batch_size": 1000}})
    state, world = make_world(config, tmp_path / "replay")
    learn(state, world, 1)
    memory = state.prior.memory
    everything = world.stream.tasks[0].samples("train")
    whole = memory.admit(
        task=0,
        sample=torch.tensor(sorted(set(everything) - set(memory.sample.tolist()))),
        label=torch.tensor(
            [int(world.stream.labels("train")[i]) for i in sorted(set(everything) - set(memory.sample.tolist()))]
        ),
        replay=torch.ones(len(everything) - len(memory), dtype=torch.bool),
    )
    assert len(whole) == len(everything)
    state.prior = Prior(whole)
    replayed = objective_gradient(state, world, 1)
    joint_config = merged({"train": {"data": "seen", "batch_size": 1000}})
    joint_state, joint_world = make_world(joint_config, tmp_path / "joint")
    joint_state.engine.put(state.engine.gather())
    joint = objective_gradient(joint_state, joint_world, 1)
    for name, value in joint.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("replay", "head"), [(0.5, "own"), (0.25, "seen"), ("coverage", "own")])
def test_both_labels_in_shares_are_the_mean_over_all_choices_of_examples(
    tmp_path: Path, replay: float | str, head: str
) -> None:
    """Four examples in memory: the gradient is the mean over the ways to give so many of them true labels."""
    settings = {"memory": {"size": 4}, "train": {"batch_size": 1000, "head": head}}
    mixed = merged(settings, {"prior": {"replay": replay, "share_of": "labels"}})
    state, world = make_world(mixed, tmp_path / "mixed")
    learn(state, world, 1)
    moved = {name: value + 0.05 for name, value in wholes(state.engine.gather()).items()}
    state.engine.put(moved)
    found = objective_gradient(state, world, 1)
    assert not bool(state.prior.memory.replay.any())

    kept, num_train = len(state.prior.memory), len(world.stream.tasks[0].samples("train"))
    share = kept / num_train if replay == "coverage" else float(replay)
    # Where the share is no whole number of examples: the mean of none and one, as often as it says.
    choices = (
        list(itertools.combinations(range(4), int(4 * share))) if replay != "coverage" else [(n,) for n in range(4)]
    )
    split_state, split_world = make_world(merged(settings, {"prior": {"replay": 0.5}}), tmp_path / "split")
    split_state.engine.put(moved)

    def gradient(slots: tuple[int, ...]) -> dict[str, Tensor]:
        replayed = torch.zeros(4, dtype=torch.bool)
        replayed[list(slots)] = True
        split_state.prior = Prior(replace(state.prior.memory, replay=replayed))
        return objective_gradient(split_state, split_world, 1)

    of_choices = [gradient(slots) for slots in choices]
    none = gradient(())
    for name, value in found.items():
        mean = sum((each[name] for each in of_choices), torch.zeros_like(value)) / len(choices)
        if replay == "coverage":
            mean = none[name] + 4 * share * (mean - none[name])
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_stratified_batches_have_the_expected_gradient_of_natural_ones(tmp_path: Path, share: float) -> None:
    """Per training example and over whole cycles, quotas change the variance and not the objective."""
    base = {"memory": {"size": 64}, "prior": {"replay": 0.5, "temperature": 2.0}}
    state, world = make_world(merged(base), tmp_path / "natural")
    learn(state, world, 1)
    natural = objective_gradient(state, world, 1)
    stratified_config = merged(base, {"memory": {"size": 64, "mix": {"kind": "stratified", "share": share}}})
    stratified = objective_gradient(state, replace(world, config=stratified_config), 1, epochs=100)
    difference = sum(float((stratified[name] - natural[name]).square().sum()) for name in natural) ** 0.5
    size = sum(float(value.square().sum()) for value in natural.values()) ** 0.5
    assert difference / size < 0.05


@pytest.mark.parametrize("kind", ["kronecker", "ekfac", "diagonal"])
def test_4_curvature_is_measured_with_the_right_labels_and_head(tmp_path: Path, kind: str) -> None:
    curvature = {"kind": kind, "fisher": "ggn"}
    config = merged({"curvature": curvature, "prior": {"quadratic": {"weight": 1.0}}, "train": {"epochs": 20}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    assert state.prior.quadratic is not None
    head = world.stream.tasks[1]
    precision = measure(head, replace(state.prior.memory), state.engine.gather(), replace_prior(state), world)
    assert precision is not None
    quadratic = replace(precision, weight=1.0, damping=0.0)
    weights = {name: value.detach() for name, value in trainable(state.engine.module).items()}
    rows = torch.zeros(10)
    for row in range(10):  # how much it costs to move one class's weights alone
        moved = weights["3.weight"].clone()
        moved[row] += 1
        rows[row] = quadratic.value({**weights, "3.weight": moved}, world.comm)
    others = [number for number in range(10) if number not in head.classes]
    assert float(rows[others].abs().max()) == 0
    assert float(rows[list(head.classes)].min()) > 0
    # The loss that the pass sees is the training loss: its labels are the right ones among the own head.
    samples = np.arange(head.samples("train").start, head.samples("train").stop)
    batches = list(TaskPass(head, samples, world))
    nats = [
        row_nats(
            state.engine.predict(batch.pixels),
            torch.nn.functional.one_hot(batch.labels, 10).float(),
            batch.head.expand(len(batch), -1),
        )
        for batch in batches
    ]
    assert float(torch.cat(nats).mean()) < 0.2  # ln 2 would be chance


@pytest.mark.parametrize(
    ("curvature", "problem"),
    [
        ({"kind": "kronecker", "max_factor": 20}, "curvature.max_factor=20"),
        ({"kind": "ekfac", "diagonal": ("layer4",)}, "matches no linear map or convolution"),
        ({"kind": "dense", "max_parameters": 100}, "curvature.max_parameters=100"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, curvature: dict[str, Any], problem: str
) -> None:
    folder = str(tmp_path / "run")
    config = merged({"curvature": curvature, "prior": {"quadratic": {"weight": 1.0}}, "folder": folder})
    with pytest.raises((ConfigError, CoverageError), match=problem):
        run(config, Comm.solo(), Stop(), quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("task-*"))


def replace_prior(state: RunState) -> RunState:
    """The same state without a quadratic, so that one task's curvature stands alone."""
    return RunState(state.engine, Prior(state.prior.memory, None, state.prior.anchor), state.mark)


def test_4_curvatures_of_equal_tasks_are_comparable(tmp_path: Path) -> None:
    """With wrong labels the second task's Fisher was 14 times the first's."""
    config = merged({"prior": {"quadratic": {"weight": 1.0}}, "train": {"epochs": 8}})
    state, world = make_world(config, tmp_path)
    traces = []
    for tasks in (1, 2):
        learn(state, world, tasks) if tasks == 1 else None
        task = world.stream.tasks[tasks - 1]
        if tasks == 2:
            fresh, fresh_world = make_world(config, tmp_path / "second")
            learn(fresh, fresh_world, 2)
            state = fresh
        alone = measure(task, state.prior.memory, state.engine.gather(), replace_prior(state), world)
        assert alone is not None
        traces.append(alone.precision.totals(world.comm).trace)
    assert 0.2 < traces[1] / traces[0] < 5


@pytest.mark.parametrize("view", ["stored", "teacher", "recorded"])
def test_5_soft_labels_are_those_of_the_model_that_was_trained(tmp_path: Path, view: str) -> None:
    config = merged({"memory": {"size": 40}, "prior": {"replay": 0.0, "view": view}, "train": {"epochs": 10}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    memory = state.prior.memory
    own = [list(world.stream.tasks[int(task)].classes) for task in memory.task]
    (images,) = world.stream.load(iter([request_stored(memory.sample)]))
    logits = state.engine.predict(images.pixels)
    guesses = torch.tensor([head[int(row[head].argmax())] for row, head in zip(logits, own, strict=True)])
    for task, agreement in enumerate(memory.agreement(2)):
        of_task = memory.task == task
        accuracy = float((guesses == memory.label)[of_task].float().mean())
        assert agreement == pytest.approx(accuracy)
        assert agreement > 0.9
    target, _ = memory.soft_targets(torch.arange(len(memory)), temperature=1.0, num_classes=10)
    assert torch.equal(target.argmax(1), guesses)


def request_stored(samples: Tensor) -> Request:
    """The evaluation view of some training examples."""
    return Request(samples.numpy(), np.zeros(len(samples), dtype=np.uint64))


def test_9_the_centre_moves_also_when_the_whole_task_is_in_memory(tmp_path: Path) -> None:
    config = merged({"stream": {"kind": "digits", "tasks": 5}, "prior": {"quadratic": {"weight": 1.0}}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    assert state.prior.quadratic is not None
    before = state.prior.quadratic
    task = world.stream.tasks[1]
    own = torch.arange(task.samples("train").start, task.samples("train").stop)
    labels = torch.from_numpy(world.stream.labels("train"))[own]
    whole = state.prior.memory.admit(task=1, sample=own, label=labels, replay=torch.ones(len(own), dtype=torch.bool))
    anchor = {name: value + 1 for name, value in wholes(state.engine.gather()).items()}
    after = measure(task, whole, anchor, state, world)
    assert after is not None
    moved = wholes(after.anchor)
    assert all(torch.equal(moved[name], anchor[name]) for name in anchor)
    assert after.precision.totals(world.comm).trace == pytest.approx(before.precision.totals(world.comm).trace)
    assert all(
        not bool(force.any())
        for force in wholes(
            after.force({n: anchor[n] for n in ("1.weight", "1.bias", "3.weight", "3.bias")}, world.comm)
        ).values()
    )


def test_10_no_weight_on_memory_does_not_change_the_curvature(tmp_path: Path) -> None:
    traces = {}
    for weight in (0.0, 1.0):
        config = merged({"memory": {"size": 50}, "prior": {"weight": weight, "quadratic": {"weight": 1.0}}})
        state, world = make_world(config, tmp_path / str(weight))
        learn(state, world, 1)
        assert state.prior.quadratic is not None
        traces[weight] = (state.prior.quadratic.precision.totals(world.comm).trace, len(state.prior.memory))
    assert traces[0.0] == traces[1.0]
    assert traces[0.0][1] == 50


def test_memory_is_paired_across_methods(tmp_path: Path) -> None:
    """The same seed keeps the same examples whatever the method, and another seed keeps others."""
    kept = []
    for number, change in enumerate(({"replay": 0.0}, {"replay": 1.0}, {"quadratic": {"weight": 1.0}})):
        state, world = make_world(merged({"memory": {"size": 30}, "prior": change}), tmp_path / str(number))
        learn(state, world, 1)
        kept.append(state.prior.memory.sample.tolist())
    assert kept[0] == kept[1] == kept[2]
    state, world = make_world(merged({"memory": {"size": 30}, "seed": 1}), tmp_path / "other")
    learn(state, world, 1)
    assert state.prior.memory.sample.tolist() != kept[0]


@pytest.mark.parametrize("classes", ["seen", "known"])
def test_soft_labels_of_the_whole_past_give_the_change_of_its_gradient(tmp_path: Path, classes: str) -> None:
    """Class-incremental and linear, where K-priors are exact (Khan and Swaroop 2021), if all seen classes compete."""
    config = merged(
        {"model": {"kind": "mlp", "hidden": []}, "train": {"head": "seen"}, "memory": {"size": 283}},
        {"prior": {"classes": classes}, "stream": {"kind": "digits", "tasks": 5}},
    )
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    task, prior = world.stream.tasks[1], state.prior
    everything = world.stream.tasks[0].samples("train")
    missing = sorted(set(everything) - set(prior.memory.sample.tolist()))
    labels = torch.from_numpy(world.stream.labels("train")[missing])
    memory = prior.memory.admit(
        task=0, sample=torch.tensor(missing), label=labels, replay=torch.zeros(len(missing), dtype=torch.bool)
    )
    state.prior = prior = replace(prior, memory=relabel(world.stream.tasks[0], memory, state, world))

    def gradients() -> tuple[Tensor, Tensor]:
        found = true_gradient(task, 1.0, state, world), prior_gradients(task, prior, state, world)["total"]
        true, said = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in found)
        return true, said

    before = gradients()
    fit(task, state, world)
    true, said = (now - old for now, old in zip(gradients(), before, strict=True))
    error = float((said - true).norm() / true.norm())
    assert error < 1e-5 if classes == "seen" else error > 0.1


def test_the_share_that_curvature_is_measured_on_may_differ_by_task(tmp_path: Path) -> None:
    """Each example measured stands for several, so that the curvature is that of all that are not in memory."""
    images, examples = {}, {}
    for name, fraction in (("shares", [0.1, 0.5]), ("all", 1.0)):
        curvature = {"kind": "diagonal", "fraction": fraction}
        prior = {"quadratic": {"weight": 1.0}}
        config = merged(
            {"curvature": curvature, "memory": {"size": 10}, "prior": prior, "folder": str(tmp_path / name)}
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(config))
        run(config, Comm.solo(), Stop(), quiet=True)
        events = read_events(tmp_path / name / "events.jsonl")
        phases = [event for event in events if event["event"] == "phase"]
        images[name] = [event["images"] for event in phases if event["phase"] == "curvature"]
        examples[name] = [event["num_examples"] for event in events if event["event"] == "curvature"]
    assert examples["all"] == images["all"]
    shares = (0.1, *[0.5] * (len(images["all"]) - 1))
    assert images["shares"] == [round(share * count) for share, count in zip(shares, images["all"], strict=True)]
    assert len(set(images["shares"])) > 1
