"""The curvature of the quadratic: its kinds, and how those of several tasks become one."""

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
    """Every task's own factors, exactly, as long as they fit; then the closest terms of each layer are merged.

    A merge is the nearest Kronecker product of two terms. Its error is known before it is made; one that would take a
    layer beyond `tolerance` is not made, and then the list stays larger than it should.
    """

    kind: Literal["list"] = "list"
    max_gib: PositiveFloat = 4.0  # of all factors on all ranks together
    max_cost: PositiveFloat = 4.0  # of one step's pull, in multiples of the exact pull of one task
    tolerance: Annotated[float, Field(ge=0)] = 0.1  # largest error of a layer's sum, relative, Frobenius norm


class PooledTasks(Section):
    """One pair a layer: input factors averaged over examples, gradient factors summed (online Laplace)."""

    kind: Literal["pooled"] = "pooled"


class NearestTasks(Section):
    """One pair a layer: the nearest Kronecker product of the sum so far and the new task (Van Loan, Pitsianis 1993)."""

    kind: Literal["nearest"] = "nearest"


class RefitTasks(Section):
    """One eigenbasis a layer, that of the nearest pair, with the exact diagonal of the sum in it (EKFAC)."""

    kind: Literal["refit"] = "refit"


TasksConfig = Annotated[ListedTasks | PooledTasks | NearestTasks | RefitTasks, Field(discriminator="kind")]


class Measured(Section):
    """What every kind of curvature measures."""

    # exact over labels, labels drawn from the model, true labels; weighted: true ones, by their probability (Mammoth);
    # predicted: the likeliest ones
    fisher: Literal["ggn", "mc", "empirical", "weighted", "predicted"] = "ggn"
    samples: PositiveInt = 1  # labels drawn per example for fisher=mc
    fraction: SharePerTask = (1.0,)  # of a task's examples that is used; one value, or one a task
    batch_size: PositiveInt = 256  # examples at a time; changes memory use, not the result


class LayerMeasured(Measured):
    """What both Kronecker kinds measure of a layer."""

    # exact over labels, labels drawn from the model, true labels; weighted: true ones, by their probability (Mammoth);
    # predicted: the likeliest ones
    fisher: Literal["ggn", "mc", "empirical", "weighted", "predicted"] = "mc"
    sharing: Literal["expand", "reduce"] = "expand"  # of a weight over positions: each counts alone, or their mean does
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward and backward pass; sums are always fp32
    max_factor: PositiveInt = 16384  # largest side of a factor; 16384 is 1 GiB
    # layers (module names, with * and ?) that get the diagonal instead, like all that is no linear map or convolution
    diagonal: Annotated[tuple[str, ...], Strict(False)] = ()


class KroneckerCurvature(LayerMeasured):
    """K-FAC: a Kronecker product for each layer, exact diagonal for norms, embeddings and free parameters."""

    kind: Literal["kronecker"] = "kronecker"
    tasks: TasksConfig = ListedTasks()  # how the curvatures of several tasks become one
    keep_trace: Annotated[float, Field(gt=0, le=1)] = 1.0  # below 1: low-rank factors that keep this share of the trace


class EkfacCurvature(LayerMeasured):
    """EKFAC: K-FAC's eigenbasis with the exact diagonal in it, from a second pass; tasks are summed by refitting."""

    kind: Literal["ekfac"] = "ekfac"


class DiagonalCurvature(Measured):
    """Diagonal of the Fisher matrix, exact per example."""

    kind: Literal["diagonal"] = "diagonal"
    # examples whose gradients are averaged before they are squared. Above 1 it is no Fisher matrix, and up to so many
    # times smaller, but it is what Avalanche takes for one; with fisher=empirical
    group: PositiveInt = 1


class MasCurvature(Section):
    """Memory Aware Synapses (Aljundi et al. 2018): how much a weight moves the squared norm of the competing logits.

    Omega = mean_i |d |z_i|^2 / dw|, no labels; the quadratic is then weight * sum Omega (w - a)^2 beside the mean loss
    of a new task of as many examples. Exact per example, whatever the batch and the number of processes.
    """

    kind: Literal["mas"] = "mas"
    # global: of the network's output; local: of every layer's own output, its input held constant (Hebbian)
    variant: Literal["global", "local"] = "global"
    # examples whose gradients are averaged before their absolute values are taken. Above 1 signs cancel, as they do in
    # the authors' code (200) and in Avalanche; with variant=global
    group: PositiveInt = 1
    fraction: SharePerTask = (1.0,)  # of a task's examples that is used; one value, or one a task
    batch_size: PositiveInt = 256  # examples at a time; changes memory use, not the result


class SiCurvature(Section):
    """Synaptic Intelligence (Zenke et al. 2017): what each weight did for the loss while it was learned.

    Omega = max(omega, 0) / (distance^2 + xi), no pass over the task; the quadratic is that of kind=mas with this Omega.
    """

    kind: Literal["si"] = "si"
    xi: PositiveFloat = 0.1  # added to the squared distance that a weight moved in a task, by which omega is divided
    # task: what a step did for the loss; total: for the loss and the quadratic together (Avalanche)
    gradient: Literal["task", "total"] = "task"
    limit: PositiveFloat | None = None  # largest Omega that a task adds to a weight's; null: none
    fraction: SharePerTask = (1.0,)  # of a pass over the task: there is none, leave it 1
    batch_size: PositiveInt = 256  # examples at a time, of other passes over a task


class DenseCurvature(Measured):
    """The whole matrix, for small networks and tests."""

    kind: Literal["dense"] = "dense"
    max_parameters: PositiveInt = 10000  # a larger network is refused; 10000 is 0.4 GB


class OptimizerCurvature(Measured):
    """The diagonal that the optimiser has learned: no pass over the task. ivon, vogn, soba, adam, adamw or rmsprop."""

    kind: Literal["optimizer"] = "optimizer"


PassCurvature: TypeAlias = KroneckerCurvature | EkfacCurvature | DiagonalCurvature | MasCurvature | DenseCurvature
CurvatureConfig = Annotated[PassCurvature | SiCurvature | OptimizerCurvature, Field(discriminator="kind")]
