"""From a configuration to an engine."""

from __future__ import annotations

from torch import nn

from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.engine.ddp import DdpEngine
from hpccl.engine.protocols import Engine

__all__ = ["build_engine"]


def build_engine(config: RunConfig, model: nn.Module, comm: Comm) -> Engine:
    """The engine of `config.engine.kind` around a model that is the same on every rank."""
    return DdpEngine(model, config, comm)
