"""The full Fisher matrix, for small networks and as the reference for other kinds of curvature.

F = sum_i w_i J_i' Lambda_i J_i over all trainable parameters in one order (by name), [P, P].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hpccl.curvature.capture import measuring
from hpccl.curvature.columns import Fisher, output_columns
from hpccl.curvature.coverage import refuse_unfit
from hpccl.curvature.protocols import Examples, Piece, Precision, Totals, Weights
from hpccl.curvature.sweep import MEASURE, fit_examples
from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, CoverageError, DivergedError

__all__ = ["DenseEstimator", "DensePrecision", "split_by_name"]


@final
@dataclass(frozen=True)
class DensePrecision:
    """A Precision as one matrix, equal on all ranks.

    matrix: [P, P] fp32
    shapes: shapes of the parameters by name, in the order of the matrix
    num_examples: sum of the weights of the examples
    """

    matrix: Tensor
    shapes: Mapping[str, tuple[int, ...]]
    num_examples: float = 0.0

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DensePrecision:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: the state is damaged.
        """
        try:
            shapes = {name: tuple(shape) for name, shape in state["shapes"]}
            return cls(state["matrix"], shapes, float(state["num_examples"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the dense curvature in the checkpoint is damaged: {error}") from error

    def pieces(self, comm: Comm, like: Weights) -> list[Piece]:
        """Return the pieces of the parameters whose rows this rank multiplies; see Precision.pieces."""
        self._refuse_other(like)
        sizes = [like[name].numel() for name in self.shapes]
        rows = dict(zip(self.shapes, self.matrix.split(sizes), strict=True))
        mine = list(self.shapes)[comm.rank :: comm.size]
        return [_piece(name, tuple(self.shapes), rows[name]) for name in mine]

    def plus(self, other: Precision, comm: Comm) -> DensePrecision:
        """Return the sum.

        Raises:
            CoverageError: `other` is of another kind or over other weights.
        """
        if not isinstance(other, DensePrecision) or dict(self.shapes) != dict(other.shapes):
            raise CoverageError(f"cannot add {type(other).__name__} to a dense curvature; both must be dense")
        return DensePrecision(self.matrix + other.matrix, self.shapes, self.num_examples + other.num_examples)

    def times(self, scale: float) -> DensePrecision:
        """Return it scaled by `scale` >= 0."""
        assert scale >= 0, "a precision stays positive semi-definite"
        return DensePrecision(self.matrix * scale, self.shapes, self.num_examples)

    def rounded(self) -> DensePrecision:
        """Return itself: it serves as a reference."""
        return self

    def totals(self, comm: Comm) -> Totals:
        """See Precision.totals; equal on all ranks."""
        return Totals(float(self.matrix.diagonal().double().sum()), self.matrix.nbytes, self.matrix.nbytes)

    def to(self, device: torch.device) -> DensePrecision:
        """Return it on a device."""
        return DensePrecision(self.matrix.to(device), self.shapes, self.num_examples)

    def state_dict(self) -> dict[str, Any]:
        """The state, with keys 'kind', 'num_examples', 'shapes' and 'matrix'."""
        shapes = [[name, list(shape)] for name, shape in self.shapes.items()]
        return {"kind": "dense", "num_examples": self.num_examples, "shapes": shapes, "matrix": self.matrix}

    def shard_dict(self) -> dict[str, Any]:
        """Empty: every rank holds the whole matrix."""
        return {}

    def _refuse_other(self, names: Iterable[str]) -> None:
        differing = set(names) ^ set(self.shapes)
        if differing:
            raise CoverageError(f"dense curvatures of different parameters: only one of them has '{min(differing)}'")


def split_by_name(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Split a vector [P] of parameters with these shapes, in their order, into views by name."""
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _piece(name: str, names: tuple[str, ...], rows: Tensor) -> Piece:
    def add(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        deltas = {other: weights[other].float() - anchor[other] for other in names}
        flat = torch.cat([delta.reshape(-1) for delta in deltas.values()])
        product = (rows @ flat).view(target.shape) + damping * deltas[name]
        return torch.add(target, product, alpha=scale, out=torch.empty_like(target))

    return Piece(name, names, add)


@final
@dataclass(frozen=True)
class DenseEstimator:
    """Measures a DensePrecision by one backward pass per example and column.

    fisher, samples, seed: see DiagonalEstimator
    max_parameters: a larger model is refused
    """

    fisher: Fisher = "ggn"
    samples: int = 1
    seed: int = 0
    max_parameters: int = 10_000

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        refuse_unfit(model)
        size = sum(value.numel() for value in model.parameters() if value.requires_grad)
        if size > self.max_parameters:
            raise CoverageError(
                f"a dense curvature of {size} parameters is {4 * size**2 / 2**30:.1f} GiB; allowed: "
                f"curvature.max_parameters={self.max_parameters} parameters; use curvature.kind=kronecker, or raise it"
            )

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> DensePrecision:
        """See Estimator.estimate.

        Raises:
            CoverageError: the model is too large, or a trainable parameter is not reached.
            DivergedError: a gradient is not finite.
            WorldError: any of these on another rank.
        """
        parameters = {name: value for name, value in sorted(model.named_parameters()) if value.requires_grad}
        self.check(model)
        size = sum(value.numel() for value in parameters.values())
        matrix = torch.zeros(size, size, device=comm.device)
        count = torch.zeros(1, dtype=torch.float64, device=comm.device)

        def add() -> None:
            for part in fit_examples(model, batches):
                count.add_(part.weight.double().sum())
                for number in range(len(part)):
                    self._add(model, parameters, part.select(slice(number, number + 1)), matrix)

        all_or_none(comm, add, MEASURE)
        comm.sum_([matrix, count])
        return DensePrecision(matrix, {name: tuple(value.shape) for name, value in parameters.items()}, float(count))

    def _add(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], example: Examples, matrix: Tensor) -> None:
        with measuring(model, example.pixels.device):
            logits = model(example.pixels)
            columns = output_columns(logits, example, self.fisher, samples=self.samples, seed=self.seed)
            rows = [_gradient(logits, column, parameters) for column in columns]
        if not rows:  # a head of one class has no `ggn` columns: its Fisher matrix is 0
            return
        root = torch.stack(rows)
        if not bool(root.isfinite().all()):
            raise DivergedError(
                f"the gradient of sample {int(example.sample[0])} is not finite; "
                "curvature needs a model that has not diverged"
            )
        matrix.addmm_(root.T, root)


def _gradient(logits: Tensor, column: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        logits, list(parameters.values()), column, retain_graph=True, allow_unused=True
    )
    unreached = [name for name, grad in zip(parameters, grads, strict=True) if grad is None]
    if unreached:
        raise CoverageError(
            f"trainable parameter '{unreached[0]}' does not influence the logits and would be left unprotected; "
            "freeze what is not used (requires_grad=False)"
        )
    return torch.cat([grad.reshape(-1).float() for grad in grads if grad is not None])
