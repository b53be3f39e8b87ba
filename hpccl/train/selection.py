"""Choosing a task's memory, one case per selector. Each rank computes the scores of its share of the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.memory import (
    FeatureSelector,
    GreedySelector,
    PosteriorSelector,
    ReconstructionSelector,
    ReservoirSelector,
    ScoreSelector,
    UniformSelector,
)
from hpccl.data.protocols import Task
from hpccl.memory.by_class import by_class
from hpccl.memory.greedy import herding, k_center, matching, welling
from hpccl.memory.score import (
    Projection,
    Residuals,
    TopLayer,
    error,
    gini,
    leverage,
    output_curvature,
    residual,
    sensitivity,
    step_size,
    whole_leverage,
    whole_sensitivity,
)
from hpccl.memory.select import Candidates, Choice, scored, uniform
from hpccl.train.kept import admitted_greedily
from hpccl.train.score import Look, competing, looks
from hpccl.train.state import RunState, World
from hpccl.train.variance import logit_variances

__all__ = ["chosen"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
# Purposes of hashes; in a hash, the candidates' `words` come first.
_PROBES, _PROJECTION = 11, 12
_TOGETHER = 4096  # examples whose gradients are computed at a time


def chosen(task: Task, given: Candidates, state: RunState, world: World) -> Choice:
    """Return what the configured selector keeps of the task's examples; collective.

    Raises:
        ConfigError: the selector needs a last layer that is an nn.Linear, or a smaller network.
        CoverageError: the curvature of the whole network cannot be measured.
        DivergedError: a score is not finite.
        Stopped: the run was asked to stop.
    """
    config = world.config.memory.selector
    match config:
        case UniformSelector() | ReservoirSelector():
            return uniform(given)
        case GreedySelector():
            return _in_order_of_arrival(admitted_greedily(world.config, world.stream, task, np.zeros(0, np.int64)))
        case ScoreSelector() | PosteriorSelector():
            score, sample = _collected(_scored(config, task, given, state, world))
            choice = scored(score, sample, given, world.comm, sampled=config.sampled)
            # Memory would stand for its task, whose other examples are in the quadratic.
            return replace(choice, weight=np.ones(len(choice.weight))) if world.config.prior.stands_alone else choice
        case FeatureSelector():
            return _by_features(config, task, given, state, world)
        case ReconstructionSelector():
            return _reconstruction(config, task, given, state, world)
        case _:
            assert_never(config)


def _in_order_of_arrival(sample: Ints) -> Choice:
    order = np.argsort(sample)
    return Choice(sample[order], order.astype(np.int64), np.ones(len(sample)), np.zeros(len(sample)))


# ---------------------------------------------------------------- scores

Scored: TypeAlias = tuple[Ints, npt.NDArray[np.bool_], Tensor]  # of a batch: positions, whether decoded, scores


def _collected(batches: Iterable[Scored]) -> tuple[npt.NDArray[np.float64], Ints]:
    """Return the scores of this rank's share and their sample positions; -inf where an image cannot be decoded."""
    found, samples = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for sample, valid, score in batches:
        found.append(np.where(valid, score.double().cpu().numpy(), -np.inf))
        samples.append(sample)
    return np.concatenate(found), np.concatenate(samples)


def _scored(
    config: ScoreSelector | PosteriorSelector, task: Task, given: Candidates, state: RunState, world: World
) -> Iterator[Scored]:
    """Yield the scores of each batch of this rank's share; collective."""
    classes = competing(task, world)

    def labels(sample: Ints, logits: Tensor) -> Tensor:
        return _labels(sample, classes, world).to(logits.device)

    match config:
        case ScoreSelector():
            for look in looks(given.samples, classes, state, world, inputs=False):
                score = _score_of_logits(config.kind, look.logits, labels(look.sample, look.logits))
                yield look.sample, look.valid, score
        case PosteriorSelector(network="all"):
            for each in logit_variances(task, given.samples, state, world, prior_precision=config.prior_precision):
                known = labels(each.sample, each.logits)
                yield each.sample, each.valid, _score_of_variance(config.kind, each.logits, each.variance, known)
        case PosteriorSelector():
            layer = _top_layer(task, given, state, world, prior_precision=config.prior_precision)
            for look in looks(given.samples, classes, state, world, inputs=True):
                known = labels(look.sample, look.logits)
                yield look.sample, look.valid, _score_of_layer(config.kind, look, known, layer)


def _score_of_logits(kind: Literal["gini", "error", "residual"], logits: Tensor, labels: Tensor) -> Tensor:
    match kind:
        case "gini":
            return gini(logits)
        case "error":
            return error(logits, labels)
        case "residual":
            return residual(logits, labels)


def _score_of_variance(
    kind: Literal["leverage", "sensitivity"], logits: Tensor, variance: Tensor, labels: Tensor
) -> Tensor:
    match kind:
        case "leverage":
            return whole_leverage(logits, variance)
        case "sensitivity":
            return whole_sensitivity(logits, variance, labels)


def _score_of_layer(kind: Literal["leverage", "sensitivity"], look: Look, labels: Tensor, layer: TopLayer) -> Tensor:
    match kind:
        case "leverage":
            return leverage(look.logits, look.x, layer)
        case "sensitivity":
            return sensitivity(look.logits, look.x, labels, layer)


def _top_layer(task: Task, given: Candidates, state: RunState, world: World, *, prior_precision: float) -> TopLayer:
    """Return the last layer's posterior on the task, from a pass of its own that keeps the two factors only."""
    classes = competing(task, world)
    moment: Tensor | None = None
    curvature = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.float64)
    for look in looks(given.samples, classes, state, world, inputs=True):
        good = torch.from_numpy(look.valid).to(look.x.device)
        x = look.x[good].double()
        product = (x.T @ x).cpu()
        moment = product if moment is None else moment + product
        curvature += output_curvature(look.logits[good]).cpu()
        count += len(x)
    assert moment is not None, "a task has examples"
    world.comm.sum_([moment, curvature, count])
    return TopLayer.of(moment / count.clamp_min(1), curvature, prior_precision=prior_precision).to(state.engine.device)


# ---------------------------------------------------------------- features and gradients


@dataclass(frozen=True)
class _Share:
    """This rank's share of the task, in host memory until the choice is made.

    sample: [share] positions; valid: [share] bool, could be decoded
    x: [share, d] input of the last layer, with a 1 appended for the bias
    logits: [share, K] of the competing classes; labels: [share] positions among these
    """

    sample: Ints
    valid: npt.NDArray[np.bool_]
    x: Tensor
    logits: Tensor
    labels: Tensor

    @classmethod
    def of(cls, task: Task, given: Candidates, state: RunState, world: World) -> _Share:
        classes = competing(task, world)
        seen = list(_on_host(looks(given.samples, classes, state, world, inputs=True)))
        sample = np.concatenate([look.sample for look in seen])
        return cls(
            sample=sample,
            valid=np.concatenate([look.valid for look in seen]),
            x=torch.cat([look.x for look in seen]),
            logits=torch.cat([look.logits for look in seen]),
            labels=_labels(sample, classes, world),
        )


def _on_host(seen: Iterable[Look]) -> Iterator[Look]:
    for look in seen:
        yield replace(look, logits=look.logits.cpu(), x=look.x.cpu())


def _labels(sample: Ints, classes: list[int], world: World) -> Tensor:
    """Return the positions of the samples' labels in `classes`."""
    return torch.from_numpy(np.searchsorted(classes, world.stream.labels("train")[sample]))


def _by_features(config: FeatureSelector, task: Task, given: Candidates, state: RunState, world: World) -> Choice:
    """Choose by class, from the inputs of the last layer."""

    def pick(rows: Floats, keep: int) -> tuple[Ints, npt.NDArray[np.float64]]:
        return _feature_order(config.kind, rows, keep), np.ones(keep)

    seen = _Share.of(task, given, state, world)
    found = by_class(seen.x[:, :-1], seen.sample, seen.valid, given=given, comm=world.comm, pick=pick)
    return replace(found, weight=np.ones(len(found.sample)))


def _feature_order(kind: Literal["herding", "welling", "k_center"], rows: Floats, keep: int) -> Ints:
    match kind:
        case "herding":
            return herding(rows, keep)
        case "welling":
            return welling(rows, keep)
        case "k_center":
            return k_center(rows, keep)


def _reconstruction(
    config: ReconstructionSelector, task: Task, given: Candidates, state: RunState, world: World
) -> Choice:
    """Choose, by class, examples that match sums or means of last-layer gradients; objectives are in docs/memory.md."""
    prior, comm = world.config.prior, world.comm
    seen = _Share.of(task, given, state, world)
    good = torch.from_numpy(seen.valid)
    total = torch.stack([seen.x[good].double().square().sum(), good.double().sum()])
    comm.sum_([total])
    num_classes, inputs = seen.logits.shape[1], seen.x.shape[1]
    residuals = Residuals.around(
        num_classes=num_classes,
        inputs=inputs,
        probes=config.probes,
        size=step_size(float(total[0] / total[1].clamp_min(1)), config.radius),
        words=(*given.words, _PROBES),
        true_share=prior.true_share(given.keep, len(given.samples)) if prior.mixes else float(prior.some_true),
    )
    outputs = (config.probes + 1) * num_classes
    words = (*given.words, _PROJECTION)
    project = Projection.of(outputs=outputs, inputs=inputs, size=config.projection, words=words)
    weight = prior.quadratic.weight
    width = min(outputs * inputs, config.projection)

    def vectors(part: slice) -> Tensor:
        """Return projected gradients [n, D]; with a quadratic [n, 2 D], followed by its gradient for each example."""
        logits, x = seen.logits[part], seen.x[part]
        own = project(residuals(logits, x, seen.labels[part]), x)
        return torch.cat([own, weight * project(residuals.first_order(logits, x), x)], dim=1) if weight else own

    def pick(rows: Floats, keep: int) -> tuple[Ints, npt.NDArray[np.float64]]:
        own, others = rows[:, :width], rows[:, width:] if weight else None
        if config.weights == "equal":
            return herding(own if others is None else own - others, keep, normalise=False), np.ones(keep)
        return matching(own, keep, ridge=config.ridge, given=others)

    parts = [slice(start, start + _TOGETHER) for start in range(0, len(seen.x), _TOGETHER)]
    empty = torch.zeros(0, 2 * width if weight else width)
    gradients = torch.cat([empty, *map(vectors, parts)])
    choice = by_class(gradients, seen.sample, seen.valid, given=given, comm=comm, pick=pick)
    if config.weights == "equal":
        return replace(choice, weight=np.ones(len(choice.weight)))
    # As it may stand alone, whatever the size of the memory.
    scale = len(given.samples) / max(given.keep, 1) if world.config.prior.stands_alone else 1.0
    return replace(choice, weight=choice.weight * scale)
