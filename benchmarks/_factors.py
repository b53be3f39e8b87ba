"""Kronecker factors of a briefly trained network, for the benchmarks that time the pull (quadratic's gradient)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks._pictures import Pictures
from hpccl.config.curvature import PassCurvature
from hpccl.config.run import RunConfig
from hpccl.curvature.build import build_estimator
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves
from hpccl.engine.protocols import Engine
from hpccl.prior.quadratic import Quadratic

__all__ = ["CLASSES", "curvature", "force", "learn", "most_held", "placed", "truncated"]

CLASSES = 10  # per task; there are two tasks


def learn(engine: Engine, images: Pictures, classes: range, count: int, *, batch: int, size: int) -> float:
    """Take `count` plain training steps on some classes, at `size` pixels; return the last batch's mean nats."""
    optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.02, momentum=0.9)
    engine.module.train()
    mine = torch.tensor([label in classes for label in images.labels.tolist()]).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(classes.start)
    last = 0.0
    for _ in range(count):
        chosen = mine[torch.randint(len(mine), (batch,), generator=generator)]
        pixels = images.pixels[chosen]
        if size < pixels.shape[-1]:
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode="area")
        logits = engine.forward(pixels, torch.randint(1 << 30, (len(chosen),), generator=generator))
        nats = torch.nn.functional.cross_entropy(
            logits[:, classes.start : classes.stop], images.labels[chosen] - classes.start
        )
        optimizer.zero_grad()
        nats.backward()
        torch.nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0)
        optimizer.step()
        last = float(nats.detach())
    engine.module.zero_grad(set_to_none=True)
    return last


def curvature(engine: Engine, config: RunConfig, images: Pictures, count: int) -> Kronecker:
    """Measure the curvature of the first task at the current weights."""
    head = torch.arange(2 * CLASSES) < CLASSES
    chosen = (images.labels < CLASSES).nonzero()[:, 0][:count]
    batches = [
        Examples(images.pixels[some], images.labels[some], head, some, torch.ones(len(some)))
        for some in chosen.split(config.curvature.batch_size)
    ]
    assert isinstance(config.curvature, PassCurvature), "this measures passes"
    precision = build_estimator(config.curvature, seed=0).estimate(engine.module, batches, Comm.solo())
    assert isinstance(precision, Kronecker)
    return precision


def truncated(exact: Kronecker, keep_trace: float) -> Kronecker:
    """Truncate the factors to as few eigenvectors as keep this share of each layer's trace."""
    blocks = tuple(block.truncated(keep_trace) for block in exact.blocks)
    return replace(exact, blocks=blocks, divisible=False, keep_trace=keep_trace)


def force(precision: Kronecker, weights: Mapping[str, Tensor], anchor: Leaves) -> Tensor:
    """Return F (w - a) as one vector."""
    found = Quadratic(precision, anchor, weight=1.0, damping=0.0).force(weights, Comm.solo())
    return torch.cat([value.double().flatten() for value in found.values() if isinstance(value, Tensor)])


def placed(saved: Sequence[Any], comm: Comm) -> Kronecker:
    """Return this rank's share of the factors, as in a resumed run.

    saved: [state_dict(), shard_dict()] of all factors, perhaps still in a file
    """
    state, shard = saved

    def shards(wanted: Callable[[str], bool]) -> dict[str, Any]:
        return _in_memory({name: blocks for name, blocks in shard.items() if wanted(name)})

    return Kronecker.from_state_dict(_in_memory(state), shards, comm)


def _in_memory(node: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, node)
    return found


def most_held(factors: Kronecker, comm: Comm) -> int:
    """Return the bytes of factors on the rank that holds most."""
    return comm.max(sum(block.num_bytes for block in factors.blocks))
