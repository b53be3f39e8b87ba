"""The normal prior of the weights, and the weight divergence of K-priors.

    R(w) = 1/2 precision |w|^2 - pull <a, w> + 1/2 pull |a|^2                 nats in total
    dR/dw = precision w - pull a

With precision delta: for the first task, pull = 0. For w* that minimises
sum_i CE(y_i, f_w(x_i)) + delta/2 |w|^2,

    sum_i J_i' (p_i - y_i) + delta w  =  sum_i J_i' (p_i - p*_i) + delta (w - w*)

for all w if J does not depend on w: so soft labels of all examples and pull = delta around a = w* reconstruct the
gradient of the past exactly. True labels leave less to the pull (train/normal.py). Changing the prior to delta' makes
precision = delta', while the pull stays.

Source: Khan and Swaroop 2021, "Knowledge-adaptation priors", NeurIPS, sections 3 and 4.

A rank adds dR/dw of the parameters that it owns (shared out by size), times the number of ranks, and the averaging of
gradients distributes it: as for the quadratic, a step has no collective of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpccl.config.adaptation import NewPrecision
from hpccl.config.run import RunConfig
from hpccl.curvature.protocols import strided_like
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.dist.spread import Leaf, Leaves, Slab, fetch
from hpccl.engine.protocols import Engine, GradientHook, Weights

__all__ = ["NormalPrior"]


@dataclass(frozen=True)
class NormalPrior:
    """The regulariser R(w).

    precision: nats per squared weight
    pull: likewise; 0 if there is no anchor
    anchor: a, by name of parameter (and buffer), whole on every rank or spread
    """

    precision: float
    pull: float = 0.0
    anchor: Leaves | None = None

    @classmethod
    def of(cls, config: RunConfig, anchor: Leaves | None, *, labelled: float = 0.0) -> NormalPrior | None:
        """Build it from a configuration and the weights of the newest old model; None if it would be 0.

        labelled: share of the past that memory represents by true labels, which leaves less to the pull
        """
        normal, adapt = config.prior.normal, config.adapt
        precision = adapt.precision if isinstance(adapt, NewPrecision) else normal.precision
        if anchor is None or config.train.data == "seen" or config.train.restart:
            return cls(precision) if precision > 0 else None
        around = normal.weight * normal.precision
        precision = precision if isinstance(adapt, NewPrecision) else around
        return cls(precision, around * (1 - labelled), anchor) if precision > 0 or around > 0 else None

    def force(self, weights: Tensor, anchor: Tensor | None) -> Tensor:
        """Return dR/dw of a parameter, given its weights and their anchor."""
        return self.precision * weights if anchor is None else self.precision * weights - self.pull * anchor

    def attach(self, engine: Engine, comm: Comm, *, num_train: int) -> Callable[[], None]:
        """Add dR/dw / num_train to every step's gradient until the returned function is called; collective."""
        like = engine.like
        owner = owners({name: float(math.prod(value.shape)) for name, value in like.items()}, comm.size)
        mine = [name for name in like if owner[name] == comm.rank]
        anchor = {} if self.anchor is None else fetch(self.anchor, mine, comm)
        scale = comm.size / num_train
        hooks = []
        for name in mine:
            centre = strided_like(anchor[name], like[name]) if name in anchor else None
            hooks.append((name, GradientHook((name,), self._adding(name, centre, scale))))
        return engine.on_gradient(hooks)

    def _adding(self, name: str, anchor: Tensor | None, scale: float) -> Callable[[Tensor, Weights], Tensor]:
        def call(gradient: Tensor, weights: Weights) -> Tensor:
            return torch.add(gradient, self.force(weights[name], anchor), alpha=scale)

        return call

    def value(self, weights: Leaves, comm: Comm) -> float:
        """Return this rank's share of R(w) in nats, over the named parameters; R(w) is the sum over ranks."""
        total = 0.0
        for name, leaf in weights.items():
            own = _own(leaf, comm)
            if own is None:
                continue
            total += 0.5 * self.precision * float(own.double().square().sum())
            if self.anchor is not None:
                anchor = _own(self.anchor[name], comm)
                assert anchor is not None, "an anchor is divided as the weights are"
                anchor = anchor.to(own.device)  # an engine may keep its weights in host memory
                total += self.pull * float((anchor.double() * (anchor.double() / 2 - own.double())).sum())
        return total


def _own(leaf: Leaf, comm: Comm) -> Tensor | None:
    """Return the part of a tensor that this rank counts, so that all ranks together count it once."""
    if isinstance(leaf, Slab):
        return leaf.local if leaf.span.copy == 0 else None
    return leaf if comm.leader else None
