"""What an engine holds on a rank and sends in a step: arithmetic on shapes, without torch.

P ranks, of which S neighbours share one sharded copy (S = P except for fsdp2 with engine.shard_size), n trainable
weights in fp32, k numbers that the optimiser keeps of each weight, one micro-batch a step:

    engine            weights      gradients    optimiser       sent by a rank in a step
    ddp, ZeRO 0       4n           4n           4kn             2 (P-1)/P 4n                         ring all-reduce
    ZeRO 1, 2         4n           4n, 4n / P   4(k+1)n / P     3 (P-1)/P 4n                         all-reduce, gather
    ZeRO 3            4n / P       4n / P       4(k+1)n / P     2 (P-1)/P 4n or 3 (P-1)/P 4n         1-2 gathers, reduce
    fsdp2             4n / S       4n / S       4kn / S         3 (S-1)/S 4n + 2 (R-1)/R 4n / S      R = P/S copies

Shares are those of the rank that holds most: fsdp2 shards rows of every parameter, ZeRO-3 elements of every parameter,
ZeRO-1 and 2 elements of all parameters concatenated. In addition, unsharded for a while:

- fsdp2: four times the largest unit, in the backward pass: its weights and those of the next unit, its gradient, and
  the buffer from which this is sent.
- ZeRO-2 averages whole parameters that overlap a share, so the gradient of one at an edge is whole on both sides.
- DeepSpeed fills a bucket with gradients, and sends a copy of it. Stages 1 and 2 all-reduce it.
- ZeRO-3 frees a layer's weights after the forward pass only if more than `stage3_max_reuse_distance` weights are used
  before the backward pass needs them, so small networks stay whole in between; it gathers `stage3_prefetch_bucket_size`
  ahead, and weights that this reaches stay as well. It keeps parameters whole that are smaller than
  `stage3_param_persistence_threshold`, which hpccl sets to 0.

The behaviour of DeepSpeed was observed in version 0.19.8. Its optimiser works on a copy of its share of the weights,
even where these are fp32.

Sources: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"; Thakur,
Rabenseifner and Gropp 2005 (ring collectives).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, assert_never

from hpccl.config.engine import BUCKET, DdpEngine, DeepspeedEngine, EngineConfig, Fsdp2Engine, shards_of

__all__ = ["Sharding", "all_reduce", "elements", "held", "rows", "sent"]

FLOAT = 4  # bytes of a weight, a gradient, a moment
_PREFETCH = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size, in elements
_REUSE = 50_000_000  # stage3_max_reuse_distance and stage3_max_live_parameters as hpccl sets them, in elements

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """An engine on a number of ranks.

    ranks: P
    shards: S, ranks that share a copy
    stage: of deepspeed
    reshard: of fsdp2, whether a block's weights are freed between forward and backward pass
    state_on_host, weights_on_host: whether optimiser state, or the weights as well, are in host memory
    persistent: of deepspeed, elements below which a parameter stays whole
    bucket: of deepspeed, elements of gradients that are sent together; None: hpccl's default
    reuse: of deepspeed, elements of stage3_max_reuse_distance
    prefetch: of deepspeed, elements of weights that are gathered ahead
    """

    kind: Literal["ddp", "fsdp2", "deepspeed"]
    ranks: int
    shards: int
    stage: int = 0
    reshard: bool = True
    state_on_host: bool = False
    weights_on_host: bool = False
    persistent: int = 0
    bucket: int | None = None
    reuse: int = _REUSE
    prefetch: int = _PREFETCH

    @classmethod
    def of(cls, engine: EngineConfig, ranks: int) -> Sharding:
        """Build from the section `engine` of a configuration.

        Raises:
            ConfigError: engine.shard_size does not divide the ranks.
        """
        match engine:
            case DdpEngine():
                return cls("ddp", ranks, ranks)
            case Fsdp2Engine():
                offload, shards = engine.offload, shards_of(engine.shard_size, ranks)
                return cls(
                    "fsdp2", ranks, shards, reshard=engine.reshard, state_on_host=offload, weights_on_host=offload
                )
            case DeepspeedEngine():
                zero = engine.deepspeed.get("zero_optimization", {})
                bucket = zero.get("reduce_bucket_size")
                ahead = int(zero.get("stage3_prefetch_bucket_size", _PREFETCH))
                return cls(
                    "deepspeed",
                    ranks,
                    ranks,
                    stage=engine.stage,
                    state_on_host=engine.offload_optimizer,
                    weights_on_host=engine.offload_weights,
                    persistent=int(zero.get("stage3_param_persistence_threshold", 0)),
                    bucket=None if bucket is None else int(bucket),
                    reuse=int(zero.get("stage3_max_reuse_distance", _REUSE)),
                    prefetch=min(ahead, int(zero.get("stage3_max_live_parameters", _REUSE))),
                )
            case _:
                assert_never(engine)

    @property
    def spreads_weights(self) -> bool:
        """Whether weights are sharded, so that no rank holds the whole network."""
        return self.kind == "fsdp2" or self.has_second_network

    @property
    def has_second_network(self) -> bool:
        """Whether passes outside training use a second sharded network, as ZeRO-3's is for training only."""
        return self.kind == "deepspeed" and self.stage == 3

    def kept_whole(self, num_weights: int) -> int:
        """Return how many elements of weights stay whole from the forward to the backward pass."""
        if self.kind == "fsdp2":
            return 0 if self.reshard else num_weights
        # Between a layer's forward and backward pass, the weights of all later layers are used twice: hence the half.
        return min(num_weights, max(self.reuse, self.prefetch) // 2)


def rows(shapes: Iterable[Shape], sharding: Sharding) -> int:
    """Return the elements of the network for passes outside training, on the rank that has most."""
    if sharding.spreads_weights:
        return sum(_rows(shape, sharding.shards) for shape in shapes)
    return sum(map(math.prod, shapes))


def elements(shapes: Sequence[Shape], sharding: Sharding, *, what: Literal["weights", "gradients", "moments"]) -> int:
    """Return the elements of weights, gradients or one moment on the rank that has most."""
    sizes = [math.prod(shape) for shape in shapes]
    if sharding.kind == "fsdp2":
        return rows(shapes, sharding)
    if sharding.has_second_network:
        return sum(-(-size // sharding.ranks) for size in sizes)
    if sharding.stage == 2 and what == "gradients":
        return _reaching(sizes, sharding.ranks)
    return -(-sum(sizes) // sharding.ranks) if sharding.stage and what == "moments" else sum(sizes)


def _rows(shape: Shape, shards: int) -> int:
    return -(-shape[0] // shards) * math.prod(shape[1:]) if shape else 1


def _reaching(sizes: Sequence[int], ranks: int) -> int:
    """Return the elements of all parameters that overlap a rank's share of the concatenated ones, at most."""
    stops = list(accumulate(sizes))
    starts, share = [0, *stops[:-1]], -(-stops[-1] // ranks)
    most = 0
    for rank in range(ranks):
        first, last = bisect_right(stops, rank * share), bisect_left(starts, (rank + 1) * share)
        most = max(most, stops[last - 1] - starts[first] if first < last else 0)
    return most


def held(shapes: Sequence[Shape], largest_unit: int, moments: float, sharding: Sharding) -> dict[str, float]:
    """Return the bytes on the rank that has most, by purpose.

    Args:
        shapes: of the parameters.
        largest_unit: elements of the largest module whose weights are gathered and freed together.
        moments: k.
        sharding: the engine.
    """
    master = 1 if sharding.kind == "deepspeed" and sharding.stage > 0 else 0
    found = {
        "weights": FLOAT * elements(shapes, sharding, what="weights"),
        "gradients": FLOAT * elements(shapes, sharding, what="gradients"),
        "optimizer": FLOAT * (moments + master) * elements(shapes, sharding, what="moments"),
    }
    whole = sum(map(math.prod, shapes))
    kept = sharding.kept_whole(whole)
    if sharding.kind == "fsdp2":
        found["whole blocks"] = FLOAT * (kept + (2 if kept else 4) * largest_unit)
    if sharding.has_second_network:
        found["whole blocks"] = FLOAT * (min(whole, kept + sharding.prefetch + largest_unit) + largest_unit)
        found["small weights, whole"] = FLOAT * sum(n for n in map(math.prod, shapes) if n < sharding.persistent)
    if master:
        bucket = sharding.bucket or min(BUCKET, whole)
        found["bucket of gradients"] = FLOAT * bucket
        if sharding.stage > 1:  # stage 1 frees gradients that are in the bucket, which makes room
            found["gradients on their way"] = FLOAT * min(bucket, whole)
    return found


def sent(num_weights: int, num_buffer_bytes: int, sharding: Sharding, *, accumulate: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by purpose."""
    whole, shards, copies = FLOAT * num_weights, sharding.shards, sharding.ranks // sharding.shards
    gathers = accumulate * (2 - sharding.kept_whole(num_weights) / num_weights)
    match sharding.kind:
        case "ddp":
            return {
                "average gradients": all_reduce(whole, sharding.ranks),
                "buffers": num_buffer_bytes * accumulate * (sharding.ranks > 1),
            }
        case "fsdp2":
            return {
                "gather weights": gathers * _share(whole, shards),
                "average gradients": accumulate * (_share(whole, shards) + all_reduce(whole / shards, copies)),
            }
        case "deepspeed":
            if sharding.stage == 0:
                return {"average gradients": all_reduce(whole, sharding.ranks)}
            if sharding.stage == 3:
                return {
                    "gather weights": gathers * _share(whole, shards),
                    "average gradients": accumulate * _share(whole, shards),
                }
            # Stage 1 averages once a step, stage 2 after every micro-batch, as it keeps only shards.
            times = accumulate if sharding.stage == 2 else 1
            return {
                "gather weights": _share(whole, shards),
                "average gradients": times * all_reduce(whole, sharding.ranks),
            }


def all_reduce(num_bytes: float, ranks: int) -> float:
    """Return the bytes that a rank sends in a ring all-reduce: reduce-scatter, then all-gather."""
    return 2 * _share(num_bytes, ranks)


def _share(num_bytes: float, ranks: int) -> float:
    """Return the bytes that a rank sends in a ring all-gather or reduce-scatter of `num_bytes`."""
    return (ranks - 1) / ranks * num_bytes
