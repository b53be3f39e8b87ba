"""The memory map of a run: every training example's error, variance and sensitivity, and what follows from them.

All are of one checkpoint's network and a Laplace posterior at its weights; the formulas are in
`hpccl.memory.perturbation`. Examples are judged among the classes that competed when they were learned: those of their
own task, or all that were seen.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import load, marks
from hpccl.config.sections import DiagonalCurvature, EkfacCurvature, KroneckerCurvature, PassCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples
from hpccl.data.order import mix
from hpccl.data.protocols import Task
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.errors import ConfigError, DataError, DivergedError
from hpccl.memory.perturbation import Variance, best_prior_precision, perturbed, top_layer_variance
from hpccl.memory.score import TopLayer, output_curvature
from hpccl.memory.store import Memory
from hpccl.report.memory_map import MemoryMap, worth_showing
from hpccl.report.text import size
from hpccl.train.consolidate import TaskPass, thumbnail
from hpccl.train.evaluate import test
from hpccl.train.evaluate_run import reopened
from hpccl.train.passes import shared_images
from hpccl.train.score import competing, last_layer, looks
from hpccl.train.state import RunState, World

__all__ = ["Kind", "map_memory"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Kind: TypeAlias = Literal["last_layer", "kronecker", "diagonal"]

_FEW = 2000  # examples of the map, unless told otherwise, where each needs the Jacobian of the whole network
_LARGEST = 4 << 30  # bytes of one image's Jacobian by one layer, with the copies that are made of it
_BY_CLASS = 1 << 26  # numbers of the factors of each class alone
_SUBSAMPLE, _CURVATURE = 105, 106


@dataclass(frozen=True)
class _Group:
    """Examples that are judged among the same classes.

    task: of which `competing` names the classes
    samples: [n] of the map, ascending
    measured: [m] of which the curvature of all weights is
    total: training examples of these tasks
    """

    task: Task
    samples: Ints
    measured: Ints
    total: int


@dataclass(frozen=True)
class _Found:
    """What one group's pass over its examples found.

    sample: [n]; columns: [n] by name
    removed: by class, mean nats of its examples if none of them had been learned, after one Newton step
    """

    sample: Ints
    columns: dict[str, Floats]
    removed: dict[int, float]


def map_memory(
    path: Path,
    *,
    task: int | None = None,
    posterior: Kind = "last_layer",
    examples: int | None = None,
    fraction: float = 1.0,
    prior_precision: float | None = None,
) -> MemoryMap:
    """The map of the newest checkpoint, or of the newest of `task`; writes nothing.

    Args:
        path: the run's folder.
        task: counted from 0.
        posterior: of the last layer, or of all weights with Kronecker-factored or diagonal curvature.
        examples: of the map, drawn uniformly; None: all for `last_layer`, 2000 otherwise.
        fraction: share of the training examples on which the curvature of all weights is measured.
        prior_precision: delta; None: that with the largest evidence.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint.
        ConfigError: an argument is out of range, or the network does not suit the posterior.
    """
    _check(examples=examples, fraction=fraction, prior_precision=prior_precision)
    with reopened(path, task=task) as (state, world):
        groups = _groups(state, world, examples=examples, fraction=fraction, posterior=posterior)
        match posterior:
            case "last_layer":
                found, delta = _by_last_layer(groups, state, world, prior_precision)
            case "kronecker" | "diagonal":
                found, delta = _by_all_weights(posterior, groups, state, world, prior_precision)
            case _:
                assert_never(posterior)
        table = _table(found, state, world)
        shown = worth_showing(table)
        return MemoryMap(
            run=str(path),
            checkpoint=state.mark.name,
            task=state.mark.task,
            posterior=posterior,
            prior_precision=delta,
            num_seen=sum(group.total for group in groups),
            class_names=world.stream.class_names,
            names=world.stream.sample_names("train", table["sample"]),
            table=table,
            tasks=_tasks(table, state, world),
            classes=_classes(table, found, world),
            memory=_memory_over_tasks(table, state, world),
            pictures=_pictures(table["sample"][shown], world),
        )


def _check(*, examples: int | None, fraction: float, prior_precision: float | None) -> None:
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}: at least 1")
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction:g}: above 0 and at most 1")
    if prior_precision is not None and not (0 < prior_precision < float("inf")):
        raise ConfigError(f"--prior-precision {prior_precision:g}: a finite number above 0")


def _groups(state: RunState, world: World, *, examples: int | None, fraction: float, posterior: Kind) -> list[_Group]:
    last = world.stream.tasks[state.mark.task]
    learned = [last] if world.config.method == "separate" else list(world.stream.tasks[: last.index + 1])
    spans = [np.arange(each.samples("train").start, each.samples("train").stop) for each in learned]
    seen = np.concatenate(spans)
    most = examples if examples is not None else len(seen) if posterior == "last_layer" else _FEW
    mapped = _drawn(seen, min(most, len(seen)), _SUBSAMPLE, world)
    measured = _drawn(seen, max(1, round(fraction * len(seen))), _CURVATURE, world)
    if world.config.train.head == "seen":
        return [_Group(last, mapped, measured, len(seen))]
    groups = [
        _Group(each, np.intersect1d(span, mapped), np.intersect1d(span, measured), len(span))
        for each, span in zip(learned, spans, strict=True)
    ]
    return [group for group in groups if len(group.samples)]


def _drawn(samples: Ints, count: int, purpose: int, world: World) -> Ints:
    if count >= len(samples):
        return samples
    order = np.argsort(mix(world.config.seed, purpose, samples), kind="stable")
    return np.sort(samples[order[:count]])


# ---------------------------------------------------------------- the last layer


def _by_last_layer(
    groups: Sequence[_Group], state: RunState, world: World, prior_precision: float | None
) -> tuple[list[_Found], float]:
    """One pass over the images; what the last layer saw waits in a file until its curvature is known."""
    try:
        layer = last_layer(state.engine.module, world, state)
    except ConfigError as error:
        raise ConfigError(
            "--posterior last_layer needs a network whose logits an nn.Linear makes, and "
            f"{type(state.engine.module).__name__} is none; use --posterior kronecker or diagonal"
        ) from error
    with contextlib.ExitStack() as stack:
        spools = [stack.enter_context(_Spool.of(group, state, world)) for group in groups]
        factors = [spool.factors() for spool in spools]
        delta = prior_precision
        if delta is None:
            posteriors = [each.posterior(1.0) for each in factors]
            values = [torch.outer(each.inputs, each.outputs).flatten() for each in posteriors]
            delta = best_prior_precision(torch.cat(values), _square(layer, spools))
        return [spool.scored(each, delta) for spool, each in zip(spools, factors, strict=True)], delta


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
    def of(cls, group: _Group, state: RunState, world: World) -> Iterator[_Spool]:
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

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(logits, x, labels) of some examples."""
        rows = np.memmap(self.path, dtype=np.float32, mode="r").reshape(len(self.sample), -1)
        size = max(1, min(4096, (1 << 25) // len(self.classes) ** 2))
        for start in range(0, len(rows), size):
            part = torch.from_numpy(np.array(rows[start : start + size]))
            labels = torch.from_numpy(self.labels[start : start + size])
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

    def scored(self, factors: _Factors, prior_precision: float) -> _Found:
        """Every example's figures, and what every class would lose."""
        layer = factors.posterior(prior_precision)
        columns: list[dict[str, Tensor]] = []
        gradient = torch.zeros(len(self.classes), *self._widths(), dtype=torch.float64)
        for logits, x, labels in self._parts():
            columns.append(perturbed(logits, labels, top_layer_variance(x, layer)).columns())
            _add_gradients(gradient, logits, x, labels)
        steps = torch.stack(
            [
                factors.posterior(prior_precision, without=number).solve(each * self.scale)
                for number, each in enumerate(gradient)
            ]
        )
        return _Found(self.sample, _joined(columns), self._removed(steps))

    def _widths(self) -> tuple[int, int]:
        """K and d."""
        width = self.path.stat().st_size // (4 * len(self.sample))
        return len(self.classes), width - len(self.classes)

    def _removed(self, steps: Tensor) -> dict[int, float]:
        total, count = np.zeros(len(self.classes)), np.bincount(self.labels, minlength=len(self.classes))
        for logits, x, labels in self._parts():
            for number in labels.unique().tolist():
                own = labels == number
                moved = logits[own].double() + x[own].double() @ steps[number].T
                total[number] += float(torch.nn.functional.cross_entropy(moved, labels[own], reduction="sum"))
        return {number: float(total[k] / count[k]) for k, number in enumerate(self.classes) if count[k]}


@dataclass(frozen=True)
class _Factors:
    """Of the last layer's curvature, by class of the examples: [G, d, d] and [G, K, K], and their numbers [G].

    G is 1 where they are not kept apart.
    """

    moments: Tensor
    curvatures: Tensor
    sizes: Tensor
    scale: float

    def posterior(self, prior_precision: float, *, without: int | None = None) -> TopLayer:
        """That of all examples, or of those of other classes as far as they are kept apart."""
        kept = torch.ones(len(self.sizes), dtype=torch.float64)
        if without is not None and len(kept) > 1:
            kept[without] = 0
        moment = torch.einsum("g,gij->ij", kept, self.moments) / (kept * self.sizes).sum().clamp_min(1)
        curvature = torch.einsum("g,gkl->kl", kept, self.curvatures) * self.scale
        return TopLayer.of(moment, curvature, prior_precision=prior_precision)


def _add_gradients(total: Tensor, logits: Tensor, x: Tensor, labels: Tensor) -> None:
    """Add sum_j e_j x_j' over the examples of each class to [K, K, d]."""
    p = logits.double().softmax(dim=1)
    error = p - torch.nn.functional.one_hot(labels, logits.shape[1]).to(p)
    for number in labels.unique().tolist():
        own = labels == number
        total[number] += error[own].T @ x[own].double()


def _refuse_infinite(rows: npt.NDArray[np.floating[Any]], sample: Ints) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DivergedError(
            f"what the network makes of sample {int(sample[bad][0])} is not finite; it has diverged, or its pixels "
            "are not finite"
        )


# ---------------------------------------------------------------- all weights


def _by_all_weights(
    kind: Literal["kronecker", "diagonal"],
    groups: Sequence[_Group],
    state: RunState,
    world: World,
    prior_precision: float | None,
) -> tuple[list[_Found], float]:
    """A pass for the curvature, and one for Jacobians."""
    module = state.engine.module
    _refuse_large(module, kind, max(len(competing(group.task, world)) for group in groups))
    estimator = build_estimator(_curvature(kind, world), world.config.seed)
    precision = estimator.estimate(module, _Passes(groups, world), world.comm)
    precision = precision.times(
        sum(group.total for group in groups) / max(1, sum(len(group.measured) for group in groups))
    )
    posterior = Posterior.of(precision, wholes(state.engine.gather()), prior_precision=prior_precision or 1.0)
    if prior_precision is None:
        posterior = posterior.with_prior_precision(posterior.best_prior_precision())
    return [_by_jacobians(group, posterior, state, world) for group in groups], posterior.prior_precision


def _curvature(kind: Literal["kronecker", "diagonal"], world: World) -> PassCurvature:
    """As the run measures it where it is of this kind; exact over labels."""
    config = world.config.curvature
    if kind == "diagonal":
        return DiagonalCurvature(fisher="ggn")
    if isinstance(config, KroneckerCurvature | EkfacCurvature):
        return config.model_copy(update={"fisher": "ggn"})
    return KroneckerCurvature(fisher="ggn")


@dataclass(frozen=True)
class _Passes:
    """All groups' examples for the curvature, one group after the other; may be repeated."""

    groups: Sequence[_Group]
    world: World

    def __iter__(self) -> Iterator[Examples]:
        for group in self.groups:
            if len(group.measured):
                yield from TaskPass(group.task, group.measured, self.world)


def _refuse_large(module: nn.Module, kind: str, num_classes: int) -> None:
    largest = max(trainable(module).items(), key=lambda item: item[1].numel())
    needed = 4 * 4 * num_classes * largest[1].numel()
    if needed > _LARGEST:
        raise ConfigError(
            f"the network is too large for --posterior {kind}: the Jacobian of one image by '{largest[0]}' takes "
            f"{size(needed)} with its copies; allowed: {size(_LARGEST)}; use --posterior last_layer"
        )


def _by_jacobians(group: _Group, posterior: Posterior, state: RunState, world: World) -> _Found:
    classes = competing(group.task, world)
    columns: list[dict[str, Tensor]] = []
    kept: list[Ints] = []
    for seen in shared_images(group.samples, world, size=min(world.stream_batch, 64)):
        good = seen.valid.numpy()
        pixels = seen.pixels[torch.from_numpy(good).to(seen.pixels.device)]
        if not len(pixels):
            continue
        sample = seen.sample[good]
        labels = torch.from_numpy(np.searchsorted(classes, world.stream.labels("train")[sample]))
        with _only(state.engine.module, classes):
            logits = state.engine.predict(pixels).cpu()
            full = posterior.logit_variance(state.engine.module, pixels).cpu()
        columns.append(perturbed(logits, labels, Variance.of(full)).columns())
        kept.append(sample)
    if not kept:
        raise DataError(f"no image of task {group.task.index} that was to be in the map can be decoded")
    return _Found(np.concatenate(kept), _joined(columns), {})


@contextlib.contextmanager
def _only(module: nn.Module, classes: Sequence[int]) -> Iterator[None]:
    """The network makes the logits of these classes only: the Jacobians of others would be for nothing."""
    handle = module.register_forward_hook(lambda _module, _arguments, out: out[:, list(classes)])
    try:
        yield
    finally:
        handle.remove()


def _joined(columns: Sequence[dict[str, Tensor]]) -> dict[str, Floats]:
    return {name: torch.cat([each[name] for each in columns]).cpu().numpy() for name in columns[0]}


# ---------------------------------------------------------------- what follows from it


def _table(found: Sequence[_Found], state: RunState, world: World) -> dict[str, npt.NDArray[Any]]:
    """All groups' examples, by sample."""
    sample = np.concatenate([each.sample for each in found])
    order = np.argsort(sample)
    sample = sample[order]
    bounds = [each.samples("train").stop for each in world.stream.tasks]
    names = [name for name in found[0].columns if all(name in each.columns for each in found)]
    return {
        "sample": sample,
        "task": np.searchsorted(bounds, sample, side="right"),
        "label": world.stream.labels("train")[sample],
        "in_memory": np.isin(sample, state.prior.memory.sample.numpy()),
        **{name: np.concatenate([each.columns[name] for each in found])[order] for name in names},
    }


def _tasks(table: dict[str, npt.NDArray[Any]], state: RunState, world: World) -> list[dict[str, Any]]:
    """Mean nats of every task's examples, as learned and as if each had been left out, and those of the test data."""
    own = world.config.train.head == "own"
    results = state.results if state.mark.phase == "done" else test(state, world, last=state.mark.task)
    tested = {result["task"]: result["task_incremental" if own else "class_incremental"] for result in results}
    rows = []
    for number in np.unique(table["task"]).tolist():
        here = table["task"] == number
        newton = table.get("left_out_newton")
        rows.append(
            {
                "task": number,
                "name": world.stream.tasks[number].name,
                "examples": int(here.sum()),
                "train_nats": float(table["nats"][here].mean()),
                "left_out": float(table["left_out"][here].mean()),
                "left_out_newton": None if newton is None else float(newton[here].mean()),
                "test_nats": None if tested.get(number) is None else float(tested[number]["nll"]),
            }
        )
    return rows


def _classes(table: dict[str, npt.NDArray[Any]], found: Sequence[_Found], world: World) -> list[dict[str, Any]]:
    removed = {number: value for each in found for number, value in each.removed.items()}
    rows = []
    for number in np.unique(table["label"]).tolist():
        here = table["label"] == number
        rows.append(
            {
                "class": number,
                "name": world.stream.class_names[number],
                "task": int(table["task"][here][0]),
                "examples": int(here.sum()),
                "nats": float(table["nats"][here].mean()),
                "left_out": float(table["left_out"][here].mean()),
                "removed": removed.get(number),
                "sensitivity": float(table["sensitivity"][here].mean()),
                "leverage": float(table["leverage"][here].sum()),
            }
        )
    return rows


def _memory_over_tasks(table: dict[str, npt.NDArray[Any]], state: RunState, world: World) -> list[dict[str, Any]]:
    """The memory at the end of every task that this checkpoint has behind it."""
    checkpoints, rows = world.folder.checkpoints, []
    for mark in marks(checkpoints):
        if mark.phase != "done" or mark > state.mark:
            continue
        memory = Memory.from_state_dict(load(checkpoints, mark)["prior"]["memory"])
        if not len(memory):
            continue
        past = table["task"] <= mark.task
        kept = np.isin(table["sample"][past], memory.sample.numpy())
        count = int(kept.sum())
        top = np.argsort(-table["sensitivity"][past], kind="stable")[:count]
        of_class = np.bincount(memory.label.numpy())[np.unique(memory.label.numpy())]
        rows.append(
            {
                "task": mark.task,
                "size": len(memory),
                "per_task": memory.per_task(mark.task + 1),
                "smallest_class": int(of_class.min()),
                "largest_class": int(of_class.max()),
                "agreement": memory.agreement(mark.task + 1),
                "sensitive_share": float(kept[top].mean()) if count else None,
                "chance": float(kept.mean()) if count else None,
            }
        )
    return rows


def _pictures(samples: Ints, world: World) -> dict[int, npt.NDArray[np.uint8]]:
    found = {}
    for sample in samples.tolist():
        with contextlib.suppress(DataError):  # data.bad_images is `skip`, and it is no longer there
            found[sample] = thumbnail(world.stream.raw(sample))
    return found
