"""The diagonal of the Fisher matrix: sum_i w_i diag(J_i' Lambda_i J_i), exact per example.

J_i = d logits / d weights [C, parameters], Lambda_i = diag(p) - p p' of the own-head softmax for `ggn`; the outer
product of residuals p - e_y for `mc` (y drawn from p) and `empirical` (y the label). Sums, never means: nats per
squared weight.
Source: Martens 2020, "New insights and perspectives on the natural gradient method", JMLR 21, sections 8-9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from hpccl.curvature.capture import measuring, working_bytes
from hpccl.curvature.columns import Wanted
from hpccl.curvature.coverage import Coverage, refuse_unfit, widen
from hpccl.curvature.layers import Power, raised, squares
from hpccl.curvature.protocols import Examples, Piece, Precision, Totals, Weights, strided_like
from hpccl.curvature.pullback import Layers, layer_squares, looped_squares, mapped_squares, stream_gradients
from hpccl.curvature.sweep import (
    Forward,
    Sweep,
    at_the_end,
    fit_examples,
    fitting,
    in_step,
    listed,
    planned,
    together,
    zeros_for,
)
from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from hpccl.dist.spread import (
    Leaf,
    Leaves,
    Place,
    Slab,
    Stored,
    aligned,
    elements,
    fetch,
    mapped,
    own,
    placed_whole,
    wholes,
)
from hpccl.engine.sharded import is_spread, parameters_of
from hpccl.errors import CheckpointError, CoverageError

__all__ = ["Diagonal", "DiagonalEstimator", "accumulated", "measured_parts", "summed_diagonal"]


@final
@dataclass(frozen=True)
class Diagonal:
    """A diagonal Precision.

    leaves: fp32 by parameter name, in the parameter's shape, whole or spread as the weights are
    num_examples: sum of the weights of the examples
    """

    leaves: Leaves
    num_examples: float = 0.0

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], place: Place = placed_whole) -> Diagonal:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: `state` is not that of a diagonal.
        """
        values = state.get("values")
        if state.get("kind") != "diagonal" or not isinstance(values, Mapping):
            raise CheckpointError(f"not the state of a diagonal curvature: kind {state.get('kind')!r}, {sorted(state)}")
        for name, value in values.items():
            if not isinstance(value, (Tensor, Stored)) or getattr(value, "dtype", None) != torch.float32:
                raise CheckpointError(
                    f"diagonal curvature of '{name}' is not an fp32 tensor: the checkpoint is damaged"
                )
        return cls(place(values), float(state.get("num_examples", 0.0)))

    @property
    def values(self) -> dict[str, Tensor]:
        """The diagonal by parameter name, if nothing is spread."""
        return wholes(self.leaves)

    @property
    def num_bytes(self) -> int:
        """Bytes held by this rank."""
        return sum(value.nbytes for value in self._own)

    @property
    def _own(self) -> list[Tensor]:
        """The tensors that this rank holds."""
        return [own(leaf) for leaf in self.leaves.values()]

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.leaves]
        if unknown:
            raise CoverageError(f"parameter '{unknown[0]}' has no curvature; measured: {listed(self.leaves)}")

    def pieces(self, comm: Comm, like: Weights) -> list[Piece]:
        """Return the pieces of the parameters that this rank owns; see Precision.pieces.

        Raises:
            CoverageError: a name of `like` has no curvature.
        """
        self._refuse_unknown(like)
        owner = owners({name: float(weight.numel()) for name, weight in like.items()}, comm.size)
        mine = fetch(self.leaves, [name for name in like if owner[name] == comm.rank], comm)
        return [_piece(name, strided_like(value, like[name])) for name, value in mine.items()]

    def plus(self, other: Precision, comm: Comm) -> Diagonal:
        """Return the sum.

        Raises:
            CoverageError: `other` is of another kind or over other weights.
        """
        if not isinstance(other, Diagonal):
            raise CoverageError(f"cannot add {type(other).__name__} to a diagonal curvature; both must be diagonal")
        differing = self.leaves.keys() ^ other.leaves.keys()
        if differing:
            raise CoverageError(f"cannot add curvatures of different weights: only one of them has {listed(differing)}")
        values = {name: _sum(leaf, aligned(other.leaves[name], leaf, comm)) for name, leaf in self.leaves.items()}
        return Diagonal(values, self.num_examples + other.num_examples)

    def times(self, scale: float) -> Diagonal:
        """Return the diagonal scaled by `scale` >= 0."""
        assert scale >= 0, "a precision stays positive semi-definite"
        values = {name: mapped(leaf, lambda value: value * scale) for name, leaf in self.leaves.items()}
        return Diagonal(values, self.num_examples)

    def rounded(self) -> Diagonal:
        """Return itself: a product with a diagonal is cheap already."""
        return self

    def totals(self, comm: Comm) -> Totals:
        """See Precision.totals."""
        whole = [leaf for leaf in self.leaves.values() if isinstance(leaf, Tensor)]
        parts = [leaf.local for leaf in self.leaves.values() if isinstance(leaf, Slab) and leaf.span.copy == 0]
        spread = torch.tensor([_trace(parts), sum(part.nbytes for part in parts)], dtype=torch.float64)
        most = self.num_bytes
        if any(isinstance(leaf, Slab) for leaf in self.leaves.values()):
            comm.sum_([spread])
            most = comm.max(most)
        trace, num_bytes = spread.tolist()
        return Totals(trace + _trace(whole), int(num_bytes) + sum(value.nbytes for value in whole), most)

    def to(self, device: torch.device) -> Diagonal:
        """Return it on a device."""
        return Diagonal({name: leaf.to(device) for name, leaf in self.leaves.items()}, self.num_examples)

    def state_dict(self) -> dict[str, Any]:
        """The state, with keys 'kind', 'num_examples' and 'values'."""
        return {"kind": "diagonal", "num_examples": self.num_examples, "values": dict(self.leaves)}

    def shard_dict(self) -> dict[str, Any]:
        """Empty: `state_dict` has the spread leaves by name, like weights."""
        return {}


def summed_diagonal(model: nn.Module, values: Mapping[str, Tensor], count: float, comm: Comm) -> Diagonal:
    """Sum all ranks' values, whole or divided as the model's weights are; collective."""
    comm.sum_(list(values.values()))
    weights, _ = parameters_of(model)
    found: dict[str, Leaf] = {}
    for name, value in values.items():
        like = weights[name]
        found[name] = value
        if isinstance(like, Slab):
            found[name] = Slab(elements(value, like.span.start, like.span.stop).clone(), like.span)
    return Diagonal(found, count)


def accumulated(model: nn.Module, parts: Iterable[tuple[Tensor, Mapping[str, Tensor]]], comm: Comm) -> Diagonal:
    """Sum, over all parts of all ranks, fp32 values by parameter; collective, one exchange at the end.

    parts: total weight [] of a part's examples, and its values; made while they are summed, so that a failure on one
        rank ends all
    """
    values = {name: zeros_for(value) for name, value in model.named_parameters() if value.requires_grad}
    count = torch.zeros(1, dtype=torch.float64, device=comm.device)

    def add() -> None:
        for weight, found in parts:
            count.add_(weight.to(count.device))
            for name, value in found.items():
                values[name] += value

    at_the_end(model, comm, add)
    comm.sum_([count])
    return summed_diagonal(model, values, float(count), comm)


def measured_parts(
    model: nn.Module,
    batches: Iterable[Examples],
    comm: Comm,
    known: Coverage | None,
    *,
    size: Callable[[Coverage, Examples], int],
    measure: Callable[[nn.Module, Coverage, Examples], Mapping[str, Tensor]],
) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """Yield, for `accumulated`, parts of the batches with what `measure` returns for each.

    known: planned with the first batch if None
    size: how many of the examples to hold at a time
    """
    coverage = known

    def fits(examples: Examples) -> int:
        nonlocal coverage
        coverage = coverage or planned(model, examples)
        return size(coverage, examples)

    for part in in_step(model, fit_examples(model, batches), comm, fits):
        assert coverage is not None, "a size was asked for first"
        with measuring(model, part.pixels.device):
            found = together(model, comm, partial(measure, model, coverage, part))
        yield part.weight.double().sum(), found


@final
@dataclass(frozen=True)
class DiagonalEstimator:
    """Measures a Diagonal in one pass over the examples.

    fisher: ggn: exact, K - 1 backward passes for K own-head classes; mc: `samples` labels drawn per example;
        empirical: the true label; weighted: the same times its probability; predicted: the likeliest label;
        outputs: no Fisher matrix but 2 sum_i w_i |d |z_i|^2 / dw| for own-head logits z_i, the importances of Memory
        Aware Synapses (see `hpccl.config.curvature.MasCurvature`)
    samples: draws of mc
    seed: seed of mc; draws depend on (seed, sample) only, not on batches, order or ranks
    known: see KroneckerPass
    """

    fisher: Wanted = "ggn"
    samples: int = 1
    seed: int = 0
    known: Coverage | None = None

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        refuse_unfit(model)

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Diagonal:
        """See Estimator.estimate. fp32 sums; one exchange between ranks, at the end.

        Raises:
            CoverageError: a trainable parameter is not covered.
            DataError: a label is outside its head.
            DivergedError: an activation or a gradient is not finite.
            WorldError: any of these on another rank.
        """

        def size(coverage: Coverage, examples: Examples) -> int:
            return self._part(coverage, examples)[0]

        parts = measured_parts(model, batches, comm, self.known, size=size, measure=self._squares)
        total = accumulated(model, parts, comm)
        return total.times(2.0) if self.fisher == "outputs" else total

    def _part(self, coverage: Coverage, examples: Examples) -> tuple[int, int]:
        """Return how many examples, and how many columns of them, to hold at a time."""
        room = working_bytes(examples.pixels.device) // 2  # squares take as much again
        columns = max(1, self._sweep.num_columns(examples))
        group = min(columns, max(1, room // (8 * max(1, coverage.output_bytes))))
        held = coverage.graph_bytes + group * coverage.output_bytes
        return fitting(examples, held, room), group

    def _squares(self, model: nn.Module, coverage: Coverage, part: Examples) -> Mapping[str, Tensor]:
        rows = widen(model, coverage.widened, len(part))
        found = self._sweep.forward(model, coverage.layers, part, widened=rows)
        columns = found.columns
        power: Power = 1 if self.fisher == "outputs" else 2
        if is_spread(model):
            by_layer = passing_squares(model, coverage.layers, found, rows, power=power)
        else:
            _, group = self._part(coverage, part)
            by_layer = layer_squares(
                model, coverage.layers, found.calls, found.logits, columns, rows=rows, group=group, power=power
            )
        mapped = [name for name in coverage.mapped if name not in rows]
        by_model = mapped_squares(model, mapped, part.pixels, columns, graph_bytes=coverage.graph_bytes, power=power)
        by_example, _ = looped_squares(model, coverage.looped, part.pixels, columns, power=power)
        total = {**by_layer, **by_model, **by_example}
        if total and not bool(torch.stack([value.sum() for value in total.values()]).isfinite().all()):
            raise self._sweep.blame(model, coverage.layers, part, {name: v.sum() for name, v in total.items()})
        return total

    @property
    def _sweep(self) -> Sweep:
        return Sweep(self.fisher, self.samples, self.seed)


def passing_squares(
    model: nn.Module, layers: Layers, found: Forward, rows: Mapping[str, Tensor], *, power: Power = 2
) -> dict[str, Tensor]:
    """Return squares by full name: each layer's, taken while its weights are whole, and those of `rows` [n, ...].

    rows: parameters with one row per example, see `coverage.widen`
    """
    total: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        total[name] = total[name] + value if name in total else value

    def visit(name: str, grad: Tensor) -> None:
        if name in rows:
            add(name, raised(grad, power).sum(0, keepdim=True))
            return
        names = layers[name]
        module, inputs = model.get_submodule(name), found.calls[name][0].inputs
        by_local = squares(module, inputs, grad[:, None], names, len(found.logits), power=power)
        for local, value in by_local.items():
            add(names[local], value)

    edges = found.edges | {name: get_gradient_edge(value) for name, value in rows.items()}
    stream_gradients(edges, found.logits, found.columns, visit)
    return total


def _sum(first: Leaf, second: Leaf) -> Leaf:
    """Add on the second's device: an engine may hold in host memory what was read from a checkpoint onto the GPU."""
    if isinstance(first, Slab):
        assert isinstance(second, Slab), "both were aligned"
        return replace(second, local=first.local.to(second.local.device) + second.local)
    assert isinstance(second, Tensor), "both were aligned"
    return first.to(second.device) + second


def _trace(values: Iterable[Tensor]) -> float:
    return sum(float(value.double().sum()) for value in values)


def _piece(name: str, values: Tensor) -> Piece:
    def add(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        difference = weights[name].float() - anchor[name]
        # In the target's own layout, which is that of the buckets in which gradients are averaged.
        total = torch.addcmul(target, values, difference, value=scale, out=torch.empty_like(target))
        return total.add_(difference, alpha=scale * damping)

    return Piece(name, (name,), add)
