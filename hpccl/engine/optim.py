"""Optimisers from timm's factory or hpccl.optim, and the learning rate as a function of the step."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import nn

from hpccl.compat import import_timm
from hpccl.config.base import per_task
from hpccl.config.optim import AnyOptim, OptimConfig, TimmOptim
from hpccl.errors import ConfigError
from hpccl.optim.build import build_perturbing

__all__ = ["averaging", "build_optimizer", "learning_rate", "tell_peak"]

# torch's own optimisers that have a fused kernel on every device we run on.
_FUSED = {"adam", "adamw", "sgd", "momentum"}
# One-cycle starts at this fraction of the peak (Smith and Topin 2018).
_ONECYCLE_START = 1 / 25


def learning_rate(config: AnyOptim, *, task: int, step: int, num_steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of `num_steps`."""
    peak = per_task(config.lr, task)
    rising = config.warmup * num_steps
    if step < rising:
        start = _ONECYCLE_START if config.schedule == "onecycle" else 0.0
        return peak * (start + (1 - start) * (step + 1) / (rising + 1))
    if config.schedule == "constant":
        return peak
    progress = (step - rising) / max(num_steps - rising, 1)
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.final_lr + (1 - config.final_lr) * falling)


def averaging(decay: float, step: int) -> float:
    """Return the decay of the weight average at step `step` (from 0) of a task.

    Less than `decay` at first: the average starts at the last task's weights, which would otherwise dominate in a short
    task. The rule of TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + step) / (10 + step))


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of the trainable parameters.

    Raises:
        ConfigError: timm or the optimiser refuses the name or an option.
    """
    return _from_timm(config, model) if isinstance(config, TimmOptim) else build_perturbing(config, model)


def tell_peak(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Tell an optimiser a task's largest learning rate: some of timm's decay weights by rate^2 / largest rate."""
    optimizer.defaults["lr"] = rate  # older versions of timm look there
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = rate


def _from_timm(config: TimmOptim, model: nn.Module) -> torch.optim.Optimizer:
    """Build timm's optimiser of that name; biases and normalisation have no weight decay."""
    import_timm()
    from timm.optim import Lookahead, create_optimizer_v2, list_optimizers

    options: dict[str, Any] = dict(config.options)
    if config.name.lower() in _FUSED:
        options.setdefault("fused", True)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr[0],
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **options,
        )
    except (ValueError, TypeError, AssertionError) as error:
        with_options = f" with options {config.options}" if config.options else ""
        known = [str(name) for name in list_optimizers()]
        near = ", ".join(difflib.get_close_matches(config.name.lower(), known, n=6)) or "none"
        unknown = config.name.lower() not in known
        advice = f"; similar: {near}; `timm.optim.list_optimizers()` lists all" if unknown else ""
        raise ConfigError(f"optim.name '{config.name}'{with_options} was refused: {error}{advice}") from error
    if isinstance(optimizer, Lookahead):
        optimizer.state = optimizer._base_optimizer.state  # all of its state is there; its own would stay empty
    return optimizer
