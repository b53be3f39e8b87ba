"""Where the weights live."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from hpccl.config.base import PositiveInt, Section

__all__ = ["BUCKET", "AnyEngine", "DdpEngine", "DeepspeedEngine", "EngineConfig", "Fsdp2Engine"]


BUCKET = 50_000_000  # of ZeRO: elements of gradients on their way, and of whole weights, at most


class AnyEngine(Section):
    """What every engine is told."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay fp32
    channels_last: bool = False  # memory layout of images (ddp: and of convolutions); often faster with bf16
    recompute: bool = False  # activation checkpointing of timm models: less memory, a forward pass more


class DdpEngine(AnyEngine):
    """Every rank holds the model; gradients are averaged. One process is the same code."""

    kind: Literal["ddp"] = "ddp"
    compile: bool = False  # torch.compile


class Fsdp2Engine(AnyEngine):
    """Weights, gradients and optimiser state in shards (torch.distributed.fsdp.fully_shard)."""

    kind: Literal["fsdp2"] = "fsdp2"
    compile: bool = False  # torch.compile, block by block
    shard_size: PositiveInt | None = None  # ranks that share one copy, such as those of a node; null: all of them
    reshard: bool = True  # let a block's weights go between forward and backward; false: more memory, less traffic
    offload: bool = False  # shards of weights, gradients and optimiser state in host memory


class DeepspeedEngine(AnyEngine):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    # what is in shards: 0 nothing, 1 optimiser state, 2 and gradients, 3 and weights
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: bool = False  # optimiser state in host memory; stages 1 to 3
    offload_weights: bool = False  # shards of weights in host memory; stage 3
    deepspeed: dict[str, Any] = {}  # further settings in DeepSpeed's own words; none that hpccl sets


EngineConfig = Annotated[DdpEngine | Fsdp2Engine | DeepspeedEngine, Field(discriminator="kind")]
