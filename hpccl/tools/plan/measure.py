"""Measuring the speed of this machine at the parts of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpccl.config.run import RunConfig
from hpccl.dist.mesh import pick_device
from hpccl.engine.optim import build_optimizer
from hpccl.models.build import build_model
from hpccl.models.dropout import set_noise

__all__ = ["Rates", "measure"]

_ENOUGH = 0.5  # minimum seconds of a measured pass, unless the micro-batch is too small
_SIDE = 1024  # side of the matrices


@dataclass(frozen=True)
class Rates:
    """Speed of one process on this machine.

    device: cpu or the name of the GPU
    threads: of the process
    rows: images in the timed pass
    row_seconds: forward and backward pass, per image
    predict_seconds: forward pass alone, per image
    optimizer_seconds: a step over all weights
    flops: additions and multiplications of fp32 matrices, per second
    """

    device: str
    threads: int
    rows: int
    row_seconds: float
    predict_seconds: float
    optimizer_seconds: float
    flops: float


def measure(config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int, rows: int) -> Rates:
    """Time a micro-batch of at most `rows` images through the network of `config`; takes seconds."""
    device = pick_device(config.engine.device)
    model = build_model(config.model, image_shape=image_shape, num_classes=num_classes, seed=0).to(device).train()
    if config.engine.recompute:
        switch: Any = model.set_grad_checkpointing
        switch(True)
    order = torch.channels_last if config.engine.channels_last else torch.contiguous_format
    model = model.to(memory_format=order)  # type: ignore[call-overload]

    def forward(count: int) -> Tensor:
        pixels = torch.ones(count, *image_shape, device=device).contiguous(memory_format=order)
        set_noise(model, torch.arange(count, device=device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.engine.precision == "bf16"):
            logits: Tensor = model(pixels)
        return logits.float().sum()

    def learn(count: int) -> None:
        forward(count).backward()

    count = 2  # BatchNorm cannot normalise a single image
    while (seconds := _seconds(partial(learn, count), device, 1)) < _ENOUGH and count < rows:
        count = min(rows, count * max(2, int(_ENOUGH / seconds)))
    seconds = _seconds(partial(learn, count), device, 3)
    with torch.no_grad():
        predicting = _seconds(partial(forward, count), device, 3)
    return Rates(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        rows=count,
        row_seconds=seconds / count,
        predict_seconds=predicting / count,
        optimizer_seconds=_optimizer_seconds(config, model, device),
        flops=_flops(device),
    )


def _optimizer_seconds(config: RunConfig, model: nn.Module, device: torch.device) -> float:
    optimizer = build_optimizer(config.optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _seconds(optimizer.step, device, 3)


def _flops(device: torch.device) -> float:
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    return 2 * _SIDE**3 / _seconds(lambda: matrix @ matrix, device, 5)


def _seconds(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the median time of `repeat` calls, after a warm-up call."""
    times = []
    for _ in range(1 + repeat):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return max(statistics.median(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
