"""The curvature in a checkpoint, layer by layer, as numbers and as a table.

Eigenvalues are those of the sum of a layer's terms. With several terms they are the diagonal of the sum in the basis of
the nearest single term (`kron.merge.refit`): the largest is at most the true one, the smallest at least the true one.
Eigenvalues below rounding error are given as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hpccl.checkpoint.store import Mark, load, open_shards
from hpccl.config.load import load_recorded
from hpccl.curvature.blocks import Block
from hpccl.curvature.build import precision_from_state
from hpccl.curvature.dense import DensePrecision
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Precision, Totals
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, DivergedError, FolderError
from hpccl.folder import RunFolder
from hpccl.kron.eigen import Eigen, symmetric_eigh
from hpccl.kron.factor import Dense, Factor, LowRank
from hpccl.kron.merge import eigen_of
from hpccl.kron.pair import Pair
from hpccl.report.text import fixed, percent, size, whole
from hpccl.tools.evaluate_run import find_checkpoint
from hpccl.tools.export import no_curvature

__all__ = ["Layer", "Shown", "read_curvature", "render"]

FAST = 2048  # largest matrix side up to which eigenvalues are computed by default
_SHARE = 0.99  # share of the trace that the effective rank keeps


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The curvature of one layer or, where it is diagonal or dense, of the parameters of one module.

    kind: pair, low rank, eigen, diagonal or dense
    shape: (groups, outputs, inputs) of a Kronecker product, the bias counted as an input
    weights: number of weights
    terms: number of terms in the sum
    trace: nats per squared weight; share: of the trace of all layers
    largest, smallest: eigenvalues; condition: their ratio. None: not computed, or infinite
    rank_a, rank_b: number of eigenvectors of the input and output factor that keep 99 % of its trace, in the group that
        needs most
    bytes: in memory
    error: bound on the relative error from truncation and merging, in the Frobenius norm
    """

    name: str
    kind: str
    shape: tuple[int, int, int] | None = None
    weights: int
    terms: int = 1
    trace: float
    share: float
    largest: float | None
    smallest: float | None
    condition: float | None
    rank_a: int | None = None
    rank_b: int | None = None
    bytes: int
    error: float = 0.0


@dataclass(frozen=True)
class Shown:
    """The curvature in a checkpoint.

    kind: kronecker, diagonal or dense
    weight, damping: of the quadratic
    tasks: settings `curvature.tasks` of the sum over tasks; None for a plain sum
    diagonal: names of the parameters whose curvature is diagonal
    """

    run: str
    checkpoint: str
    task: int
    kind: str
    num_examples: float
    weight: float
    damping: float
    tasks: dict[str, Any] | None
    keep_trace: float
    totals: Totals
    layers: tuple[Layer, ...]
    diagonal: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, totals and layers as objects."""
        return asdict(self)


def read_curvature(path: Path, *, task: int | None = None, spectra: bool | None = None) -> Shown:
    """Read the curvature in the newest checkpoint, or in the newest of `task`, in this process; nothing is written.

    Args:
        path: the run's folder.
        task: counted from 0; None: the newest.
        spectra: whether to compute eigenvalues; None: those of matrices with at most 2048 rows.

    Raises:
        CheckpointError: the checkpoint is damaged.
        DivergedError: the curvature is not finite.
        FolderError: the folder is no run, or has no such checkpoint, or no curvature in it.
    """
    folder = RunFolder(path)
    mark = find_checkpoint(folder, task)
    state = _quadratic_state(folder, mark)
    try:
        precision = precision_from_state(state["precision"], open_shards(folder.checkpoints, mark), Comm.solo())
        weight, damping = float(state["weight"]), float(state["damping"])
        kind = str(state["precision"]["kind"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the curvature in checkpoint '{folder.checkpoints / mark.name}' is damaged ({error!r}); "
            "choose another task's curvature with --task N"
        ) from error
    limit = math.inf if spectra else 0 if spectra is not None else FAST
    totals = precision.totals(Comm.solo())
    if not math.isfinite(totals.trace):
        raise DivergedError(f"the curvature in checkpoint '{mark.name}' is not finite: the model has diverged")
    rest = precision.rest if isinstance(precision, Kronecker) else precision
    return Shown(
        run=str(path),
        checkpoint=mark.name,
        task=mark.task,
        kind=kind,
        num_examples=precision.num_examples,
        weight=weight,
        damping=damping,
        tasks=precision.tasks.model_dump(mode="json") if isinstance(precision, Kronecker) else None,
        keep_trace=precision.keep_trace if isinstance(precision, Kronecker) else 1.0,
        totals=totals,
        layers=tuple(_layers(precision, totals.trace, limit)),
        diagonal=tuple(rest.values) if isinstance(rest, Diagonal) else (),
    )


def render(shown: Shown) -> Group:
    """Return a table of the layers, followed by notes on the whole."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "kind"):
        table.add_column(heading, no_wrap=heading == "layer")
    for heading in _FIGURES:
        table.add_column(heading, justify="right")
    for layer in shown.layers:
        table.add_row(Text(layer.name), layer.kind, *_figures(layer))
    return Group(table, *(Text(line) for line in _notes(shown)))


# ---------------------------------------------------------------- reading


def _quadratic_state(folder: RunFolder, mark: Mark) -> Mapping[str, Any]:
    """Return the quadratic in a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
        FolderError: it has no quadratic.
    """
    try:
        state = load(folder.checkpoints, mark)["prior"]["quadratic"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint '{folder.checkpoints / mark.name}' has no {error}: it is damaged") from error
    if isinstance(state, Mapping):
        return state
    if load_recorded(folder.config).prior.quadratic.weight == 0:
        raise FolderError(no_curvature(str(folder.path), mark.name))
    raise FolderError(
        f"'{folder.path}' has no curvature in checkpoint {mark.name}: it is measured at the end of each task, and no "
        "task had ended yet"
    )


# ---------------------------------------------------------------- figures of a layer


def _layers(precision: Precision, trace: float, limit: float) -> list[Layer]:
    match precision:
        case Kronecker():
            blocks = [_of_block(block, trace, limit) for block in precision.blocks]
            return [*blocks, *_of_diagonal(precision.rest, trace)]
        case Diagonal():
            return _of_diagonal(precision, trace)
        case DensePrecision():
            return _of_dense(precision, trace, limit)
        case _:
            raise CheckpointError(f"curvature of kind {type(precision).__name__} cannot be shown")


def _of_block(block: Block, total: float, limit: float) -> Layer:
    groups, outputs, inputs = block.layout.shape
    values = rank_a = rank_b = None
    if max(outputs, inputs) <= limit:
        a, b, values = _eigenvalues(block)
        rank_a, rank_b = _effective_rank(a), _effective_rank(b)
    plain = _layer(
        block.layout.name,
        _kind(block),
        values,
        weights=groups * outputs * inputs,
        trace=block.trace(),
        total=total,
        num_bytes=block.num_bytes,
    )
    return replace(
        plain,
        shape=(groups, outputs, inputs),
        terms=len(block.terms),
        rank_a=rank_a,
        rank_b=rank_b,
        error=block.error(),
    )


def _kind(block: Block) -> str:
    if isinstance(block.terms[0], Eigen):
        return "eigen"
    low = any(isinstance(factor, LowRank) for t in block.terms if isinstance(t, Pair) for factor in (t.a, t.b))
    return "low rank" if low else "pair"


def _eigenvalues(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of A [g, d], of B [g, o], and of the whole block [g, o, d]."""
    (first, *others) = block.terms
    if isinstance(first, Pair) and not others:
        a, b = _of_factor(first.a), _of_factor(first.b)
        return a, b, b[:, :, None] * a[:, None, :]
    eigen = eigen_of(block.terms)
    noise = eigen.values.amax((1, 2), keepdim=True) * max(eigen.values.shape) * torch.finfo(eigen.values.dtype).eps
    return eigen.a, eigen.b, torch.where(eigen.values > noise, eigen.values, 0.0)


def _of_factor(factor: Factor) -> Tensor:
    """Return eigenvalues [g, k], ascending; those of a low-rank factor come from its r x r inner products."""
    match factor:
        case Dense(matrix):
            return _symmetric_eigenvalues(matrix)
        case LowRank(vectors, values):
            half = vectors * values.sqrt()[:, None, :]
            found = _symmetric_eigenvalues(half.mT @ half)
            return torch.cat([found.new_zeros(factor.groups, factor.size - found.shape[1]), found], dim=1)


def _symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues [g, k] of [g, k, k], ascending; those below rounding error are 0."""
    scale = matrix.abs().amax((1, 2), keepdim=True)
    scaled = matrix / scale.where(scale > 0, 1)
    try:
        values = torch.linalg.eigvalsh((scaled + scaled.mT) / 2) * scale[:, :, 0]
    except RuntimeError:  # no convergence
        values, _ = symmetric_eigh(matrix)
    noise = values[:, -1:] * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return torch.where(values > noise, values, 0.0)


def _of_diagonal(diagonal: Diagonal, total: float) -> list[Layer]:
    """Return one entry for each module."""
    layers = []
    found = diagonal.values
    for module, names in _by_module(found).items():
        values = torch.cat([found[name].flatten() for name in names])
        trace, held = float(values.double().sum()), values.nbytes
        layers.append(_layer(module, "diagonal", values, weights=len(values), trace=trace, total=total, num_bytes=held))
    return layers


def _of_dense(dense: DensePrecision, total: float, limit: float) -> list[Layer]:
    """Return one entry for each module, with the eigenvalues of its diagonal block."""
    sizes = [math.prod(shape) for shape in dense.shapes.values()]
    places = dict(zip(dense.shapes, torch.arange(len(dense.matrix)).split(sizes), strict=True))
    layers = []
    for module, names in _by_module(dense.shapes).items():
        rows = torch.cat([places[name] for name in names])
        square = dense.matrix[rows[:, None], rows]
        values = _symmetric_eigenvalues(square[None]) if len(rows) <= limit else None
        trace, held = float(square.diagonal().double().sum()), dense.matrix[rows].nbytes
        layers.append(_layer(module, "dense", values, weights=len(rows), trace=trace, total=total, num_bytes=held))
    return layers


def _layer(
    name: str, kind: str, values: Tensor | None, *, weights: int, trace: float, total: float, num_bytes: int
) -> Layer:
    """Fill in the fields that every kind has; `values` are the eigenvalues, `total` is the trace of all layers."""
    largest, smallest, condition = (None, None, None) if values is None else _extremes(values)
    return Layer(
        name=name,
        kind=kind,
        weights=weights,
        trace=trace,
        share=trace / total if total > 0 else 0.0,
        largest=largest,
        smallest=smallest,
        condition=condition,
        bytes=num_bytes,
    )


def _by_module(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Group parameter names by module; a parameter of the root module is a group of its own."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return found


def _extremes(values: Tensor) -> tuple[float | None, float | None, float | None]:
    """Return the largest and smallest value, and their ratio, None where infinite."""
    if values.numel() == 0:
        return None, None, None
    largest, smallest = float(values.max()), max(0.0, float(values.min()))
    return largest, smallest, largest / smallest if smallest > 0 and math.isfinite(largest / smallest) else None


def _effective_rank(values: Tensor) -> int:
    """Return how many of the eigenvalues [g, k], ascending, keep 99 % of the trace, in the group that needs most."""
    kept = values.double().flip(1).cumsum(1)
    return min(values.shape[1], 1 + int((kept < _SHARE * kept[:, -1:]).sum(1).max()))


# ---------------------------------------------------------------- text

_FIGURES = (
    "g × o × d",
    "terms",
    "trace",
    "% of trace",
    "largest",
    "smallest",
    "condition",
    "rank B",
    "rank A",
    "memory",
    "error",
)


def _figures(layer: Layer) -> list[str]:
    return [
        whole(layer.weights) if layer.shape is None else " × ".join(str(side) for side in layer.shape),
        str(layer.terms),
        fixed(layer.trace),
        percent(layer.share),
        fixed(layer.largest),
        fixed(layer.smallest),
        "∞" if layer.smallest == 0 else "–" if layer.condition is None else f"{layer.condition:.1e}",
        whole(layer.rank_b),
        whole(layer.rank_a),
        size(layer.bytes),
        f"{layer.error:.1e}" if layer.error else "0",
    ]


def _notes(shown: Shown) -> list[str]:
    totals, num_weights = shown.totals, sum(layer.weights for layer in shown.layers)
    notes = [
        f"{shown.run}, checkpoint {shown.checkpoint}: {shown.kind} curvature of {whole(shown.num_examples)} examples",
        f"trace {fixed(totals.trace)} over {whole(num_weights)} weights, {size(totals.num_bytes)}",
        f"terms of a layer: at most {totals.terms}; error: at most {totals.error:.2g}",
        f"prior.quadratic: weight {shown.weight:g}, damping {shown.damping:g}",
    ]
    if shown.tasks is not None:
        settings = ", ".join(f"{name} {value}" for name, value in shown.tasks.items() if name != "kind")
        policy = f"tasks: {shown.tasks['kind']}" + (f" ({settings})" if settings else "")
        notes.append(policy + (f"; keep_trace {shown.keep_trace:g}" if shown.keep_trace < 1 else ""))
    if any(layer.terms > 1 and layer.largest is not None for layer in shown.layers):
        notes.append("eigenvalues and ranks of several terms: in the basis of the nearest single term")
    if any(layer.largest is None for layer in shown.layers):
        notes.append(f"–: not computed; --spectra computes it for matrices above {FAST} rows too")
    if shown.kind == "kronecker" and shown.diagonal:
        notes.append(f"diagonal curvature only: {', '.join(shown.diagonal)}")
    return notes
