"""Methods that are made of rows: the number of processes and the engine are not in the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.checkpoint.store import Mark
from hpccl.cluster.prepare import prepare
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.run import run
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged, weights

BASE: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [12]},
    "train": {"epochs": 1, "batch_size": 91, "accumulate": 2},  # 91: uneven over any number of ranks
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant", "weight_decay": 0.01},
}
DISTILL: dict[str, Any] = {"weight": 1.0, "images": "all", "view": "same"}
METHODS: dict[str, dict[str, Any]] = {
    "lwf": {"train": {"head_epochs": 1}, "prior": {"distill": {"weight": 1.0}}},
    "lwf on its own views": {"prior": {"distill": {"weight": 1.0, "view": "same"}}},
    "features": {"train": {"frozen": ["features"], "ema": 0.9}},
    "der++": {
        "memory": {"total": 60, "selector": {"kind": "reservoir"}, "labels": "kept", "mix": {"kind": "stratified"}},
        "prior": {"weight": 0.2, "label_weight": 0.5, "loss": "squared", "view": "recorded", "scale_to_new": True},
    },
    "ewc+replay of what leaves memory": {
        "memory": {"total": 60, "selector": {"kind": "herding"}},
        "prior": {"replay": 1.0, "quadratic": {"weight": 1.0}},
        "curvature": {"kind": "diagonal"},
    },
    "er_ace": {
        "train": {"head": "seen", "competing": "task"},
        "memory": {"total": 60, "selector": {"kind": "reservoir"}, "mix": {"kind": "stratified"}},
        "prior": {"replay": 1.0, "scale_to_new": True},
    },
    "icarl": {
        "train": {"head": "seen", "loss": "sigmoid"},
        "memory": {"total": 60, "selector": {"kind": "herding"}},
        "prior": {"replay": 1.0, "distill": {**DISTILL, "temperature": 1.0}},
        "evaluate": {"classifier": "nearest_mean"},
    },
    "bic": {
        "train": {"head": "seen"},
        "memory": {"total": 120, "selector": {"kind": "herding"}},
        "prior": {"replay": 1.0, "distill": {**DISTILL, "balance": "classes"}, "correct": {"share": 0.1}},
    },
    "joint": {"train": {"data": "seen", "restart": True}},
    "gdumb": {
        "train": {"data": "memory", "restart": True, "head": "seen", "epochs": 3},
        "memory": {"total": 60, "selector": {"kind": "greedy"}},
        "prior": {"replay": 1.0},
    },
}


FEW = ("lwf", "der++", "ewc+replay of what leaves memory", "bic")
OTHERS = tuple(name for name in METHODS if name not in FEW)


def three_tasks(comm: Comm, folder: str, names: tuple[str, ...], changes: dict[str, Any]) -> Result:
    """By method, what three tasks leave: the teacher of the third has the second's correction."""
    return {
        name: _learned(comm, Path(folder) / f"{name}-{comm.size}", merged(BASE, METHODS[name], changes))
        for name in names
    }


def _learned(comm: Comm, folder: Path, config: Any) -> Result:
    state, world = make_world(config, folder, comm)
    learn(state, world, 3)
    prior = state.prior
    return {
        "weights": everything(state, comm),
        "sample": prior.memory.sample,
        "soft": prior.memory.soft,
        "numbers": [0.0] if prior.correction is None else [prior.correction.alpha, prior.correction.beta],
        "means": torch.zeros(1) if prior.means is None else prior.means.means,
        "accuracy": [result["class_incremental"]["accuracy"] for result in evaluate_all(state, world, last=2)[:3]],
    }


def everything(state: RunState, comm: Comm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in streamed(state.engine.gather(), comm)}


@pytest.fixture(scope="module", params=[FEW, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["few", "others"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What one process leaves, by method."""
    folder = tmp_path_factory.mktemp("alone")
    return run_in_world(three_tasks, 1, folder, str(folder), request.param, {})[0]


def agree(found: Result, expected: Result, tolerance: float) -> None:
    for method, one in expected.items():
        other = found[method]
        a, b = (torch.cat([each["weights"][name].flatten() for name in one["weights"]]) for each in (one, other))
        assert float((a - b).norm() / a.norm()) <= tolerance, method
        assert torch.equal(other["sample"], one["sample"]), method
        for part in ("soft", "means"):
            torch.testing.assert_close(other[part], one[part], atol=100 * tolerance, rtol=0.0)
        assert other["numbers"] == pytest.approx(one["numbers"], abs=1000 * tolerance), method
        assert other["accuracy"] == pytest.approx(one["accuracy"], abs=0.02), method


def test_two_processes_learn_what_one_learns(alone: Result, tmp_path: Path) -> None:
    ranks = run_in_world(three_tasks, 2, tmp_path, str(tmp_path), tuple(alone), {})
    for found in ranks:
        agree(found, alone, 1e-6)
    for method, parts in ranks[0].items():
        assert parts["numbers"] == ranks[1][method]["numbers"]  # of one world, to the last bit
        assert all(torch.equal(value, ranks[1][method]["weights"][name]) for name, value in parts["weights"].items())


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
}
ZERO = [pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4)]


@pytest.mark.parametrize("name", ["fsdp2", *ZERO])
def test_every_engine_learns_what_ddp_learns(alone: Result, tmp_path: Path, name: str) -> None:
    for found in run_in_world(three_tasks, 2, tmp_path, str(tmp_path), tuple(alone), {"engine": ENGINES[name]}):
        agree(found, alone, 2e-6)


NET = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
HELD: dict[str, dict[str, Any]] = {
    "features": {"train": {"frozen": ["features"]}},
    "some": {"train": {"frozen": ["blocks.0.*", "patch_embed.proj.weight"]}},
    "head first": {"train": {"head_epochs": 1}},
}


def held(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """By case, weights before and after a second task."""
    found = {}
    base = {"model": {"kind": "timm", "name": "vit_tiny_patch16_224", "options": NET}, "train": {"batch_size": 37}}
    for name, sections in HELD.items():
        config = merged(BASE, base, {"optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}}, sections, changes)
        state, world = make_world(config, Path(folder) / f"{name}-{comm.size}", comm)
        learn(state, world, 1)
        before = everything(state, comm)
        found[name] = {"before": before, "after": _after_some_steps(state, world)}
    return found


def _after_some_steps(state: RunState, world: World) -> dict[str, torch.Tensor]:
    """Of the second task: a few, for the head is alone in the first epoch."""
    state.mark = Mark.at(1, "fit", 0)
    world.stop.request("test")  # heard after five steps
    assert not fit(world.stream.tasks[1], state, world)
    return everything(state, world.comm)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", *ZERO])
def test_what_is_held_stays_to_the_last_bit(tmp_path: Path, name: str) -> None:
    engine = ENGINES.get(name, {"kind": "ddp"})
    for ranks in run_in_world(held, 2, tmp_path, str(tmp_path), {"engine": engine}):
        for case, states in ranks.items():
            before, after = states["before"], states["after"]
            changed = {key for key in before if not torch.equal(before[key], after[key])}
            if case == "some":
                frozen = {key for key in before if key.startswith("blocks.0.") or key == "patch_embed.proj.weight"}
                assert frozen
                assert not changed & frozen
                assert changed >= {"blocks.1.attn.qkv.weight", "head.weight", "patch_embed.proj.bias"}
                continue
            assert changed == {"head.weight", "head.bias"}
            if case == "head first":
                rows = [
                    row for row in range(10) if not torch.equal(before["head.weight"][row], after["head.weight"][row])
                ]
                assert rows == [2, 3]


RESUMED: dict[str, dict[str, Any]] = {
    **METHODS,
    "fromp": {
        "memory": {"size": 12, "selector": {"kind": "gini"}},
        "curvature": {"kind": "diagonal"},
        "prior": {"replay": 0.0, "fromp": {"weight": 1.0}},
        "log": {"reconstruction": 0.0},
    },
    "topic": {
        "train": {"head": "seen", "frozen": ["old_classes"], "norms": "running"},
        "memory": {"size": 0},
        "prior": {"replay": 0.0, "topology": {"nodes": 20}},
    },
}


class WithinTheSecondTask(Stop):
    """A wish to stop that comes once there is a checkpoint in the middle of the second task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__()

    def __getattribute__(self, name: str) -> Any:
        if name == "reason" and any((self.folder / "checkpoints").glob("task-001-fit-*[1-9]*")):
            return "enough"
        return super().__getattribute__(name)


def resumed(comm: Comm, folder: str, names: tuple[str, ...]) -> Result:
    """By method, how an undisturbed run ends, how one that is to stop does, and how that ends when it goes on."""
    found: Result = {}
    for name in names:
        ends: list[str] = []
        for kind in ("whole", "stopped", "stopped"):
            path = Path(folder) / f"{name}-{kind}"
            changes = {"checkpoint": {"every": 2}, "stream": {"kind": "digits", "tasks": 2}}
            config = merged(BASE, {"train": {"batch_size": 40}}, changes, RESUMED[name], {"train": {"epochs": 2}})
            config = config.model_copy(update={"folder": str(path)})
            stop = WithinTheSecondTask(path) if kind == "stopped" and len(ends) == 1 else Stop()
            if comm.leader:
                prepare(config, [])
            comm.barrier()
            ends.append(run(config, comm, stop, quiet=True))
        comm.barrier()  # the leader writes the last event
        whole, stopped = (weights(Path(folder) / f"{name}-{kind}") for kind in ("whole", "stopped"))
        found[name] = {"ends": ends, "same": whole == stopped}
    return found


@pytest.mark.slow
def test_every_method_ends_bit_for_bit_where_it_would_have_on_two_ranks(tmp_path: Path) -> None:
    for found in run_in_world(resumed, 2, tmp_path, str(tmp_path), tuple(RESUMED)):
        assert found == {name: {"ends": ["done", "stopped", "done"], "same": True} for name in RESUMED}
