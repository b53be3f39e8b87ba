"""Engines: where weights, gradients and optimiser state are held."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpccl.config.base import PositiveInt, Section
from hpccl.errors import ConfigError

__all__ = ["BUCKET", "AnyEngine", "DdpEngine", "DeepspeedEngine", "EngineConfig", "Fsdp2Engine", "shards_of"]


BUCKET = 50_000_000  # ZeRO: largest number of elements of gradients in transit, and of gathered weights


class AnyEngine(Section):
    """Keys of every engine; they stay when another one is chosen, on which a run may go on."""

    lasting: ClassVar[frozenset[str]] = frozenset({"device", "precision", "channels_last", "recompute"})
    # auto: cuda if available, else cpu (in a SLURM job with GPUs: an error)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights stay fp32
    channels_last: bool = False  # memory layout of images (ddp: also of convolutions); often faster with bf16
    recompute: bool = False  # activation checkpointing of timm models: less memory, one more forward pass


class DdpEngine(AnyEngine):
    """Every rank holds the whole model; gradients are averaged. A single process runs the same code."""

    kind: Literal["ddp"] = "ddp"
    compile: bool = False  # apply torch.compile


class Fsdp2Engine(AnyEngine):
    """Weights, gradients and optimiser state are sharded (torch.distributed.fsdp.fully_shard)."""

    kind: Literal["fsdp2"] = "fsdp2"
    compile: bool = False  # apply torch.compile to each block
    shard_size: PositiveInt | None = None  # ranks that share one copy, such as those of a node; null: all ranks
    reshard: bool = True  # free a block's weights between forward and backward; false: more memory, less traffic
    offload: bool = False  # keep shards of weights, gradients and optimiser state in host memory


class DeepspeedEngine(AnyEngine):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    # what is sharded: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: bool = False  # keep optimiser state in host memory; stages 1 to 3
    offload_weights: bool = False  # keep shards of weights in host memory; stage 3
    deepspeed: dict[str, Any] = {}  # further keys of DeepSpeed's configuration, except those that hpccl sets


EngineConfig = Annotated[DdpEngine | Fsdp2Engine | DeepspeedEngine, Field(discriminator="kind")]


def shards_of(shard_size: int | None, ranks: int) -> int:
    """Return how many of `ranks` share one copy of the weights.

    Raises:
        ConfigError: engine.shard_size does not divide the ranks.
    """
    size = shard_size or ranks
    if ranks % size:
        allowed = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise ConfigError(
            f"engine.shard_size={size} does not divide the {ranks} ranks of this run; allowed: {allowed} (ranks that "
            "share one copy of the weights, such as those of a node), or null for all"
        )
    return size
