"""The diagonal that the optimiser has learned while it trained: a Precision without a pass over the data.

IVON's and SOBA's estimates are of the whole objective, the quadratic pull of earlier tasks included, for their
gradients are taken at weights that are drawn; its Hessian is known and is taken off, so that tasks add up:

    F_t = max(0, N (h - h_t) - weight (F_{<t} + damping))

VOGN's squares are of examples and have no pull in them; of Adam's root of squares it cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from hpccl.config.optim import IvonOptim, OptimConfig, SobaOptim
from hpccl.curvature.diagonal import Diagonal
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, Slab, aligned
from hpccl.engine.protocols import Engine
from hpccl.optim.posterior import curvature, curvature_key

__all__ = ["learned_diagonal"]


def learned_diagonal(
    engine: Engine,
    config: OptimConfig,
    comm: Comm,
    *,
    num_train: int,
    past: Diagonal | None = None,
    weight: float = 0.0,
    damping: float = 0.0,
) -> Diagonal:
    """Of the task that the engine has just trained on; collective.

    Args:
        engine: with the optimiser's state of that task.
        config: the section `optim`; config.rules allows those that have a curvature.
        comm: of the engine's ranks.
        num_train: N, training examples of the task.
        past: the precision that pulled, times `weight`.
        weight: of the quadratic.
        damping: of the quadratic.
    """
    key = curvature_key(config)
    assert key is not None, "config.rules refuses optimisers without a curvature"
    steps = engine.steps_taken  # less than the task's where its last layer learned alone before
    kept = engine.moments({key: "curvature"})["curvature"]
    leaves = {
        name: _mapped(leaf, lambda value: curvature(config, value, num_train=num_train, steps=steps).float())
        for name, leaf in kept.items()
    }
    if past is not None and isinstance(config, (IvonOptim, SobaOptim)):
        for name, leaf in leaves.items():
            leaves[name] = _less(leaf, aligned(past.leaves[name], leaf, comm), weight, damping)
    return Diagonal({name: _mapped(leaf, lambda value: value.clamp(min=0)) for name, leaf in leaves.items()}, num_train)


def _less(leaf: Leaf, past: Leaf, weight: float, damping: float) -> Leaf:
    other = past.local if isinstance(past, Slab) else past
    return _mapped(leaf, lambda value: value - weight * (other.to(value.device) + damping))


def _mapped(leaf: Leaf, change: Callable[[Tensor], Tensor]) -> Leaf:
    return replace(leaf, local=change(leaf.local)) if isinstance(leaf, Slab) else change(leaf)
