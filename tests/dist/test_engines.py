"""Every engine ends where the others end, and goes on where another one stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpccl.checkpoint.store import Mark, latest, load, open_shards
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Slab, streamed
from hpccl.engine.build import build_engine
from hpccl.train.consolidate import consolidate
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.reconstruction import reconstruct
from tests.dist.world import Result, dismiss, run_in_world
from tests.run.method import learn, make_world, merged

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SECTIONS: dict[str, Any] = {
    "model": {"kind": "timm", "name": "vit_tiny_patch16_224", "options": VIT},
    "train": {"epochs": 1, "batch_size": 37, "accumulate": 2, "clip_norm": 1.0},
    "optim": {"name": "momentum", "lr": 0.05, "schedule": "constant"},
    "memory": {"size": 21},
    "curvature": {"kind": "kronecker", "fisher": "ggn", "fraction": 0.3},
    "prior": {"replay": 0.4, "quadratic": {"weight": 3.0}},
    "log": {"reconstruction": 0.1},
}
DDP: dict[str, Any] = {"kind": "ddp"}
FSDP2: dict[str, Any] = {"kind": "fsdp2"}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
}

GATHERED: dict[str, Any] = {"kind": "fsdp2", "reshard": False}
GROUPS: dict[str, Any] = {"kind": "fsdp2", "shard_size": 2}


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Weights after two tasks, and what was measured on the way."""
    events: list[dict[str, Any]] = []
    state, world = make_world(merged(SECTIONS, changes), Path(folder) / f"size-{comm.size}", comm)
    world.log.write = lambda event, **fields: events.append({**fields, "event": event})  # type: ignore[method-assign]
    learn(state, world, 1)
    state.mark = Mark.at(1, "fit", 0)
    task = world.stream.tasks[1]
    assert fit(task, state, world)
    reconstruct(task, state, world)
    weights = everything(state, comm)
    consolidate(task, state, world)
    assert state.prior.quadratic is not None
    (error,) = [event["terms"] for event in events if event["event"] == "reconstruction"]
    return {
        "weights": weights,
        "soft": state.prior.memory.soft,
        "trace": torch.tensor(state.prior.quadratic.precision.totals(comm).trace),
        "cosine": torch.tensor([term["cosine"] for term in error.values()]),
        "accuracy": [result["task_incremental"]["accuracy"] for result in evaluate_all(state, world, last=1)],
    }


def everything(state: Any, comm: Comm) -> dict[str, Tensor]:
    """All weights, whole."""
    return {name: value.clone() for name, value in streamed(state.engine.gather(), comm)}


def agree(found: Result, expected: Result, tolerance: float, *, accuracy: float = 0.0) -> None:
    """To a relative difference, over all weights together and for the rest."""
    a = torch.cat([value.double().flatten() for value in expected["weights"].values()])
    b = torch.cat([found["weights"][name].double().flatten() for name in expected["weights"]])
    assert float((a - b).norm() / a.norm()) <= tolerance
    for name in ("soft", "trace", "cosine"):
        size = expected[name].double().norm().clamp_min(1e-30)  # without memory there are no soft labels
        difference = (found[name].double() - expected[name].double()).norm() / size
        assert float(difference) <= 1e3 * tolerance, name
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=accuracy)


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "ddp"])
def test_engines_agree(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {"engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {"engine": ENGINES[name]}):
        agree(found, expected, 1e-6)


def test_shards_that_stay_gathered_between_forward_and_backward(tmp_path: Path) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {"engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / "fsdp2", str(tmp_path), {"engine": GATHERED}):
        agree(found, expected, 1e-6)


SHARDED = ["fsdp2", "zero-3"]
TINY = {"model": {"kind": "mlp", "hidden": [6]}, "curvature": {"kind": "dense", "fraction": 0.1}}
# AdamW divides by the root of squared gradients: with a small eps, rounding of small ones is as large as a step.
ADAM = {
    "optim": {"name": "adamw", "lr": 1e-3, "schedule": "cosine", "weight_decay": 0.05, "options": {"eps": 1e-3}},
    "train": {"ema": 0.9},
}
TEACHER = {"prior": {"view": "teacher"}, "memory": {"mix": {"kind": "stratified", "share": 0.3}}}
OFFLOAD = {
    "zero-1": {"kind": "deepspeed", "stage": 1, "offload_optimizer": True},
    "zero-3": {"kind": "deepspeed", "stage": 3, "offload_optimizer": True, "offload_weights": True},
    "fsdp2": {"kind": "fsdp2", "offload": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "diagonal, teacher, AdamW, averaged weights": {
        "curvature": {"kind": "diagonal", "fraction": 0.2},
        **ADAM,
        **TEACHER,
    },
    "EKFAC, each anchor": {
        "curvature": {"kind": "ekfac", "fisher": "ggn", "fraction": 0.2},
        "prior": {"quadratic": {"weight": 3.0, "anchor": "each", "decay": 0.8}},
    },
    "dense": TINY,
    "Kronecker of low rank": {"curvature": {"kind": "kronecker", "fisher": "empirical", "keep_trace": 0.9}},
}


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("zero-3", marks=pytest.mark.slow)])
def test_importances_of_synapses_on_shards(tmp_path: Path, name: str) -> None:
    changes = {"curvature": {"kind": "mas"}}
    expected = run_in_world(two_tasks, 1, tmp_path / "ddp", str(tmp_path), {**changes, "engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**changes, "engine": ENGINES[name]}):
        agree(found, expected, 1e-6)


LEARNED: dict[str, Any] = {
    "optim": {"kind": "ivon", "lr": 0.1, "initial_curvature": 0.1, "curvature_decay": 0.99},
    "curvature": {"kind": "optimizer"},
    "train": {"clip_norm": None},
    "memory": {"size": 0},
    "prior": {"replay": 0.0, "quadratic": {"weight": 1.0}},
}


@pytest.mark.parametrize(
    "name", ["fsdp2", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4))]
)
def test_what_the_optimiser_learned_on_shards(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {**LEARNED, "engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**LEARNED, "engine": ENGINES[name]}):
        agree(found, expected, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*SHARDED, pytest.param("zero-1", marks=pytest.mark.slow)])
def test_every_curvature_and_teacher_on_every_engine(tmp_path: Path, name: str, variant: str) -> None:
    changes = VARIANTS[variant]
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {**changes, "engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**changes, "engine": ENGINES[name]}):
        agree(found, expected, 1e-6)


def test_a_normal_prior_where_ranks_have_parts_of_rows(tmp_path: Path) -> None:
    """ZeRO-3 cuts what it saves into equal parts, the network of other passes is cut by rows: 10 rows on 3 ranks."""
    dismiss()  # DeepSpeed counts layers in each process, and ranks must have counted alike
    changes = {"prior": {"normal": {"precision": 0.01}}}
    expected = run_in_world(two_tasks, 1, tmp_path / "ddp", str(tmp_path), {**changes, "engine": DDP})[0]
    for found in run_in_world(
        two_tasks, 3, tmp_path / "zero-3", str(tmp_path), {**changes, "engine": ENGINES["zero-3"]}
    ):
        agree(found, expected, 1e-6)


@pytest.mark.parametrize(("name", "optimiser"), [("zero-0", "adan"), ("zero-1", "adan"), ("zero-0", "lookahead_adan")])
def test_every_task_has_an_optimiser_of_its_own(tmp_path: Path, name: str, optimiser: str) -> None:
    """Adan counts its steps in the groups of parameters, from its first step on; Lookahead's state is in another."""
    adan = {"optim": {"name": optimiser, "lr": 1e-3, "schedule": "constant", "options": {"eps": 1e-3}}}
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {**adan, "engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**adan, "engine": ENGINES[name]}):
        agree(found, expected, 1e-6)


@pytest.mark.slow
def test_compiled_blocks_in_shards(tmp_path: Path) -> None:
    """Curvature looks into the blocks."""
    wide = {"model": {**SECTIONS["model"], "options": {**VIT, "embed_dim": 48}}}
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {**wide, "engine": DDP})[0]
    engine = {"engine": {**FSDP2, "compile": True}}
    for found in run_in_world(two_tasks, 2, tmp_path / "fsdp2", str(tmp_path), {**wide, **engine}):
        agree(found, expected, 1e-5)


def clipped_steps(comm: Comm, engine: dict[str, Any]) -> Result:
    """Weights after steps of a network that has rows for one rank only."""
    torch.manual_seed(0)
    made = build_engine(
        merged(SECTIONS, {"engine": engine}), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1)), comm
    )
    made.start(num_steps=2, task=0)
    for _ in range(2):
        made.backward(made.forward(torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)).square().sum())
        made.step()
    return {name: value.clone() for name, value in streamed(made.gather(), comm)}


@pytest.mark.parametrize("name", SHARDED)
def test_a_rank_without_rows(tmp_path: Path, name: str) -> None:
    expected = run_in_world(clipped_steps, 2, tmp_path / "ddp", DDP)[0]
    for found in run_in_world(clipped_steps, 2, tmp_path / name, ENGINES[name]):
        torch.testing.assert_close(found, expected)


class Idle(torch.nn.Module):
    """A network whose first layer its passes do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.used(pixels.flatten(1))
        return logits


def taken_over(comm: Comm, engine: dict[str, Any]) -> Result:
    """The optimiser's state after a step alone, and as an engine has it that took it over."""
    pixels, noise = (
        torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, dtype=torch.int64),
    )
    torch.manual_seed(0)
    one = build_engine(merged(SECTIONS, ADAM, {"engine": DDP}), Idle(), Comm.solo())
    one.start(num_steps=2, task=0)
    one.backward(one.forward(pixels, noise).square().sum())
    one.step()
    other = build_engine(merged(SECTIONS, ADAM, {"engine": engine}), Idle(), comm)
    other.load_state_dict(one.state_dict())
    names = {"exp_avg": "mean", "exp_avg_sq": "square"}
    before, after = (
        {f"{key} {name}": value.clone() for key, leaves in held.items() for name, value in streamed(leaves, ranks)}
        for held, ranks in ((one.moments(names), Comm.solo()), (other.moments(names), comm))
    )
    return {"before": before, "after": after}


@pytest.mark.parametrize("name", ["fsdp2", "zero-1", pytest.param("zero-3", marks=pytest.mark.slow)])
def test_the_state_of_weights_that_had_no_gradient(tmp_path: Path, name: str) -> None:
    """Without any itself, the first parameter does not hide that of the others."""
    dismiss()
    for found in run_in_world(taken_over, 2, tmp_path, ENGINES[name]):
        assert sum(bool(value.any()) for value in found["before"].values()) == 4
        torch.testing.assert_close(found["after"], found["before"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOAD)
def test_shards_in_host_memory(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 2, tmp_path / "ddp", str(tmp_path), {"engine": DDP})[0]
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {"engine": OFFLOAD[name]}):
        agree(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["zero-2", *SHARDED])
def test_bf16_keeps_fp32_weights(tmp_path: Path, name: str) -> None:
    """What is rounded to 8 bits differs between engines only where sums before it do."""
    engines = [{**ENGINES[each], "precision": "bf16"} for each in ("ddp", name)]
    expected, found = (
        run_in_world(two_tasks, 2, tmp_path / engine["kind"], str(tmp_path), {"engine": engine})[0]
        for engine in engines
    )
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}
    agree(found, expected, 5e-4, accuracy=0.02)


class Probe(torch.nn.Module):
    """Logits, and whether autocast keeps what it lowers meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.keeps = torch.nn.Linear(4, 3), True

    def forward(self, pixels: Tensor) -> Tensor:
        self.keeps = torch.is_autocast_cache_enabled()
        logits: Tensor = self.linear(pixels.flatten(1))
        return logits


def lowered_copies(comm: Comm, engine: dict[str, Any]) -> Result:
    """Whether a pass outside training keeps lowered copies of weights."""
    made = build_engine(merged(SECTIONS, {"engine": {**engine, "precision": "bf16"}}), Probe(), comm)
    made.predict(torch.ones(2, 1, 2, 2))
    return {"keeps": made.module.keeps}


@pytest.mark.parametrize("name", SHARDED)
def test_bf16_keeps_no_lowered_copy_of_spread_weights(tmp_path: Path, name: str) -> None:
    assert [found["keeps"] for found in run_in_world(lowered_copies, 2, tmp_path, ENGINES[name])] == [False, False]


@pytest.mark.parametrize(
    "name", ["zero-3", "groups of two", *(pytest.param(name, marks=pytest.mark.slow) for name in SHARDED[:-1])]
)
def test_four_processes(tmp_path: Path, name: str) -> None:
    expected = run_in_world(two_tasks, 1, tmp_path / "ddp", str(tmp_path), {"engine": DDP})[0]
    engine = ENGINES.get(name, GROUPS)
    dismiss()  # DeepSpeed numbers modules as they are made, and wants equal numbers: processes of one age
    for found in run_in_world(two_tasks, 4, tmp_path / name, str(tmp_path), {"engine": engine}):
        agree(found, expected, 1e-5)


RESTORED: dict[str, dict[str, Any]] = {
    "the path": {"curvature": {"kind": "si"}, "prior": {"quadratic": {"weight": 0.1}}, "train": {"ema": None}},
    "an anchor": {
        "prior": {"normal": {"precision": 1e-3}, "quadratic": {"weight": 0.0}, "replay": 0.0},
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0},
    },
    "a functional prior": {
        "prior": {"fromp": {"weight": 1.0}, "quadratic": {"weight": 0.0}, "replay": 0.0},
        "log": {"reconstruction": 0.0},
    },
}


def half_and_rest(comm: Comm, folder: str, changes: dict[str, Any], *, resume: bool) -> Result:
    """Go on from the newest checkpoint, and stop in the middle of the second task; with `resume`, at its end."""
    state, world = make_world(merged(SECTIONS, ADAM, changes), Path(folder), comm)
    checkpoints = world.folder.checkpoints
    found = latest(checkpoints)
    if found is None:
        learn(state, world, 1)
        state.mark = Mark.at(1, "fit", 0)
    else:
        state.load_state_dict(load(checkpoints, found), found, open_shards(checkpoints, found), comm)
    if not resume:
        world.stop.on_signal(15, None)
        assert not fit(world.stream.tasks[1], state, world)
        world.settle(state)
        return {"step": state.mark.step}
    assert fit(world.stream.tasks[1], state, world)
    return {"weights": everything(state, comm), "step": state.mark.step}


WORLDS = {
    "zero-3 on 4": 4,
    "ddp on 1": 1,
    "fsdp2 on 2": 2,
    "zero-1 on 2": 2,
    "zero-2 on 3": 3,
    "fsdp2 on 4": 4,
    "zero-0 on 2": 2,
    "groups on 4": 4,
}
CHAIN = list(WORLDS)


def part(tmp_path: Path, folder: Path, world: str, *, resume: bool) -> Result:
    """`half_and_rest` on one of WORLDS."""
    name, _, _ = world.partition(" ")
    engine = {"engine": ENGINES.get(name, GROUPS), "checkpoint": {"background": name == "fsdp2"}}
    run = rest if resume else half
    return run_in_world(run, WORLDS[world], tmp_path / f"{world}-{resume}", str(folder), engine)[0]


def half(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Stop within the second task."""
    return half_and_rest(comm, folder, changes, resume=False)


def rest(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Reach its end."""
    return half_and_rest(comm, folder, changes, resume=True)


def consolidated(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Reach its end, and make the prior of the third, with all that is measured on the way."""
    state, world = make_world(merged(SECTIONS, ADAM, changes), Path(folder), comm)
    checkpoints = world.folder.checkpoints
    if found := latest(checkpoints):
        state.load_state_dict(load(checkpoints, found), found, open_shards(checkpoints, found), comm)
    else:
        learn(state, world, 1)
        state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    reconstruct(world.stream.tasks[1], state, world)
    consolidate(world.stream.tasks[1], state, world)
    saved = [leaf for leaf in tree_leaves(state.prior.state_dict()) if isinstance(leaf, Tensor | Slab)]
    leaves = {str(number): leaf for number, leaf in enumerate(saved)}
    made = {name: value.clone() for name, value in streamed(leaves, comm)}
    return {"step": state.mark.step, "weights": everything(state, comm), "prior": made}


def assert_ended_alike(found: Result, undisturbed: Result) -> None:
    """Bit for bit, in the weights and in all that the next task's prior is made of."""
    assert found["step"] == undisturbed["step"]
    assert len(undisturbed["prior"]) > 1
    for kind in ("weights", "prior"):
        assert found[kind].keys() == undisturbed[kind].keys()
        differing = [name for name, value in undisturbed[kind].items() if not torch.equal(value, found[kind][name])]
        assert differing == []


@pytest.mark.parametrize("changes", RESTORED.values(), ids=list(RESTORED))
def test_what_is_measured_after_a_stop(tmp_path: Path, changes: dict[str, Any]) -> None:
    """As tests/gpu has it with shards in host memory."""
    more = {**changes, "engine": ENGINES["fsdp2"]}
    undisturbed = run_in_world(consolidated, 2, tmp_path / "one", str(tmp_path / "whole"), more)[0]
    stopped = run_in_world(half, 2, tmp_path / "half", str(tmp_path / "run"), more)[0]
    ended = run_in_world(consolidated, 2, tmp_path / "rest", str(tmp_path / "run"), more)[0]
    assert 0 < stopped["step"] < ended["step"]
    assert_ended_alike(ended, undisturbed)


FAST = list(zip(CHAIN[::2], CHAIN[1::2], strict=True))  # each of WORLDS once
PAIRS = [
    pytest.param(first, second, marks=() if (first, second) in FAST else pytest.mark.slow)
    for first in CHAIN
    for second in CHAIN
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_stopped_on_one_engine_and_ended_on_another(tmp_path: Path, first: str, second: str) -> None:
    dismiss()
    undisturbed = part(tmp_path / "one", tmp_path / "whole", "ddp on 1", resume=True)
    stopped = part(tmp_path / "two", tmp_path / "run", first, resume=False)
    ended = part(tmp_path / "three", tmp_path / "run", second, resume=True)
    assert 0 < stopped["step"] < ended["step"] == undisturbed["step"]
    a = torch.cat([value.double().flatten() for value in undisturbed["weights"].values()])
    b = torch.cat([ended["weights"][name].double().flatten() for name in undisturbed["weights"]])
    assert float((a - b).norm() / a.norm()) <= 1e-5


class Traffic(TorchDispatchMode):
    """What collectives are called with: their names, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(str(func))
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def step_traffic(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """What the collectives of one step carry, with the quadratic and without."""
    state, world = make_world(merged(SECTIONS, changes), Path(folder), comm)
    learn(state, world, 1)
    quadratic, engine = state.prior.quadratic, state.engine
    assert quadratic is not None
    engine.start(num_steps=9, task=1)
    found: Result = {}
    for name in ("first", "without", "with"):  # the first step of an engine settles what it sends
        detach = quadratic.attach(engine, comm, num_train=10) if name == "with" else (lambda: None)
        with Traffic() as traffic:
            for last in (False, True):
                logits = engine.forward(torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), last=last)
                engine.backward(logits.square().sum())
            engine.step()
        detach()
        found[name] = {"calls": traffic.calls, "bytes": traffic.sizes}
    return found


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "ddp"])
def test_the_pull_sends_nothing(tmp_path: Path, name: str) -> None:
    for found in run_in_world(step_traffic, 2, tmp_path / name, str(tmp_path / "run"), {"engine": ENGINES[name]}):
        assert sum(found["without"]["bytes"]) > 0
        assert found["with"] == found["without"]


def most_whole(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """Elements of weights that were whole at once in passes outside training: the most, a block's, and of all."""
    state, world = make_world(merged(SECTIONS, changes), Path(folder), comm)
    network = state.engine.module
    largest, own = [0], 0

    def look() -> None:
        whole = [value for value in network.parameters() if not hasattr(value, "to_local")]
        largest[0] = max(largest[0], sum(value.numel() for value in whole))

    def passing(module: Any, arguments: Any, out: Tensor) -> None:
        look()
        if out.requires_grad:
            out.register_hook(lambda _: look())

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(passing)
    own = sum(value.numel() for name, value in network.named_parameters() if not name.startswith("blocks."))
    block = sum(value.numel() for name, value in network.named_parameters() if name.startswith("blocks.0."))
    consolidate(world.stream.tasks[0], state, world)
    evaluate_all(state, world, last=0)
    return {"most": largest[0], "block": block, "outside": own}


@pytest.mark.parametrize("name", SHARDED)
def test_passes_outside_training_have_two_blocks_whole_at_most(tmp_path: Path, name: str) -> None:
    """One that is at work, and one that comes next."""
    deep = {"model": {**SECTIONS["model"], "options": {**VIT, "embed_dim": 48, "depth": 6}}, "memory": {"size": 4}}
    changes = {**deep, "engine": ENGINES[name], "curvature": {"kind": "kronecker", "fraction": 0.05}}
    for found in run_in_world(most_whole, 2, tmp_path / name, str(tmp_path / "run"), changes):
        assert found["block"] < found["most"] <= 2 * found["block"] + found["outside"]
