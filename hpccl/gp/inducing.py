"""Choose among the rows of all ranks: inducing inputs that explain most, and memory by leverage.

Inducing inputs are the pivots of the kernel matrix's Cholesky factorisation, each the row whose variance given those
before it is largest (Burt et al. 2020, "Convergence of sparse variational inference in Gaussian processes regression",
JMLR, sec. 4.2.2). Memory is a draw without replacement in proportion to leverage, by the largest log b_i + Gumbel noise
(Efraimidis and Spirakis 2006). Both are the same on any number of ranks: ties go to the example with the lower
number, and noise is a hash of that number.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpccl.data.order import mix
from hpccl.dist.comm import Comm
from hpccl.gp.kernel import Kernel

__all__ = ["drawn_by_leverage", "pivots"]

_GUMBEL = 126
_ALIKE = 1e-12  # relative difference below which two variances are a tie: ranks may round differently
_LEAST = 1e-8  # share of the largest prior variance that a candidate must have left to be chosen


def pivots(kernel: Kernel, x: Tensor, number: Tensor, count: int, comm: Comm) -> Tensor:
    """Return the inducing inputs [m, d], m <= count, in order; collective.

    Args:
        kernel: of the process.
        x: [n, d] this rank's candidates, possibly none.
        number: [n] int64 number of each candidate, unique over ranks; decides ties.
        count: largest number of inducing inputs.
        comm: the ranks.
    """
    x = x.double()
    left = kernel.diagonal(x).clone()
    factor = left.new_zeros(len(x), count)  # L of the rows so far
    first = comm.gather(left.max().reshape(1) if len(left) else left.new_zeros(1)).max()
    chosen: list[Tensor] = []
    if not float(first) > 0:
        return x.new_zeros(0, x.shape[1])
    while len(chosen) < count:
        best = _winner(left, number.double()) if len(left) else None
        # value, number, and the row with its part of L, from the rank that has it
        own = torch.zeros(1, 2 + x.shape[1] + count, dtype=torch.float64, device=x.device)
        own[0, :2] = torch.tensor([-1.0, -1.0])
        if best is not None:
            own[0, 0], own[0, 1] = left[best], number[best]
            own[0, 2:] = torch.cat([x[best], factor[best]])
        offers = comm.gather(own)
        offer = offers[_winner(offers[:, 0], offers[:, 1])]
        if not float(offer[0]) > _LEAST * float(first):
            break
        row, past = offer[2 : 2 + x.shape[1]], offer[2 + x.shape[1] :]
        column = (kernel(x, row[None])[:, 0] - factor @ past) / offer[0].sqrt()
        factor[:, len(chosen)] = column
        left = (left - column.square()).clamp_min(0)
        left[number == offer[1].long()] = 0
        chosen.append(row)
    return torch.stack(chosen) if chosen else x.new_zeros(0, x.shape[1])


def _winner(values: Tensor, number: Tensor) -> int:
    """Return the index of the largest value; in a tie, that of the lowest number."""
    alike = values >= values.max() * (1 - _ALIKE)
    places = alike.nonzero()[:, 0]
    return int(places[number[places].argmin()])


def drawn_by_leverage(leverage: Tensor, number: Tensor, count: int, comm: Comm, *, seed: int) -> Tensor:
    """Draw examples of all ranks, and return their numbers [k], ascending, k <= count; collective.

    Args:
        leverage: [n] b_i >= 0 of this rank's examples; those with 0 are never drawn.
        number: [n] int64 number of each example.
        count: how many.
        comm: the ranks.
        seed: of the draw.
    """
    uniform = (mix(seed, _GUMBEL, number.cpu().numpy()) >> np.uint64(11)).astype(np.float64) / 2**53 + 2**-54
    noise = torch.from_numpy(-np.log(-np.log(uniform))).to(leverage.device)
    keys = leverage.double().log() + noise
    top = keys.topk(min(count, len(keys))).indices
    offers = comm.gather(torch.stack([keys[top], number[top].double()], dim=1))
    offers = offers[offers[:, 0] > -torch.inf]
    order = offers[:, 0].argsort(descending=True, stable=True)[:count]
    return offers[order, 1].long().sort().values
