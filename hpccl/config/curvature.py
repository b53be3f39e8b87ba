"""Curvature of the quadratic: its kinds, and how the curvatures of several tasks are summed."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, Strict

from hpccl.config.base import PositiveFloat, PositiveInt, Section, SharePerTask

__all__ = [
    "CurvatureConfig",
    "DenseCurvature",
    "DiagonalCurvature",
    "EkfacCurvature",
    "KroneckerCurvature",
    "LayerMeasured",
    "ListedTasks",
    "MasCurvature",
    "Measured",
    "NearestTasks",
    "OptimizerCurvature",
    "PassCurvature",
    "PooledTasks",
    "RefitTasks",
    "SiCurvature",
    "TasksConfig",
]


class ListedTasks(Section):
    """Every task's factors are kept exactly, as long as they fit; then the closest terms of each layer are merged.

    A merge replaces two terms by their nearest Kronecker product. Its error is known in advance: one that would take a
    layer beyond `tolerance` is not made, and the list then exceeds its limits.
    """

    kind: Literal["list"] = "list"
    max_gib: PositiveFloat = 4.0  # GiB of all factors, on all ranks together
    max_cost: PositiveFloat = 4.0  # cost of the pull in a step, in multiples of the exact pull of one task
    tolerance: Annotated[float, Field(ge=0)] = 0.1  # largest relative error of a layer's sum, in Frobenius norm


class PooledTasks(Section):
    """One pair per layer: input factors averaged over examples, gradient factors summed (online Laplace)."""

    kind: Literal["pooled"] = "pooled"


class NearestTasks(Section):
    """One pair per layer: the Kronecker product nearest to the sum with the new task (Van Loan and Pitsianis 1993)."""

    kind: Literal["nearest"] = "nearest"


class RefitTasks(Section):
    """One eigenbasis per layer, that of the nearest pair, with the exact diagonal of the sum in it (EKFAC)."""

    kind: Literal["refit"] = "refit"


TasksConfig = Annotated[ListedTasks | PooledTasks | NearestTasks | RefitTasks, Field(discriminator="kind")]


class Measured(Section):
    """Keys of curvatures that are measured with labels."""

    # labels of the Fisher matrix. ggn: exact over all; mc: drawn from the network; empirical: true ones; weighted: true
    # ones, weighted by their probability (Mammoth); predicted: the most probable ones
    fisher: Literal["ggn", "mc", "empirical", "weighted", "predicted"] = "ggn"
    samples: PositiveInt = 1  # labels drawn per example for fisher=mc
    fraction: SharePerTask = (1.0,)  # share of a task's examples that is used; one value, or one per task
    batch_size: PositiveInt = 256  # examples at a time; affects memory use, not the result


class LayerMeasured(Measured):
    """Keys of both Kronecker kinds."""

    # labels of the Fisher matrix. ggn: exact over all; mc: drawn from the network; empirical: true ones; weighted: true
    # ones, weighted by their probability (Mammoth); predicted: the most probable ones
    fisher: Literal["ggn", "mc", "empirical", "weighted", "predicted"] = "mc"
    # weights used at many positions (pixels, tokens). expand: each position counts separately; reduce: an example's
    # inputs are first averaged, and its gradients summed, over positions
    sharing: Literal["expand", "reduce"] = "expand"
    precision: Literal["fp32", "bf16"] = "fp32"  # precision of the forward and backward pass; sums are always fp32
    max_factor: PositiveInt = 16384  # largest side of a factor that is accepted; 16384 is 1 GiB
    # layers (module names, with * and ?) that get the diagonal instead, like all but linear maps and convolutions
    diagonal: Annotated[tuple[str, ...], Strict(False)] = ()


class KroneckerCurvature(LayerMeasured):
    """K-FAC: one Kronecker product per layer, and the exact diagonal for norms, embeddings and free parameters."""

    kind: Literal["kronecker"] = "kronecker"
    tasks: TasksConfig = ListedTasks()  # how the curvatures of several tasks are summed
    keep_trace: Annotated[float, Field(gt=0, le=1)] = 1.0  # below 1: low-rank factors that keep this share of the trace


class EkfacCurvature(LayerMeasured):
    """EKFAC: K-FAC's eigenbasis with the exact diagonal in it, from a second pass; tasks are summed by refitting."""

    kind: Literal["ekfac"] = "ekfac"


class DiagonalCurvature(Measured):
    """Diagonal of the Fisher matrix, exact for each example."""

    kind: Literal["diagonal"] = "diagonal"
    # number of examples whose gradients are averaged before they are squared; above 1 only with fisher=empirical. Above
    # 1 the result is not a Fisher matrix and is up to `group` times smaller, but it is what Avalanche uses
    group: PositiveInt = 1


class MasCurvature(Section):
    """Memory Aware Synapses (Aljundi et al. 2018): how much each weight changes the squared norm of competing logits.

    Omega = mean_i |d |z_i|^2 / dw|, without labels; the quadratic is then weight * sum Omega (w - a)^2, added to the
    mean loss of a new task of the same size. Exact for each example, whatever the batch and the number of processes.
    """

    kind: Literal["mas"] = "mas"
    # global: change of the network's output; local: of every layer's own output, for constant layer input (Hebbian)
    variant: Literal["global", "local"] = "global"
    # number of examples whose gradients are averaged before their absolute values are taken; above 1 only with
    # variant=global. Above 1 signs cancel, as they do in the authors' code (200) and in Avalanche
    group: PositiveInt = 1
    fraction: SharePerTask = (1.0,)  # share of a task's examples that is used; one value, or one per task
    batch_size: PositiveInt = 256  # examples at a time; affects memory use, not the result


class SiCurvature(Section):
    """Synaptic Intelligence (Zenke et al. 2017): how much each weight reduced the loss while it was learned.

    Omega = max(omega, 0) / (distance^2 + xi), without a pass; the quadratic is that of kind=mas with this Omega.
    """

    kind: Literal["si"] = "si"
    xi: PositiveFloat = 0.1  # added to the squared distance that a weight moved in a task, the divisor of omega
    # task: effect of a step on the loss; total: on the loss and the quadratic together (Avalanche)
    gradient: Literal["task", "total"] = "task"
    limit: PositiveFloat | None = None  # largest Omega that a task adds to a weight's; null: no limit
    fraction: SharePerTask = (1.0,)  # must be 1: there is no pass over the task
    batch_size: PositiveInt = 256  # examples at a time in other passes over a task


class DenseCurvature(Measured):
    """The full matrix, for small networks and tests."""

    kind: Literal["dense"] = "dense"
    max_parameters: PositiveInt = 10000  # larger networks are refused; 10000 parameters take 0.4 GB


class OptimizerCurvature(Measured):
    """The diagonal that the optimiser has learned (ivon, vogn, soba, adam, adamw or rmsprop), without a pass."""

    kind: Literal["optimizer"] = "optimizer"


PassCurvature: TypeAlias = KroneckerCurvature | EkfacCurvature | DiagonalCurvature | MasCurvature | DenseCurvature
CurvatureConfig = Annotated[PassCurvature | SiCurvature | OptimizerCurvature, Field(discriminator="kind")]
