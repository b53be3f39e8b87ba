"""The cost of the curvature on every rank, from the shapes of the layers alone.

A layer [g, o, d] has the factors A [g, d, d] and B [g, o, o]. Which rank holds which factors, or which part of a layer,
is determined by the functions that place them in a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from hpccl.config.curvature import (
    CurvatureConfig,
    DenseCurvature,
    DiagonalCurvature,
    EkfacCurvature,
    KroneckerCurvature,
    ListedTasks,
    MasCurvature,
    OptimizerCurvature,
    RefitTasks,
    SiCurvature,
    TasksConfig,
)
from hpccl.curvature.blocks import Layout, Part
from hpccl.curvature.kronecker import layout_parts
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.kron.pack import packed_size
from hpccl.tools.plan.sharding import FLOAT, Sharding, all_reduce, rows

__all__ = ["CurvaturePlan", "plan_curvature"]

Shape = tuple[int, int, int]
Shapes = Mapping[str, tuple[int, ...]]
Parts = Sequence[tuple[Layout, list[tuple[int, Part]]]]


@dataclass(frozen=True)
class CurvaturePlan:
    """The cost of the curvature summed over all tasks.

    terms: of a layer, within the budget of `curvature.tasks`; most_terms: the most, where no merge is within its
        tolerance
    held: bytes, by rank
    flops: of one step's pull, by rank
    fetched: bytes of old weights and of the diagonal that a rank has unsharded in training, where weights are sharded;
        by rank
    measuring: bytes of sums on every rank while a task is measured
    sent: bytes that a rank sends when a task is measured, by rank
    """

    terms: int
    most_terms: int
    held: tuple[int, ...]
    flops: tuple[float, ...]
    fetched: tuple[int, ...]
    measuring: int
    sent: tuple[float, ...]


def plan_curvature(
    config: CurvatureConfig,
    layouts: Sequence[Layout],
    rest: Shapes,
    sharding: Sharding,
    *,
    tasks: int,
) -> CurvaturePlan:
    """Plan the curvature: factors of `layouts`, and of `rest` a diagonal, sharded as weights are, or a dense matrix.

    Args:
        config: the section `curvature`.
        layouts: of the factored layers; empty for other kinds than kronecker and ekfac.
        rest: shapes of all other trainable weights, by name.
        sharding: the engine.
        tasks: number of tasks that are summed.
    """
    total = sum(map(math.prod, rest.values()))
    match config:
        case DiagonalCurvature() | MasCurvature():
            sums, held, flops = FLOAT * total, FLOAT * rows(rest.values(), sharding), float(2 * total)
            return _alike(sums, held, flops, _fetched((), rest, sharding), sharding.ranks)
        case OptimizerCurvature() | SiCurvature():
            held, flops = FLOAT * rows(rest.values(), sharding), float(2 * total)
            return _alike(0, held, flops, _fetched((), rest, sharding), sharding.ranks)
        case DenseCurvature():
            fetched = (FLOAT * total * sharding.spreads_weights,) * sharding.ranks
            return _alike(FLOAT * total**2, FLOAT * total**2, float(2 * total**2), fetched, sharding.ranks)
        case EkfacCurvature():
            return _placed(layouts, rest, sharding, RefitTasks(), tasks, divisible=False, eigen=True, bases=True)
        case KroneckerCurvature():
            refit = isinstance(config.tasks, RefitTasks)
            divisible = config.keep_trace == 1 and not refit
            eigen = refit and tasks > 1
            return _placed(layouts, rest, sharding, config.tasks, tasks, divisible=divisible, eigen=eigen, bases=False)
        case _:
            assert_never(config)


def _alike(sums: int, held: int, flops: float, fetched: tuple[int, ...], ranks: int) -> CurvaturePlan:
    """Return the plan of a curvature spread evenly: each rank holds `held` bytes, and `sums` more when measuring."""
    wire = all_reduce(sums, ranks)
    return CurvaturePlan(1, 1, (held,) * ranks, (flops / ranks,) * ranks, fetched, sums, (wire,) * ranks)


def _placed(
    layouts: Sequence[Layout],
    rest: Shapes,
    sharding: Sharding,
    policy: TasksConfig,
    tasks: int,
    *,
    divisible: bool,
    eigen: bool,
    bases: bool,
) -> CurvaturePlan:
    ranks, sums = sharding.ranks, FLOAT * sum(map(math.prod, rest.values()))
    placed = layout_parts(layouts, Comm(0, ranks, Comm.solo().device), divisible=divisible)
    whole = sum(pair_bytes(layout.shape, Part()) for layout in layouts)
    terms = listed_terms(policy, tasks, whole)
    held, flops, own = [FLOAT * rows(rest.values(), sharding)] * ranks, [0.0] * ranks, [0.0] * ranks
    for layout, owning in placed:
        for rank, part in owning:
            one = eigen_bytes(layout.shape) if eigen else pair_bytes(layout.shape, part)
            held[rank] += one * terms
            flops[rank] += terms * pull_flops(layout.shape) / len(owning) * (2 if eigen else 1)
            own[rank] += FLOAT * sent_numbers(layout.shape, part)
    diagonal = all_reduce(sums, ranks)
    # EKFAC sends every basis to every rank, holds them there, and sums the diagonals in them.
    others = whole + sum(FLOAT * math.prod(layout.shape) for layout in layouts) if bases else 0
    sent = tuple(sum(own) - mine + diagonal + others * (ranks > 1) for mine in own)
    most = tasks if isinstance(policy, ListedTasks) else 1
    fetched = _fetched(placed, rest, sharding)
    return CurvaturePlan(terms, most, tuple(held), tuple(flops), fetched, whole + sums + others, sent)


def _fetched(placed: Parts, rest: Shapes, sharding: Sharding) -> tuple[int, ...]:
    """Return `CurvaturePlan.fetched`, for the layers and diagonals that each rank multiplies; 0 for whole weights."""
    found = [0] * sharding.ranks
    if not sharding.spreads_weights:
        return tuple(found)
    for layout, owning in placed:
        for rank in {rank for rank, _ in owning}:
            found[rank] += FLOAT * math.prod(layout.shape)
    sizes = {name: math.prod(shape) for name, shape in rest.items()}
    for name, rank in owners({name: float(size) for name, size in sizes.items()}, sharding.ranks).items():
        found[rank] += 2 * FLOAT * sizes[name]
    return tuple(found)


def listed_terms(policy: TasksConfig, tasks: int, one_task: int) -> int:
    """Return the terms of a layer in the sum over `tasks`, if merges are within the tolerance.

    A pull with t terms costs t times that of one. one_task: bytes of one term of all layers
    """
    if not isinstance(policy, ListedTasks):
        return 1
    fitting = min(policy.max_gib * 2**30 / max(one_task, 1), policy.max_cost)
    return max(1, min(tasks, int(fitting)))


def pair_bytes(shape: Shape, part: Part) -> int:
    """Return the bytes of a term's factors that are held for a part of the layer."""
    groups, outputs, inputs = shape
    width = part.stop - part.start
    a = inputs * (width if part.axis == "input" else inputs)
    b = outputs * (width if part.axis == "output" else outputs)
    return FLOAT * groups * (a + b)


def eigen_bytes(shape: Shape) -> int:
    """Return the bytes of both eigenbases, the diagonal in them, and the eigenvalues of both factors."""
    groups, outputs, inputs = shape
    return FLOAT * groups * (inputs**2 + outputs**2 + outputs * inputs + outputs + inputs)


def pull_flops(shape: Shape) -> float:
    """Return the multiplications and additions of B D A."""
    groups, outputs, inputs = shape
    return float(2 * groups * outputs * inputs * (outputs + inputs))


def sent_numbers(shape: Shape, part: Part) -> int:
    """Return the numbers in a message of a layer's sums to the rank that owns a part; whole factors send triangles."""
    groups, outputs, inputs = shape
    width = part.stop - part.start
    a = groups * inputs * width if part.axis == "input" else packed_size(groups, inputs)
    b = groups * outputs * width if part.axis == "output" else packed_size(groups, outputs)
    return a + b
