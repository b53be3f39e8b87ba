"""Contexts of a network's passes: recomputed activations, and BatchNorm statistics that stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError

__all__ = ["recomputing", "refuse_recompute", "without_statistics"]


def refuse_recompute(model: nn.Module, config: RunConfig) -> None:
    """Refuse engine.recompute for models without activation checkpointing.

    Raises:
        ConfigError: it is set, and the model does not support it.
    """
    if config.engine.recompute and not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(
            f"engine.recompute=true: {type(model).__name__} (model.kind={config.model.kind}) cannot recompute its "
            "activations; allowed: timm models with set_grad_checkpointing"
        )


@contextlib.contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Switch on timm's activation checkpointing, for training passes only: others hook layers, and gain nothing."""
    if not wanted:
        yield
        return
    switch: Any = model.set_grad_checkpointing
    switch(True)
    try:
        yield
    finally:
        switch(False)


@contextlib.contextmanager
def without_statistics(model: nn.Module, without: bool) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are, if `without`; batches are still normalised by their own."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if without else []
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counted = [count.clone() for count in counts]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in zip(counts, counted, strict=True):
            count.copy_(before)
