"""A map from the Laplace posterior of the last layer: one Kronecker product for each group of competing classes."""

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
from hpccl.train.memory_map.found import Found, Group, joined
from hpccl.train.score import competing, last_layer, looks
from hpccl.train.state import RunState, World

__all__ = ["by_last_layer"]

Ints = npt.NDArray[np.int64]

_BY_CLASS = 1 << 26  # numbers of the factors of each class alone
_GRADIENTS = 1 << 26  # numbers of the gradients of some classes at once: of 1,000 classes, all would be 16 GB


def by_last_layer(
    groups: Sequence[Group], state: RunState, world: World, prior_precision: float | None
) -> tuple[list[Found], float]:
    """One pass over the images; what the last layer saw waits in a file until its curvature is known."""
    try:
        layer = last_layer(state.engine.module, world, state)
    except ConfigError as error:
        raise ConfigError(
            "--posterior last_layer needs a network whose logits an nn.Linear makes, and "
            f"{type(state.engine.module).__name__} is none; use --posterior kronecker or diagonal"
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
    """Each has a posterior of its own, which is that of its rows where no other group has examples of them."""
    labels = [label for group in groups for label in group.task.classes]
    if len(labels) > len(set(labels)):
        raise ConfigError(
            "--posterior last_layer measures every task's rows of the last layer alone, and tasks of this run share "
            "some of their classes; use --posterior kronecker or diagonal"
        )


def _square(layer: nn.Linear, spools: Sequence[_Spool]) -> float:
    """|w|^2 of the competing rows."""
    rows = sorted({number for spool in spools for number in spool.classes})
    weights = [value[rows] for value in layer.parameters()]  # a bias may be absent
    return sum(float(value.detach().double().square().sum()) for value in weights)


@dataclass(frozen=True)
class _Spool:
    """Logits and inputs of the last layer of a group's examples, in a file that vanishes.

    classes: [K]
    sample: [n] of those that could be decoded; labels: [n] positions of theirs among the classes
    path: of [n, K + d] float32
    scale: of a sum over these examples, so that it stands for all that the group stands for
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
                raise DataError(f"no image of task {group.task.index} that was to be in the map can be decoded")
            labels = np.searchsorted(classes, world.stream.labels("train")[sample])
            yield cls(classes, sample, labels, path, group.total / len(sample))

    def _parts(self, among: range | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(logits, x, labels) of some examples; among: of these classes only."""
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

    def factors(self) -> _Factors:
        """Sums over the examples of each class, or of all at once if those would be too large."""
        _, inputs = self._widths()
        by_class = len(self.classes) * inputs**2 <= _BY_CLASS
        count = len(self.classes) if by_class else 1
        moments = torch.zeros(count, inputs, inputs, dtype=torch.float64)
        curvatures = torch.zeros(count, len(self.classes), len(self.classes), dtype=torch.float64)
        for logits, x, labels in self._parts():
            group = labels if by_class else torch.zeros_like(labels)
            for number in group.unique().tolist():
                own = group == number
                moments[number] += x[own].double().T @ x[own].double()
                curvatures[number] += output_curvature(logits[own])
        sizes = np.bincount(self.labels, minlength=count) if by_class else np.array([len(self.labels)])
        return _Factors(moments, curvatures, torch.from_numpy(sizes), self.scale)

    def scored(self, factors: _Factors, prior_precision: float) -> Found:
        """Every example's figures, and what every class would lose."""
        layer = factors.posterior(prior_precision)
        columns = [
            perturbed(logits, labels, top_layer_variance(x, layer)).columns() for logits, x, labels in self._parts()
        ]
        outputs, inputs = self._widths()
        removed: dict[int, float] = {}
        some = max(1, _GRADIENTS // (outputs * inputs))
        for first in range(0, outputs, some):
            among = range(first, min(first + some, outputs))
            steps = self._gradients(among)
            for number in among:  # in place, for they are large
                left = factors.posterior(prior_precision, without=number) if factors.by_class else layer
                steps[number - first] = left.solve(steps[number - first] * self.scale)
            removed |= self._removed(among, steps)
        return Found(self.sample, joined(columns), removed)

    def _widths(self) -> tuple[int, int]:
        """K and d."""
        width = self.path.stat().st_size // (4 * len(self.sample))
        return len(self.classes), width - len(self.classes)

    def _gradients(self, among: range) -> Tensor:
        """Sums of e_j x_j' over the examples of each of some classes, [len(among), K, d]."""
        total = torch.zeros(len(among), *self._widths(), dtype=torch.float64)
        for logits, x, labels in self._parts(among):
            p = logits.double().softmax(dim=1)
            error = p - torch.nn.functional.one_hot(labels, logits.shape[1]).to(p)
            for number in labels.unique().tolist():
                own = labels == number
                total[number - among.start] += error[own].T @ x[own].double()
        return total

    def _removed(self, among: range, steps: Tensor) -> dict[int, float]:
        """By number of class, the mean loss of its examples at weights that have moved by `steps`."""
        total, count = np.zeros(len(self.classes)), np.bincount(self.labels, minlength=len(self.classes))
        for logits, x, labels in self._parts(among):
            for number in labels.unique().tolist():
                own = labels == number
                moved = logits[own].double() + x[own].double() @ steps[number - among.start].T
                total[number] += float(torch.nn.functional.cross_entropy(moved, labels[own], reduction="sum"))
        return {self.classes[k]: float(total[k] / count[k]) for k in among if count[k]}


@dataclass(frozen=True)
class _Factors:
    """Of the last layer's curvature, by class of the examples: [G, d, d] and [G, K, K], and their numbers [G].

    G is 1 where they are not kept apart.
    """

    moments: Tensor
    curvatures: Tensor
    sizes: Tensor
    scale: float

    @property
    def by_class(self) -> bool:
        """Whether they are kept apart."""
        return len(self.sizes) > 1

    def posterior(self, prior_precision: float, *, without: int | None = None) -> TopLayer:
        """That of all examples, or of those of other classes as far as they are kept apart."""
        kept = torch.ones(len(self.sizes), dtype=torch.float64)
        if without is not None and self.by_class:
            kept[without] = 0
        moment = torch.einsum("g,gij->ij", kept, self.moments) / (kept * self.sizes).sum().clamp_min(1)
        curvature = torch.einsum("g,gkl->kl", kept, self.curvatures) * self.scale
        return TopLayer.of(moment, curvature, prior_precision=prior_precision)


def _refuse_infinite(rows: npt.NDArray[np.floating[Any]], sample: Ints) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DivergedError(
            f"what the network makes of sample {int(sample[bad][0])} is not finite; it has diverged, or its pixels "
            "are not finite"
        )
