"""Build the engine that a configuration names."""

from __future__ import annotations

from typing import assert_never

from torch import nn

from hpccl.config.engine import DdpEngine as DdpConfig
from hpccl.config.engine import DeepspeedEngine as DeepspeedConfig
from hpccl.config.engine import Fsdp2Engine as Fsdp2Config
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.engine.ddp import DdpEngine
from hpccl.engine.protocols import Engine

__all__ = ["build_engine", "spreads_weights"]


def spreads_weights(config: RunConfig) -> bool:
    """Whether the engine spreads weights, so that no rank holds the whole network between passes."""
    match config.engine:
        case DdpConfig():
            return False
        case Fsdp2Config():
            return True
        case DeepspeedConfig(stage=stage):
            return stage == 3
        case _ as never:
            assert_never(never)


def build_engine(config: RunConfig, model: nn.Module, comm: Comm) -> Engine:
    """Build the engine of `config.engine.kind` around `model`.

    Raises:
        ConfigError: the engine refuses the model, a setting or the number of ranks.
    """
    match config.engine:
        case DdpConfig():
            return DdpEngine(model, config, comm)
        case Fsdp2Config():
            from hpccl.engine.fsdp2 import Fsdp2Engine

            return Fsdp2Engine(model, config, comm)
        case DeepspeedConfig():
            from hpccl.engine.deepspeed import DeepspeedEngine

            return DeepspeedEngine(model, config, comm)
        case _ as never:
            assert_never(never)
