"""Every example of the past is in memory or in the quadratic, also those that memory.total lets go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpccl.curvature.diagonal import Diagonal
from hpccl.data.rows import Request
from hpccl.train.consolidate import consolidate
from hpccl.train.state import RunState, World
from tests.run.method import make_world, merged


def _ended(state: RunState, world: World, tasks: int) -> None:
    """Tasks that end one after the other, at the same weights."""
    for task in world.stream.tasks[:tasks]:
        state.mark = type(state.mark).at(task.index, "fit", 0)
        consolidate(task, state, world)


@pytest.mark.parametrize("kind", ["reservoir", "uniform"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_leaves_memory_is_counted_in_the_curvature(tmp_path: Path, kind: str, fraction: float) -> None:
    budget = {"total": 300, "size": 0, "selector": {"kind": kind}}
    curvature = {"kind": "diagonal", "fraction": fraction}
    config = merged({"memory": budget, "curvature": curvature, "prior": {"quadratic": {"weight": 1.0}}})
    state, world = make_world(config, tmp_path)
    _ended(state, world, 4)
    quadratic = state.prior.quadratic
    assert quadratic is not None
    num_seen = world.stream.tasks[3].samples("train").stop
    assert len(state.prior.memory) == 300
    assert quadratic.precision.num_examples == pytest.approx(fraction * (num_seen - 300), abs=4)


def test_it_is_the_curvature_of_all_that_is_not_in_memory_with_their_own_heads(tmp_path: Path) -> None:
    """At weights that stay, in whatever order examples leave: as if memory had been chosen at the end."""
    quadratic = {"curvature": {"kind": "diagonal"}, "prior": {"quadratic": {"weight": 1.0}}}
    state, world = make_world(merged({"memory": {"total": 200, "size": 0}}, quadratic), tmp_path / "total")
    _ended(state, world, 3)
    kept = np.bincount(state.prior.memory.task.numpy(), minlength=3)
    assert (kept > 0).all()

    whole, surroundings = make_world(merged(quadratic), tmp_path / "none")
    _ended(whole, surroundings, 3)
    inside, rest = _of_memory(state, world), _diagonal(state)
    for name, value in _diagonal(whole).items():
        torch.testing.assert_close(rest[name] + inside[name], value, rtol=1e-4, atol=1e-7)


def _diagonal(state: RunState) -> dict[str, torch.Tensor]:
    assert state.prior.quadratic is not None
    precision = state.prior.quadratic.precision
    assert isinstance(precision, Diagonal)
    return {name: value.double() for name, value in precision.values.items()}


def _of_memory(state: RunState, world: World) -> dict[str, torch.Tensor]:
    """By autograd: sum over memory of E_y [(d log p_y / dw)^2], y drawn by the network among its task's classes."""
    module = state.engine.module.eval()
    named = dict(module.named_parameters())
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in named.items()}
    memory = state.prior.memory
    request = Request(memory.sample.numpy(), np.zeros(len(memory), dtype=np.uint64))  # the evaluation view
    (images,) = world.stream.load(iter([request]))
    for logits, number in zip(module(images.pixels), memory.task.tolist(), strict=True):
        log_p = logits[list(world.stream.tasks[number].classes)].log_softmax(0)
        for each in log_p:
            gradients = torch.autograd.grad(each, list(named.values()), retain_graph=True)
            for name, gradient in zip(named, gradients, strict=True):
                total[name] += each.detach().exp() * gradient.double().square()
    return total
