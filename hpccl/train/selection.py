"""Choosing a task's memory, one case per selector. Each rank computes the scores of its share of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

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
# (look, positions of its labels among the competing classes) -> scores [n]
Scores: TypeAlias = Callable[[Look, Tensor], Tensor]

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
        case ScoreSelector():
            of_kind: dict[str, Scores] = {
                "gini": lambda look, _: gini(look.logits),
                "error": lambda look, labels: error(look.logits, labels),
                "residual": lambda look, labels: residual(look.logits, labels),
            }
            score, sample = _scores(task, given, state, world, of_kind[config.kind], inputs=False)
            return scored(score, sample, given, world.comm, sampled=config.sampled)
        case PosteriorSelector(network="all"):
            score, sample = _whole_scores(config, task, given, state, world)
            return scored(score, sample, given, world.comm, sampled=config.sampled)
        case PosteriorSelector():
            layer = _top_layer(task, given, state, world, prior_precision=config.prior_precision)
            of_kind = {
                "leverage": lambda look, _: leverage(look.logits, look.x, layer),
                "sensitivity": lambda look, labels: sensitivity(look.logits, look.x, labels, layer),
            }
            score, sample = _scores(task, given, state, world, of_kind[config.kind], inputs=True)
            return scored(score, sample, given, world.comm, sampled=config.sampled)
        case FeatureSelector():
            by_kind: dict[str, Callable[[Floats, int], Ints]]
            by_kind = {"herding": herding, "welling": welling, "k_center": k_center}

            def pick(rows: Floats, keep: int) -> tuple[Ints, npt.NDArray[np.float64]]:
                return by_kind[config.kind](rows, keep), np.ones(keep)

            seen = _Share.of(task, given, state, world)
            found = by_class(seen.x[:, :-1], seen.sample, seen.valid, given=given, comm=world.comm, pick=pick)
            return replace(found, weight=np.ones(len(found.sample)))
        case ReconstructionSelector():
            return _reconstruction(config, task, given, state, world)
        case _:
            assert_never(config)


def _in_order_of_arrival(sample: Ints) -> Choice:
    order = np.argsort(sample)
    return Choice(sample[order], order.astype(np.int64), np.ones(len(sample)), np.zeros(len(sample)))


def _scores(
    task: Task, given: Candidates, state: RunState, world: World, score: Scores, *, inputs: bool
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Return the scores of this rank's share and their sample positions; -inf where an image cannot be decoded."""
    classes = competing(task, world)
    found, samples = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for look in looks(given.samples, classes, state, world, inputs=inputs):
        labels = _labels(look.sample, classes, world).to(look.logits.device)
        found.append(np.where(look.valid, score(look, labels).double().cpu().numpy(), -np.inf))
        samples.append(look.sample)
    return np.concatenate(found), np.concatenate(samples)


def _whole_scores(
    config: PosteriorSelector, task: Task, given: Candidates, state: RunState, world: World
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Return scores as `_scores` does, from the variance of the logits under the posterior of all layers."""
    classes = competing(task, world)
    found, samples = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for each in logit_variances(task, given.samples, state, world, prior_precision=config.prior_precision):
        labels = _labels(each.sample, classes, world).to(each.logits.device)
        if config.kind == "leverage":
            score = whole_leverage(each.logits, each.variance)
        else:
            score = whole_sensitivity(each.logits, each.variance, labels)
        found.append(np.where(each.valid, score.cpu().numpy(), -np.inf))
        samples.append(each.sample)
    return np.concatenate(found), np.concatenate(samples)


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
    # With a quadratic an example stands for itself, whatever the size of the memory, unless the prior scales it up.
    alone = weight > 0 and not prior.scale_to_task
    return replace(choice, weight=choice.weight * len(given.samples) / max(given.keep, 1)) if alone else choice
