"""FROMP in a run: one step against Jacobians, blocks, processes, engines, resuming; and K-priors over two tasks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.cluster.prepare import prepare
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed, wholes
from hpccl.engine.protocols import trainable
from hpccl.report.events import read_events
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.functional import recalled
from hpccl.train.run import run
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 2},
    "model": {"kind": "mlp", "hidden": [8]},
    "train": {"epochs": 2, "batch_size": 64},
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant"},
    "memory": {"size": 20, "selector": {"kind": "gini"}},
    "curvature": {"kind": "diagonal"},
    # Rounding of probabilities is magnified by up to 1 / jitter.
    "prior": {"fromp": {"weight": 2.0, "precision": 0.1, "jitter": 1e-3}},
}


def after_one_task(changes: dict[str, Any], folder: Path, comm: Comm | None = None) -> tuple[RunState, World]:
    state, world = make_world(merged(SECTIONS, changes), folder, comm)
    learn(state, world, 1)
    return state, world


def recalled_gradient(state: RunState, world: World, step: int, num_train: int) -> tuple[dict[str, Tensor], float]:
    """What a step's functional prior adds to the gradient, and its value."""
    prior, engine = state.prior, state.engine
    assert prior.fromp is not None
    engine.start(num_steps=1, task=1)
    (past,) = recalled(prior.fromp, prior.memory, world, task=1, num_train=num_train, first=step, stop=step + 1)
    value = float(past.learn(engine))
    found = {name: part.grad.clone() for name, part in trainable(engine.module).items() if part.grad is not None}
    engine.module.zero_grad()
    return found, value


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prior": {"fromp": {"weight": 2.0, "kernel": "identity"}}},
        {"curvature": {"kind": "kronecker", "fisher": "ggn"}},
        {"train": {"head": "seen"}},
        {"train": {"head": "seen"}, "prior": {"classes": "known"}},
    ],
    ids=["diagonal", "identity", "Kronecker", "new classes compete", "old classes alone"],
)
def test_a_step_adds_the_sum_over_jacobians(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Dense Jacobians of all memory at moved weights, float64, against the one backward pass of a step."""
    state, world = after_one_task(changes, tmp_path)
    generator = torch.Generator().manual_seed(0)
    weights = wholes(state.engine.gather())
    state.engine.put(
        {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    )
    found, value = recalled_gradient(state, world, step=0, num_train=50)
    assert state.prior.fromp is not None
    ((block, stands_for),) = state.prior.fromp.at(0)
    assert stands_for == 1
    assert len(block.slots) == 20
    model = state.engine.module.double()
    memory = state.prior.memory
    (images,) = world.stream.load([_request(memory.sample[block.slots])])
    new = world.config.train.head == "seen" and world.config.prior.classes == "seen"
    later = torch.tensor(world.stream.tasks[1].classes if new else [], dtype=torch.int64)
    competing = torch.cat([block.classes, later])
    now = model(images.pixels.double())[:, competing].softmax(dim=1)
    identity = torch.eye(20, dtype=torch.float64)
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    total = 0.0
    for number in range(len(block.classes)):
        kernel = identity if block.root is None else block.root[number] @ block.root[number].T
        change = (now[:, number] - block.old[:, number]).detach()
        weight = torch.linalg.inv(kernel) @ change
        total += 0.5 * float(change @ weight)
        for row in range(20):
            grads = torch.autograd.grad(now[row, number], list(model.parameters()), retain_graph=True)
            torch._foreach_add_(expected, [weight[row] * grad for grad in grads])
    assert value == pytest.approx(2.0 * total / 50, rel=1e-3)
    for (name, _), target in zip(model.named_parameters(), expected, strict=True):
        assert float((found[name] - 2.0 / 50 * target).norm()) < 1e-3 * float((2.0 / 50 * target).norm())


def _request(samples: Tensor) -> Any:
    import numpy as np

    from hpccl.data.rows import Request

    return Request(samples.numpy(), np.zeros(len(samples), dtype=np.uint64))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_the_old_weights_nothing_pulls(tmp_path: Path, precision: str) -> None:
    """In bf16 too: what was predicted is rounded as what a step predicts."""
    state, world = after_one_task({"engine": {"kind": "ddp", "precision": precision}}, tmp_path)
    gradient, value = recalled_gradient(state, world, step=0, num_train=50)
    assert abs(value) < 1e-6
    assert all(float(part.norm()) < 1e-4 for part in gradient.values())


def test_with_the_kernel_one_a_round_of_blocks_is_all_of_memory(tmp_path: Path) -> None:
    whole = {"prior": {"fromp": {"weight": 2.0, "kernel": "identity"}}}
    cut = {"prior": {"fromp": {"weight": 2.0, "kernel": "identity", "block": 7}}}
    gradients = []
    for name, changes in (("whole", whole), ("cut", cut)):
        state, world = after_one_task(changes, tmp_path / name)
        assert state.prior.fromp is not None
        rounds = len(state.prior.fromp.tasks[0])
        state.engine.put({name: value + 0.1 for name, value in wholes(state.engine.gather()).items()})
        parts = [recalled_gradient(state, world, step=step, num_train=10)[0] for step in range(rounds)]
        gradients.append({key: sum(part[key] for part in parts) / rounds for key in parts[0]})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_it_keeps_the_past_better_than_fine_tuning(tmp_path: Path) -> None:
    kept, changes = [], {"train": {"epochs": 10}, "stream": {"kind": "digits", "tasks": 2}}
    for name, weight in (("fromp", 1.0), ("finetune", 1e-9)):
        fromp = {"prior": {"fromp": {"weight": weight, "precision": 1e-3, "jitter": 1e-5}}}
        state, world = after_one_task({**changes, **fromp, "train": {"epochs": 10, "head": "own"}}, tmp_path / name)
        state.mark = type(state.mark).at(1, "fit", 0)
        assert fit(world.stream.tasks[1], state, world)
        kept.append([result["task_incremental"]["accuracy"] for result in evaluate_all(state, world, last=1)])
    assert kept[0][0] > kept[1][0] + 0.02
    assert kept[0][1] > 0.8


def test_old_classes_hold_against_new_ones(tmp_path: Path) -> None:
    """Class-incremental: the first task among all classes; old classes alone would not see new logits grow."""
    kept = {}
    for classes in ("seen", "known"):
        prior = {"classes": classes, "fromp": {"weight": 50.0, "kernel": "identity"}}
        changes = {"prior": prior, "train": {"epochs": 10, "head": "seen"}, "memory": {"size": 50}}
        state, world = after_one_task(changes, tmp_path / classes)
        state.mark = type(state.mark).at(1, "fit", 0)
        assert fit(world.stream.tasks[1], state, world)
        kept[classes] = evaluate_all(state, world, last=1)[0]["class_incremental"]["accuracy"]
    assert kept["seen"] > 0.4
    assert kept["known"] < 0.2


# ---------------------------------------------------------------- processes and engines


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after a second task, and what the functional prior is then."""
    state, world = after_one_task(changes, Path(folder) / f"size-{comm.size}", comm)
    state.mark = type(state.mark).at(1, "fit", 0)
    task = world.stream.tasks[1]
    assert fit(task, state, world)
    weights = {name: value.cpu() for name, value in streamed(state.engine.gather(), comm)}
    consolidate(task, state, world)
    fromp = state.prior.fromp
    assert fromp is not None
    blocks = [block for blocks in fromp.tasks for block in blocks]
    return {
        "weights": weights,
        "slots": torch.cat([block.slots for block in blocks]),
        "old": torch.cat([block.old.reshape(-1) for block in blocks]),
        "roots": torch.cat([block.root.reshape(-1) for block in blocks if block.root is not None]),
    }


def agree(found: Result, expected: Result, tolerance: float) -> None:
    assert torch.equal(found["slots"], expected["slots"])
    pairs = [(found[key], expected[key]) for key in ("old", "roots")]
    pairs += [(found["weights"][name], value) for name, value in expected["weights"].items()]
    for one, other in pairs:
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {
                "curvature": {"kind": "kronecker", "fisher": "ggn"},
                "prior": {"fromp": {"weight": 2.0, "precision": 0.1, "jitter": 1e-3, "block": 3}},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["diagonal, whole memory", "Kronecker, blocks"],
)
def test_two_processes_agree_with_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = run_in_world(two_tasks, 1, tmp_path, str(tmp_path), changes)[0]
    for rank in run_in_world(two_tasks, 2, tmp_path, str(tmp_path), changes):
        agree(rank, one, 1e-3)


def recalled_logits(comm: Comm, folder: str) -> Result:
    """Where each rank has statistics of its own, as within a task."""
    changes = {"model": {"kind": "timm", "name": "test_resnet"}, "engine": {"kind": "fsdp2"}}
    state, _ = make_world(merged(changes), Path(folder) / f"{comm.rank}", comm)
    for name, buffer in state.engine.module.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1 + comm.rank)
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"logits": state.engine.forward(pixels, torch.zeros(2, dtype=torch.int64), training=False).detach()}


def test_ranks_recall_with_the_same_statistics(tmp_path: Path) -> None:
    first, second = run_in_world(recalled_logits, 2, tmp_path, str(tmp_path))
    assert torch.equal(first["logits"], second["logits"])


@pytest.mark.slow
def test_more_processes_than_recalled_examples(tmp_path: Path) -> None:
    changes = {
        "prior": {"fromp": {"weight": 2.0, "precision": 0.1, "jitter": 1e-3, "block": 3}},
        "train": {"epochs": 1},
    }
    one = run_in_world(two_tasks, 1, tmp_path, str(tmp_path), changes)[0]
    for rank in run_in_world(two_tasks, 4, tmp_path, str(tmp_path), changes):
        agree(rank, one, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{"kind": "fsdp2"}, *({"kind": "deepspeed", "stage": stage} for stage in range(4))], ids=str
)
def test_engines_agree(tmp_path: Path, engine: dict[str, Any]) -> None:
    if engine["kind"] == "deepspeed":
        pytest.importorskip("deepspeed")
    small = {"train": {"epochs": 1, "accumulate": 2}}
    ddp = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path / "ddp"), small)[0]
    other = run_in_world(two_tasks, 2, tmp_path / "other", str(tmp_path / "other"), {**small, "engine": engine})
    for rank in other:
        agree(rank, ddp, 1e-3)


# ---------------------------------------------------------------- resuming


def finished(config: RunConfig, stop: Stop | None = None) -> str:
    prepare(config, [])
    return run(config, Comm.solo(), stop or Stop(), quiet=True)


class StopLater(Stop):
    """Asks to stop at its third question: in the middle of the second task."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def requested(self, comm: Comm) -> bool:
        self.asked += 1
        if self.asked == 9:
            self.request("test")
        return super().requested(comm)


@pytest.mark.parametrize(
    "changes",
    [{}, {"prior": {"fromp": {}, "normal": {"precision": 0.5}}}],
    ids=["fromp", "kpriors"],
)
def test_stopped_in_the_second_task_and_again_gives_the_same_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = merged(SECTIONS, changes, {"log": {"tensorboard": False, "every": 1}})
    folders = [tmp_path / name for name in ("once", "again")]
    once, again = (config.model_copy(update={"folder": str(folder)}) for folder in folders)
    assert finished(once) == "done"
    assert finished(again, StopLater()) == "stopped"
    stopped = [event for event in read_events(folders[1] / "events.jsonl") if event["event"] == "stop"]
    assert stopped[0]["task"] == 1
    assert stopped[0]["step"] > 0
    assert finished(again) == "done"
    digests = [
        event["weights_sha256"]
        for folder in folders
        for event in read_events(folder / "events.jsonl")
        if event["event"] == "done"
    ]
    assert digests[0] == digests[1]
    terms = [event["terms"] for event in read_events(folders[0] / "events.jsonl") if event["event"] == "step"]
    assert set(terms[-1]) == {"new", "soft", "replay", "normal" if changes else "functional"}


def test_methods_in_the_files_are_these() -> None:
    for name in ("fromp", "kpriors"):
        config = load([ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "method" / f"{name}.yaml"], [])
        assert config.method == name


def test_every_pass_of_a_step_recalls_the_past(tmp_path: Path) -> None:
    """SAM's second gradient, at weights hardly elsewhere, is that of SGD with momentum: of all of the objective."""
    sam = {"optim": {"kind": "sam", "radius": 1e-7, "lr": 0.05, "schedule": "constant"}}
    one = two_tasks(Comm.solo(), str(tmp_path / "momentum"), {})
    plain = {name: value for name, value in SECTIONS.items() if name != "optim"}
    state, world = make_world(merged(plain, sam), tmp_path / "sam", Comm.solo())
    learn(state, world, 1)
    state.mark = type(state.mark).at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    for name, value in streamed(state.engine.gather(), Comm.solo()):
        assert float((value.cpu() - one["weights"][name]).norm()) <= 1e-3 * float(one["weights"][name].norm())
