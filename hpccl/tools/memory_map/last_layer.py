"""The memory map by the last layer's Laplace posterior: one Kronecker product for each group of competing classes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpccl.errors import ConfigError, DataError, DivergedError
from hpccl.memory.perturbation import best_prior_precision, perturbed, top_layer_variance
from hpccl.memory.score import TopLayer, output_curvature
from hpccl.tools.memory_map.found import Found, Group, joined
from hpccl.train.score import competing, last_layer, looks
from hpccl.train.state import RunState, World

__all__ = ["by_last_layer"]

Ints = npt.NDArray[np.int64]

_DECOMPOSED = 3e12  # K (K^3 + d^3): the work up to which each class's posterior is decomposed
_GRADIENTS = 1 << 26  # elements of gradients at a time: for all of 1,000 classes they would take 16 GB


def by_last_layer(
    groups: Sequence[Group], state: RunState, world: World, prior_precision: float | None
) -> tuple[list[Found], float]:
    """Return the figures of every group, and delta, from one pass over the images.

    Logits and inputs of the last layer are kept in a file until its curvature is known.

    prior_precision: delta; None: the one with the largest evidence
    """
    try:
        layer = last_layer(state.engine.module, world, state)
    except ConfigError as error:
        raise ConfigError(
            "--posterior last_layer needs a network whose last layer is an nn.Linear; "
            f"{type(state.engine.module).__name__} has none; use --posterior kronecker or diagonal"
        ) from error
    with contextlib.ExitStack() as stack:
        _refuse_shared(groups)
        spools = [stack.enter_context(_Spool.of(group, state, world)) for group in groups if len(group.samples)]
        factors = [spool.factors() for spool in spools]
        delta = prior_precision
        if delta is None:
            posteriors = [each.posterior(1.0) for each in factors]
            values = [torch.outer(each.inputs, each.outputs).flatten() for each in posteriors]
            delta = best_prior_precision(torch.cat(values), _square(layer, spools))
        return [spool.scored(each, delta) for spool, each in zip(spools, factors, strict=True)], delta


def _refuse_shared(groups: Sequence[Group]) -> None:
    """Refuse groups that share classes: each has a posterior of its own rows, from its own examples alone."""
    labels = [label for group in groups for label in group.task.classes]
    if len(labels) > len(set(labels)):
        raise ConfigError(
            "--posterior last_layer needs tasks without common classes, but tasks of this run share some; "
            "use --posterior kronecker or diagonal"
        )


def _square(layer: nn.Linear, spools: Sequence[_Spool]) -> float:
    """Return |w|^2 over the last layer's rows of competing classes."""
    rows = sorted({number for spool in spools for number in spool.classes})
    weights = [value[rows] for value in layer.parameters()]  # a bias may be absent
    return sum(float(value.detach().double().square().sum()) for value in weights)


@dataclass(frozen=True)
class _Spool:
    """Logits and inputs of the last layer of a group's examples, in a temporary file.

    classes: [K] the competing classes
    sample: [n] positions of the decodable examples; labels: [n] positions of their labels in `classes`
    path: of the file, [n, K + d] float32
    scale: factor from a sum over these examples to one over all that the group represents
    """

    classes: list[int]
    sample: Ints
    labels: Ints
    path: Path
    scale: float

    @classmethod
    @contextlib.contextmanager
    def of(cls, group: Group, state: RunState, world: World) -> Iterator[_Spool]:
        classes = competing(group.task, world)
        kept: list[Ints] = [np.zeros(0, dtype=np.int64)]
        with tempfile.TemporaryDirectory(prefix="hpccl-map-") as folder:
            path = Path(folder) / "rows"
            with path.open("wb") as file:
                for look in looks(group.samples, classes, state, world, inputs=True):
                    rows = torch.cat([look.logits, look.x], dim=1).cpu().numpy()[look.valid]
                    _refuse_infinite(rows, look.sample[look.valid])
                    rows.astype(np.float32).tofile(file)
                    kept.append(look.sample[look.valid])
            sample = np.concatenate(kept)
            if not len(sample):
                raise DataError(f"none of the images of task {group.task.index} selected for the map can be decoded")
            labels = np.searchsorted(classes, world.stream.labels("train")[sample])
            yield cls(classes, sample, labels, path, group.total / len(sample))

    def _parts(self, among: range | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (logits, x, labels) in batches; among: only of examples whose label is in this range of `classes`."""
        rows = np.memmap(self.path, dtype=np.float32, mode="r").reshape(len(self.sample), -1)
        size = max(1, min(4096, (1 << 25) // len(self.classes) ** 2))
        some = np.ones(len(rows), dtype=bool)
        if among is not None:
            some = (self.labels >= among.start) & (self.labels < among.stop)
        places = np.flatnonzero(some)
        for start in range(0, len(places), size):
            here = places[start : start + size]
            part = torch.from_numpy(np.array(rows[here]))
            labels = torch.from_numpy(self.labels[here])
            yield part[:, : len(self.classes)], part[:, len(self.classes) :], labels

    def factors(self, among: range | None = None) -> _Factors:
        """Sum the curvature's factors over the examples; among: only over those with a label in this range."""
        outputs, inputs = self._widths()
        moment = torch.zeros(inputs, inputs, dtype=torch.float64)
        curvature, size = torch.zeros(outputs, outputs, dtype=torch.float64), 0
        for logits, x, _ in self._parts(among):
            moment += x.double().T @ x.double()
            curvature += output_curvature(logits)
            size += len(x)
        return _Factors(moment, curvature, size, self.scale)

    def scored(self, factors: _Factors, prior_precision: float) -> Found:
        """Return every example's figures, and every class's loss if it had not been learned."""
        layer = factors.posterior(prior_precision)
        columns = [
            perturbed(logits, labels, top_layer_variance(x, layer)).columns() for logits, x, labels in self._parts()
        ]
        return Found(self.sample, joined(columns), self._without_each(factors, prior_precision))

    def _without_each(self, factors: _Factors, prior_precision: float) -> dict[int, float]:
        """Return, by class number, the mean loss of its examples after a step that removes them.

        Empty where the classes' own posteriors would take too long.
        """
        outputs, inputs = self._widths()
        removed: dict[int, float] = {}
        if outputs * (outputs**3 + inputs**3) > _DECOMPOSED:
            return removed
        some = max(1, _GRADIENTS // (outputs * inputs))
        for first in range(0, outputs, some):
            among = range(first, min(first + some, outputs))
            steps = self._gradients(among)
            for number in among:  # in place, as they are large
                left = factors.less(self.factors(range(number, number + 1))).posterior(prior_precision)
                steps[number - first] = left.solve(steps[number - first] * self.scale)
            removed |= self._removed(among, steps)
        return removed

    def _widths(self) -> tuple[int, int]:
        """Return K and d."""
        width = self.path.stat().st_size // (4 * len(self.sample))
        return len(self.classes), width - len(self.classes)

    def _gradients(self, among: range) -> Tensor:
        """Return sums of e_j x_j' [len(among), K, d] over the examples of each class in `among`; e = p - y."""
        total = torch.zeros(len(among), *self._widths(), dtype=torch.float64)
        for logits, x, labels in self._parts(among):
            p = logits.double().softmax(dim=1)
            error = p - torch.nn.functional.one_hot(labels, logits.shape[1]).to(p)
            for number in labels.unique().tolist():
                own = labels == number
                total[number - among.start] += error[own].T @ x[own].double()
        return total

    def _removed(self, among: range, steps: Tensor) -> dict[int, float]:
        """Return, by class number, the mean loss of its examples at weights moved by its `steps` [len(among), K, d]."""
        total, count = np.zeros(len(self.classes)), np.bincount(self.labels, minlength=len(self.classes))
        for logits, x, labels in self._parts(among):
            for number in labels.unique().tolist():
                own = labels == number
                moved = logits[own].double() + x[own].double() @ steps[number - among.start].T
                total[number] += float(torch.nn.functional.cross_entropy(moved, labels[own], reduction="sum"))
        return {self.classes[k]: float(total[k] / count[k]) for k in among if count[k]}


@dataclass(frozen=True)
class _Factors:
    """The last layer's curvature: sums of both factors over examples, and the number of examples.

    moment: [d, d]; curvature: [K, K]
    scale: as in `_Spool`
    """

    moment: Tensor
    curvature: Tensor
    size: int
    scale: float

    def less(self, some: _Factors) -> _Factors:
        """Return the sums without some of the examples."""
        return _Factors(self.moment - some.moment, self.curvature - some.curvature, self.size - some.size, self.scale)

    def posterior(self, prior_precision: float) -> TopLayer:
        """Return the posterior given these examples."""
        moment, curvature = self.moment / max(self.size, 1), self.curvature * self.scale
        return TopLayer.of(moment, curvature, prior_precision=prior_precision)


def _refuse_infinite(rows: npt.NDArray[np.floating[Any]], sample: Ints) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DivergedError(
            f"the network's output for sample {int(sample[bad][0])} is not finite; the network has diverged, or the "
            "pixels are not finite"
        )
