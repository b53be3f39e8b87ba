"""The diagonal that the optimiser learned during training: a Precision without a pass over the data.

IVON and SOBA estimate the Hessian of the whole objective, including the quadratic penalty of earlier tasks, because
they take gradients at sampled weights. The penalty's Hessian is known and is subtracted, so that tasks add up:

    F_t = max(0, N (h - h_t) / (1 - b^t) - weight (F_{<t} + damping))

VOGN squares per-example gradients, which do not include the penalty; in Adam's root of squares it cannot be separated.
"""

from __future__ import annotations

from hpccl.config.optim import IvonOptim, OptimConfig, SobaOptim
from hpccl.curvature.diagonal import Diagonal
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, aligned, mapped, own
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
    """Return the diagonal of the task that the engine has just trained on; collective.

    Args:
        engine: with the optimiser's state of that task.
        config: the section `optim`; config.rules allows optimisers that have a curvature.
        comm: the engine's ranks.
        num_train: N, training examples of the task.
        past: F_{<t}, the precision of the quadratic during training.
        weight: weight of the quadratic.
        damping: damping of the quadratic.
    """
    key = curvature_key(config)
    assert key is not None, "config.rules refuses optimisers without a curvature"
    steps = engine.steps_taken  # fewer than the task's steps if the head was trained alone first
    kept = engine.moments({key: "curvature"})["curvature"]
    leaves = {
        name: mapped(leaf, lambda value: curvature(config, value, num_train=num_train, steps=steps).float())
        for name, leaf in kept.items()
    }
    if past is not None and isinstance(config, (IvonOptim, SobaOptim)):
        for name, leaf in leaves.items():
            leaves[name] = _less(leaf, aligned(past.leaves[name], leaf, comm), weight, damping)
    return Diagonal({name: mapped(leaf, lambda value: value.clamp(min=0)) for name, leaf in leaves.items()}, num_train)


def _less(leaf: Leaf, past: Leaf, weight: float, damping: float) -> Leaf:
    return mapped(leaf, lambda value: value - weight * (own(past).to(value.device) + damping))
