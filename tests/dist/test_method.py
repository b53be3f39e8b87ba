"""Acceptance test 6 of the method: the number of processes is not in the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint.store import Mark
from hpccl.curvature.diagonal import Diagonal
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.train.compose import Composer, split
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.plan import plan_task
from hpccl.train.step import train_step
from hpccl.train.stop import Stopped
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

SECTIONS: dict[str, Any] = {
    "train": {"epochs": 2, "batch_size": 37, "accumulate": 2},  # 37: uneven over any number of ranks
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant"},
    "memory": {"size": 21},
    "curvature": {"kind": "diagonal"},
    "prior": {"replay": 0.4, "temperature": 2.0, "quadratic": {"weight": 3.0}},
}


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Everything that the first task leaves, the first step of the second, and the end of the second."""
    state, world = make_world(merged(SECTIONS, changes), Path(folder) / f"size-{comm.size}", comm)
    learn(state, world, 1)
    prior = state.prior
    assert prior.quadratic is not None
    precision = prior.quadratic.precision
    found: Result = {
        "memory": prior.memory.tensors(),
        "trace": torch.tensor(precision.totals(comm).trace),
        "curvature": dict(precision.values) if isinstance(precision, Diagonal) else {},
        "anchor": dict(prior.anchor or {}),
        "accuracy": [result["task_incremental"]["accuracy"] for result in evaluate_all(state, world, last=0)],
    }
    found["first step"] = first_step(state, world)
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    found["weights"] = wholes(state.engine.gather())
    return found


def first_step(state: Any, world: Any) -> dict[str, Any]:
    """What the first step of the second task does to weights that were moved away from the anchor."""
    task = world.stream.tasks[1]
    plan = plan_task(world.config, world.stream, task, state.prior.memory)
    teacher = state.engine.frozen(state.prior.anchor) if world.config.prior.view == "teacher" else None
    composer = Composer.build(
        world.config, world.stream, task, state.prior.memory, teacher=teacher, device=world.comm.device
    )
    before = wholes(state.engine.gather())
    moved = {name: value + 0.01 for name, value in before.items()}
    state.engine.put(moved)
    state.engine.start(num_steps=plan.num_steps, task=1)
    detach = state.prior.quadratic.attach(state.engine, world.comm, num_train=plan.num_train)
    parts = split(plan.batch(0), world.comm, accumulate=2)
    images = list(world.stream.load(composer.request(part) for part in parts))
    rows = [composer.rows(part, made) for part, made in zip(parts, images, strict=True)]
    stats = train_step(state.engine, rows, num_rows=len(parts[0].batch))
    detach()
    after = wholes(state.engine.gather())
    state.engine.put(before)
    step = {name: after[name] - moved[name] for name in after}
    return {"norm": stats.gradient_norm.detach(), **step}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prior": {"view": "teacher"}, "memory": {"mix": {"kind": "stratified", "share": 0.3}}},
        # Labels that are drawn (fisher=mc) may change with the rounding of their probabilities.
        {"curvature": {"kind": "kronecker", "fisher": "ggn"}},
    ],
    ids=["stored view, natural", "teacher view, stratified", "Kronecker"],
)
def test_one_two_and_four_processes_agree(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = run_in_world(two_tasks, 1, tmp_path, str(tmp_path), changes)[0]
    for size in (2, 4):
        ranks = run_in_world(two_tasks, size, tmp_path, str(tmp_path), changes)
        for found in ranks:
            for name in ("sample", "task", "label", "replay", "heads", "weight", "order"):
                assert torch.equal(found["memory"][name], one["memory"][name]), name
            close(found["memory"]["soft"], one["memory"]["soft"], 1e-4)
            close(found["trace"], one["trace"], 1e-4)
            for part in ("curvature", "anchor", "first step", "weights"):
                for name, value in one[part].items():
                    close(found[part][name], value, 1e-3)
            assert found["accuracy"] == pytest.approx(one["accuracy"])
        # Ranks of one world hold the same to the last bit.
        for name, value in ranks[0]["weights"].items():
            assert all(torch.equal(other["weights"][name], value) for other in ranks[1:])


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def left(comm: Comm, folder: str, asked: int) -> Result:
    """Whether this rank leaves a test that one of all ranks was asked to leave."""
    state, world = make_world(merged(), Path(folder) / f"left-{comm.size}", comm)
    if comm.rank == asked:
        world.stop.request("test")
    try:
        evaluate_all(state, world, last=-1)
    except Stopped:
        return {"left": True}
    return {"left": False}


@pytest.mark.parametrize(("asked", "leaves"), [(1, True), (-1, False)])
def test_all_ranks_leave_a_pass_that_one_was_asked_to_leave(tmp_path: Path, asked: int, leaves: bool) -> None:
    for rank in run_in_world(left, 2, tmp_path, str(tmp_path), asked):
        assert rank["left"] == leaves
