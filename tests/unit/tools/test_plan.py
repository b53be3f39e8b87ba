"""Plans: arithmetic of engines and curvature, and the network they are made of, against the real things."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from hpccl.cli import app
from hpccl.config.curvature import (
    DenseCurvature,
    DiagonalCurvature,
    EkfacCurvature,
    KroneckerCurvature,
    ListedTasks,
    PooledTasks,
    TasksConfig,
)
from hpccl.config.engine import DdpEngine, DeepspeedEngine, Fsdp2Engine
from hpccl.config.run import RunConfig
from hpccl.curvature.blocks import Layout
from hpccl.curvature.coverage import _graph_bytes
from hpccl.curvature.kfac import _size
from hpccl.curvature.kronecker import layout_parts
from hpccl.data.build import open_stream
from hpccl.dist.comm import Comm
from hpccl.engine.deepspeed_start import _settings
from hpccl.errors import ConfigError, CoverageError, DataError
from hpccl.models.build import build_model
from hpccl.models.dropout import set_noise
from hpccl.tools.plan.build import make_plan
from hpccl.tools.plan.curvature import listed_terms, pair_bytes, plan_curvature, sent_numbers
from hpccl.tools.plan.network import look, moments
from hpccl.tools.plan.sharding import Sharding, elements, held, sent
from hpccl.train.plan import planned_steps
from tests.run.method import merged

SHAPES = [(64, 3, 7, 7), (10, 64), (10,)]
NUM = sum(map(math.prod, SHAPES))
Stage = Literal[0, 1, 2, 3]

# ---------------------------------------------------------------- engines


def test_data_parallel_holds_everything_everywhere() -> None:
    sharding = Sharding.of(DdpEngine(), 8)
    assert held(SHAPES, 100, 2, sharding) == {"weights": 4 * NUM, "gradients": 4 * NUM, "optimizer": 8 * NUM}
    assert sent(NUM, 0, sharding, accumulate=4)["average gradients"] == pytest.approx(2 * 7 / 8 * 4 * NUM)
    assert not any(sent(NUM, 128, Sharding.of(DdpEngine(), 1), accumulate=1).values())
    assert held(SHAPES, 100, 2, Sharding.of(DeepspeedEngine(stage=0), 8)) == held(SHAPES, 100, 2, sharding)


def test_fully_sharded_holds_rows_and_four_whole_units() -> None:
    sharding = Sharding.of(Fsdp2Engine(), 8)
    rows = 8 * 3 * 7 * 7 + 2 * 64 + 2  # of 64, 10 and 10 rows, the first of 8 ranks has 8, 2 and 2
    assert held(SHAPES, 100, 1, sharding) == {
        "weights": 4 * rows,
        "gradients": 4 * rows,
        "optimizer": 4 * rows,
        "whole blocks": 1600,
    }
    assert sum(sent(NUM, 0, sharding, accumulate=1).values()) == pytest.approx(3 * 7 / 8 * 4 * NUM)
    assert sum(sent(NUM, 0, sharding, accumulate=2).values()) == pytest.approx(6 * 7 / 8 * 4 * NUM)
    kept = Sharding.of(Fsdp2Engine(reshard=False), 8)
    assert held(SHAPES, 100, 1, kept)["whole blocks"] == 4 * (NUM + 200)
    assert sum(sent(NUM, 0, kept, accumulate=1).values()) == pytest.approx(2 * 7 / 8 * 4 * NUM)


def test_copies_in_shards() -> None:
    """Two copies on 4 ranks each: gathers within a copy, and the average of shards between them."""
    sharding = Sharding.of(Fsdp2Engine(shard_size=4), 8)
    assert elements(SHAPES, sharding, what="weights") == 16 * 147 + 3 * 64 + 3
    found = sent(NUM, 0, sharding, accumulate=1)
    assert found["gather weights"] == pytest.approx(2 * 3 / 4 * 4 * NUM)
    assert found["average gradients"] == pytest.approx(3 / 4 * 4 * NUM + 2 * 1 / 2 * NUM)
    with pytest.raises(
        ConfigError, match=r"engine.shard_size=3 does not divide the 8 ranks of this run; allowed: 1, 2, 4, 8 "
    ):
        Sharding.of(Fsdp2Engine(shard_size=3), 8)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "wire"),
    [(1, 1, 1, 3 / 4, 9 / 4), (2, 1, 1 / 2, 3 / 4, 9 / 4), (3, 1 / 4, 1 / 4, 3 / 4, 6 / 4)],
)
def test_zero(stage: Stage, weights: float, gradients: float, optimizer: float, wire: float) -> None:
    """In units of 4n, on 4 ranks with two moments; the optimiser's share has a copy of the weights as well.

    Of two equal parameters, each reaches into two of four shares.
    """
    shapes = [(256, 256), (512, 128)]
    num = 2 * 65536
    found = held(shapes, 0, 2, Sharding.of(DeepspeedEngine(stage=stage), 4))
    assert [found[name] / (4 * num) for name in ("weights", "gradients", "optimizer")] == [
        weights,
        gradients,
        optimizer,
    ]
    assert sum(sent(num, 0, Sharding.of(DeepspeedEngine(stage=stage), 4), accumulate=1).values()) == pytest.approx(
        wire * 4 * num
    )
    assert found["bucket of gradients"] == 4 * num
    assert ("gradients on their way" in found) == (stage > 1)


def test_zero_3_by_the_users_own_settings() -> None:
    """Weights go between the passes only if enough others pass by; then they are gathered twice."""
    shapes = [(256, 256), (512, 128)]
    num = 2 * 65536
    found = held(shapes, 65536, 2, Sharding.of(DeepspeedEngine(), 4))
    assert (found["small weights, whole"], found["whole blocks"]) == (0, 4 * (num + 65536))
    zero = {
        "stage3_param_persistence_threshold": 100_000,
        "reduce_bucket_size": 1000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    sharding = Sharding.of(DeepspeedEngine(deepspeed={"zero_optimization": zero}), 4)
    found = held(shapes, 65536, 2, sharding)
    assert (found["small weights, whole"], found["whole blocks"]) == (4 * num, 4 * 2 * 65536)
    assert (found["bucket of gradients"], found["gradients on their way"]) == (4000, 4000)
    assert sum(sent(num, 0, sharding, accumulate=2).values()) == pytest.approx(2 * 3 * 3 / 4 * 4 * num)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 8))
def test_gradients_that_reach_into_a_share(sizes: list[int], ranks: int) -> None:
    sharding = Sharding.of(DeepspeedEngine(stage=2), ranks)
    share, whose = -(-sum(sizes) // ranks), [number for number, size in enumerate(sizes) for _ in range(size)]
    most = max(sum(sizes[number] for number in set(whose[rank * share :][:share])) for rank in range(ranks))
    assert elements([(size,) for size in sizes], sharding, what="gradients") == most


@pytest.mark.parametrize("count", [1000, 10**9])
def test_deepspeed_is_told_what_is_planned(count: int) -> None:
    """And the user's own settings win."""
    own = {"reduce_bucket_size": 7, "stage3_param_persistence_threshold": 5}
    for zero in ({}, own):
        engine = DeepspeedEngine(deepspeed={"zero_optimization": zero})
        told = _settings(merged({"engine": engine.model_dump()}), count)["zero_optimization"]
        sharding = Sharding.of(engine, 2)
        assert sharding.persistent == told["stage3_param_persistence_threshold"]
        assert held([(count,)], 0, 1, sharding)["bucket of gradients"] == 4 * told["reduce_bucket_size"]


# ---------------------------------------------------------------- curvature

LAYERS = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.booleans())


@given(st.lists(LAYERS, min_size=1, max_size=5), st.integers(1, 8), st.booleans())
def test_parts_and_messages_are_those_of_a_run(
    layers: list[tuple[int, int, int, bool]], ranks: int, divisible: bool
) -> None:
    layouts = [
        Layout(str(number), "w", "b" if bias else None, (groups * outputs, inputs), groups)
        for number, (groups, outputs, inputs, bias) in enumerate(layers)
    ]
    config = KroneckerCurvature(tasks=PooledTasks(), keep_trace=1.0 if divisible else 0.5)
    plan = plan_curvature(config, layouts, {"norm": (7,)}, Sharding.of(DdpEngine(), ranks), tasks=3)
    placed = layout_parts(layouts, Comm(0, ranks, torch.device("cpu")), divisible=divisible)
    for layout, owners in placed:
        assert all(sent_numbers(layout.shape, part) == _size(layout, part) for _, part in owners)
    everything = sum(pair_bytes(layout.shape, part) for layout, owners in placed for _, part in owners)
    assert sum(plan.held) == everything + ranks * 28
    if ranks == 1:
        assert plan.sent == (0.0,)
        assert plan.held == (sum(4 * g * (o * o + d * d) for g, o, d in (each.shape for each in layouts)) + 28,)


@pytest.mark.parametrize(
    ("policy", "tasks", "terms"),
    [
        (ListedTasks(), 3, 3),
        (ListedTasks(), 9, 4),  # max_cost
        (ListedTasks(max_cost=9.0, max_gib=2.5), 9, 2),  # of 1 GiB each
        (ListedTasks(max_gib=0.5), 9, 1),
        (PooledTasks(), 9, 1),
    ],
)
def test_terms_are_bounded_by_the_budget(policy: TasksConfig, tasks: int, terms: int) -> None:
    assert listed_terms(policy, tasks, 2**30) == terms


def test_other_kinds_of_curvature() -> None:
    layouts, rest = [Layout("layer", "w", None, (6, 10))], {"a": (30, 3), "b": (10,)}
    diagonal = plan_curvature(DiagonalCurvature(), [], rest, Sharding.of(DdpEngine(), 2), tasks=5)
    assert (diagonal.held, diagonal.sent, diagonal.fetched) == ((400, 400), (400.0, 400.0), (0, 0))
    dense = plan_curvature(DenseCurvature(), [], rest, Sharding.of(DdpEngine(), 2), tasks=5)
    assert dense.held == (40_000, 40_000)
    ekfac = plan_curvature(EkfacCurvature(), layouts, {}, Sharding.of(DdpEngine(), 1), tasks=5)
    assert ekfac.held == (4 * (36 + 100 + 60 + 16),)


def test_a_diagonal_is_spread_as_weights_are() -> None:
    """Rows of every parameter; what a process pulls on it has whole, with the old weights."""
    rest = {"a": (30, 3), "b": (10,)}
    for engine in (Fsdp2Engine(), DeepspeedEngine(stage=3)):
        plan = plan_curvature(DiagonalCurvature(), [], rest, Sharding.of(engine, 4), tasks=5)
        assert plan.held == (4 * (8 * 3 + 3),) * 4
        assert plan.fetched == (2 * 4 * 90, 2 * 4 * 10, 0, 0)
        assert plan.measuring == 400
    layouts = [Layout("layer", "w", None, (6, 10))]
    layered = plan_curvature(KroneckerCurvature(keep_trace=0.5), layouts, {}, Sharding.of(Fsdp2Engine(), 2), tasks=1)
    assert sorted(layered.fetched) == [0, 4 * 60]


# ---------------------------------------------------------------- the network


def config_of(model: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate({**merged().model_dump(), "model": model, **sections})


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "cifarnet"},
        {"kind": "mlp", "hidden": [20]},
        {"kind": "timm", "name": "test_resnet"},
        {"kind": "timm", "name": "test_vit", "options": {"img_size": 32, "patch_size": 8}},
        {"kind": "timm", "name": "test_efficientnet"},
    ],
    ids=lambda model: model.get("name", model["kind"]),
)
def test_activations_without_memory_are_those_of_a_real_pass(model: dict[str, Any]) -> None:
    config = config_of(model)
    network = look(config, image_shape=(3, 32, 32), num_classes=10, rows=5)
    real = build_model(config.model, image_shape=(3, 32, 32), num_classes=10, seed=0).train()
    assert network.num_weights == sum(value.numel() for value in real.parameters())
    assert network.buffer_bytes == sum(value.nbytes for value in real.buffers())
    set_noise(real, torch.arange(5))
    own = {value.untyped_storage().data_ptr(): value.nbytes for value in (*real.parameters(), *real.buffers())}
    kept = _graph_bytes(real, torch.randn(5, 3, 32, 32)) - sum(own.values())
    assert network.activations is not None
    # A pass keeps most weights and not all.
    assert network.activations == pytest.approx(kept, rel=0.15, abs=sum(own.values()))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_recomputed_activations_are_what_goes_into_blocks_and_one_block(name: str) -> None:
    options = {"img_size": 64, "patch_size": 8, "depth": 6} if name == "test_vit" else {}
    model = {"kind": "timm", "name": name, "options": options}
    config = config_of(model, engine={"kind": "ddp", "recompute": True})
    network = look(config, image_shape=(3, 64, 64), num_classes=10, rows=5)
    real: Any = build_model(config.model, image_shape=(3, 64, 64), num_classes=10, seed=0).train()
    own = sum(value.nbytes for value in real.parameters())
    set_noise(real, torch.arange(5))
    pixels = torch.randn(5, 3, 64, 64)
    inside: list[int] = []
    stages = [real.blocks] if name == "test_vit" else [real.layer1, real.layer2, real.layer3, real.layer4]
    blocks = [block for stage in stages for block in stage]
    handles = [
        block.register_forward_pre_hook(lambda block, found: inside.append(_graph_bytes(block.forward, *found)))
        for block in blocks
    ]
    everything = _graph_bytes(real, pixels)
    for handle in handles:
        handle.remove()
    real.set_grad_checkpointing(True)
    expected = _graph_bytes(real, pixels) + max(inside)
    assert network.activations == pytest.approx(expected, rel=0.15, abs=own)
    assert expected < 0.9 * everything
    assert network.largest_unit == max(sum(value.numel() for value in block.parameters()) for block in blocks)


def test_a_network_that_cannot_recompute_is_refused() -> None:
    config = config_of({"kind": "cifarnet"}, engine={"kind": "ddp", "recompute": True})
    with pytest.raises(ConfigError, match=r"engine.recompute=true: .*cannot recompute"):
        look(config, image_shape=(3, 32, 32), num_classes=10, rows=2)


def test_layers_are_those_that_a_run_would_factor() -> None:
    config = config_of(
        {"kind": "timm", "name": "test_vit", "options": {"img_size": 32, "patch_size": 8}},
        curvature={"kind": "kronecker", "diagonal": ["blocks.0.*"]},
    )
    network = look(config, image_shape=(3, 32, 32), num_classes=10, rows=2)
    names = [layout.name for layout in network.layouts]
    assert names[0] == "patch_embed.proj"
    assert "head" in names
    assert not any(name.startswith("blocks.0.") for name in names)
    covered = sum(math.prod(layout.weight_shape) + layout.weight_shape[0] for layout in network.layouts)
    assert sum(map(math.prod, network.rest.values())) + covered == network.num_weights
    small: dict[str, Any] = {"curvature": {"kind": "ekfac", "max_factor": 20}, "prior": {"quadratic": {"weight": 1.0}}}
    with pytest.raises(CoverageError, match=r"max_factor=20"):
        look(config_of({"kind": "cifarnet"}, **small), image_shape=(3, 32, 32), num_classes=10, rows=2)


@pytest.mark.parametrize(
    ("optim", "kept"),
    [
        ({"name": "sgd"}, 1),
        ({"name": "adamw"}, 2),
        ({"name": "momentum", "momentum": 0.0}, 0),
        ({"name": "lookahead_adamw"}, 3),
    ],
)
def test_moments_are_counted(optim: dict[str, Any], kept: float) -> None:
    assert moments(merged({"optim": optim})) == kept


# ---------------------------------------------------------------- plans


def test_a_plan_adds_up() -> None:
    config = merged(
        {
            "memory": {"size": 20},
            "prior": {"view": "teacher", "quadratic": {"weight": 1.0, "anchor": "each"}},
            "train": {"ema": 0.9, "batch_size": 64},
        }
    )
    plan = make_plan(config, nodes=2, nproc=2, gigabytes_per_second=0.001)
    found = {(each.name, each.when): each.num_bytes for each in plan.held}
    weights = 4 * plan.num_weights
    assert plan.num_weights == 65 * 16 + 17 * 10
    assert plan.rows == 16
    assert found["weights", "always"] == found["old weights", "always"] == found["teacher", "training"] == weights
    assert found["averaged weights", "training"] == found["pull to each task's weights", "always"] == weights
    assert found["optimizer", "always"] == 2 * weights
    assert found["memory", "always"] == 20 * 5 * 45
    assert "soft labels: a file of 800 B, mapped once by all processes of a machine" in plan.notes
    assert plan.peak("training") == sum(
        each.num_bytes for each in plan.held if each.when != "measuring" and each.name != "memory"
    )
    assert plan.wire("step") == pytest.approx(2 * 3 / 4 * weights)
    assert plan.terms == 4
    assert any("4 terms a layer fit" in note for note in plan.notes)
    assert plan.step_seconds is not None
    shares = {each.name: each.seconds for each in plan.spent}
    assert shares["wire"] == pytest.approx(plan.wire("step") / 1e6)
    assert set(shares) == {"forward and backward pass", "teacher", "optimizer", "pull of the curvature", "wire"}
    assert all(seconds > 0 for seconds in shares.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": {"replay": 1.0, "correct": {"share": 0.1}}},
        {
            "stream": {"kind": "digits", "tasks": 5, "scenario": {"kind": "blurry"}},
            "train": {"data": "memory", "restart": True},
            "prior": {"replay": 1.0},
            "memory": {"selector": {"kind": "greedy"}},
        },
    ],
    ids=["held out, of small classes", "greedy, of shared classes"],
)
def test_steps_are_those_of_a_run(changes: dict[str, Any]) -> None:
    config = merged({"memory": {"total": 2000}, "train": {"head": "seen"}}, changes)
    plan = make_plan(config, nodes=1, nproc=1, measured=False)
    assert plan.steps == sum(planned_steps(config, open_stream(config.stream, config.data)))


def test_what_is_recalled_beside_rows_is_not_counted() -> None:
    config = merged({"memory": {"size": 20}, "prior": {"fromp": {"weight": 1.0}}})
    plan = make_plan(config, nodes=1, nproc=1, measured=False)
    assert any("kept examples that a step of a later task uses besides" in note for note in plan.notes)


def test_more_ranks_hold_less_curvature() -> None:
    config = merged({"prior": {"quadratic": {"weight": 1.0}}, "model": {"hidden": [64, 64, 64]}})
    held_by = [
        next(each.num_bytes for each in make_plan(config, nodes=1, nproc=nproc, measured=False).held
             if each.name == "curvature")
        for nproc in (1, 2, 4)
    ]  # fmt: skip
    assert held_by[0] > 1.5 * held_by[1] > 1.5 * held_by[2]


@pytest.mark.parametrize(("kind", "copies"), [("kronecker", 1), ("ekfac", 1), ("diagonal", 0)])
def test_matrices_in_bf16_are_held_a_second_time(kind: str, copies: int) -> None:
    prior = {"quadratic": {"weight": 1.0, "products": "bf16"}}
    plan = make_plan(merged({"prior": prior, "curvature": {"kind": kind}}), nodes=1, nproc=1, measured=False)
    held = {each.name: each.num_bytes for each in plan.held}
    assert [name for name in held if name == "curvature in bf16"] == ["curvature in bf16"] * copies
    assert held.get("curvature in bf16", 0) == copies * (held["curvature"] // 2)


def test_the_command_speaks_and_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "model.hidden=[4]", "memory.size=5", "--nodes", "3", "--nproc", "2", "--no-measure"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["sums"]["ranks"], found["sums"]["step_seconds"], found["spent"]) == (6, None, [])
    assert len(json.loads(CliRunner().invoke(app, [*arguments, "--json", "seed=1,2"]).stdout)) == 2
    text = CliRunner().invoke(app, arguments).output
    assert "3 x 2 processes, engine ddp" in text
    assert "average gradients" in text
    assert list(tmp_path.iterdir()) == []


def test_missing_data_and_no_bandwidth_are_told() -> None:
    config = config_of({"kind": "cifarnet"}, stream={"kind": "shards", "parts": [{"path": "nowhere"}]})
    with pytest.raises(DataError, match="nowhere"):
        make_plan(config, nodes=1, nproc=1, measured=False)
    for bandwidth in ("0", "nan", "inf"):
        result = CliRunner().invoke(app, ["plan", "seed=1", "--bandwidth", bandwidth])
        assert isinstance(result.exception, ConfigError)
        assert f"--bandwidth is {bandwidth}; allowed: a finite number" in str(result.exception)


def test_a_memory_that_training_would_refuse_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory.size=5000 is larger than task"):
        make_plan(config_of({"kind": "mlp"}, memory={"size": 5000}), nodes=1, nproc=1, measured=False)


def test_a_factor_that_nothing_measures_may_have_any_size() -> None:
    wide: dict[str, Any] = {"kind": "mlp", "hidden": [20000]}
    make_plan(config_of(wide), nodes=1, nproc=1, measured=False)
    with pytest.raises(CoverageError, match="max_factor"):
        make_plan(config_of(wide, prior={"quadratic": {"weight": 1.0}}), nodes=1, nproc=1, measured=False)


def test_a_layer_that_is_called_twice_is_not_factored() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.again(self.again(self.first(pixels.flatten(1))))
            return found

    from collections import Counter

    from hpccl.tools.plan.network import _counting, _layouts

    model, calls = Twice(), Counter[str]()
    with _counting(model, calls):
        model(torch.zeros(1, 1, 2, 2))
    assert [layout.name for layout in _layouts(model, KroneckerCurvature(), calls)] == ["first"]
