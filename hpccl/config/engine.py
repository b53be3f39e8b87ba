"""Engines: where weights, gradients and optimiser state are held."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpccl.config.base import PositiveInt, Section

__all__ = ["BUCKET", "AnyEngine", "DdpEngine", "DeepspeedEngine", "EngineConfig", "Fsdp2Engine"]


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
