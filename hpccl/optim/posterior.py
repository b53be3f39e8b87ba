"""What an optimiser's state says of the posterior over weights, in nats per squared weight, summed over N examples.

                likelihood's curvature     posterior variance
    ivon        N h                        1 / (lambda (h + delta))
    vogn        N s                        tau / (rho N (s + delta~ + gamma))
    soba        s - delta                  1 / s
    adam, rmsprop   N sqrt(v)              1 / (N sqrt(v) + delta)
    bsam        -                          1 / (N s), N times `augmentation`
    lie         -                          sigma0^2;  sigma0^2 A^2;  (2 - pi / 2) (g+^2 + g-^2)

h, s: curvature per example, of SOBA summed; v: the raw mean of squared gradients of batches, whose root takes the place
of the curvature in these rules (Nickl et al. 2023, "The memory-perturbation equation", NeurIPS). delta is the prior
precision, or the weight decay where the module of the rule says so.
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
    """The name of the state that a likelihood's curvature is made of; None where there is none."""
    if isinstance(config, TimmOptim):
        return LEARNING_SQUARES.get(config.name.lower())
    return "curvature" if isinstance(config, (IvonOptim, VognOptim, SobaOptim)) else None


def curvature(config: OptimConfig, kept: Tensor, *, num_train: int) -> Tensor:
    """Of the likelihood, from the state `curvature_key`."""
    match config:
        case IvonOptim() | VognOptim():
            return kept * num_train
        case SobaOptim(prior_precision=prior):
            return kept - prior
        case _:
            return kept.sqrt() * num_train


def variance(config: OptimConfig, state: State, *, num_train: int, prior_precision: float = 1.0) -> Tensor | None:
    """Of the posterior of one parameter; None where the optimiser has none. prior_precision: of timm's optimisers."""
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
            return None if key is None else 1 / (curvature(config, state[key], num_train=num_train) + prior_precision)
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
