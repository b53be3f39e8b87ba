"""The curvature that an optimiser learned, beside the one that a pass measures, and what earlier tasks add to it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import Mark, load, open_shards
from hpccl.config.optim import IvonOptim
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.learned import learned_diagonal
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.engine.build import build_engine
from hpccl.train.consolidate import consolidate
from hpccl.train.fit import fit
from hpccl.train.run import fresh_state, weights_sha256
from hpccl.train.state import RunState, World
from tests.run.method import learn, make_world, merged

SECTIONS: dict[str, Any] = {
    "curvature": {"kind": "optimizer"},
    "prior": {"quadratic": {"weight": 1.0}},
    "train": {"epochs": 12, "batch_size": 32, "head": "own"},
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "ivon": {"kind": "ivon", "lr": 0.1, "initial_curvature": 0.1, "curvature_decay": 0.995},
    "vogn": {"kind": "vogn", "lr": 1e-3},
    "soba": {"kind": "soba", "lr": 0.02, "initial_curvature": 0.1},
    "adamw": {"kind": "timm", "name": "adamw", "lr": 3e-3},
    "rmsprop": {"kind": "timm", "name": "rmsprop", "lr": 1e-3},
}


def measured(changes: dict[str, Any], folder: Path) -> tuple[Diagonal, RunState, World]:
    state, world = make_world(merged(SECTIONS, changes), folder)
    learn(state, world, 1)
    assert state.prior.quadratic is not None
    assert isinstance(state.prior.quadratic.precision, Diagonal)
    return state.prior.quadratic.precision, state, world


def flat(precision: Diagonal) -> Tensor:
    return torch.cat([value.flatten() for value in precision.values.values()]).double()


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("ivon", 0.25),
        ("adamw", 0.6),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("vogn", 0.6), ("soba", 0.25), ("rmsprop", 0.6))),
    ],
)
def test_what_was_learned_goes_with_what_a_pass_measures(tmp_path: Path, kind: str, least: float) -> None:
    """Correlation over all weights, with the squares of the same task's examples at the weights that end it."""
    found, state, world = measured({"optim": OPTIMISERS[kind]}, tmp_path / "learned")
    state.prior = type(state.prior)(state.prior.memory)
    other = merged(SECTIONS, {"optim": OPTIMISERS[kind], "curvature": {"kind": "diagonal"}})
    object.__setattr__(world, "config", other)
    consolidate(world.stream.tasks[0], state, world)
    assert state.prior.quadratic is not None
    assert isinstance(state.prior.quadratic.precision, Diagonal)
    pair = torch.stack([flat(found), flat(state.prior.quadratic.precision)])
    assert float(torch.corrcoef(pair)[0, 1]) > least
    assert float(pair.min()) >= 0


class Idle(nn.Module):
    """A network with a layer that its passes do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.used(pixels.flatten(1))
        return logits


def test_weights_that_had_no_gradient_have_learned_nothing() -> None:
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    try:
        engine = build_engine(merged(SECTIONS, {"optim": OPTIMISERS["adamw"]}), Idle(), Comm.solo())
        engine.start(num_steps=1, task=0)
        engine.backward(engine.forward(torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)).square().sum())
        engine.step()
        found = dict(streamed(engine.moments({"exp_avg_sq": "squares"})["squares"], Comm.solo()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(found["used.weight"].min()) > 0
    assert {name for name, value in found.items() if not value.any()} == {"idle.weight", "idle.bias"}


@dataclass
class Fixed:
    """An engine whose optimiser has a given state."""

    steps_taken: int

    def moments(self, names: dict[str, str]) -> dict[str, dict[str, Tensor]]:
        return {answer: {"w": torch.tensor([0.5, 0.1])} for answer in names.values()}


def test_units_and_what_is_taken_off() -> None:
    past = Diagonal({"w": torch.tensor([3.0, 40.0])}, 10)
    quadratic: dict[str, Any] = {"past": past, "weight": 2.0, "damping": 0.5, "num_train": 100}

    def of(optim: dict[str, Any], *, steps: int, **more: Any) -> list[Any]:
        engine: Any = Fixed(steps)
        found = learned_diagonal(engine, merged({"optim": optim}).optim, Comm.solo(), **more)
        assert found.num_examples == 100
        return [pytest.approx(value) for value in found.values["w"].tolist()]

    ivon = {"kind": "ivon", "initial_curvature": 0.2, "curvature_decay": 0.5, "weight_decay": 0.3}
    left = 0.2 - 0.5 * 0.2 + (0.5 * 0.2) ** 2 / (2 * 0.5)  # after a step without a gradient
    assert of(ivon, num_train=100, steps=1) == [(50.0 - 100 * left) / 0.5, 0.0]  # a step weighs half
    assert of(ivon, num_train=100, steps=10**5) == [50.0, 10.0]
    assert of(ivon, steps=10**5, **quadratic) == [50.0 - 2 * 3.5, 0.0]
    assert of({"kind": "vogn"}, steps=1, **quadratic) == [50.0, 10.0]
    soba = {"kind": "soba", "prior_precision": 0.2, "initial_curvature": 0.004, "curvature_rate": 0.5}
    u = 0.5 * (0.2 / 0.4 - 1)
    assert of(soba, num_train=100, steps=1) == [(0.5 - 0.4 * (1 + u + u**2 / 2)) / 0.5, 0.0]
    assert of(soba, num_train=100, steps=10**4) == [0.3, 0.0]
    assert of({"name": "adamw"}, steps=1, **quadratic) == [100 * 0.5**0.5, 100 * 0.1**0.5]


@pytest.mark.parametrize("steps", [50, 2000])
def test_tasks_that_are_short_beside_the_average_add_up(steps: int) -> None:
    """IVON's rule with its default decay and a Hessian of 1: that of the task and, later, of the quadratic, too."""
    optim = IvonOptim(kind="ivon")
    total = 0.0
    for _ in range(3):
        h, rate = optim.initial_curvature, 1 - optim.curvature_decay
        for _ in range(steps):
            found = 1.0 + total / 100  # per example
            h += rate * (found - h) + (rate * (found - h)) ** 2 / (2 * (h + optim.weight_decay))
        engine: Any = Kept(steps, h)
        past = None if total == 0 else Diagonal({"w": torch.tensor([total])}, 100)
        task = learned_diagonal(engine, optim, Comm.solo(), num_train=100, past=past, weight=1.0)
        assert float(task.values["w"]) == pytest.approx(100.0, rel=0.01)
        total += float(task.values["w"])


@dataclass
class Kept:
    """An engine whose optimiser has learned one curvature, in more digits than fp32 has."""

    steps_taken: int
    curvature: float

    def moments(self, names: dict[str, str]) -> dict[str, dict[str, Tensor]]:
        return {answer: {"w": torch.tensor([self.curvature], dtype=torch.float64)} for answer in names.values()}


@pytest.mark.parametrize("kind", ["ivon", "soba", "adamw"])
def test_classes_to_come_have_no_curvature(tmp_path: Path, kind: str) -> None:
    """Or the quadratic would hold their rows where they were drawn."""
    found, _, world = measured({"optim": OPTIMISERS[kind], "train": {"epochs": 3}}, tmp_path)
    first = list(world.stream.tasks[0].classes)
    later = [number for task in world.stream.tasks[1:] for number in task.classes]
    rows = [value for name, value in found.values.items() if len(value) == 10]
    assert len(rows) == 2, "weights and biases of the last layer"
    for row in rows:
        assert float(row[first].mean()) > 0
        assert float(row[later].max()) <= 1e-6 * float(row[first].mean())


def test_stopped_before_the_curvature_is_taken_it_is_the_same(tmp_path: Path) -> None:
    """The optimiser's state is in the checkpoint that ends training on a task."""
    config = merged(SECTIONS, {"optim": OPTIMISERS["ivon"], "train": {"epochs": 2}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)  # which saves at its end
    other, checkpoints = fresh_state(config, world.stream, world.comm), world.folder.checkpoints
    other.load_state_dict(load(checkpoints, state.mark), state.mark, open_shards(checkpoints, state.mark), world.comm)
    for one in (state, other):
        consolidate(world.stream.tasks[1], one, world)
        one.mark = Mark.at(2, "fit", 0)
        assert fit(world.stream.tasks[2], one, world)
    first, second = (dict(one.engine.gather()) for one in (state, other))
    assert weights_sha256(sorted(first.items())) == weights_sha256(sorted(second.items()))  # type: ignore[arg-type]


def test_classes_to_come_have_no_curvature_where_the_last_layer_learned_alone_first(tmp_path: Path) -> None:
    """Its steps were another optimiser's: the one that is asked forgot its initial value over fewer."""
    config = merged(SECTIONS, {"optim": OPTIMISERS["ivon"], "train": {"epochs": 2, "head_epochs": 2}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    state.prior = replace(state.prior, quadratic=None)  # what is found is of the second task alone
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    consolidate(world.stream.tasks[1], state, world)
    assert state.prior.quadratic is not None
    found = state.prior.quadratic.precision
    assert isinstance(found, Diagonal)
    now, later = (list(world.stream.tasks[number].classes) for number in (1, 2))
    for row in (value for value in found.values.values() if len(value) == 10):
        assert float(row[later].max()) <= 1e-6 * float(row[now].mean())
