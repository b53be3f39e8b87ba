"""The curvature of a network whose last layer gets more outputs, on which nothing that was learned depends.

The loss of past tasks does not depend on logits that never competed: the curvature of their rows is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from hpccl.curvature.blocks import WHOLE, Block, Layout, Term
from hpccl.curvature.dense import DensePrecision
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Precision
from hpccl.dist.spread import wholes
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, Factor, LowRank
from hpccl.kron.pair import Pair

__all__ = ["padded", "widened"]

Rows = Mapping[str, int]  # number of rows of the wider parameters, by name


def padded(values: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Return tensors by name of parameter, those of wider parameters with rows of zeros at their end."""
    return {name: _taller(value, rows[name]) if name in rows else value for name, value in values.items()}


def widened(precision: Precision, rows: Rows) -> Precision:
    """Return the curvature with zeros for the new rows; all of it is on this process."""
    match precision:
        case Diagonal():
            return replace(precision, leaves=padded(wholes(precision.leaves), rows))
        case Kronecker():
            blocks = tuple(_wider_block(block, rows) for block in precision.blocks)
            layouts = tuple(_wider_layout(layout, rows) for layout in precision.layouts)
            rest = replace(precision.rest, leaves=padded(wholes(precision.rest.leaves), rows))
            return replace(precision, blocks=blocks, layouts=layouts, rest=rest)
        case DensePrecision():
            return _wider_dense(precision, rows)
        case _:
            raise AssertionError(f"no curvature that a checkpoint has: {type(precision)}")


def _taller(value: Tensor, rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _wider_layout(layout: Layout, rows: Rows) -> Layout:
    if layout.weight not in rows:
        return layout
    assert layout.groups == 1, "a last layer has one group"
    return replace(layout, weight_shape=(rows[layout.weight], *layout.weight_shape[1:]))


def _wider_block(block: Block, rows: Rows) -> Block:
    layout = _wider_layout(block.layout, rows)
    if layout == block.layout:
        return block
    assert block.part == WHOLE, "on one process, no block is cut"
    more = layout.shape[1] - block.layout.shape[1]
    return replace(block, layout=layout, terms=tuple(_wider_term(term, more) for term in block.terms))


def _wider_term(term: Term, more: int) -> Term:
    match term:
        case Pair():
            return Pair(term.a, _wider_factor(term.b, more))
        case Eigen():
            return _wider_eigen(term, more)
        case _:
            assert_never(term)


def _wider_factor(factor: Factor, more: int) -> Factor:
    match factor:
        case Dense(matrix):
            return Dense(pad(matrix, (0, more, 0, more)))
        case LowRank(vectors, values):
            return LowRank(pad(vectors, (0, 0, 0, more)), values)
        case _:
            assert_never(factor)


def _wider_eigen(term: Eigen, more: int) -> Eigen:
    """Eigenvalues are ascending: the new ones, zeros, come first."""
    qb = pad(term.qb, (more, 0, 0, more))
    qb[:, -more:, :more] = torch.eye(more, dtype=qb.dtype, device=qb.device)
    return replace(term, qb=qb, values=pad(term.values, (0, 0, more, 0)), b=pad(term.b, (more, 0)))


def _wider_dense(precision: DensePrecision, rows: Rows) -> DensePrecision:
    old = precision.shapes
    shapes = {name: (rows[name], *shape[1:]) if name in rows else shape for name, shape in old.items()}
    kept, start = [], 0
    for name, shape in shapes.items():
        kept.append(start + torch.arange(math.prod(old[name])))  # the old rows come first
        start += math.prod(shape)
    places = torch.cat(kept)
    matrix = precision.matrix.new_zeros(start, start)
    matrix[places[:, None], places] = precision.matrix
    return replace(precision, matrix=matrix, shapes=shapes)
