"""Curvature in orthonormal bases: F = Q diag(values) Q', one piece per layer, parameter or matrix.

    Pair, Eigen     Q = Qb (x) Qa                exact for one term; several terms are replaced by their `refit`
    Diagonal        Q = 1
    DensePrecision  eigenvectors of the whole matrix

Each rank holds pieces of its own; the pieces of all ranks together make up the whole, without overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from hpccl.curvature.blocks import Block, Layout, Part
from hpccl.curvature.dense import DensePrecision, split_by_name
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker, layout_parts
from hpccl.curvature.protocols import Precision, Weights
from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.dist.spread import fetch
from hpccl.errors import CoverageError
from hpccl.kron.eigen import Eigen, symmetric_eigh
from hpccl.kron.merge import eigen_of
from hpccl.kron.product import chain, matmul

__all__ = [
    "BlockSpectrum",
    "DenseSpectrum",
    "DiagonalSpectrum",
    "Spectrum",
    "covered",
    "gathered",
    "spectra",
]


class Spectrum(Protocol):
    """F = Q diag(values) Q' over some of the weights."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""

    @property
    def values(self) -> Tensor:
        """The eigenvalues, >= 0, of any shape."""

    def coefficients(self, rows: Weights) -> Tensor:
        """Return Q' w for m weights w, given by name as [m, *shape of the parameter]: [m, *shape of the values]."""

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return Q c for one c of the values' shape, by name."""


@final
@dataclass(frozen=True)
class BlockSpectrum:
    """The spectrum of a layer's block."""

    layout: Layout
    eigen: Eigen

    @property
    def names(self) -> tuple[str, ...]:
        """See Spectrum."""
        return self.layout.names

    @property
    def values(self) -> Tensor:
        """The eigenvalues [g, o, d]."""
        return self.eigen.values

    def coefficients(self, rows: Weights) -> Tensor:
        """See Spectrum: [m, g, o, d]."""
        matrices = self.layout.matrices(rows).to(self.values)
        count, _, outputs, inputs = matrices.shape
        right = matmul(matrices.movedim(0, 1).flatten(1, 2), self.eigen.qa)  # [g, m o, d]
        turned = right.unflatten(1, (count, outputs)).transpose(1, 2).flatten(2)  # [g, o, m d]
        found: Tensor = matmul(self.eigen.qb.mT, turned).unflatten(2, (count, inputs)).movedim(2, 0)
        return found

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """See Spectrum."""
        return self.layout.named(chain(self.eigen.qb, coefficients, self.eigen.qa.mT))


@final
@dataclass(frozen=True)
class DiagonalSpectrum:
    """The spectrum of one parameter whose curvature is a diagonal."""

    name: str
    values: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See Spectrum."""
        return (self.name,)

    def coefficients(self, rows: Weights) -> Tensor:
        """See Spectrum: the weights as they are."""
        return rows[self.name].to(self.values)

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """See Spectrum."""
        return {self.name: coefficients}


@final
@dataclass(frozen=True)
class DenseSpectrum:
    """The spectrum of a dense matrix.

    shapes: shapes of the parameters by name, in the order of the matrix
    values: [P]
    vectors: [P, P], in columns
    """

    shapes: Mapping[str, tuple[int, ...]]
    values: Tensor
    vectors: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See Spectrum."""
        return tuple(self.shapes)

    def coefficients(self, rows: Weights) -> Tensor:
        """See Spectrum: [m, P]."""
        return torch.cat([rows[name].flatten(1).to(self.values) for name in self.shapes], dim=1) @ self.vectors

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """See Spectrum."""
        return split_by_name(self.vectors @ coefficients, self.shapes)


def covered(precision: Precision) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that the precision covers, on all ranks together.

    Raises:
        CoverageError: the precision is of a kind without eigenvalues.
    """
    match precision:
        case Kronecker():
            shapes = {}
            for layout in precision.layouts:
                shapes[layout.weight] = layout.weight_shape
                if layout.bias is not None:
                    shapes[layout.bias] = layout.weight_shape[:1]
            return {**shapes, **covered(precision.rest)}
        case Diagonal():
            return {name: tuple(value.shape) for name, value in precision.leaves.items()}
        case DensePrecision():
            return dict(precision.shapes)
        case _:
            raise CoverageError(
                f"a {type(precision).__name__} has no eigenvalues here; allowed: Kronecker, Diagonal, DensePrecision"
            )


def spectra(precision: Precision, comm: Comm) -> tuple[Spectrum, ...]:
    """Decompose this rank's pieces; collective, since blocks that are cut are joined on the rank of their first part.

    Raises:
        CoverageError: the precision is spread over more ranks than `comm` has, or of a kind without eigenvalues.
        DivergedError: a factor is not finite.
        WorldError: any of these on another rank.
    """
    covered(precision)
    blocks = tuple(_own_blocks(precision, comm)) if isinstance(precision, Kronecker) else ()
    return all_or_none(comm, lambda: tuple(_decomposed(precision, blocks, comm)), "decompose its factors")


def gathered(precision: Kronecker, comm: Comm) -> Kronecker:
    """Return the precision with all blocks, whole, on every rank; collective.

    For inspecting it or saving it in one place: as a prior on several ranks it would count several times.

    Raises:
        CoverageError: a block is on no rank.
        WorldError: another rank lacks its block.
    """
    _refuse_absent(precision, comm)
    blocks = tuple(_everywhere(layout, ranks, precision, comm) for layout, ranks in _placed(precision, comm))
    return replace(precision, blocks=blocks, divisible=False)


# ---------------------------------------------------------------- blocks among ranks

Ranks = list[tuple[int, Part]]


def _placed(precision: Kronecker, comm: Comm) -> list[tuple[Layout, Ranks]]:
    return layout_parts(precision.layouts, comm, divisible=precision.divisible)


def _own_blocks(precision: Kronecker, comm: Comm) -> Iterator[Block]:
    _refuse_absent(precision, comm)
    for layout, ranks in _placed(precision, comm):
        whole = _everywhere(layout, ranks, precision, comm) if len(ranks) > 1 else None
        if ranks[0][0] == comm.rank:
            yield whole or _held(precision)[layout.name, ranks[0][1]]


def _refuse_absent(precision: Kronecker, comm: Comm) -> None:
    held = _held(precision)
    placed = _placed(precision, comm)

    def check() -> None:
        for layout, ranks in placed:
            if any(rank == comm.rank and (layout.name, part) not in held for rank, part in ranks):
                raise CoverageError(
                    f"this rank has no curvature of layer '{layout.name}' ({len(held)} of {len(placed)} layers or "
                    f"parts are here); it is distributed over other ranks than the {comm.size} of comm: pass the comm "
                    "used to measure it"
                )

    all_or_none(comm, check, "find its layers of the curvature")


def _held(precision: Kronecker) -> dict[tuple[str, Part], Block]:
    return {(block.layout.name, block.part): block for block in precision.blocks}


def _everywhere(layout: Layout, ranks: Ranks, precision: Kronecker, comm: Comm) -> Block:
    """Return the whole block of a layer on every rank."""
    held = _held(precision)
    if comm.size == 1:
        return held[layout.name, ranks[0][1]]
    parts = []
    for rank, part in ranks:
        state = held[layout.name, part].state_dict() if rank == comm.rank else None
        parts.append(Block.from_state_dict(layout, _broadcast(state, rank, comm)))
    return Block.joined(parts)


def _broadcast(state: Mapping[str, Any] | None, source: int, comm: Comm) -> dict[str, Any]:
    """Broadcast the nested state of tensors and JSON scalars of rank `source`."""
    tensors: list[Tensor] = []
    text = None if state is None else json.dumps(_emptied(state, tensors))
    skeleton = json.loads(comm.broadcast_text(text, source=source))
    if state is None:
        _allocate(skeleton, tensors, comm.device)
    comm.broadcast_(tensors, source=source)
    filled: dict[str, Any] = _filled(skeleton, iter(tensors))
    return filled


def _emptied(node: Any, tensors: list[Tensor]) -> Any:
    """Replace every tensor of a nested state by its shape and dtype, and append it to `tensors`."""
    if isinstance(node, Tensor):
        tensors.append(node)
        return {"shape": list(node.shape), "dtype": str(node.dtype).removeprefix("torch.")}
    if isinstance(node, Mapping):
        return {key: _emptied(value, tensors) for key, value in node.items()}
    return [_emptied(value, tensors) for value in node] if isinstance(node, (list, tuple)) else node


def _allocate(node: Any, tensors: list[Tensor], device: torch.device) -> None:
    if isinstance(node, dict) and "dtype" in node:
        tensors.append(torch.empty(node["shape"], dtype=getattr(torch, node["dtype"]), device=device))
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            _allocate(value, tensors, device)


def _filled(node: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(node, dict):
        return next(tensors) if "dtype" in node else {key: _filled(value, tensors) for key, value in node.items()}
    return [_filled(value, tensors) for value in node] if isinstance(node, list) else node


# ---------------------------------------------------------------- decompositions


def _decomposed(precision: Precision, blocks: Iterable[Block], comm: Comm) -> Iterator[Spectrum]:
    match precision:
        case Kronecker():
            for block in blocks:
                eigen = eigen_of(block.terms)
                yield BlockSpectrum(block.layout, replace(eigen, values=eigen.values.clamp_min(0)))
            yield from _diagonals(precision.rest, comm)
        case Diagonal():
            yield from _diagonals(precision, comm)
        case DensePrecision() if comm.leader:
            values, vectors = symmetric_eigh(precision.matrix[None])
            yield DenseSpectrum(precision.shapes, values[0], vectors[0])


def _diagonals(diagonal: Diagonal, comm: Comm) -> Sequence[Spectrum]:
    owner = owners({name: float(math.prod(leaf.shape)) for name, leaf in diagonal.leaves.items()}, comm.size)
    mine = fetch(diagonal.leaves, [name for name in diagonal.leaves if owner[name] == comm.rank], comm)
    return [DiagonalSpectrum(name, value.clamp_min(0)) for name, value in mine.items()]
