"""The diagonal of the Fisher matrix: sum_i w_i diag(J_i' Lambda_i J_i), exact per example.

J_i = d logits / d weights [C, parameters], Lambda_i = diag(p) - p p' of the own-head softmax for `ggn`; the outer
product of residuals p - e_y for `mc` (y drawn from p) and `empirical` (y the label). Sums, never means: nats per
squared weight.
Source: Martens 2020, "New insights and perspectives on the natural gradient method", JMLR 21, sections 8-9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hpccl.curvature.capture import captured, first_not_finite, measuring
from hpccl.curvature.columns import Fisher, check_labels, num_columns, output_columns
from hpccl.curvature.coverage import Coverage, plan, refuse_unfit
from hpccl.curvature.protocols import Examples, Precision, Weights
from hpccl.curvature.pullback import layer_gradients, layer_squares, looped_squares, mapped_squares
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, CoverageError, DivergedError, HpcclError, WorldError

__all__ = ["Diagonal", "DiagonalEstimator"]

_PROBE = 4  # examples that the coverage is checked with


@final
@dataclass(frozen=True)
class Diagonal:
    """A diagonal Precision.

    values: fp32 by parameter name, in the parameter's shape
    num_examples: sum of the weights of the examples
    """

    values: Mapping[str, Tensor]
    num_examples: float = 0.0

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Diagonal:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: `state` is not that of a diagonal.
        """
        values = state.get("values")
        if state.get("kind") != "diagonal" or not isinstance(values, Mapping):
            raise CheckpointError(f"not the state of a diagonal curvature: kind {state.get('kind')!r}, {sorted(state)}")
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise CheckpointError(
                    f"diagonal curvature of '{name}' is not an fp32 tensor: the checkpoint is damaged"
                )
        return cls(dict(values), float(state.get("num_examples", 0.0)))

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(value.nbytes for value in self.values.values())

    def matvec(self, delta: Weights) -> Weights:
        """Values times `delta`, element by element, for the names in `delta`; in fp32.

        Raises:
            CoverageError: a name of `delta` has no curvature.
        """
        unknown = [name for name in delta if name not in self.values]
        if unknown:
            raise CoverageError(f"parameter '{unknown[0]}' has no curvature; measured: {_some(self.values)}")
        return {name: self.values[name] * value.float() for name, value in delta.items()}

    def plus(self, other: Precision) -> Diagonal:
        """The sum.

        Raises:
            CoverageError: `other` is of another kind or over other weights.
        """
        if not isinstance(other, Diagonal):
            raise CoverageError(f"cannot add {type(other).__name__} to a diagonal curvature; both must be diagonal")
        differing = self.values.keys() ^ other.values.keys()
        if differing:
            raise CoverageError(f"cannot add curvatures of different weights: only one of them has {_some(differing)}")
        values = {name: value + other.values[name] for name, value in self.values.items()}
        return Diagonal(values, self.num_examples + other.num_examples)

    def times(self, scale: float) -> Diagonal:
        """The diagonal scaled by `scale` >= 0."""
        assert scale >= 0, "a precision stays positive semi-definite"
        return Diagonal({name: value * scale for name, value in self.values.items()}, self.num_examples)

    def trace(self) -> float:
        """Sum of all values."""
        return sum(float(value.double().sum()) for value in self.values.values())

    def to(self, device: torch.device) -> Diagonal:
        """The same on a device."""
        return Diagonal({name: value.to(device) for name, value in self.values.items()}, self.num_examples)

    def state_dict(self) -> dict[str, Any]:
        """{'kind', 'num_examples', 'values'}."""
        return {"kind": "diagonal", "num_examples": self.num_examples, "values": dict(self.values)}


@final
@dataclass(frozen=True)
class DiagonalEstimator:
    """Measures a Diagonal in one pass over the examples.

    fisher: ggn: exact, K - 1 backward passes for K own-head classes; mc: `samples` labels drawn per example;
        empirical: the true label
    samples: of mc
    seed: of mc; what is drawn depends on (seed, sample) only, not on batches, order or ranks
    """

    fisher: Fisher = "ggn"
    samples: int = 1
    seed: int = 0

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Diagonal:
        """See Estimator.estimate. fp32 sums; one exchange between ranks, at the end.

        Raises:
            CoverageError: a trainable parameter is not covered.
            DataError: a label is outside its head.
            DivergedError: an activation or a gradient is not finite.
            WorldError: any of these on another rank.
        """
        values = {name: _accumulator(value) for name, value in model.named_parameters() if value.requires_grad}
        count = torch.zeros(1, dtype=torch.float64, device=comm.device)
        failure: HpcclError | None = None
        try:
            for examples, squares in self._measured(model, batches):
                count += examples.weight.double().sum().to(count.device)
                for name, value in squares.items():
                    values[name] += value
        except HpcclError as error:
            failure = error
        # Together, so that no rank waits in the sum below for one that has stopped.
        if comm.any(failure is not None):
            raise failure or WorldError("curvature stopped: another rank could not measure its part; see its message")
        comm.sum_([*values.values(), count])
        return Diagonal(values, float(count))

    def _measured(
        self, model: nn.Module, batches: Iterable[Examples]
    ) -> Iterator[tuple[Examples, Mapping[str, Tensor]]]:
        """Parts of the batches that fit in memory, each with its sums of squares."""
        refuse_unfit(model)
        like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        coverage: Coverage | None = None
        for batch in batches:
            examples = batch.to(like.device, like.dtype)
            examples = examples.select(examples.weight > 0)
            if len(examples) == 0:
                continue
            check_labels(examples)
            if coverage is None:
                with measuring(model, like.device):
                    coverage = plan(model, examples.pixels[:_PROBE])
            size, group = self._part(coverage, examples)
            for first in range(0, len(examples), size):
                part = examples.select(slice(first, first + size))
                with measuring(model, like.device):
                    squares = self._squares(model, coverage, part, group)
                yield part, squares

    def _part(self, coverage: Coverage, examples: Examples) -> tuple[int, int]:
        """How many examples, and how many columns of them, to hold at a time."""
        budget = 1 << 27 if examples.pixels.device.type == "cpu" else 1 << 31
        columns = max(1, num_columns(self.fisher, int(examples.head.sum()), self.samples))
        group = min(columns, max(1, budget // (8 * max(1, coverage.output_bytes))))
        held = coverage.graph_bytes + group * coverage.output_bytes
        return max(1, min(len(examples), budget // max(1, held))), group

    def _squares(self, model: nn.Module, coverage: Coverage, part: Examples, group: int) -> Mapping[str, Tensor]:
        with captured(model, coverage.layers) as calls:
            logits = model(part.pixels)
        if not bool(logits.isfinite().all()):
            raise _diverged(model, part)
        columns = output_columns(logits, part, self.fisher, samples=self.samples, seed=self.seed)
        by_layer = layer_squares(model, coverage.layers, calls, logits, columns, group=group)
        by_model = mapped_squares(model, coverage.mapped, part.pixels, columns, graph_bytes=coverage.graph_bytes)
        by_example, _ = looped_squares(model, coverage.looped, part.pixels, columns)
        squares = {**by_layer, **by_model, **by_example}
        if squares and not bool(torch.stack([value.sum() for value in squares.values()]).isfinite().all()):
            for name, grad in layer_gradients(coverage.layers, calls, logits, columns[:group]):
                _check_gradient(name, grad, part)
            raise _overflowed(squares, part)
        return squares


def _accumulator(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format)


def _diverged(model: nn.Module, part: Examples) -> DivergedError:
    bad_pixels = ~part.pixels.isfinite().flatten(1).all(1)
    place, rows = "the pixels", bad_pixels
    if not bool(bad_pixels.any()):
        place, rows = first_not_finite(model, part.pixels) or ("the model's output", ~bad_pixels)
    samples = _samples(part, rows)
    return DivergedError(f"{place} is not finite for samples {samples}; curvature needs a model that has not diverged")


def _check_gradient(name: str, grad: Tensor, part: Examples) -> None:
    bad = ~grad.isfinite().flatten(1).all(1).unflatten(0, (len(part), -1)).any(1)
    if bool(bad.any()):
        raise DivergedError(f"the gradient of layer '{name}' is not finite for samples {_samples(part, bad)}")


def _overflowed(squares: Mapping[str, Tensor], part: Examples) -> DivergedError:
    names = [name for name, value in squares.items() if not bool(value.sum().isfinite())]
    everyone = torch.ones(len(part), dtype=torch.bool)
    return DivergedError(
        f"squared gradients of '{names[0]}' overflow fp32 for samples {_samples(part, everyone)}; "
        "its inputs or gradients are beyond 1e19: the model has diverged"
    )


def _samples(part: Examples, rows: Tensor) -> str:
    return _some(part.sample[rows.to(part.sample.device)].tolist())


def _some(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
