"""Optimisers: timm's, and those that learn a distribution over weights or look for flat minima.

Units of the latter: the loss is a mean in nats per training example (including memory), and N is the number of these
examples. A precision is in nats per squared weight, summed over examples; a weight decay is a precision / N.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hpccl.config.base import Fraction, NonNegativeFloat, PositiveFloat, PositiveFloatPerTask, PositiveInt, Section

__all__ = [
    "LEARNING_SQUARES",
    "AdditiveGroup",
    "AffineGroup",
    "AnyOptim",
    "BsamOptim",
    "IvonOptim",
    "LieGroup",
    "LieOptim",
    "MultiplicativeGroup",
    "OptimConfig",
    "SamOptim",
    "SobaOptim",
    "TimmOptim",
    "VognOptim",
    "passes_of",
    "trials_of",
]

# timm's optimisers whose state has a mean of squared gradients, and its name there.
LEARNING_SQUARES = {"adam": "exp_avg_sq", "adamw": "exp_avg_sq", "rmsprop": "square_avg"}

Decay = Annotated[float, Field(ge=0, lt=1)]


class AnyOptim(Section):
    """Keys of every optimiser."""

    lr: PositiveFloatPerTask = (1e-3,)  # largest learning rate; one value, or one per task
    schedule: Literal["constant", "cosine", "onecycle"] = "cosine"  # course of the learning rate over a task
    warmup: Fraction = 0.0  # share of a task's steps with linear warm-up; onecycle: with a rising rate
    final_lr: Fraction = 0.0  # final learning rate, as a share of lr


class TimmOptim(AnyOptim):
    """An optimiser of timm's factory, restarted at every task."""

    kind: Literal["timm"] = "timm"
    name: str = "adamw"  # timm's name: `sgd` has Nesterov momentum, `momentum` heavy-ball momentum
    weight_decay: NonNegativeFloat = 0.0  # weight decay of weight matrices; biases and normalisation layers have none
    momentum: Fraction = 0.9  # for optimisers without betas, such as `sgd` and `momentum`
    options: dict[str, Any] = {}  # further keyword arguments of the optimiser


class IvonOptim(AnyOptim):
    """IVON (Shen et al. 2024): a Gaussian over weights at Adam's cost. All weights have a prior, including biases."""

    kind: Literal["ivon"] = "ivon"
    lr: PositiveFloatPerTask = (0.1,)  # largest learning rate, about that of SGD; one value, or one per task
    samples: PositiveInt = 1  # draws of the weights per step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1
    # beta2: the curvature is a mean over 1 / (1 - beta2) steps. With 0.99999, h stays near initial_curvature for tens
    # of thousands of steps; short tasks need less, such as 0.999
    curvature_decay: Decay = 0.99999
    weight_decay: NonNegativeFloat = 1e-4  # delta: prior precision / N, for all weights
    initial_curvature: PositiveFloat = 1.0  # h0, per example; small values draw weights far from the mean
    effective_size: PositiveFloat | None = None  # lambda: number of examples that the posterior counts; null: N
    clip: PositiveFloat | None = None  # xi: largest element of an update, before the learning rate; null: no limit
    rescale_lr: bool = True  # multiply the learning rate by h0 + delta, so that first steps are those of SGD


class SamOptim(AnyOptim):
    """SAM (Foret et al. 2021) over SGD with heavy-ball momentum: the gradient at the worst weights in a small ball."""

    kind: Literal["sam"] = "sam"
    lr: PositiveFloatPerTask = (0.03,)  # largest learning rate; one value, or one per task
    radius: PositiveFloat = 0.05  # rho: length of the ascent step, over all weights
    momentum: Decay = 0.9  # beta1
    weight_decay: NonNegativeFloat = 0.0  # delta, for all weights


class BsamOptim(AnyOptim):
    """Bayesian SAM (Möllenhoff and Khan 2023): SAM in the posterior's ball, with a Gaussian over weights."""

    kind: Literal["bsam"] = "bsam"
    lr: PositiveFloatPerTask = (0.5,)  # largest learning rate; one value, or one per task
    radius: PositiveFloat = 0.01  # rho of the ascent step rho g / s
    momentum: Decay = 0.9  # beta1
    curvature_decay: Decay = 0.999  # beta2
    prior_precision: NonNegativeFloat = 25.0  # precision of the prior, for all weights
    augmentation: PositiveFloat = 1.0  # number of examples that one counts for, because its views differ
    damping: NonNegativeFloat = 0.1  # gamma, added to the curvature
    initial_curvature: PositiveFloat = 1.0  # s0, per example


class VognOptim(AnyOptim):
    """VOGN (Osawa et al. 2019): a Gaussian over weights whose precision is a sum of per-example squared gradients."""

    kind: Literal["vogn"] = "vogn"
    lr: PositiveFloatPerTask = (1e-3,)  # largest learning rate; one value, or one per task
    samples: PositiveInt = 1  # draws of the weights per step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1, of heavy-ball momentum
    curvature_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # beta2: weight of a step's squares in their mean
    prior_precision: NonNegativeFloat = 50.0  # delta; BatchNorm's parameters have no prior and are not drawn
    augmentation: PositiveFloat = 1.0  # rho: number of examples that one counts for, because its views differ
    temperature: PositiveFloat = 1.0  # tau: 1 is the Bayesian posterior, smaller values are narrower
    damping: PositiveFloat = 1e-3  # gamma, added to the curvature in the update and in the posterior


class SobaOptim(AnyOptim):
    """The improved variational online Newton rule (Lin, Schmidt and Khan 2020), diagonal, in units of a summed loss."""

    kind: Literal["soba"] = "soba"
    lr: PositiveFloatPerTask = (0.1,)  # alpha: largest learning rate; one value, or one per task
    samples: PositiveInt = 1  # draws of the weights per step, each a pass over the whole batch
    curvature_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # rho: weight of a step's estimate of the Hessian
    prior_precision: NonNegativeFloat = 1.0  # precision of the prior, for all weights
    initial_curvature: PositiveFloat = 1.0  # s0 / N


class AdditiveGroup(Section):
    """Weights theta = g + xi with noise xi of a fixed size: gradient descent on the smoothed loss."""

    kind: Literal["additive"] = "additive"
    noise: PositiveFloat = 0.001  # sigma0: standard deviation of xi


class MultiplicativeGroup(Section):
    """Weights theta = g+ x+ - g- x- with Rayleigh-distributed x and g > 0: excitation and inhibition."""

    kind: Literal["multiplicative"] = "multiplicative"
    offset: PositiveFloat = 0.001  # added to both parts g when they are made from the weights


class AffineGroup(Section):
    """Weights theta = b + A xi: location and scale of every weight."""

    kind: Literal["affine"] = "affine"
    noise: PositiveFloat = 0.005  # sigma0: standard deviation of xi
    scale_lr: PositiveFloat = 0.01  # alpha2: learning rate of A; it follows the schedule of lr
    scale_momentum: Decay = 0.999  # beta2
    initial_scale: PositiveFloat = 1.0  # A0


LieGroup = Annotated[AdditiveGroup | MultiplicativeGroup | AffineGroup, Field(discriminator="kind")]


class LieOptim(AnyOptim):
    """The Lie-group Bayesian learning rule (Kıral, Möllenhoff and Khan 2023)."""

    kind: Literal["lie"] = "lie"
    lr: PositiveFloatPerTask = (1.0,)  # alpha (affine: alpha1): largest learning rate; one value, or one per task
    group: LieGroup = AffineGroup()  # how weights are made from noise
    samples: PositiveInt = 1  # draws of the weights per step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1
    prior_precision: NonNegativeFloat = 25.0  # precision of the prior, for all weights
    temperature: NonNegativeFloat = 1.0  # T: 1 is the Bayesian posterior, smaller values are narrower
    augmentation: PositiveFloat = 1.0  # number of examples that one counts for, because its views differ


def _as_timm(value: Any) -> Any:
    """kind=timm where none is given, as in code and in files older than the kinds."""
    return {"kind": "timm", **value} if isinstance(value, dict) and "kind" not in value else value


OptimConfig = Annotated[
    TimmOptim | IvonOptim | SamOptim | BsamOptim | VognOptim | SobaOptim | LieOptim,
    Field(discriminator="kind"),
    BeforeValidator(_as_timm),
]


def passes_of(optim: AnyOptim) -> int:
    """Forward and backward passes per step."""
    if isinstance(optim, (SamOptim, BsamOptim)):
        return 2
    return optim.samples if isinstance(optim, (IvonOptim, VognOptim, SobaOptim, LieOptim)) else 1


def trials_of(optim: AnyOptim) -> int:
    """Passes per step at weights other than those that the optimiser holds."""
    if isinstance(optim, SamOptim):
        return 1
    return 0 if isinstance(optim, TimmOptim) else passes_of(optim)
