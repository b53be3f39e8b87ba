"""How close an adapted network comes to one that was trained anew, and at what share of the cost."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpccl.config.adaptation import AnyAdaptation, RemoveData
from hpccl.config.load import load as load_config
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report.adaptation import Adaptation, Cost, Network
from hpccl.report.events import latest as latest_events
from hpccl.report.events import read_events
from hpccl.train.evaluate_run import reopened
from hpccl.train.passes import shared_images
from hpccl.train.state import RunState, World

__all__ = ["compare_adaptation"]

_PHASES = ("fit", "relabel")  # what an adaptation costs; testing is left out


@dataclass(frozen=True)
class _Tested:
    """probabilities: [n, C] of the test images, 0 beyond their heads; labels: [n]; weights: learned ones, by name."""

    probabilities: Tensor
    labels: Tensor
    weights: Mapping[str, Tensor]
    classes: tuple[str, ...]


def compare_adaptation(run: Path, reference: Path | None = None) -> Adaptation:
    """Test the adapted network in `run`, the one that it began from, and the reference; on one process.

    Args:
        run: folder of an adaptation that is done.
        reference: folder of a run with the same classes and test images that was trained anew; None: no comparison.

    Raises:
        FolderError: a folder is no run, has not ended, or the reference is about other data.
    """
    config = load_config([RunFolder(run).config], [])
    adapt = config.adapt
    if not isinstance(adapt, AnyAdaptation):
        raise FolderError(f"'{run}' is no adaptation; give a folder that hpccl adapt wrote")
    adapted, start = _tested(run), _tested(Path(adapt.source))
    other = None if reference is None else _tested(reference)
    if other is not None and (other.classes != adapted.classes or not torch.equal(other.labels, adapted.labels)):
        raise FolderError(
            f"--reference '{reference}' was tested on other images or classes than '{run}'; give a run of the same "
            "stream, or --reference retrain"
        )
    gone = list(adapt.names) if isinstance(adapt, RemoveData) else []
    removed = torch.tensor([name in gone for name in adapted.classes])[adapted.labels]
    return Adaptation(
        kind=adapt.kind,
        run=str(run),
        source=adapt.source,
        reference=None if reference is None else str(reference),
        start=_network(start, other, removed),
        adapted=_network(adapted, other, removed),
        retrained=None if other is None else _network(other, None, removed),
        cost=_cost(run),
        reference_cost=None if reference is None else _cost(reference),
    )


def _tested(run: Path) -> _Tested:
    with reopened(run) as (state, world):
        if state.mark.phase != "done":
            raise FolderError(f"'{run}' has only come to {state.mark.name}; continue it to its end first")
        probabilities, labels = _probabilities(state, world)
        learned = trainable(state.engine.module)
        weights = {name: value for name, value in wholes(state.engine.gather()).items() if name in learned}
        return _Tested(probabilities, labels, weights, tuple(world.stream.class_names))


def _probabilities(state: RunState, world: World) -> tuple[Tensor, Tensor]:
    """Of all test images that can be read, among the classes that compete for each."""
    stream = world.stream
    labels = torch.from_numpy(stream.labels("test"))
    heads = torch.ones(len(stream.tasks), len(stream.class_names), dtype=torch.bool)
    if world.config.train.head == "own":
        heads = torch.zeros_like(heads)
        for task in stream.tasks:
            heads[task.index, list(task.classes)] = True
    ends = np.array([task.samples("test").stop for task in stream.tasks])  # tasks may share classes
    found, shown = [], []
    passes = shared_images(np.arange(len(labels)), world, size=world.stream_batch, split="test")
    with contextlib.closing(passes):
        for seen in passes:
            truth = labels[torch.from_numpy(seen.sample)]
            own = heads[torch.from_numpy(np.searchsorted(ends, seen.sample, side="right"))]
            logits = state.engine.predict(seen.pixels).cpu().masked_fill(~own, -torch.inf)
            found.append(logits.softmax(dim=1)[seen.valid])
            shown.append(truth[seen.valid])
    return torch.cat(found), torch.cat(shown)


def _network(own: _Tested, other: _Tested | None, removed: Tensor) -> Network:
    guess = own.probabilities.argmax(1)
    right = (guess == own.labels).double()
    agreement = variation = distance = None
    if other is not None:
        agreement = float((guess == other.probabilities.argmax(1)).double().mean())
        variation = float((own.probabilities - other.probabilities).abs().sum(1).double().mean() / 2)
        distance = _distance(own.weights, other.weights)
    return Network(
        accuracy=float(right.mean()),
        accuracy_kept=float(right[~removed].mean()) if bool(removed.any()) and not bool(removed.all()) else None,
        accuracy_removed=float(right[removed].mean()) if bool(removed.any()) else None,
        agreement=agreement,
        total_variation=variation,
        distance=distance,
    )


def _distance(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """Euclidean; None between networks of different kinds."""
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in other.items()}:
        return None
    squares = [(value.double().cpu() - other[name].double().cpu()).square().sum() for name, value in own.items()]
    return float(torch.stack(squares).sum().sqrt())


def _cost(run: Path) -> Cost:
    """Images that were learned from or labelled, and seconds; the parts of a phase that was cut in two are added."""
    events = latest_events(read_events(RunFolder(run).events), "phase", "task", "phase", "part")
    counted = [event for event in events if event["phase"] in _PHASES]
    return Cost(
        images=sum(int(event["images"]) for event in counted), seconds=sum(float(event["seconds"]) for event in counted)
    )
