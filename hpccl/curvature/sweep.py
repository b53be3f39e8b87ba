"""Shared parts of all passes over a task's examples: usable examples, one plan for all ranks, precise errors.

A rank that fails notifies the others before it raises, so that none of them waits for it in a later collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hpccl.curvature.capture import Call, captured, first_not_finite, measuring
from hpccl.curvature.columns import Wanted, check_labels, num_columns, output_columns
from hpccl.curvature.coverage import Coverage, plan, refuse_unfit
from hpccl.curvature.protocols import Examples
from hpccl.curvature.pullback import Layers, layer_gradients
from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.engine.sharded import computes_on, is_spread, whole_parameters
from hpccl.errors import DivergedError

__all__ = [
    "MEASURE",
    "Forward",
    "Sweep",
    "at_the_end",
    "fastest_layout",
    "fit_examples",
    "fitting",
    "in_parts",
    "in_step",
    "listed",
    "planned",
    "planned_together",
    "together",
    "zeros_for",
]

Made = TypeVar("Made")

MEASURE = "measure its part of the curvature"  # a step of dist.agree

_PROBE = 2  # examples that the coverage is checked with: two reveal whether each has its own rows


@dataclass(frozen=True)
class Forward:
    """A forward pass with its graph: the calls of the watched layers, logits [n, C] and columns [c, n, C] over them."""

    calls: Mapping[str, list[Call]]
    logits: Tensor
    columns: Tensor

    @property
    def edges(self) -> dict[str, GradientEdge]:
        """By layer, the graph edge where its output gradient arrives."""
        return {name: call.edge for name, (call, *_) in self.calls.items() if call.edge is not None}


@dataclass(frozen=True)
class Sweep:
    """The vectors over the logits (columns) that are pulled back for every example.

    fisher: ggn: exact, K - 1 columns for K own-head classes; mc: `samples` labels drawn per example; empirical: the
        true label; weighted: the same times its probability; predicted: the likeliest label; outputs: the gradient of
        its own-head logits' squared norm
    samples: draws of mc
    seed: seed of mc; draws depend on (seed, sample) only, not on batches, order or ranks
    """

    fisher: Wanted
    samples: int
    seed: int

    def num_columns(self, examples: Examples) -> int:
        """Return the number of columns per example."""
        return num_columns(self.fisher, int(examples.head.sum()), self.samples)

    def forward(
        self,
        model: nn.Module,
        names: Iterable[str],
        part: Examples,
        *,
        autocast: torch.dtype | None = None,
        widened: dict[str, Tensor] | None = None,
    ) -> Forward:
        """Run a forward pass of `part`; logits and columns are never in half precision.

        Args:
            model: the model.
            names: layers to watch.
            part: examples.
            autocast: the dtype of the pass; None: that of the weights.
            widened: parameters to use instead of the model's own, by name.

        Raises:
            DivergedError: the logits are not finite.
        """
        device = part.pixels.device.type
        lower = torch.autocast(device, dtype=autocast) if autocast else nullcontext()
        with captured(model, names) as calls, lower:
            logits = _logits(model, part.pixels, widened)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not is_spread(model) and not bool(logits.isfinite().all()):  # if spread, all ranks finish the pass first
            raise _diverged(model, part)
        columns = output_columns(logits, part, self.fisher, samples=self.samples, seed=self.seed)
        return Forward(calls, logits, columns)

    def blame(self, model: nn.Module, layers: Layers, part: Examples, sums: Mapping[str, Tensor]) -> DivergedError:
        """Return an error that says why `sums`, by name, are not finite although the logits of `part` are."""
        names = [name for name, value in sums.items() if not bool(value.isfinite().all())]
        everyone = torch.ones(len(part), dtype=torch.bool)
        if is_spread(model):  # another pass would be collective
            return DivergedError(
                f"activations or gradients at '{names[0]}' are not finite for samples {_samples(part, everyone)}; "
                "curvature needs a model that has not diverged"
            )
        found = self.forward(model, layers, part)
        for name, calls in found.calls.items():
            for call in calls:
                for value in call.inputs:
                    if error := _not_finite(f"the input of layer '{name}'", value, part):
                        return error
        for column in found.columns.split(1):
            for name, grad in layer_gradients(layers, found.calls, found.logits, column):
                if error := _not_finite(f"the gradient of layer '{name}'", grad, part):
                    return error
        return DivergedError(
            f"squared gradients of '{names[0]}' overflow fp32 for samples {_samples(part, everyone)}; "
            "its inputs or gradients are beyond 1e19: the model has diverged"
        )


def fit_examples(model: nn.Module, batches: Iterable[Examples]) -> Iterator[Examples]:
    """Yield the batches on the model's device, without examples of weight 0; none is empty.

    Where passes are collective, no batch is dropped: one without other examples keeps one of weight 0.

    Raises:
        CoverageError: the model's per-example gradients would be meaningless or imprecise.
        DataError: a label is outside its head.
    """
    refuse_unfit(model)
    for batch in batches:
        examples = _on_device(model, batch)
        counting = examples.weight > 0
        if is_spread(model) and not bool(counting.any()):
            yield nothing(examples)
        elif bool(counting.any()):
            examples = examples.select(counting)
            check_labels(examples)
            yield examples


def nothing(examples: Examples) -> Examples:
    """Return one example of weight 0, with which this rank takes part in a pass that the others need."""
    one = examples.select(slice(0, 1))
    return replace(one, weight=torch.zeros_like(one.weight))


def in_step(
    model: nn.Module, examples: Iterable[Examples], comm: Comm, size: Callable[[Examples], int]
) -> Iterator[Examples]:
    """Yield the examples of each batch, at most `size` at a time.

    Where passes are collective, every rank yields equally many parts of equal length, padded with examples of weight 0:
    some parameters are measured one example at a time.
    """
    batches = iter(examples)
    while (batch := together(model, comm, lambda: next(batches, None))) is not None:
        if not is_spread(model):
            yield from in_parts(batch, size(batch))
            continue
        batch = padded(batch, comm.max(len(batch)))
        yield from in_parts(batch, -(-len(batch) // comm.max(-(-len(batch) // size(batch)))))


def padded(examples: Examples, length: int) -> Examples:
    """Pad to `length` examples with copies of the first one that have weight 0."""
    places = torch.arange(length, device=examples.weight.device)
    there = places < len(examples)
    more = examples.select(torch.where(there, places, 0))
    return replace(more, weight=more.weight * there)


def together(model: nn.Module, comm: Comm, make: Callable[[], Made]) -> Made:
    """Return `make()`; where passes are collective, a rank that fails in it stops the others before the next pass."""
    return all_or_none(comm, make, MEASURE) if is_spread(model) else make()


def at_the_end(model: nn.Module, comm: Comm, make: Callable[[], Made]) -> Made:
    """Return `make()`, a whole loop of passes; a failing rank stops the others, unless `together` already did so."""
    return make() if is_spread(model) else all_or_none(comm, make, MEASURE)


def _logits(model: nn.Module, pixels: Tensor, widened: dict[str, Tensor] | None) -> Tensor:
    if widened and is_spread(model):
        with whole_parameters(model, widened):
            return cast(Tensor, model(pixels))
    if widened:
        return cast(Tensor, torch.func.functional_call(model, widened, (pixels,)))
    return cast(Tensor, model(pixels))


def _on_device(model: nn.Module, batch: Examples) -> Examples:
    if is_spread(model):  # weights may be off the device between passes
        return batch
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return batch.to(like.device, like.dtype)


def fitting(examples: Examples, each: int, room: int) -> int:
    """Return how many of the examples, at least one, to hold at a time, of `each` bytes in `room` bytes."""
    return max(1, min(len(examples), room // max(1, each)))


def in_parts(examples: Examples, size: int) -> Iterator[Examples]:
    """Yield the examples in parts of at most `size`, as equal in length as possible."""
    number = -(-len(examples) // size)
    for part in range(number):
        yield examples.select(slice(part * len(examples) // number, (part + 1) * len(examples) // number))


def fastest_layout(model: nn.Module, pixels: Tensor) -> torch.memory_format:
    """Return channels_last, in which patches and gradients need no copies, if the model accepts such pixels.

    Some models flatten by `view`, which fails on channels_last activations. A single convolution (a transformer's patch
    embedding) gains nothing.
    """
    if is_spread(model) or pixels.dim() != 4 or sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:
        return torch.contiguous_format
    some = pixels[:2]
    with torch.no_grad():
        plain = model(some)
        try:
            other = model(some.contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            return torch.contiguous_format
    agrees = bool((other - plain).norm() <= 1e-3 * plain.norm())
    return torch.channels_last if agrees else torch.contiguous_format


def planned(model: nn.Module, examples: Examples) -> Coverage:
    """Plan the coverage with a few of the examples; see coverage.plan."""
    with measuring(model, examples.pixels.device):
        return plan(model, examples.pixels[:_PROBE])


def planned_together(
    model: nn.Module, batches: Iterable[Examples], comm: Comm, known: Coverage | None = None
) -> tuple[Coverage | None, Iterator[Examples]]:
    """Return one coverage for all ranks, and this rank's usable examples; collective.

    One rank makes the plan from its first batch, so that ranks without examples have it too; None if no rank has a
    batch. Before that every rank takes exactly one batch, even if all its examples have weight 0: `batches` may be
    collective (each rank takes a batch as often as the others), so no rank may iterate further than another.

    Raises:
        HpcclError: what stopped this rank; WorldError if another rank was stopped.
    """
    if known is not None:
        return known, fit_examples(model, batches)
    assert not is_spread(model), "a network whose weights are spread is planned ahead"
    remaining = (batch for batch in batches if len(batch))

    def first_batch() -> tuple[Examples | None, Examples | None]:
        taken = next(remaining, None)
        return taken, next(fit_examples(model, [] if taken is None else [taken]), None)

    first, fit = all_or_none(comm, first_batch, MEASURE)
    having = comm.gather(torch.tensor([(first is not None) + (fit is not None)])).tolist()
    if not any(having):
        return None, iter(())
    source = having.index(max(having))  # the lowest rank with examples that count, or with any

    def plan_of_all() -> Coverage | None:
        return planned(model, fit or _on_device(model, first)) if comm.rank == source and first is not None else None

    coverage = all_or_none(comm, plan_of_all, MEASURE)
    return _shared(coverage, source, comm), fit_examples(model, chain([] if first is None else [first], remaining))


def listed(names: Iterable[object]) -> str:
    """Join the first names, and say how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def zeros_for(parameter: Tensor) -> Tensor:
    """Return an fp32 accumulator of zeros in the parameter's shape."""
    return torch.zeros(parameter.shape, dtype=torch.float32, device=computes_on(parameter))


def _shared(coverage: Coverage | None, source: int, comm: Comm) -> Coverage:
    """Broadcast the coverage of rank `source`; elsewhere `coverage` is ignored."""
    text = json.dumps(asdict(coverage)) if coverage else None
    fields: dict[str, Any] = json.loads(comm.broadcast_text(text, source=source))
    for name in ("mapped", "looped", "widened", "factored"):
        fields[name] = tuple(fields[name])
    return Coverage(**fields)


def _diverged(model: nn.Module, part: Examples) -> DivergedError:
    bad_pixels = ~part.pixels.isfinite().flatten(1).all(1)
    place, rows = "the pixels", bad_pixels
    if not bool(bad_pixels.any()):
        place, rows = first_not_finite(model, part.pixels) or ("the model's output", ~bad_pixels)
    samples = _samples(part, rows)
    return DivergedError(
        f"non-finite values in {place} for samples {samples}; curvature needs a model that has not diverged"
    )


def _not_finite(what: str, value: Tensor, part: Examples) -> DivergedError | None:
    finite = value.isfinite().flatten(1).all(1).unflatten(0, (len(part), -1)).all(1)
    if bool(finite.all()):
        return None
    return DivergedError(f"non-finite values in {what} for samples {_samples(part, ~finite)}")


def _samples(part: Examples, rows: Tensor) -> str:
    return listed(part.sample[rows.to(part.sample.device)].tolist())
