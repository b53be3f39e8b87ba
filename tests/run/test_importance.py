"""Importances of weights (MAS, SI) in real runs: units, the path, what is held, resuming, forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import Mark, load, open_shards
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.si import synaptic
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.build import build_engine
from hpccl.prior.quadratic import Quadratic
from hpccl.train.compose import Composer, split
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.loss import weighted_nats
from hpccl.train.plan import plan_task
from hpccl.train.run import fresh_state, weights_sha256
from hpccl.train.state import RunState, World
from tests.run.method import learn, make_world, merged

SOLO = Comm.solo()
SGD: dict[str, Any] = {"optim": {"name": "momentum", "momentum": 0.0, "lr": 0.1, "schedule": "constant"}}
MAS: dict[str, Any] = {"curvature": {"kind": "mas"}, "prior": {"quadratic": {"weight": 1.0, "damping": 0.0}}}
LOCAL: dict[str, Any] = {**MAS, "curvature": {"kind": "mas", "variant": "local"}}
SI: dict[str, Any] = {"curvature": {"kind": "si"}, "prior": {"quadratic": {"weight": 1.0, "damping": 0.0}}}


class Scalar(nn.Module):
    """theta, whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.theta.expand(len(pixels), 1)


def scalar_steps(engine: Any, number: int) -> None:
    """Steps on 1/2 theta^2."""
    for _ in range(number):
        engine.backward(engine.forward(torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)).square().sum() / 2)
        engine.step()


def test_si_of_a_parabola() -> None:
    """Two steps of 0.1 from 1: omega = 0.181, Omega = 1.329904, and 0.1 Omega (0.9 - 0.81)^2 = 0.001077."""
    engine = build_engine(merged(SI, SGD), Scalar(), SOLO)
    engine.start(num_steps=2, task=0)
    scalar_steps(engine, 2)
    credit, start = engine.path()
    end = engine.gather()
    assert wholes(end)["theta"].item() == pytest.approx(0.81)
    assert wholes(credit)["theta"].item() == pytest.approx(0.181)
    found = synaptic(credit, start, end, xi=0.1, num_examples=1)
    assert found.values["theta"].item() == pytest.approx(2 * 1.329904, rel=1e-5)
    penalty = Quadratic(found, end, 0.1, 0.0)
    assert penalty.value({"theta": torch.tensor([0.9])}, SOLO) == pytest.approx(0.001077, abs=1e-6)
    engine.start(num_steps=2, task=1)
    assert not bool(wholes(engine.path()[0])["theta"].any())


def test_a_limit_is_of_omega() -> None:
    """Omega = 4, 1 and 0: a limit of 2 leaves 2, 1 and 0, before the sum over examples and the factor of MAS."""
    credit, end = {"w": torch.tensor([0.4, 0.1, -0.3])}, {"w": torch.zeros(3)}
    found = synaptic(credit, {"w": torch.zeros(3)}, end, xi=0.1, num_examples=5, limit=2.0)
    torch.testing.assert_close(found.values["w"], 2 * 5 * torch.tensor([2.0, 1.0, 0.0]))


def test_the_total_gradient_of_a_run_has_the_prior_in_it(tmp_path: Path) -> None:
    """What the first task says is the same, for there is no prior yet; that of the second is not."""
    credit: dict[str, list[Tensor]] = {}
    for gradient in ("task", "total"):
        settings = {**SI, "curvature": {"kind": "si", "gradient": gradient}}
        state, world = make_world(merged(SGD, settings), tmp_path / gradient)
        for task in world.stream.tasks[:2]:
            state.mark = Mark.at(task.index, "fit", 0)
            assert fit(task, state, world)
            consolidate(task, state, world)
            path = wholes(state.engine.path()[0])
            credit.setdefault(gradient, []).append(torch.cat([value.flatten() for value in path.values()]))
    for number, (one, other) in enumerate(zip(credit["task"], credit["total"], strict=True)):
        assert torch.equal(one, other) == (number == 0), number
    # Towards the minimum of the sum, the sum of gradients does less than that of the loss alone.
    assert credit["total"][1].sum() < credit["task"][1].sum()


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_the_path_leaves_out_the_prior_and_clipping(clip_norm: float | None) -> None:
    engine = build_engine(merged(SI, SGD, {"train": {"clip_norm": clip_norm}}), Scalar(), SOLO)
    engine.start(num_steps=3, task=1)
    precision = Diagonal.from_state_dict({"kind": "diagonal", "values": {"theta": torch.tensor([3.0])}})
    quadratic = Quadratic(precision, {"theta": torch.tensor([0.5])}, 2.0, 0.25, {"theta": torch.tensor([0.7])})
    detach, end = quadratic.attach(engine, SOLO, num_train=4), engine.follow(quadratic.pull_on(4))
    theta, omega = 1.0, 0.0
    for _ in range(3):
        scalar_steps(engine, 1)
        total = theta + 2.0 / 4 * (3.25 * (theta - 0.5) + 0.7)
        moved = -0.1 * total * min(1.0, (clip_norm or total) / total)
        omega -= theta * moved
        theta += moved
    detach()
    end()
    assert wholes(engine.gather())["theta"].item() == pytest.approx(theta, rel=1e-5)
    assert wholes(engine.path()[0])["theta"].item() == pytest.approx(omega, rel=1e-4)


def test_what_is_held_did_nothing() -> None:
    """Though what the prior adds is masked like the gradient, and though Adam's moments would move it on."""
    engine = build_engine(merged(SI, {"optim": {"name": "adamw", "lr": 0.1, "schedule": "constant"}}), Scalar(), SOLO)
    engine.start(num_steps=4, task=1)
    quadratic = Quadratic(Diagonal({"theta": torch.tensor([3.0])}), {"theta": torch.tensor([0.5])}, 2.0, 0.25)
    end = engine.follow(quadratic.pull_on(4))
    scalar_steps(engine, 2)
    before = wholes(engine.path()[0])["theta"].item()
    engine.hold({"theta": torch.ones(1, dtype=torch.bool)}, frozenset())
    scalar_steps(engine, 1)
    assert wholes(engine.path()[0])["theta"].item() == before
    engine.hold({}, frozenset())
    scalar_steps(engine, 1)
    end()
    assert wholes(engine.path()[0])["theta"].item() != before


def test_the_sum_over_examples_counts_them() -> None:
    one = {"w": torch.tensor([0.3])}
    few, many = (synaptic(one, {"w": torch.zeros(1)}, one, xi=0.1, num_examples=number) for number in (3, 6))
    torch.testing.assert_close(many.values["w"], 2 * few.values["w"])
    assert many.num_examples == 6


def test_what_lost_cannot_be_negative() -> None:
    one = {"w": torch.tensor([-0.3, 0.2])}
    found = synaptic(one, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])}, xi=0.1, num_examples=1)
    torch.testing.assert_close(found.values["w"], torch.tensor([0.0, 4.0]))


def first_step_of_second_task(state: RunState, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Weights moved away from the anchor, where the first step leads, and that step's rows."""
    task = world.stream.tasks[1]
    plan = plan_task(world.config, world.stream, task, state.prior.memory)
    composer = Composer.build(
        world.config, world.stream, task, state.prior.memory, teacher=None, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(2)
    moved = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in wholes(state.engine.gather()).items()
    }
    state.engine.put(moved)
    state.engine.start(num_steps=plan.num_steps, task=1)
    assert state.prior.quadratic is not None
    detach = state.prior.quadratic.attach(state.engine, SOLO, num_train=plan.num_train)
    (part,) = split(plan.batch(0), SOLO, accumulate=1)
    (images,) = world.stream.load([composer.request(part)])
    rows = composer.rows(part, images)
    state.engine.backward((weighted_nats(state.engine.forward(rows.pixels, rows.noise), rows) / len(part.batch)).sum())
    state.engine.step()
    detach()
    return moved, wholes(state.engine.gather()), rows


@pytest.mark.parametrize("settings", [MAS, SI], ids=["mas", "si"])
def test_a_step_is_that_of_the_mean_loss_and_lambda_omega_distance_squared(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """With the paper's lambda, but for the sizes of the tasks: against autograd in float64."""
    weight = 0.7
    quadratic = {"prior": {"quadratic": {"weight": weight, "damping": 0.0}}}
    # Two epochs with one batch of everything: a step's rows are then the whole task.
    config = merged(settings, SGD, quadratic, {"train": {"batch_size": 1000, "epochs": 2}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    anchor = wholes(state.prior.anchor or {})
    assert state.prior.quadratic is not None
    precision = state.prior.quadratic.precision
    assert isinstance(precision, Diagonal)
    old, new = (len(task.samples("train")) for task in world.stream.tasks[:2])
    omega = {name: value.double() / (2 * old) for name, value in precision.values.items()}
    assert all(bool((value > 0).any()) for value in omega.values())
    moved, after, rows = first_step_of_second_task(state, world)
    weights = {name: value.double().requires_grad_() for name, value in moved.items()}
    network = state.engine.module.double()
    logits = torch.func.functional_call(network, weights, (rows.pixels.double(),))
    own = logits.masked_fill(~rows.head, -torch.inf).log_softmax(1)
    mean = -own[torch.arange(len(own)), rows.target.argmax(1)].mean()
    distance = sum((omega[name] * (value - anchor[name]).square()).sum() for name, value in weights.items())
    gradients = torch.autograd.grad(mean + weight * old / new * distance, list(weights.values()))
    for (name, value), gradient in zip(moved.items(), gradients, strict=True):
        torch.testing.assert_close((value - after[name]).double() / 0.1, gradient, rtol=1e-3, atol=2e-5, msg=name)


def digest(state: RunState) -> str:
    return weights_sha256(sorted(wholes(state.engine.gather()).items()))


@pytest.mark.parametrize("settings", [MAS, SI], ids=["mas", "si"])
def test_a_run_goes_on_in_the_middle_of_a_task(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = merged(settings, {"checkpoint": {"every": 5, "keep": 100}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    mark, checkpoints = Mark.at(1, "fit", 10), world.folder.checkpoints
    other = fresh_state(config, world.stream, world.comm)
    other.load_state_dict(load(checkpoints, mark), mark, open_shards(checkpoints, mark), world.comm)
    learn_on(other, world)
    assert digest(other) == digest(state)
    one, again = state.prior.quadratic, other.prior.quadratic
    assert one is not None
    assert again is not None
    assert isinstance(one.precision, Diagonal)
    assert isinstance(again.precision, Diagonal)
    for name, value in one.precision.values.items():
        assert torch.equal(again.precision.values[name], value), name


def learn_on(state: RunState, world: World) -> None:
    """The rest of the second task."""
    assert fit(world.stream.tasks[1], state, world)
    consolidate(world.stream.tasks[1], state, world)


STRENGTHS = {"mas": (MAS, 0.1), "mas_local": (LOCAL, 0.02), "si": (SI, 1.0)}


def forgetting(folder: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """Mean loss of accuracy of earlier tasks after five tasks, and the mean accuracy then; by task."""
    config = merged({"train": {"epochs": 12}, "optim": {"name": "adamw", "lr": 5e-2}}, settings)
    state, world = make_world(config, folder)
    then = []
    for task in world.stream.tasks:
        state.mark = Mark.at(task.index, "fit", 0)
        assert fit(task, state, world)
        consolidate(task, state, world)
        results = evaluate_all(state, world, last=task.index)
        then.append([result["task_incremental"]["accuracy"] for result in results])
    last = len(then) - 1
    return sum(then[t][t] - then[last][t] for t in range(last)) / last, sum(then[last]) / len(then)


@pytest.mark.slow
def test_mas_and_si_forget_less_than_finetuning(tmp_path: Path) -> None:
    finetune = forgetting(tmp_path / "finetune", {})
    for name, (settings, weight) in STRENGTHS.items():
        quadratic = {"prior": {"quadratic": {"weight": weight, "damping": 0.0}}}
        found = forgetting(tmp_path / name, {**settings, **quadratic})
        assert found[0] < finetune[0] - 0.05, (name, found, finetune)
        assert found[1] > finetune[1] + 0.02, (name, found, finetune)
