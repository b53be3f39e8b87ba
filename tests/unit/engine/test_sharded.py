"""What comes and goes together in networks that people train, and how ranks are divided."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpccl.compat import import_timm
from hpccl.dist.comm import Comm
from hpccl.engine.sharded import Mesh, numel, shard, skeleton, units
from hpccl.errors import ConfigError


def network(name: str) -> nn.Module:
    """Of timm, without memory."""
    import_timm()
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=10)


def members(stem: str, counts: list[int], *, between: str = "") -> list[str]:
    """Names of blocks, stage by stage; between: what stands before the blocks of each stage but the first."""
    found: list[str] = []
    for stage, count in enumerate(counts):
        found += [between.format(stage)] if between and stage else []
        found += [stem.format(stage, block) for block in range(count)]
    return found


BLOCKS = {
    "resnet18": members("layer{}.{}", [0, 2, 2, 2, 2]),
    "resnet50": members("layer{}.{}", [0, 3, 4, 6, 3]),
    "vit_tiny_patch16_224": [f"blocks.{number}" for number in range(12)],
    "convnext_tiny": members("stages.{}.blocks.{}", [3, 3, 9, 3], between="stages.{}.downsample.1"),
    "swin_tiny_patch4_window7_224": members("layers.{}.blocks.{}", [2, 2, 6, 2]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_units_are_blocks_and_what_is_left(name: str) -> None:
    model = network(name)
    names = {module: name for name, module in model.named_modules()}
    assert [names[unit] for unit in units(model)] == [*BLOCKS[name], ""]


@pytest.mark.parametrize("name", BLOCKS)
def test_no_block_has_a_parameter_of_another(name: str) -> None:
    """So that innermost first, each parameter falls to one unit; little falls to the one that stays whole."""
    model = network(name)
    *blocks, rest = units(model)
    inside = [parameter for block in blocks for parameter in block.parameters()]
    assert len(inside) == len(set(inside))
    assert set(inside) < set(rest.parameters())
    assert sum(parameter.numel() for parameter in inside) > 0.9 * numel(model) - 100_000


def test_small_members_stay_with_what_is_around_them() -> None:
    small, large = nn.Linear(8, 8), nn.Linear(200, 200)
    model = nn.Sequential(small, large, nn.ReLU())
    assert list(units(model)) == [large, model]


def test_ranks_that_cannot_be_divided_are_told_what_can() -> None:
    comm = Comm(rank=1, size=12, device=torch.device("cpu"))
    for size in (5, 24):
        with pytest.raises(
            ConfigError, match=rf"engine\.shard_size={size} does not divide the 12 ranks.*1, 2, 3, 4, 6, 12 "
        ):
            Mesh.of(comm, size)


def test_a_parameter_without_rows_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    mesh: Mesh = None  # type: ignore[assignment]  # never asked
    with pytest.raises(ConfigError, match=r"'scale' is a single number.*engine\.kind=ddp"):
        shard(model, mesh)


def test_a_skeleton_keeps_buffers_and_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    bare = skeleton(model)
    assert {value.device.type for value in bare.parameters()} == {"meta"}
    assert {value.device.type for value in bare.buffers()} == {"cpu"}
    assert not bare.get_parameter("0.weight").requires_grad
    assert bare.get_parameter("0.bias").requires_grad
    assert model[0].weight.device.type == "cpu"
