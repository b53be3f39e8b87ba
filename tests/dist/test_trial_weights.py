"""Optimisers that draw or perturb weights end where they end on one process, on every engine that takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.train.fit import fit
from hpccl.train.state import RunState, World
from tests.dist.test_engines import ENGINES, everything, half, rest
from tests.dist.world import Result, dismiss, run_in_world
from tests.run.method import learn, make_world, merged

COMMON: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [13]},
    "train": {"epochs": 2, "batch_size": 61, "accumulate": 2},
    "memory": {"size": 20},
    "prior": {"replay": 1.0, "quadratic": {"weight": 3.0}},
    "curvature": {"kind": "diagonal", "fisher": "mc", "fraction": 0.3},
}
IVON = {"kind": "ivon", "lr": 0.1, "initial_curvature": 0.1, "curvature_decay": 0.99}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "ivon": IVON,
    "ivon of two draws": {**IVON, "samples": 2},
    "sam": {"kind": "sam", "lr": 0.02, "radius": 0.1},
    "bsam": {"kind": "bsam", "lr": 0.1, "radius": 0.01},
    "vogn": {"kind": "vogn", "lr": 1e-3},
    "soba": {"kind": "soba", "lr": 0.02},
    "lie, affine": {"kind": "lie", "lr": 0.5, "group": {"kind": "affine"}},
    "lie, additive": {"kind": "lie", "lr": 0.05, "group": {"kind": "additive", "noise": 0.01}},
    "lie, multiplicative": {"kind": "lie", "lr": 5.0, "temperature": 0.01, "group": {"kind": "multiplicative"}},
}


Run: TypeAlias = Callable[[Comm, str, dict[str, Any]], Result]


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after two tasks, of which the second has a quadratic and a memory."""
    state, world = make_world(merged(COMMON, changes), Path(folder), comm)
    learn(state, world, 1)
    state.mark = type(state.mark).at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    return everything(state, comm)


def difference(found: Result, expected: Result) -> float:
    a = torch.cat([value.double().flatten() for value in expected.values()])
    b = torch.cat([found[name].double().flatten() for name in expected])
    assert bool(a.isfinite().all())
    return float((a - b).norm() / a.norm())


def ended(tmp_path: Path, size: int, name: str, changes: dict[str, Any], run: Run = two_tasks) -> Result:
    folder = tmp_path / f"{size}-{name}"
    return run_in_world(run, size, folder, str(folder / "run"), {**changes, "engine": ENGINES[name]})[-1]


def some(*fast: str) -> list[Any]:
    """All optimisers, of which some are fast enough."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in fast else slow) for name in OPTIMISERS]


def clipped(optimiser: str) -> dict[str, Any]:
    """What to change for it, with a limit of the gradient's norm where its rule has use for one."""
    limit = None if optimiser == "lie, multiplicative" else 0.5
    return {"optim": OPTIMISERS[optimiser], "train": {**COMMON["train"], "clip_norm": limit}}


@pytest.mark.parametrize("optimiser", some("ivon", "vogn"))
def test_two_processes_end_where_one_does(tmp_path: Path, optimiser: str) -> None:
    changes = clipped(optimiser)
    expected = ended(tmp_path, 1, "ddp", changes)
    assert difference(ended(tmp_path, 2, "ddp", changes), expected) < 1e-5


@pytest.mark.parametrize("optimiser", some("ivon of two draws", "sam", "bsam", "vogn"))
def test_shards_end_where_the_whole_does(tmp_path: Path, optimiser: str) -> None:
    changes = clipped(optimiser)
    expected = ended(tmp_path, 2, "ddp", changes)
    assert difference(ended(tmp_path, 2, "fsdp2", changes), expected) < 1e-5


@pytest.mark.parametrize("optimiser", some("ivon of two draws", "sam", "bsam", "vogn"))
@pytest.mark.parametrize("name", [pytest.param("zero-0", marks=pytest.mark.slow), "zero-1", "zero-2", "zero-3"])
def test_deepspeed_ends_where_ddp_does(tmp_path: Path, name: str, optimiser: str) -> None:
    changes = clipped(optimiser)
    expected = ended(tmp_path, 2, "ddp", changes)
    assert difference(ended(tmp_path, 2, name, changes), expected) < 1e-5


OFFLOADED = {
    "zero-2": {"kind": "deepspeed", "stage": 2, "offload_optimizer": True},
    "zero-3": {"kind": "deepspeed", "stage": 3, "offload_optimizer": True, "offload_weights": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimiser", ["ivon of two draws", "sam", "vogn"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_an_optimiser_beside_the_device(tmp_path: Path, name: str, optimiser: str, accumulate: int) -> None:
    changes: dict[str, Any] = clipped(optimiser)
    changes["train"] = {**changes["train"], "accumulate": accumulate}
    expected = ended(tmp_path, 2, "ddp", changes)
    changes |= {"engine": OFFLOADED[name]}
    found = run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path / name / "run"), changes)[-1]
    assert difference(found, expected) < 1e-5


HELD = torch.tensor([True, False, True, True, False, False, True, True, False, True])  # rows of the last layer


def drawn(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """What a pass computes with, less the weights."""
    state, world = make_world(merged(COMMON, changes), Path(folder), comm)
    engine = state.engine
    engine.start(num_steps=3, task=0, num_train=50)
    engine.hold({"3.weight": HELD[:, None], "1.bias": torch.ones(1, dtype=torch.bool)}, frozenset())
    return _drawn(state, world, comm)


def _drawn(state: RunState, world: World, comm: Comm) -> Result:
    """What a pass adds to the weights."""
    before = everything(state, comm)
    with state.engine.perturbed(0, num_rows=4):
        found = {name: value - before[name] for name, value in everything(state, comm).items()}
        pixels, noise = torch.ones(2, *world.stream.shape("train")), torch.arange(2)
        state.engine.backward(state.engine.forward(pixels, noise).sum())
    return found


@pytest.mark.parametrize(
    "name", ["fsdp2", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4))]
)
def test_what_is_held_is_not_drawn_in_shards(tmp_path: Path, name: str) -> None:
    found = ended(tmp_path, 2, name, {"optim": IVON}, drawn)
    assert torch.equal((found["3.weight"] != 0).all(1), ~HELD)
    assert torch.equal((found["3.weight"] != 0).any(1), ~HELD)
    assert not bool(found["1.bias"].any())
    assert bool((found["1.weight"] != 0).all())
    assert bool((found["3.bias"] != 0).all())


CONVOLUTIONS: dict[str, Any] = {
    "model": {"kind": "timm", "name": "test_resnet"},
    "data": {"image_size": 32},
    "train": {"epochs": 1, "batch_size": 122, "accumulate": 1},
    "stream": {"kind": "digits", "tasks": 5},
    "optim": OPTIMISERS["vogn"],
    "memory": {"size": 0},
    "prior": {"replay": 0.0, "quadratic": {"weight": 0.0}},
}


def drawn_after_a_task(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after a task of a network with BatchNorm, and what the next pass would add to them."""
    state, world = make_world(merged(COMMON, changes), Path(folder), comm)
    learn(state, world, 1)
    return {**everything(state, comm), **{f"drawn {name}": value for name, value in _drawn(state, world, comm).items()}}


@pytest.mark.parametrize(
    "name", ["fsdp2", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4))]
)
def test_vogn_learns_convolutions_in_shards_and_draws_no_norm(tmp_path: Path, name: str) -> None:
    expected = ended(tmp_path, 2, "ddp", CONVOLUTIONS, drawn_after_a_task)
    found = ended(tmp_path, 2, name, CONVOLUTIONS, drawn_after_a_task)
    assert difference(found, expected) < 1e-5
    moved = {
        key.removeprefix("drawn ") for key, value in found.items() if key.startswith("drawn") and bool(value.any())
    }
    kernels = {key for key, value in expected.items() if value.dim() > 1 and not key.startswith("drawn")}
    assert moved == {*kernels, "fc.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", ["sam", "vogn"])
def test_several_copies_of_the_shards(tmp_path: Path, optimiser: str) -> None:
    changes = clipped(optimiser)
    expected = ended(tmp_path, 2, "ddp", changes)
    changes |= {"engine": {"kind": "fsdp2", "shard_size": 1}}
    found = run_in_world(two_tasks, 2, tmp_path / "copies", str(tmp_path / "copies" / "run"), changes)[-1]
    assert difference(found, expected) < 1e-5


def test_squares_are_in_fp32_where_passes_are_not(tmp_path: Path) -> None:
    """Also those of DDP's first pass, which is for nothing."""
    changes = {"optim": OPTIMISERS["vogn"], "engine": {"kind": "ddp", "precision": "bf16"}}
    alone = run_in_world(two_tasks, 1, tmp_path / "one", str(tmp_path / "one" / "run"), changes)[-1]
    found = run_in_world(two_tasks, 2, tmp_path / "two", str(tmp_path / "two" / "run"), changes)[-1]
    assert difference(found, alone) < 1e-2


def test_another_seed_draws_other_weights(tmp_path: Path) -> None:
    """Or the tests above would compare runs without noise."""
    found = [ended(tmp_path / str(seed), 1, "ddp", {"optim": IVON, "seed": seed}) for seed in (0, 1)]
    assert difference(*found) > 1e-2


def _same_age(name: str) -> None:
    """DeepSpeed numbers modules as they are made, and wants equal numbers."""
    if name.startswith("zero"):
        dismiss()


def stopped_and_ended(folder: Path, first: str, second: str | None, optimiser: str = "ivon") -> Result:
    """Weights after two tasks; within the second task, engine and number of processes change to `second`."""
    changes = {"optim": OPTIMISERS[optimiser], "train": {"clip_norm": None}, **(MODEL if optimiser == "vogn" else {})}
    found: Result = {}
    for where, run in ((first, half), (second or first, rest)):
        name, _, size = where.partition(" on ")
        _same_age(name)
        meeting = folder / f"{where}-{run.__name__}"
        found = run_in_world(run, int(size), meeting, str(folder / "run"), {**changes, "engine": ENGINES[name]})[0]
    return dict(found["weights"])


PAIRS = [
    ("zero-1 on 2", "fsdp2 on 3"),
    ("fsdp2 on 2", "ddp on 1"),
    ("ddp on 1", "zero-3 on 2"),
    ("zero-2 on 2", "zero-3 on 3"),
]


MODEL = {"model": COMMON["model"]}  # VOGN's layers are those with a formula


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("zero-2 on 2", "fsdp2 on 2"), ("fsdp2 on 2", "zero-3 on 2"), ("zero-3 on 2", "ddp on 2")]
)
def test_vogn_goes_on_elsewhere(tmp_path: Path, first: str, second: str) -> None:
    undisturbed = stopped_and_ended(tmp_path / "one", "ddp on 2", None, "vogn")
    assert difference(stopped_and_ended(tmp_path / "two", first, second, "vogn"), undisturbed) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_ivon_goes_on_elsewhere(tmp_path: Path, first: str, second: str) -> None:
    undisturbed = stopped_and_ended(tmp_path / "one", "ddp on 1", None)
    assert difference(stopped_and_ended(tmp_path / "two", first, second), undisturbed) < 1e-5


@pytest.mark.parametrize("where", ["fsdp2 on 2", pytest.param("zero-2 on 2", marks=pytest.mark.slow)])
def test_ivon_resumes_to_the_last_bit(tmp_path: Path, where: str) -> None:
    """Stopped in the middle, as against a run that was not."""
    stopped = stopped_and_ended(tmp_path / "stopped", where, None)
    name, _, size = where.partition(" on ")
    _same_age(name)
    changes = {"optim": IVON, "train": {"clip_norm": None}, "engine": ENGINES[name]}
    whole = run_in_world(rest, int(size), tmp_path / "whole", str(tmp_path / "run"), changes)[0]["weights"]
    assert all(torch.equal(value, whole[key]) for key, value in stopped.items())
