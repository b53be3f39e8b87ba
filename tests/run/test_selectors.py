"""Whole tasks with every selector: what is kept is what its definition says, and trains."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from hpccl.checkpoint.store import Mark, load
from hpccl.data.rows import Request
from hpccl.errors import ConfigError
from hpccl.memory.greedy import herding
from hpccl.memory.score import signs, step_size, whole_leverage, whole_sensitivity
from hpccl.memory.store import Memory
from hpccl.train.compose import Composer
from hpccl.train.consolidate import select
from hpccl.train.fit import fit
from hpccl.train.score import looks
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stopped
from hpccl.train.variance import logit_variances
from tests.run.method import learn, make_world, merged

SELECTORS: list[dict[str, Any]] = [
    {"kind": "uniform"},
    {"kind": "reservoir"},
    {"kind": "gini"},
    {"kind": "gini", "sampled": True},
    {"kind": "error"},
    {"kind": "residual", "sampled": True},
    {"kind": "leverage"},
    {"kind": "sensitivity", "sampled": True},
    {"kind": "leverage", "network": "all"},
    {"kind": "sensitivity", "network": "all", "sampled": True},
    {"kind": "herding"},
    {"kind": "welling"},
    {"kind": "k_center"},
    {"kind": "reconstruction"},
    {"kind": "reconstruction", "weights": "fitted"},
    {"kind": "reconstruction", "weights": "fitted", "projection": 64, "probes": 0},
]


ONE_LAYER = {"kind": "mlp", "hidden": []}
ALONE = {"quadratic": {"weight": 0.0}}
KEPT = [31, 56, 64, 71, 78, 81, 142, 148, 159, 171, 176, 236]
REPLAYED = [56, 71, 81, 148, 176, 236]


def names(selector: dict[str, Any]) -> str:
    return " ".join(map(str, selector.values()))


def after(tasks: int, folder: Path, memory: dict[str, Any], **sections: Any) -> tuple[RunState, World]:
    prior = {"replay": 0.5, "quadratic": {"weight": 1.0}}
    state, world = make_world(merged({"memory": memory, "prior": prior, **sections}), folder)
    learn(state, world, tasks)
    return state, world


@pytest.mark.parametrize("selector", SELECTORS, ids=names)
def test_two_tasks(tmp_path: Path, selector: dict[str, Any]) -> None:
    state, world = after(2, tmp_path, {"size": 20, "selector": selector})
    memory = state.prior.memory
    assert memory.per_task(2) == [20, 20]
    assert memory.replay.sum() == 20
    assert bool((memory.weight >= 0).all())
    assert bool(torch.isfinite(memory.soft).all())
    for task in (0, 1):
        own = memory.task == task
        assert sorted(memory.order[own].tolist()) == list(range(20))
        assert torch.bincount(memory.label[own]).tolist()[-2:] == [10, 10]
    if not selector.get("sampled") and selector.get("weights") != "fitted":
        assert memory.weight.unique().tolist() == [1.0]
    assert world.stream.tasks[1].samples("train").start <= int(memory.sample.max())


def test_uniform_keeps_what_it_always_kept(tmp_path: Path) -> None:
    """Samples chosen by version 0 with seed 0."""
    state, _ = after(1, tmp_path, {"size": 12})
    assert state.prior.memory.sample.tolist() == KEPT
    assert state.prior.memory.sample[state.prior.memory.replay].tolist() == REPLAYED


def test_equal_weights_herd_the_gradients_of_the_last_layer(tmp_path: Path) -> None:
    """Of (p - y) x', whole; beside a quadratic the same without probes, at which alone it says something."""
    kept = {"kind": "reconstruction", "probes": 0, "projection": 10_000}
    state, world = after(1, tmp_path, {"size": 20, "selector": kept})
    (look,) = looks(np.arange(len(world.stream.tasks[0].samples("train"))), [0, 1], state, world, inputs=True)
    labels = torch.from_numpy(world.stream.labels("train")[look.sample])
    error = look.logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 2)
    gradients = torch.einsum("nk,nd->nkd", error, look.x).flatten(1).numpy()
    expected = [np.flatnonzero(labels == k)[herding(gradients[labels == k], 10, normalise=False)] for k in (0, 1)]
    assert state.prior.memory.sample.tolist() == sorted(np.concatenate(expected).tolist())


def test_equal_weights_leave_out_what_the_quadratic_says(tmp_path: Path) -> None:
    """Herding of u - c at random steps of the last layer, with c from the definition of the quadratic."""
    kept = {"kind": "reconstruction", "weights": "equal", "probes": 2, "projection": 100_000}
    prior = {"replay": 0.5, "quadratic": {"weight": 3.0}}
    state, world = after(1, tmp_path, {"size": 20, "selector": kept}, prior=prior)
    samples = np.arange(len(world.stream.tasks[0].samples("train")))
    (look,) = looks(samples, [0, 1], state, world, inputs=True)
    labels = torch.from_numpy(world.stream.labels("train")[look.sample])
    x, z = look.x.double(), look.logits.double()
    size = step_size(float(x.square().sum(dim=1).mean()), 1.0)
    selecting, probing = 101, 11  # what hashes are for
    steps = signs(2 * 2 * x.shape[1], world.config.seed, selecting, 0, probing).view(2, 2, x.shape[1]).double() * size
    p = z.softmax(dim=1)
    parts = []
    for step in (torch.zeros_like(steps[0]), *steps):
        moved = x @ step.T
        error = (z + moved).softmax(dim=1) - functional.one_hot(labels, 2)
        says = 3.0 * (p * moved - p * (p * moved).sum(dim=1, keepdim=True))
        parts.append((error - says)[:, :, None] * x[:, None, :])
    vectors = torch.stack(parts, dim=1).flatten(1).numpy()
    expected = [np.flatnonzero(labels == k)[herding(vectors[labels == k], 10, normalise=False)] for k in (0, 1)]
    assert state.prior.memory.sample.tolist() == sorted(np.concatenate(expected).tolist())


def best(state: RunState, world: World, score: Any, keep: int) -> set[int]:
    """The largest scores of the first task by class, from all its examples at once."""
    task = world.stream.tasks[0]
    samples = np.arange(len(task.samples("train")))
    (look,) = looks(samples, [0, 1], state, world, inputs=True)
    labels = torch.from_numpy(world.stream.labels("train")[samples])
    scores = score(look, labels)
    return {
        int(sample)
        for number in (0, 1)
        for sample in samples[labels == number][(-scores[labels == number]).argsort(stable=True)[: keep // 2]]
    }


def test_scores_are_those_of_the_network_that_ends_the_task(tmp_path: Path) -> None:
    state, world = after(1, tmp_path, {"size": 20, "selector": {"kind": "error"}})
    nats = lambda look, labels: torch.nn.functional.cross_entropy(look.logits.double(), labels, reduction="none")  # noqa: E731 (read in place)
    assert set(state.prior.memory.sample.tolist()) == best(state, world, nats, 20)


def test_last_layer_inputs_make_the_logits(tmp_path: Path) -> None:
    state, world = after(1, tmp_path, {"size": 4})
    last = [layer for layer in state.engine.module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    count = 0
    for look in looks(np.arange(100), [0, 1], state, world, inputs=True):
        weights = torch.cat([last.weight, last.bias[:, None]], dim=1)[:2]
        torch.testing.assert_close(look.x @ weights.T, look.logits)
        count += len(look.sample)
    assert count == 100


def test_weights_multiply_tau(tmp_path: Path) -> None:
    state, world = after(1, tmp_path, {"size": 20, "selector": {"kind": "gini", "sampled": True}}, prior=ALONE)
    memory, task = state.prior.memory, world.stream.tasks[1]
    assert len(memory.weight.unique()) > 5
    config = merged({"memory": {"size": 20}, "prior": {"weight": 3.0, "scale_to_task": True}})
    composer = Composer.build(config, world.stream, task, memory, teacher=None, device=torch.device("cpu"))
    stands_for = len(world.stream.tasks[0].samples("train")) / 20
    torch.testing.assert_close(composer.memory_weights(torch.arange(20)), 3.0 * stands_for * memory.weight)


def test_a_total_is_shared_by_all_tasks(tmp_path: Path) -> None:
    state, world = after(3, tmp_path, {"total": 24, "selector": {"kind": "herding"}})
    memory = state.prior.memory
    assert memory.per_task(3) == [8, 8, 8]
    assert torch.bincount(memory.label).tolist() == [4] * 6
    assert [int(memory.replay[memory.task == task].sum()) for task in range(3)] == [4, 4, 4]
    # What is left of the first task are the first of its order, which was made when it ended.
    alone, _ = after(1, tmp_path / "alone", {"total": 24, "selector": {"kind": "herding"}})
    first = alone.prior.memory
    assert first.per_task(1) == [24]
    assert set(memory.sample[memory.task == 0].tolist()) == set(first.sample[first.order < 8].tolist())
    state.mark = Mark.at(3, "fit", 0)
    assert fit(world.stream.tasks[3], state, world)


@pytest.mark.parametrize("balanced", [True, False])
def test_what_is_left_of_a_sampled_memory_counts_as_if_it_had_been_drawn_alone(tmp_path: Path, balanced: bool) -> None:
    shared = {"selector": {"kind": "gini", "sampled": True}, "balanced": balanced}
    memory = after(3, tmp_path / "three", {"total": 24, **shared}, prior=ALONE)[0].prior.memory
    alone = after(1, tmp_path / "alone", {"size": 8, **shared}, prior=ALONE)[0].prior.memory
    own = memory.task == 0
    assert memory.sample[own].tolist() == alone.sample.tolist()
    torch.testing.assert_close(memory.weight[own], alone.weight)
    assert len(alone.weight.unique()) > 5


@pytest.mark.parametrize("scaled", [False, True])
def test_a_sampled_memory_beside_a_quadratic_stands_for_itself(tmp_path: Path, scaled: bool) -> None:
    """Also what is left of it: the quadratic has lost every example in memory as a whole."""
    prior = {"quadratic": {"weight": 1.0}, "replay": 1.0, "scale_to_task": scaled}
    memory = {"total": 40, "selector": {"kind": "error", "sampled": True}}
    state, world = make_world(merged({"train": {"epochs": 1}, "prior": prior, "memory": memory}), tmp_path)
    learn(state, world, 2)
    weight = state.prior.memory.weight
    assert len(weight) == 40
    assert bool((weight == 1).all()) == (not scaled)


def test_a_reservoir_of_all_tasks_is_a_uniform_sample_of_all(tmp_path: Path) -> None:
    memory = {"total": 30, "selector": {"kind": "reservoir"}, "balanced": False}
    state, world = after(3, tmp_path, memory)
    kept = state.prior.memory
    past = world.stream.tasks[2].samples("train").stop
    from hpccl.memory.select import choose

    expected = choose(np.zeros(past, np.int64), np.arange(past), keep=30, balanced=False, words=(0, 101))
    assert sorted(kept.sample.tolist()) == expected.tolist()


def test_a_fraction_follows_the_tasks_sizes(tmp_path: Path) -> None:
    state, world = after(2, tmp_path, {"fraction": 0.1})
    sizes = [len(task.samples("train")) for task in world.stream.tasks[:2]]
    assert state.prior.memory.per_task(2) == [round(0.1 * size) for size in sizes]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_survives_a_checkpoint(tmp_path: Path, dtype: str) -> None:
    state, world = after(1, tmp_path, {"size": 20, "dtype": dtype})
    world.save(state, Mark.at(0, "done", 0))
    assert state.prior.memory.soft.element_size() == 2
    again = Memory.from_state_dict(load(world.folder.checkpoints, Mark.at(0, "done", 0))["prior"]["memory"])
    assert again.soft.dtype == state.prior.memory.soft.dtype
    assert torch.equal(again.soft, state.prior.memory.soft)


def test_the_run_can_be_stopped_while_it_looks(tmp_path: Path) -> None:
    state, world = make_world(merged({"memory": {"size": 20, "selector": {"kind": "gini"}}}), tmp_path)
    world.stop.reason = "signal 15"
    with pytest.raises(Stopped):
        select(world.stream.tasks[0], Memory.empty(), state, world)


def test_a_network_without_a_linear_last_layer_is_refused(tmp_path: Path) -> None:
    state, world = make_world(merged({"memory": {"size": 20, "selector": {"kind": "herding"}}}), tmp_path)
    layers = [layer for layer in state.engine.module.modules() if isinstance(layer, torch.nn.Linear)]
    layers[-1].register_forward_hook(lambda *arguments: arguments[2][:, :, None])  # no longer the logits
    state.engine.module.register_forward_hook(lambda *arguments: arguments[2][:, :, 0])
    with pytest.raises(ConfigError, match=r"needs the inputs of the last layer, which must be an nn\.Linear"):
        select(world.stream.tasks[0], Memory.empty(), state, world)


@pytest.mark.parametrize("kind", ["leverage", "sensitivity"])
def test_a_network_of_one_layer_has_no_other_layers(tmp_path: Path, kind: str) -> None:
    """Whole is then the last layer, and both make the same choice."""
    kept = [
        after(1, tmp_path / network, {"size": 20, "selector": {"kind": kind, "network": network}}, model=ONE_LAYER)
        for network in ("last_layer", "all")
    ]
    one, other = (state.prior.memory for state, _ in kept)
    assert torch.equal(one.sample, other.sample)
    assert torch.equal(one.order, other.order)


def test_variance_of_a_whole_network_against_dense_matrices(tmp_path: Path) -> None:
    """J P^-1 J' by hand, P a Kronecker product a layer of sums that are made example by example, in float64."""
    state, world = make_world(merged({"memory": {"size": 20}, "model": {"hidden": [5]}}), tmp_path)
    task = world.stream.tasks[0]
    samples, classes, delta = np.arange(task.samples("train").stop), [0, 1], 0.7
    (images,) = world.stream.load([Request(samples, np.zeros(len(samples), dtype=np.uint64))])
    network = copy.deepcopy(state.engine.module).double().eval()
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    inner = functional.relu(layers[0](images.pixels.double().flatten(1))).detach()
    inputs = [with_one(images.pixels.double().flatten(1)), with_one(inner)]
    p = network(images.pixels.double())[:, classes].softmax(1).detach()
    output = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    last = layers[1].weight.detach()[classes]
    passes = [last[None] * (inner > 0)[:, None, :], torch.eye(10, dtype=torch.float64)[classes].expand(len(p), -1, -1)]
    expected = torch.zeros_like(output)
    for x, backward in zip(inputs, passes, strict=True):  # backward: [n, K, outputs of the layer]
        a, g = x.T @ x / len(x), torch.einsum("nko,nkl,nlp->op", backward, output, backward)
        precision = torch.kron(g.contiguous(), a.contiguous()) + delta * torch.eye(len(g) * len(a), dtype=torch.float64)
        jacobian = torch.einsum("nko,ni->nkoi", backward, x).flatten(2)
        expected += jacobian @ torch.linalg.solve(precision, jacobian.flatten(0, 1).T).T.view_as(jacobian).mT
    found = list(logit_variances(task, samples, state, world, prior_precision=delta))
    variance = torch.cat([each.variance for each in found]).double()
    torch.testing.assert_close(variance, expected, rtol=1e-3, atol=1e-5)
    logits = torch.cat([each.logits for each in found])
    leverages = torch.einsum("nkl,nlk->n", output, expected)
    torch.testing.assert_close(whole_leverage(logits, variance), leverages, rtol=1e-3, atol=1e-6)
    labels = torch.from_numpy(world.stream.labels("train")[samples])
    error = (p - functional.one_hot(labels, 2)).abs()
    sensitivities = (output.diagonal(dim1=1, dim2=2) * expected.diagonal(dim1=1, dim2=2) * error).sum(1)
    torch.testing.assert_close(whole_sensitivity(logits, variance, labels), sensitivities, rtol=1e-3, atol=1e-6)


def with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def test_a_network_that_is_too_large_for_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpccl.train.variance._LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"memory\.selector\.network=all: the Jacobian of one image by '.*last_layer"):
        after(1, tmp_path, {"size": 20, "selector": {"kind": "leverage", "network": "all"}})
