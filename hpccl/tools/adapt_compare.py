"""How close an adapted network comes to one that was retrained, and at what share of the cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpccl.checkpoint.store import latest, load
from hpccl.config.adaptation import AnyAdaptation, RemoveData
from hpccl.config.differences import differences, flat
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.data.protocols import heads_of, task_numbers
from hpccl.data.shards.remote import is_url
from hpccl.dist.spread import wholes
from hpccl.engine.protocols import trainable
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.report.adaptation import Adaptation, Cost, Network
from hpccl.report.events import phase_parts, read_events
from hpccl.tools.evaluate_run import reopened
from hpccl.train.copies import open_for
from hpccl.train.passes import answers, with_mirror_images
from hpccl.train.state import RunState, World

__all__ = ["check_reference", "compare_adaptation"]

_PHASES = ("fit", "relabel")  # what an adaptation costs; testing is left out


@dataclass(frozen=True)
class _Tested:
    """Predictions of one network on the test images, and its weights.

    probabilities: [n, C], 0 outside the head; labels: [n]; weights: trainable parameters by name
    """

    probabilities: Tensor
    labels: Tensor
    weights: Mapping[str, Tensor]
    classes: tuple[str, ...]


def check_reference(reference: RunConfig) -> None:
    """Check that the folder to compare with holds the finished reference of this very adaptation.

    Args:
        reference: what `reference_config` makes of the adaptation's command, with the folder to compare with.

    Raises:
        ConfigError: the folder's configuration cannot be read.
        DataError: the data cannot be opened.
        FolderError: it is no run, a different one, not finished, or the data changed since.
    """
    folder = RunFolder(Path(reference.path))
    given = f"--reference '{folder.path}'"
    if not folder.config.is_file():
        raise FolderError(f"{given} is not a run folder (it has no config.yaml); {_INSTEAD}")
    there, here = _decided(load_recorded(folder.config)), _decided(reference)
    lines = [
        f"  {key}: {_short(theirs)} there, {_short(ours)} expected" for key, theirs, ours in differences(there, here)
    ]
    if lines:
        raise FolderError("\n".join([f"{given} is not the reference of this adaptation:", *lines, _INSTEAD]))
    mark = latest(folder.checkpoints)
    if mark is None or mark.phase != "done":
        where = "has no checkpoint yet" if mark is None else f"has only reached {mark.name}"
        raise FolderError(f"{given} {where}; repeat the command that started it, or {_INSTEAD}")
    if load(folder.checkpoints, mark)["data"] != open_for(reference, folder).fingerprint:
        raise FolderError(f"the data changed since {given} was trained; restore the earlier shards, or {_INSTEAD}")


_INSTEAD = (
    "give --reference retrain, or a folder `reference` that it made for the same adaptation of the same run with "
    "the same model, engine and weight decay"
)


def _short(value: Any) -> str:
    """Return a value as text, truncated if long, as lists of ids to be forgotten are."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _decided(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine the result, with paths resolved and names sorted."""
    found = config.identity()
    adapt = found["adapt"]
    if "source" in adapt:
        adapt["source"] = str(Path(adapt["source"]).resolve())
    if "names" in adapt:
        adapt["names"] = sorted(adapt["names"])
    if "data" in adapt:
        adapt["data"] = [path if is_url(path) else str(Path(path).resolve()) for path in adapt["data"]]
    return flat(found)


def compare_adaptation(run: Path, reference: RunConfig | None = None) -> Adaptation:
    """Test the adapted network in `run`, the network it started from, and the reference; on one process.

    Args:
        run: folder of a finished adaptation.
        reference: configuration of the retrained run, see `check_reference`; None: no comparison.

    Raises:
        FolderError: a folder is no run, has not ended, or the reference is a different one.
    """
    if reference is not None:
        check_reference(reference)
    config = load_recorded(RunFolder(run).config)
    adapt = config.adapt
    if not isinstance(adapt, AnyAdaptation):
        raise FolderError(f"'{run}' is not an adaptation; give a folder that `hpccl adapt` wrote")
    adapted, start = _tested(run), _tested(Path(adapt.source))
    anew = None if reference is None else Path(reference.path)
    other = None if anew is None else _tested(anew)
    gone = list(adapt.names) if isinstance(adapt, RemoveData) else []
    removed = torch.tensor([name in gone for name in adapted.classes])[adapted.labels]
    return Adaptation(
        kind=adapt.kind,
        run=str(run),
        source=adapt.source,
        reference=None if anew is None else str(anew),
        start=_network(start, other, removed),
        adapted=_network(adapted, other, removed),
        retrained=None if other is None else _network(other, None, removed),
        cost=_cost(run),
        reference_cost=None if anew is None else _cost(anew),
    )


def _tested(run: Path) -> _Tested:
    with reopened(run) as (state, world):
        if state.mark.phase != "done":
            raise FolderError(f"'{run}' has only reached {state.mark.name}; continue it to its end first")
        probabilities, labels = _probabilities(state, world)
        learned = trainable(state.engine.module)
        weights = {name: value for name, value in wholes(state.engine.gather()).items() if name in learned}
        return _Tested(probabilities, labels, weights, tuple(world.stream.class_names))


def _probabilities(state: RunState, world: World) -> tuple[Tensor, Tensor]:
    """Return probabilities over each image's competing classes, and labels, of all readable test images."""
    stream = world.stream
    labels = torch.from_numpy(stream.labels("test"))
    heads = heads_of(stream.tasks, len(stream.class_names)) | (world.config.train.head != "own")
    found, shown = [], []
    predict = with_mirror_images(state.engine.predict, world)
    for sample, said, readable in answers(predict, np.arange(len(labels)), world, split="test"):
        own = heads[torch.from_numpy(task_numbers(stream.tasks, "test", sample))]
        logits = said.cpu().masked_fill(~own, -torch.inf)
        found.append(logits.softmax(dim=1)[readable])
        shown.append(labels[torch.from_numpy(sample)][readable])
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
    """Return the Euclidean distance of the weights; None between different architectures."""
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in other.items()}:
        return None
    squares = [(value.double().cpu() - other[name].double().cpu()).square().sum() for name, value in own.items()]
    return float(torch.stack(squares).sum().sqrt())


def _cost(run: Path) -> Cost:
    """Return images learned from or labelled, and seconds, summed over all parts of interrupted phases."""
    counted = [part for part in phase_parts(read_events(RunFolder(run).events)) if part["phase"] in _PHASES]
    return Cost(
        images=sum(int(event["images"]) for event in counted), seconds=sum(float(event["seconds"]) for event in counted)
    )
