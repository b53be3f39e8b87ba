"""A step cut into parts: of one row, or none, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.train.compose import Composer, split
from hpccl.train.fit import fit
from hpccl.train.plan import plan_task
from hpccl.train.step import train_step
from tests.run.method import learn, make_world, merged


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_row_counts_in_one_part_and_no_part_is_alone(tmp_path: Path, size: int, accumulate: int) -> None:
    state, world = make_world(merged({"train": {"batch_size": 13}}), tmp_path)
    batch = plan_task(world.config, world.stream, world.stream.tasks[0], state.prior.memory).batch(0)
    counted: list[int] = []
    for rank in range(size):
        for part in split(batch, Comm(rank, size, world.comm.device), accumulate=accumulate):
            assert len(part.rows) >= 2
            assert len(set(part.rows.tolist())) == len(part.rows)
            counted += part.rows[: len(part.rows) - part.num_fillers].tolist()
    assert sorted(counted) == list(range(len(batch)))


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": {"replay": 0.5}},
        {"prior": {"replay": 0.0, "label_weight": 0.5}},
        {"prior": {"replay": 1.0, "distill": {"weight": 1.0}}},
    ],
    ids=["mixed", "two labels", "distilled"],
)
def test_parts_of_one_row_make_the_step_of_all(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = merged(
        {"memory": {"size": 20}, "train": {"epochs": 1, "batch_size": 9}, "optim": {"name": "sgd"}}, changes
    )
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    task = world.stream.tasks[1]
    plan = plan_task(config, world.stream, task, state.prior.memory)
    found = []
    start = state.engine.gather()
    for accumulate in (1, len(plan.batch(0))):
        state.engine.put(start)
        state.engine.start(num_steps=plan.num_steps, task=1)
        teacher = state.engine.frozen(start)
        composer = Composer.build(
            config, world.stream, task, state.prior.memory, teacher=teacher, device=world.comm.device
        )
        parts = split(plan.batch(0), world.comm, accumulate=accumulate)
        rows = [
            composer.rows(part, made)
            for part, made in zip(parts, world.stream.load(composer.request(p) for p in parts), strict=True)
        ]
        train_step(state.engine, rows, num_rows=len(plan.batch(0)))
        found.append(state.engine.gather())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_batch_normalisation_learns_from_parts_of_one_row(tmp_path: Path) -> None:
    model = {"kind": "timm", "name": "test_resnet"}
    train = {"epochs": 1, "batch_size": 5, "accumulate": 4}
    state, world = make_world(
        merged({"model": model, "train": train, "stream": {"kind": "digits", "tasks": 5}}), tmp_path
    )
    assert fit(world.stream.tasks[0], state, world)


def test_batch_normalisation_learns_from_steps_of_one_row(tmp_path: Path) -> None:
    """A step's only row fills its part, without weight."""
    model = {"kind": "timm", "name": "test_resnet"}
    state, world = make_world(
        merged({"model": model, "train": {"epochs": 1, "batch_size": 1}, "stream": {"kind": "digits", "tasks": 10}}),
        tmp_path,
    )
    plan = plan_task(world.config, world.stream, world.stream.tasks[0], state.prior.memory)
    (part,) = split(plan.batch(0), world.comm, accumulate=1)
    assert (part.rows.tolist(), part.num_fillers) == ([0, 0], 1)
    composer = Composer.build(
        world.config, world.stream, world.stream.tasks[0], state.prior.memory, teacher=None, device=world.comm.device
    )
    (images,) = world.stream.load([composer.request(part)])
    state.engine.start(num_steps=plan.num_steps, task=0)
    stats = train_step(state.engine, [composer.rows(part, images)], num_rows=1)
    assert torch.isfinite(stats.gradient_norm)
    assert composer.rows(part, images).weight.tolist() == [1.0, 0.0]
