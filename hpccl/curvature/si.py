"""Synaptic Intelligence: each weight's contribution to the decrease of the loss along the path of training.

    omega = - sum over steps of g * (theta_after - theta_before)         g: gradient of the task's mean loss, unclipped
    Omega = max(omega, 0) / ((theta - theta*)^2 + xi)                    theta*: weights when the task began

The penalty lambda sum Omega (theta - theta*)^2, without the half, is added to the mean loss. A Precision is a sum over
examples, here as in Memory Aware Synapses: 2 n Omega for a task of n examples, so that lambda is the paper's for tasks
of equal size. The engine keeps omega; mini-batch noise can make it negative, which a Precision may not be. The limit on
Omega is as in Avalanche.
Source: Zenke, Poole and Ganguli 2017, "Continual Learning Through Synaptic Intelligence", ICML.
"""

from __future__ import annotations

from torch import Tensor

from hpccl.curvature.diagonal import Diagonal
from hpccl.dist.spread import Leaf, Leaves, mapped, own

__all__ = ["synaptic"]


def synaptic(
    credit: Leaves, start: Leaves, end: Leaves, *, xi: float, num_examples: int, limit: float | None = None
) -> Diagonal:
    """Return 2 n Omega, in nats per squared weight, summed over examples; not collective.

    Args:
        credit: omega by parameter name, whole or spread.
        start: theta*, divided over ranks as `credit` is.
        end: theta, likewise; may have more names.
        xi: > 0, in squared weights.
        num_examples: n, the examples that the loss was a mean over.
        limit: largest Omega; None: no limit.
    """
    assert xi > 0, "a weight that did not move would divide by zero"
    found = {name: _importance(leaf, start[name], end[name], xi, limit) for name, leaf in credit.items()}
    return Diagonal(found, num_examples).times(2.0 * num_examples)


def _importance(credit: Leaf, start: Leaf, end: Leaf, xi: float, limit: float | None) -> Leaf:
    moved = own(end).float() - own(start)

    def importance(credit: Tensor) -> Tensor:
        found = credit.clamp(min=0) / (moved.square() + xi)
        return found if limit is None else found.clamp(max=limit)

    return mapped(credit, importance)
