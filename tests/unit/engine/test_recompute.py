"""Activation checkpointing changes memory, not what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.engine.build import build_engine
from hpccl.engine.ddp import DdpEngine
from hpccl.errors import ConfigError
from hpccl.models.build import build_model

RESNET: dict[str, Any] = {"kind": "timm", "name": "resnet10t", "options": {"drop_path_rate": 0.3}}


def engine(*, recompute: bool, model: dict[str, Any] = RESNET) -> DdpEngine:
    config = RunConfig.model_validate(
        {
            "model": model,
            "optim": {"name": "sgd", "lr": 0.1, "schedule": "constant"},
            "engine": {"kind": "ddp", "recompute": recompute},
        }
    )
    network = build_model(config.model, image_shape=(3, 32, 32), num_classes=5, seed=0)
    made = build_engine(config, network, Comm.solo())
    assert isinstance(made, DdpEngine)
    made.start(num_steps=4, task=0)
    return made


def step(made: DdpEngine, seed: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of two micro-batches, and bytes that the first forward pass kept for the backward pass."""
    generator = torch.Generator().manual_seed(seed)
    pixels, keys = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)
    kept = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.nbytes
        return value

    for last in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            logits = made.forward(pixels, keys + 100 * seed + 10 * last, last=last)
        made.backward(logits.square().mean())
    return {name: value.grad.clone() for name, value in made.module.named_parameters() if value.grad is not None}, kept


def test_gradients_and_batch_statistics_are_the_same() -> None:
    plain, again = engine(recompute=False), engine(recompute=True)
    for seed in range(2):
        (expected, whole), (found, kept) = step(plain, seed), step(again, seed)
        assert kept < whole / 2
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(again.step(), plain.step())
    statistics = dict(plain.module.named_buffers())
    assert int(statistics["bn1.num_batches_tracked"]) == 4
    for name, value in again.module.named_buffers():
        torch.testing.assert_close(value, statistics[name])


def test_other_passes_are_as_ever() -> None:
    made = engine(recompute=True)
    step(made, 0)
    assert not any(getattr(module, "grad_checkpointing", False) for module in made.module.modules())
    before = {name: value.clone() for name, value in made.module.named_buffers()}
    made.predict(torch.ones(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in made.module.named_buffers())


def test_a_network_that_cannot_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.recompute=true: .*model\.kind=cifarnet.* allowed: timm models"):
        engine(recompute=True, model={"kind": "cifarnet"})
