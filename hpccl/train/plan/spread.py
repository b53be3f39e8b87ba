"""What an engine holds on a rank and sends in a step: arithmetic on shapes, without torch.

P ranks, of which S neighbours share one copy of what is in shards (S = P but for fsdp2 with engine.shard_size), n
trainable weights in fp32, k numbers that the optimiser keeps of each weight:

    engine            weights      gradients    optimiser       sent by a rank in a step
    ddp, ZeRO 0       4n           4n           4kn             2 (P-1)/P 4n                         ring all-reduce
    ZeRO 1            4n           4n           4(k+1)n / P     2 (P-1)/P 4n                         reduce, gather
    ZeRO 2            4n           4n / P       4(k+1)n / P     2 (P-1)/P 4n                         reduce, gather
    ZeRO 3            4n / P       4n / P       4(k+1)n / P     3 (P-1)/P 4n                         2 gathers, reduce
    fsdp2             4n / S       4n / S       4kn / S         3 (S-1)/S 4n + 2 (R-1)/R 4n / S      R = P/S copies

ZeRO's optimiser works on a copy of its share of the weights, also where these are fp32 (seen in DeepSpeed 0.19.8).
Shares are those of the rank that holds most: fsdp2 deals out rows of every parameter, ZeRO-3 elements of every
parameter, ZeRO-1 and 2 elements of all of them. What is whole only while a block is computed counts twice its block:
weights and gradients. ZeRO-3 keeps small parameters whole, and ZeRO-2 and 3 have a bucket for gradients on their way;
DeepSpeed's own defaults are assumed where the configuration says nothing.

Sources: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"; Thakur,
Rabenseifner and Gropp 2005 (ring collectives).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpccl.errors import ConfigError

__all__ = ["Spread", "all_reduce", "elements", "held", "sent"]

FLOAT = 4  # bytes of a weight, a gradient, a moment
_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold, in elements
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """An engine on a world.

    ranks: P
    shards: S, ranks that share a copy
    stage: of deepspeed
    reshard: of fsdp2, whether a block's weights go between forward and backward pass
    state_on_host, weights_on_host: optimiser state, or weights as well, are in host memory
    persistent: of deepspeed, smaller parameters stay whole
    bucket: of deepspeed, elements of gradients on their way
    """

    kind: Literal["ddp", "fsdp2", "deepspeed"]
    ranks: int
    shards: int
    stage: int = 0
    reshard: bool = True
    state_on_host: bool = False
    weights_on_host: bool = False
    persistent: int = _PERSISTENT
    bucket: int = _BUCKET

    @classmethod
    def of(cls, engine: Mapping[str, Any], ranks: int) -> Spread:
        """From the section `engine` of a configuration, as plain values.

        Raises:
            ConfigError: the ranks cannot be divided so, or nothing is known of the engine.
        """
        match engine["kind"]:
            case "ddp":
                return cls("ddp", ranks, ranks)
            case "fsdp2":
                offload = bool(engine.get("offload"))
                shards = engine.get("shard_size") or ranks
                if shards > ranks or ranks % shards:
                    raise ConfigError(
                        f"engine.shard_size={shards} does not divide the {ranks} ranks; allowed: "
                        f"{', '.join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)}"
                    )
                reshard = bool(engine.get("reshard", True))
                return cls("fsdp2", ranks, shards, reshard=reshard, state_on_host=offload, weights_on_host=offload)
            case "deepspeed":
                zero = engine.get("deepspeed", {}).get("zero_optimization", {})
                return cls(
                    "deepspeed",
                    ranks,
                    ranks,
                    stage=int(engine["stage"]),
                    state_on_host=bool(engine.get("offload_optimizer")),
                    weights_on_host=bool(engine.get("offload_weights")),
                    persistent=int(zero.get("stage3_param_persistence_threshold", _PERSISTENT)),
                    bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
                )
            case kind:
                raise ConfigError(f"engine.kind={kind}: no plan can be made of it; known: ddp, fsdp2, deepspeed")

    @property
    def spreads_weights(self) -> bool:
        """Whether no rank holds the network whole."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.stage == 3)


def elements(shapes: Sequence[Shape], spread: Spread, *, what: Literal["weights", "gradients", "moments"]) -> int:
    """How many elements the rank that has most holds of each weight's `what`."""
    total = sum(map(math.prod, shapes))
    if spread.kind == "fsdp2":
        return sum(_rows(shape, spread.shards) for shape in shapes)
    if spread.kind == "deepspeed" and spread.stage == 3:
        return sum(-(-math.prod(shape) // spread.ranks) for shape in shapes)
    in_shards = spread.kind == "deepspeed" and spread.stage > {"weights": 2, "gradients": 1, "moments": 0}[what]
    return -(-total // spread.ranks) if in_shards else total


def _rows(shape: Shape, shards: int) -> int:
    return -(-shape[0] // shards) * math.prod(shape[1:]) if shape else 1


def held(shapes: Sequence[Shape], largest_block: int, moments: float, spread: Spread) -> dict[str, float]:
    """Bytes on the rank that has most, by what they are.

    Args:
        shapes: of the parameters.
        largest_block: elements of the largest block whose weights come and go together.
        moments: k.
        spread: the engine.
    """
    master = 1 if spread.kind == "deepspeed" and spread.stage > 0 else 0
    found = {
        "weights": FLOAT * elements(shapes, spread, what="weights"),
        "gradients": FLOAT * elements(shapes, spread, what="gradients"),
        "optimizer": FLOAT * (moments + master) * elements(shapes, spread, what="moments"),
    }
    whole = sum(map(math.prod, shapes))
    if spread.spreads_weights:
        found["whole blocks"] = FLOAT * (2 * largest_block if spread.reshard else whole + largest_block)
    if spread.kind == "deepspeed" and spread.stage == 3:
        found["small weights, whole"] = FLOAT * sum(n for n in map(math.prod, shapes) if n < spread.persistent)
    if spread.kind == "deepspeed" and spread.stage >= 2:
        found["gradients on their way"] = FLOAT * (spread.bucket if spread.stage == 3 else min(spread.bucket, whole))
    return found


def sent(num_weights: int, num_buffer_bytes: int, spread: Spread, *, accumulate: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, by purpose."""
    whole, shards, copies = FLOAT * num_weights, spread.shards, spread.ranks // spread.shards
    match spread.kind:
        case "ddp":
            return {
                "average gradients": all_reduce(whole, spread.ranks),
                "buffers": num_buffer_bytes * accumulate * (spread.ranks > 1),
            }
        case "fsdp2":
            gathers = 2 if spread.reshard else 1
            return {
                "gather weights": accumulate * gathers * _share(whole, shards),
                "average gradients": accumulate * (_share(whole, shards) + all_reduce(whole / shards, copies)),
            }
        case "deepspeed":
            if spread.stage == 0:
                return {"average gradients": all_reduce(whole, spread.ranks)}
            # Stage 1 averages once a step, stages 2 and 3 after every micro-batch, for they keep shards alone.
            times = accumulate if spread.stage > 1 else 1
            gathers = 2 * accumulate if spread.stage == 3 else 1
            return {
                "gather weights": gathers * _share(whole, spread.ranks),
                "average gradients": times * _share(whole, spread.ranks),
            }


def all_reduce(num_bytes: float, ranks: int) -> float:
    """Sent by a rank: a ring reduces shares, then gathers them."""
    return 2 * _share(num_bytes, ranks)


def _share(num_bytes: float, ranks: int) -> float:
    """Sent by a rank in a ring that gathers `num_bytes`, or reduces them to shares."""
    return (ranks - 1) / ranks * num_bytes
