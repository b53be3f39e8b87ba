"""Predictions of a run's network under a posterior of its weights: `hpccl evaluate --posterior`.

The Laplace posterior has the curvature in the checkpoint, around the weights at the end of the task. Like the
curvature, it covers the examples that are not in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.curvature.posterior import Posterior
from hpccl.curvature.predictive import MERITS, merits, monte_carlo, probabilities, probit
from hpccl.data.order import mix, subset
from hpccl.data.protocols import Task, heads_of, task_numbers
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.errors import ConfigError, DataError, FolderError
from hpccl.folder import RunFolder
from hpccl.prior.quadratic import Quadratic
from hpccl.report.uncertainty import Uncertainty, worth_showing
from hpccl.tools.evaluate_run import reopened
from hpccl.tools.export import find_finished, no_curvature, refuse_other_curvature, refuse_other_logits
from hpccl.train.passes import shared_images, with_mirror_images
from hpccl.train.pictures import thumbnail
from hpccl.train.state import RunState, World
from hpccl.train.variance import refuse_large_jacobians

__all__ = ["Approximation", "evaluate_posterior", "measured_past", "predictions"]

Ints = npt.NDArray[np.int64]
Approximation: TypeAlias = Literal["sampled", "probit", "monte_carlo"]

_FEW = 2000  # default number of test images where each needs the Jacobian of the whole network
_SUBSAMPLE, _NOISE = 123, 124


def evaluate_posterior(
    path: Path,
    *,
    approximation: Approximation = "sampled",
    task: int | None = None,
    samples: int = 32,
    examples: int | None = None,
    prior_precision: float | None = None,
) -> Uncertainty:
    """Evaluate the predictive distribution after the newest finished task, or after `task`; writes nothing.

    Args:
        path: the run's folder.
        approximation: weights sampled from the posterior (`sampled`); or the network linearised at the mean, with the
            probit approximation or with sampled logits (`monte_carlo`).
        task: counted from 0.
        samples: number of sampled weights, or of sampled logits per image.
        examples: number of test images, drawn uniformly; None: all for `sampled`, 2000 otherwise.
        prior_precision: delta; None: the one with the largest evidence.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint, or no curvature in it.
        ConfigError: an argument is out of range, or the network does not suit the approximation.
    """
    _check(samples=samples, examples=examples, prior_precision=prior_precision)
    mark = find_finished(RunFolder(path), task)
    with reopened(path, task=mark.task) as (state, world):
        refuse_other_logits(world.config, path)
        posterior = posterior_of(state, world, prior_precision)
        table = predictions(state, world, posterior, approximation, samples=samples, examples=examples)
        head = world.config.train.head
        shown = worth_showing(table, head, last=mark.task)
        return Uncertainty(
            run=str(path),
            checkpoint=state.mark.name,
            task=state.mark.task,
            approximation=approximation,
            samples=0 if approximation == "probit" else samples,
            prior_precision=posterior.prior_precision,
            chosen=prior_precision is None,
            effective_parameters=posterior.effective_parameters(),
            num_weights=posterior.num_weights,
            head=head,
            class_names=world.stream.class_names,
            task_names=[each.name for each in world.stream.tasks],
            table=table,
            pictures=_pictures(table["sample"][shown], world),
        )


def _check(*, samples: int, examples: int | None, prior_precision: float | None) -> None:
    if samples < 1:
        raise ConfigError(f"--samples {samples}; allowed: at least 1")
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}; allowed: at least 1")
    if prior_precision is not None and not (0 < prior_precision < float("inf")):
        raise ConfigError(f"--prior-precision {prior_precision:g}; allowed: a finite number above 0")


def posterior_of(state: RunState, world: World, prior_precision: float | None) -> Posterior:
    """Build the Laplace posterior of the curvature in the state, around its anchor; collective.

    prior_precision: delta; None: the one with the largest evidence

    Raises:
        FolderError: there is no curvature.
        ConfigError: it is an importance, or the evidence has no maximum.
    """
    quadratic = measured_past(state, world)
    posterior = Posterior.of(
        quadratic.precision, wholes(quadratic.anchor), prior_precision=prior_precision or 1.0, comm=world.comm
    )
    if prior_precision is None:
        posterior = posterior.with_prior_precision(posterior.best_prior_precision())
    return posterior


def measured_past(state: RunState, world: World) -> Quadratic:
    """Return the quadratic of the checkpoint, after checking that its precision is the curvature of a likelihood.

    Raises:
        FolderError: there is no curvature.
        ConfigError: it is an importance.
    """
    refuse_other_curvature(world.config, world.folder.path)
    if state.prior.quadratic is None:
        raise FolderError(no_curvature(str(world.folder.path), state.mark.name))
    return state.prior.quadratic


def predictions(
    state: RunState,
    world: World,
    posterior: Posterior,
    approximation: Approximation,
    *,
    samples: int,
    examples: int | None,
) -> dict[str, npt.NDArray[Any]]:
    """Return a table of the predictions for every test image, by column name, the same on all ranks; collective.

    Columns are `sample`, `task`, `label`, and `<which>_<head>_<merit>` for the network at the mean (`mean`) and the
    predictive distribution (`posterior`), over the classes of the image's task (`own`) and all seen so far (`seen`);
    merits are those of `curvature.predictive.merits`. Where an image's class is not among the seen ones, as in tasks
    not yet learned, nats over `seen` are infinite.

    Raises:
        ConfigError: the network does not suit the approximation.
        DataError: no test image can be decoded.
    """
    chosen = _chosen(world, examples, everything=approximation == "sampled")
    judge = _Judge.of(world, state.mark.task)
    state.engine.put(posterior.mean)
    try:
        if approximation == "sampled":
            rows = _by_samples(chosen, judge, state, world, posterior=posterior, samples=samples)
        else:
            draws = 0 if approximation == "probit" else samples
            rows = _linearised(chosen, judge, state, world, posterior=posterior, samples=draws)
    finally:
        state.engine.put(posterior.mean)
    if not len(rows):
        raise DataError("no test image can be decoded")
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    sample = rows[:, 0].astype(np.int64)
    names = [
        f"{which}_{head}_{merit}" for which in ("mean", "posterior") for head in ("own", "seen") for merit in MERITS
    ]
    return {
        "sample": sample,
        "task": task_numbers(world.stream.tasks, "test", sample),
        "label": world.stream.labels("test")[sample],
        **dict(zip(names, rows[:, 1:].T, strict=True)),
    }


def _chosen(world: World, examples: int | None, *, everything: bool) -> Ints:
    count = world.stream.tasks[-1].samples("test").stop
    most = examples if examples is not None else count if everything else _FEW
    return subset(np.arange(count), most, world.config.seed, _SUBSAMPLE)


@final
@dataclass(frozen=True)
class _Judge:
    """Which classes compete for an image.

    tasks: of the stream
    heads: [T, C] bool, each task's classes; seen: [C] bool, all seen classes
    """

    tasks: Sequence[Task]
    heads: Tensor
    seen: Tensor

    @classmethod
    def of(cls, world: World, last: int) -> _Judge:
        device, number = world.comm.device, len(world.stream.class_names)
        heads = heads_of(world.stream.tasks, number).to(device)
        return cls(world.stream.tasks, heads, heads[: last + 1].any(dim=0))

    def both(self, sample: Ints) -> tuple[Tensor, Tensor]:
        """Return the classes of the own task and the seen classes for test images, masks [n, C] each."""
        own = self.heads[torch.from_numpy(task_numbers(self.tasks, "test", sample)).to(self.heads.device)]
        return own, self.seen.expand_as(own)


@dataclass(frozen=True)
class _Batch:
    """Test images that could be decoded: positions, labels, pixels and logits at the present weights."""

    sample: Ints
    labels: Tensor
    pixels: Tensor
    logits: Tensor


def _batches(chosen: Ints, state: RunState, world: World, size: int) -> Iterator[_Batch]:
    """Yield this rank's share of the chosen test images in batches, equally many on every rank."""
    labels = torch.from_numpy(world.stream.labels("test"))
    predict = with_mirror_images(state.engine.predict, world)
    for seen in shared_images(chosen, world, size=size, split="test"):
        logits = predict(seen.pixels)
        good = seen.valid[: len(seen.sample)]
        sample = seen.sample[good.numpy()]
        here = good.nonzero()[:, 0].to(logits.device)
        yield _Batch(sample, labels[torch.from_numpy(sample)].to(logits.device), seen.pixels[here], logits[here])


def _by_samples(
    chosen: Ints, judge: _Judge, state: RunState, world: World, *, posterior: Posterior, samples: int
) -> npt.NDArray[np.float64]:
    """Return the rows of `predictions`, from one pass at the mean and one for each sample of the weights."""
    known: list[Tensor] = []
    sums: list[list[Tensor]] = []
    for number in range(-1, samples):
        if number >= 0:
            state.engine.put(posterior.sample(world.config.seed, number))
        for place, batch in enumerate(_batches(chosen, state, world, world.stream_batch)):
            both = [probabilities(batch.logits, head) for head in judge.both(batch.sample)]
            if number < 0:
                position = torch.from_numpy(batch.sample).to(batch.logits.device).double()[:, None]
                known.append(torch.cat([position, *(merits(p, batch.labels) for p in both)], dim=1))
                sums.append([torch.zeros_like(p) for p in both])
            else:
                for total, p in zip(sums[place], both, strict=True):
                    total.add_(p, alpha=1 / samples)
    labels = torch.from_numpy(world.stream.labels("test"))
    rows = [torch.zeros(0, 1 + 4 * len(MERITS), dtype=torch.float64, device=world.comm.device)]
    for own, totals in zip(known, sums, strict=True):
        true = labels[own[:, 0].long().cpu()].to(own.device)
        rows.append(torch.cat([own, *(merits(total, true) for total in totals)], dim=1))
    found: npt.NDArray[np.float64] = world.comm.gather(torch.cat(rows)).cpu().numpy()
    return found


def _linearised(
    chosen: Ints, judge: _Judge, state: RunState, world: World, *, posterior: Posterior, samples: int
) -> npt.NDArray[np.float64]:
    """Return the rows of `predictions` by the linearised network, in one pass; samples: 0 for probit.

    Every rank takes all images, as each has a part of the posterior.
    """
    _refuse_unfit(state, world)
    alone = replace(world, comm=Comm.solo(world.comm.device))
    rows = [torch.zeros(0, 1 + 4 * len(MERITS), dtype=torch.float64, device=world.comm.device)]
    for batch in _batches(chosen, state, alone, min(world.stream_batch, 64)):
        if not len(batch.sample):
            continue
        variance = posterior.logit_variance(state.engine.module, batch.pixels).to(batch.logits.device)
        heads = judge.both(batch.sample)
        if samples == 0:
            found = [probit(batch.logits, variance, head) for head in heads]
        else:
            noise = _noise(batch, samples, world.config.seed)
            found = [monte_carlo(batch.logits, variance, head, noise) for head in heads]
        both = [*(probabilities(batch.logits, head) for head in heads), *found]
        position = torch.from_numpy(batch.sample).to(batch.logits.device).double()[:, None]
        rows.append(torch.cat([position, *(merits(p, batch.labels) for p in both)], dim=1))
    return torch.cat(rows).cpu().numpy()


def _noise(batch: _Batch, samples: int, seed: int) -> Tensor:
    """Draw standard normal noise [S, n, C], a function of (seed, test image) alone."""
    classes = batch.logits.shape[1]
    keys = mix(seed, _NOISE, batch.sample)
    draws = [np.random.Generator(np.random.Philox(key=int(key))).standard_normal((samples, classes)) for key in keys]
    return torch.from_numpy(np.stack(draws, axis=1)).to(batch.logits.device)


def _refuse_unfit(state: RunState, world: World) -> None:
    """Refuse networks that cannot be linearised as configured.

    Raises:
        ConfigError: tests average over mirror images, or the Jacobian is too large.
    """
    if world.config.train.flip_test:
        raise ConfigError(
            "train.flip_test=true averages the logits of an image and its mirror image, which the linearised network "
            "does not; use --posterior sampled"
        )
    refuse_large_jacobians(
        state.engine.module,
        len(world.stream.class_names),
        wanted_by="--posterior probit and monte_carlo",
        instead="use --posterior sampled",
    )


def _pictures(samples: Sequence[int] | Ints, world: World) -> Mapping[int, npt.NDArray[np.uint8]]:
    found = {}
    for sample in map(int, samples):
        with contextlib.suppress(DataError):  # data.bad_images is `skip`, and the image is gone
            found[sample] = thumbnail(world.stream.raw(sample, "test"))
    return found
