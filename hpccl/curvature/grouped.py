"""The diagonal of gradients that are first averaged over groups of examples, as some other code measures importances.

    empirical:  sum over groups of n g^2,       g = mean over the group's n examples of d nats / dw
    outputs:    2 sum over groups of n |g|,     g = mean over the group's n examples of d |z|^2 / dw

With groups of one example these are the empirical Fisher diagonal and the importances of Memory Aware Synapses. In
larger groups, gradients of opposite sign cancel: for independent gradients of mean 0, squares are smaller by the factor
n. This serves for comparison with Avalanche (its EWC and MAS plugins) and the MAS authors' code, which do this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn

from hpccl.curvature.capture import measuring
from hpccl.curvature.columns import output_columns
from hpccl.curvature.coverage import refuse_unfit
from hpccl.curvature.diagonal import Diagonal, accumulated
from hpccl.curvature.layers import Power, raised
from hpccl.curvature.protocols import Examples
from hpccl.curvature.sweep import fit_examples, in_parts
from hpccl.dist.comm import Comm
from hpccl.engine.sharded import is_spread
from hpccl.errors import DivergedError

__all__ = ["GroupedEstimator"]


@final
@dataclass(frozen=True)
class GroupedEstimator:
    """Measures a Diagonal from the mean gradients of groups; every batch is one group.

    wanted: see `fisher` of DiagonalEstimator
    batch_size: examples of a group that are held at a time
    """

    wanted: Literal["empirical", "outputs"]
    batch_size: int = 256

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        refuse_unfit(model)

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Diagonal:
        """See Estimator.estimate. fp32 sums; one exchange between ranks, at the end.

        Raises:
            DataError: a label is outside its head.
            DivergedError: a gradient is not finite.
            WorldError: any of these on another rank.
        """
        assert not is_spread(model), "the configuration refuses this"
        found = accumulated(model, map(partial(self._measured, model), fit_examples(model, batches)), comm)
        return found.times(2.0) if self.wanted == "outputs" else found

    def _measured(self, model: nn.Module, group: Examples) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the group's weight n, and n g^2 or n |g| by parameter."""
        weight = group.weight.double().sum()
        number, power = float(weight), self._power
        totals = self._gradient(model, group)
        return weight, {name: number * raised(total / number, power) for name, total in totals.items()}

    @property
    def _power(self) -> Power:
        return 1 if self.wanted == "outputs" else 2

    def _gradient(self, model: nn.Module, group: Examples) -> Mapping[str, Tensor]:
        """Return the gradient summed over the group's examples, each times its weight; by parameter name."""
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        total = {name: torch.zeros_like(value) for name, value in named.items()}
        for part in in_parts(group, self.batch_size):
            with measuring(model, part.pixels.device):
                logits: Tensor = model(part.pixels)
                (column,) = output_columns(logits, part, self.wanted, samples=1, seed=0)
                if self.wanted == "empirical":  # its column has sqrt(weight), since it is meant to be squared
                    column = column * part.weight.sqrt().to(column)[:, None]
                found = torch.autograd.grad(logits, list(named.values()), column, materialize_grads=True)
            for name, value in zip(named, found, strict=True):
                total[name] += value
        broken = [name for name, value in total.items() if not bool(value.isfinite().all())]
        if broken:
            raise DivergedError(
                f"the gradient of '{broken[0]}' is not finite; curvature needs a model that has not diverged"
            )
        return total
