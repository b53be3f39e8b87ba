"""Curvature and posterior variance from an optimiser's state, in nats per squared weight, summed over N examples.

                likelihood's curvature     posterior variance
    ivon        N (h - h_t) / (1 - b^t)    1 / (lambda (h + delta))
    vogn        N s                        tau / (rho N (s + delta~ + gamma))
    soba        (s - s_t) / (1 - b^t)      1 / s
    adam, rmsprop   N sqrt(v)              1 / (N sqrt(v) + delta)
    bsam        -                          1 / (N s), N times `augmentation`
    lie         -                          sigma0^2;  sigma0^2 A^2;  (2 - pi / 2) (g+^2 + g-^2)

h, s: curvature per example (for SOBA, summed); v: the raw mean of squared gradients of batches, whose root takes the
place of the curvature in these rules (Nickl et al. 2023, "The memory-perturbation equation", NeurIPS). delta is the
prior precision, or the weight decay where the module of the rule defines it so. h_t and s_t are h and s after t steps
without a gradient: what is left of the initial value, which for SOBA tends to delta. It does not come from data and so
is not part of a likelihood's curvature; the rows of future classes have nothing else. With b the decay of the average,
t steps have the weight 1 - b^t in it, by which the rest is divided: it is then a mean over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from hpccl.config.optim import (
    LEARNING_SQUARES,
    AdditiveGroup,
    AffineGroup,
    BsamOptim,
    IvonOptim,
    LieOptim,
    MultiplicativeGroup,
    OptimConfig,
    SamOptim,
    SobaOptim,
    TimmOptim,
    VognOptim,
)

__all__ = ["curvature", "curvature_key", "variance"]

State = Mapping[str, Tensor]  # of one parameter, by the optimiser's own names


def curvature_key(config: OptimConfig) -> str | None:
    """Return the name of the state from which the likelihood's curvature is computed; None if there is none."""
    if isinstance(config, TimmOptim):
        return LEARNING_SQUARES.get(config.name.lower())
    return "curvature" if isinstance(config, (IvonOptim, VognOptim, SobaOptim)) else None


def curvature(config: OptimConfig, kept: Tensor, *, num_train: int, steps: int) -> Tensor:
    """Return the likelihood's curvature from the state `curvature_key` after `steps`; below 0 where noise dominates."""
    match config:
        case IvonOptim():
            learned = _learned(1 - config.curvature_decay, steps)
            return (kept - _unlearned_ivon(config, steps)) * (num_train / learned)
        case VognOptim():
            return kept * num_train
        case SobaOptim():
            return (kept - _unlearned_soba(config, num_train, steps)) / _learned(config.curvature_rate, steps)
        case _:
            return kept.sqrt() * num_train


def _learned(rate: float, steps: int) -> float:
    """Return the weight that all steps together have in an average which forgets with this rate."""
    return -math.expm1(steps * math.log1p(-rate)) if 0 < rate < 1 and steps > 0 else 1.0


def _unlearned_ivon(config: IvonOptim, steps: int) -> float:
    """Return h_t: the rule of hpccl.optim.ivon with h^ = 0."""
    h, rate = config.initial_curvature, 1 - config.curvature_decay
    for _ in range(steps):
        h += -rate * h + (rate * h) ** 2 / (2 * (h + config.weight_decay))
    return h


def _unlearned_soba(config: SobaOptim, num_train: int, steps: int) -> float:
    """Return s_t: the rule of hpccl.optim.soba with no gradient but the prior's."""
    s = config.initial_curvature * num_train
    for _ in range(steps):
        u = config.curvature_rate * (config.prior_precision / s - 1)
        s *= 1 + u + u * u / 2
    return s


def variance(config: OptimConfig, state: State, *, num_train: int, prior_precision: float = 1.0) -> Tensor | None:
    """Return one parameter's posterior variance; None if there is none. prior_precision: delta of timm's optimisers."""
    match config:
        case IvonOptim():
            size = num_train if config.effective_size is None else config.effective_size
            return 1 / (size * (state["curvature"] + config.weight_decay))
        case VognOptim():
            size = num_train * config.augmentation
            decay = config.temperature * config.prior_precision / size
            return config.temperature / (size * (state["curvature"] + decay + config.damping))
        case SobaOptim():
            return 1 / state["curvature"]
        case BsamOptim():
            return 1 / (num_train * config.augmentation * state["curvature"])
        case LieOptim():
            return _of_group(config, state)
        case TimmOptim():
            key = curvature_key(config)
            if key is None:
                return None
            return 1 / (curvature(config, state[key], num_train=num_train, steps=0) + prior_precision)
        case SamOptim():
            return None
        case _ as never:
            assert_never(never)


def _of_group(config: LieOptim, state: State) -> Tensor:
    match config.group:
        case AdditiveGroup(noise=noise):
            return torch.full_like(state["momentum"], noise**2)
        case AffineGroup(noise=noise):
            return (noise * state["scale"]).square()
        case MultiplicativeGroup():
            return (2 - math.pi / 2) * (state["excitation"].square() + state["inhibition"].square())
        case _ as never:
            assert_never(never)
