"""Importances of weights do not depend on the number of processes, and little on the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import Mark, latest, load, open_shards
from hpccl.curvature.mas_local import LocalMasEstimator
from hpccl.curvature.sweep import planned
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.engine.sharded import Mesh, is_spread, shard
from hpccl.errors import HpcclError
from hpccl.prior.reconstruct import summed_gradients
from hpccl.train.fit import fit
from tests.dist.test_curvature import COUNT, assert_same, shares
from tests.dist.test_engines import DDP, ENGINES, OFFLOAD, SECTIONS, agree, two_tasks
from tests.dist.world import Result, dismiss, run_in_world
from tests.run.method import learn, make_world, merged
from tests.unit.curvature.oracle import NUM_CLASSES, StandardConv, build, examples

SI: dict[str, Any] = {"curvature": {"kind": "si"}, "prior": {"quadratic": {"weight": 0.1, "decay": 0.9}}}


def measured(comm: Comm) -> Result:
    """The local variant of MAS on an uneven share of the examples."""
    model, pixels = build("convs", COUNT, dtype=torch.float32)
    return LocalMasEstimator().estimate(model, shares(comm, examples(pixels)), comm).state_dict()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_world_size_does_not_matter(tmp_path: Path, size: int) -> None:
    alone = measured(Comm.solo())
    for rank in run_in_world(measured, size, tmp_path):
        assert alone["num_examples"] == COUNT
        assert_same(alone, rank, rtol=1e-5)


class Block(nn.Module):
    """A norm and an activation before the convolution: they end what the block before says."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.act(self.norm(x)))
        return out


def blocks() -> nn.Module:
    """Of the units of shards, one has a layer without a formula, one is a layer, one begins with a norm."""
    torch.manual_seed(2)
    first, wide, standard = nn.Conv2d(2, 40, 3), nn.Conv2d(40, 48, 3), StandardConv(48, 48, 3)
    body = (first, Block(wide, 40), Block(standard, 48), nn.BatchNorm2d(48), nn.ReLU())
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(48 * 2 * 2, 150), nn.ReLU(), nn.Linear(150, NUM_CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    return model.eval()


def measured_in_shards(comm: Comm, *, reshard: bool = True) -> Result:
    """Of a network that is whole if nobody shares it."""
    model = blocks()
    pixels = torch.randn(COUNT, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    known = planned(model, examples(pixels))  # as the trainer does
    if comm.size > 1:
        shard(model, Mesh.of(comm, None), reshard=reshard)
        assert sum(is_spread(unit) for unit in model.modules()) == 4
    state = LocalMasEstimator(known).estimate(model, shares(comm, examples(pixels)), comm).state_dict()
    state["values"] = {name: value.clone() for name, value in streamed(state["values"], comm)}
    return state


def test_layers_in_shards_say_what_whole_layers_say(tmp_path: Path) -> None:
    alone = measured_in_shards(Comm.solo())
    for rank in run_in_world(measured_in_shards, 2, tmp_path):
        assert_same(alone, rank, rtol=1e-5)


def measured_where_weights_stay_gathered(comm: Comm) -> Result:
    """Its passes have no backward pass that would free them."""
    return measured_in_shards(comm, reshard=False)


def test_layers_that_stay_gathered_say_so_too(tmp_path: Path) -> None:
    alone = measured_in_shards(Comm.solo())
    for rank in run_in_world(measured_where_weights_stay_gathered, 2, tmp_path):
        assert_same(alone, rank, rtol=1e-5)


def gradient_after_a_pass(comm: Comm) -> Result:
    """The gradient's norm right after a pass that left the weights gathered."""
    model, pixels = blocks(), torch.ones(2, 2, 8, 8)
    shard(model, Mesh.of(comm, None), reshard=False)
    with torch.no_grad():
        model(pixels)
    (found,) = summed_gradients(model, [(pixels, lambda logits: (logits.square().sum(),))], Comm.solo(), num_terms=1)
    return {"squares": sum(float(value.square().sum()) for value in found.values())}


def test_gradients_after_a_pass_that_left_weights_gathered(tmp_path: Path) -> None:
    alone, pixels = blocks(), torch.ones(2, 2, 8, 8)
    (expected,) = summed_gradients(alone, [(pixels, lambda logits: (logits.square().sum(),))], Comm.solo(), num_terms=1)
    parts = run_in_world(gradient_after_a_pass, 2, tmp_path)
    total = sum(part["squares"] for part in parts)
    assert total == pytest.approx(sum(float(value.square().sum()) for value in expected.values()), rel=1e-5)


def diverged_in_shards(comm: Comm) -> Result:
    """One image of rank 0 is not finite; after its first layer comes one that others wait at."""
    model = blocks()
    pixels = torch.ones(2, 2, 8, 8)
    known = planned(model, examples(pixels))
    shard(model, Mesh.of(comm, None))
    pixels[0] = torch.nan if comm.rank == 0 else 1.0
    try:
        LocalMasEstimator(known).estimate(model, [examples(pixels)], comm)
    except HpcclError as error:
        return {"error": str(error)}
    return {"error": "nothing"}


def test_a_network_in_shards_that_has_diverged_is_refused_on_all_ranks(tmp_path: Path) -> None:
    told, heard = (found["error"] for found in run_in_world(diverged_in_shards, 2, tmp_path))
    assert told.startswith("the output of layer '0' is not finite on an image")
    assert "another rank could not measure its part" in heard


LOCAL: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [300, 60]},
    "curvature": {"kind": "mas", "variant": "local"},
}


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("zero-3", marks=pytest.mark.slow)])
def test_the_local_importance_on_engines_with_shards(tmp_path: Path, name: str) -> None:
    expected = two_tasks(Comm.solo(), str(tmp_path), {**LOCAL, "engine": DDP})
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**LOCAL, "engine": ENGINES[name]}):
        agree(found, expected, 1e-5)


WHERE = {**ENGINES, **{f"{name}, offloaded": engine for name, engine in OFFLOAD.items()}}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("zero-0", "zero-1", "zero-1, offloaded", "zero-3, offloaded")
]


@pytest.mark.parametrize("name", ["fsdp2", "zero-2", "zero-3", *SLOW])
def test_the_path_in_shards_is_that_of_whole_weights(tmp_path: Path, name: str) -> None:
    expected = two_tasks(Comm.solo(), str(tmp_path), {**SI, "engine": DDP})
    for found in run_in_world(two_tasks, 2, tmp_path / name, str(tmp_path), {**SI, "engine": WHERE[name]}):
        agree(found, expected, 1e-6)


GROUPED: dict[str, Any] = {
    "mas": {"curvature": {"kind": "mas", "group": 25}},
    "ewc": {"curvature": {"kind": "diagonal", "fisher": "empirical", "group": 25}},
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_the_same_examples_on_any_number_of_processes(tmp_path: Path, name: str) -> None:
    """Else their mean gradients would be others."""
    changes = {**GROUPED[name], "engine": DDP}
    expected = two_tasks(Comm.solo(), str(tmp_path), changes)
    for found in run_in_world(two_tasks, 2, tmp_path / "two", str(tmp_path), changes):
        agree(found, expected, 1e-6)


def part(comm: Comm, folder: str, changes: dict[str, Any], *, to_the_end: bool) -> Result:
    """The second task, to its end or to somewhere within, from where the folder stands; what each weight did in it."""
    state, world = make_world(merged(SECTIONS, changes), Path(folder), comm)
    checkpoints = world.folder.checkpoints
    found = latest(checkpoints)
    if found is None:
        learn(state, world, 1)
        state.mark = Mark.at(1, "fit", 0)
    else:
        state.load_state_dict(load(checkpoints, found), found, open_shards(checkpoints, found), comm)
    if not to_the_end:
        world.stop.on_signal(15, None)
    assert fit(world.stream.tasks[1], state, world) == to_the_end
    world.settle(state)
    credit, begun = ({name: value.clone() for name, value in streamed(leaves, comm)} for leaves in state.engine.path())
    return {"credit": credit, "begun": begun, "step": state.mark.step}


def first_part(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    return part(comm, folder, changes, to_the_end=False)


def last_part(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    return part(comm, folder, changes, to_the_end=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("fsdp2", "ddp"), ("zero-2", "ddp"), ("zero-1", "zero-3"), ("ddp", "zero-2")]
)
def test_a_path_goes_on_elsewhere(tmp_path: Path, first: str, second: str) -> None:
    """Stopped on one engine and ended on another, against one process alone."""
    (whole,) = run_in_world(last_part, 1, tmp_path / "one", str(tmp_path / "whole"), {**SI, "engine": DDP})
    dismiss()  # DeepSpeed numbers modules as they are made, and wants equal numbers
    stopped = run_in_world(first_part, 2, tmp_path / "two", str(tmp_path / "run"), {**SI, "engine": ENGINES[first]})[0]
    dismiss()
    ended = run_in_world(last_part, 2, tmp_path / "three", str(tmp_path / "run"), {**SI, "engine": ENGINES[second]})[0]
    assert 0 < stopped["step"] < ended["step"]
    for kept in ("credit", "begun"):
        for name, value in whole[kept].items():
            scale = float(value.abs().max())
            torch.testing.assert_close(ended[kept][name], value, rtol=1e-4, atol=1e-4 * scale, msg=f"{kept} {name}")
