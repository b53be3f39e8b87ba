"""Optimisers: timm's, and those that learn a distribution over weights or look for flat minima.

Units of what the latter are told: the loss is a mean, nats per training example (memory included); N is the number of
these examples. A precision is nats per squared weight, summed over examples; a weight decay is a precision / N.
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

# Of timm's optimisers: what their state calls the mean of squared gradients.
LEARNING_SQUARES = {"adam": "exp_avg_sq", "adamw": "exp_avg_sq", "rmsprop": "square_avg"}

Decay = Annotated[float, Field(ge=0, lt=1)]


class AnyOptim(Section):
    """What every optimiser is told."""

    lr: PositiveFloatPerTask = (1e-3,)  # largest learning rate; one value, or one a task
    schedule: Literal["constant", "cosine", "onecycle"] = "cosine"  # of the learning rate, over one task
    warmup: Fraction = 0.0  # share of a task's steps with linear warm-up; onecycle: the rising share
    final_lr: Fraction = 0.0  # last learning rate as a share of lr


class TimmOptim(AnyOptim):
    """Optimiser by timm's factory, restarted at every task."""

    kind: Literal["timm"] = "timm"
    name: str = "adamw"  # as timm.optim.create_optimizer_v2 has it: sgd is Nesterov's, momentum the heavy ball
    weight_decay: NonNegativeFloat = 0.0  # of weight matrices; biases and norms have none
    momentum: Fraction = 0.9  # of sgd and momentum
    options: dict[str, Any] = {}  # further keyword arguments of the optimiser


class IvonOptim(AnyOptim):
    """IVON (Shen et al. 2024): Adam's cost, and a Gaussian over weights. All weights have a prior, biases too."""

    kind: Literal["ivon"] = "ivon"
    lr: PositiveFloatPerTask = (0.1,)  # largest learning rate, about SGD's; one value, or one a task
    samples: PositiveInt = 1  # draws of the weights a step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1
    # beta2: the curvature is a mean over 1 / (1 - beta2) steps. With 0.99999, h stays near initial_curvature for tens
    # of thousands of steps; short tasks need less, such as 0.999
    curvature_decay: Decay = 0.99999
    weight_decay: NonNegativeFloat = 1e-4  # delta: prior precision / N, of all weights
    initial_curvature: PositiveFloat = 1.0  # h0, per example; small values draw weights from far apart
    effective_size: PositiveFloat | None = None  # lambda, examples that the posterior counts; null: N
    clip: PositiveFloat | None = None  # xi: largest element of an update before the learning rate
    rescale_lr: bool = True  # learning rate times h0 + delta, so that the first steps are those of SGD


class SamOptim(AnyOptim):
    """SAM (Foret et al. 2021) over SGD with heavy-ball momentum: the gradient at the worst weights in a small ball."""

    kind: Literal["sam"] = "sam"
    lr: PositiveFloatPerTask = (0.03,)  # largest learning rate; one value, or one a task
    radius: PositiveFloat = 0.05  # rho: length of the step up, over all weights
    momentum: Decay = 0.9  # beta1
    weight_decay: NonNegativeFloat = 0.0  # delta, of all weights


class BsamOptim(AnyOptim):
    """Bayesian SAM (Möllenhoff and Khan 2023): SAM whose ball is the posterior's, and a Gaussian over weights."""

    kind: Literal["bsam"] = "bsam"
    lr: PositiveFloatPerTask = (0.5,)  # largest learning rate; one value, or one a task
    radius: PositiveFloat = 0.01  # rho: of the step up, rho g / s
    momentum: Decay = 0.9  # beta1
    curvature_decay: Decay = 0.999  # beta2
    prior_precision: NonNegativeFloat = 25.0  # of all weights
    augmentation: PositiveFloat = 1.0  # how many examples one counts for, because its views differ
    damping: NonNegativeFloat = 0.1  # gamma, added to the curvature
    initial_curvature: PositiveFloat = 1.0  # s0, per example


class VognOptim(AnyOptim):
    """VOGN (Osawa et al. 2019): a Gaussian over weights whose precision is a sum of per-example squared gradients."""

    kind: Literal["vogn"] = "vogn"
    lr: PositiveFloatPerTask = (1e-3,)  # largest learning rate; one value, or one a task
    samples: PositiveInt = 1  # draws of the weights a step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1, of the heavy ball
    curvature_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # beta2: weight of a step's squares in their mean
    prior_precision: NonNegativeFloat = 50.0  # delta; BatchNorm's parameters have no prior, and are not drawn
    augmentation: PositiveFloat = 1.0  # rho: how many examples one counts for, because its views differ
    temperature: PositiveFloat = 1.0  # tau: 1 is Bayes' posterior, smaller is narrower
    damping: PositiveFloat = 1e-3  # gamma, added to the curvature in the update and in the posterior


class SobaOptim(AnyOptim):
    """The improved variational online Newton rule (Lin, Schmidt and Khan 2020), diagonal, in units of a summed loss."""

    kind: Literal["soba"] = "soba"
    lr: PositiveFloatPerTask = (0.1,)  # alpha, largest; one value, or one a task
    samples: PositiveInt = 1  # draws of the weights a step, each a pass over the whole batch
    curvature_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # rho: weight of a step's estimate of the Hessian
    prior_precision: NonNegativeFloat = 1.0  # of all weights
    initial_curvature: PositiveFloat = 1.0  # s0 / N


class AdditiveGroup(Section):
    """Weights theta = g + xi with noise of a fixed size: gradient descent on the smoothed loss."""

    kind: Literal["additive"] = "additive"
    noise: PositiveFloat = 0.001  # sigma0: standard deviation of xi


class MultiplicativeGroup(Section):
    """Weights theta = g+ x+ - g- x- with x of Rayleigh's distribution and g > 0: excitation and inhibition."""

    kind: Literal["multiplicative"] = "multiplicative"
    offset: PositiveFloat = 0.001  # added to both parts when they are made from the weights


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
    lr: PositiveFloatPerTask = (1.0,)  # alpha (affine: alpha1), largest; one value, or one a task
    group: LieGroup = AffineGroup()  # how noise becomes weights
    samples: PositiveInt = 1  # draws of the weights a step, each a pass over the whole batch
    momentum: Decay = 0.9  # beta1
    prior_precision: NonNegativeFloat = 25.0  # of all weights
    temperature: NonNegativeFloat = 1.0  # T: 1 is Bayes' posterior, smaller is narrower
    augmentation: PositiveFloat = 1.0  # how many examples one counts for, because its views differ


def _as_timm(value: Any) -> Any:
    """Of files that are older than the kinds, and of code."""
    return {"kind": "timm", **value} if isinstance(value, dict) and "kind" not in value else value


OptimConfig = Annotated[
    TimmOptim | IvonOptim | SamOptim | BsamOptim | VognOptim | SobaOptim | LieOptim,
    Field(discriminator="kind"),
    BeforeValidator(_as_timm),
]


def passes_of(optim: AnyOptim) -> int:
    """Forward and backward passes of a step."""
    if isinstance(optim, (SamOptim, BsamOptim)):
        return 2
    return optim.samples if isinstance(optim, (IvonOptim, VognOptim, SobaOptim, LieOptim)) else 1


def trials_of(optim: AnyOptim) -> int:
    """Passes of a step that compute at other weights than those that the optimiser holds."""
    if isinstance(optim, SamOptim):
        return 1
    return 0 if isinstance(optim, TimmOptim) else passes_of(optim)
