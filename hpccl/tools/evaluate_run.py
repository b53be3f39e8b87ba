"""Testing a checkpoint of a run that may be finished or still going."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpccl.checkpoint.store import Mark, load, marks, open_shards
from hpccl.config.engine import DdpEngine
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.mesh import pick_device
from hpccl.errors import CheckpointError, ConfigError, DataError, FolderError
from hpccl.folder import RunFolder
from hpccl.report.events import EventLog
from hpccl.report.progress import make_progress
from hpccl.tools.export import refuse_other_logits
from hpccl.tools.merge_sources import difference, open_weights
from hpccl.train.copies import open_for
from hpccl.train.evaluate import evaluate_all
from hpccl.train.run import fresh_state
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop

__all__ = ["evaluate_run", "find_checkpoint", "put_weights", "reopened", "with_newest"]

_LOOKS = 3  # attempts to read a checkpoint while a run may be replacing it


def evaluate_run(path: Path, *, task: int | None = None, weights: Path | None = None) -> dict[str, Any]:
    """Return task- and class-incremental figures of the newest checkpoint, or of the newest of `task`; writes nothing.

    Args:
        path: the run's folder.
        task: counted from 0.
        weights: of `hpccl export` or `hpccl merge` (or a .safetensors file), to be tested instead of the run's.

    Raises:
        ConfigError: `weights` are of another network, or the run is not tested by the network's logits alone.
        DataError: `weights` cannot be read, or a task has no readable test images.
        DivergedError: the network's logits are not finite.
        FolderError: the folder is no run, or has no such checkpoint.
    """
    with reopened(path, task=task) as (state, world):
        mark = state.mark
        if weights is not None:
            refuse_other_logits(world.config, path)
            put_weights(state, world, weights)
        results = evaluate_all(state, world, last=mark.task)
    # Where every task has a network of its own, earlier ones were tested when their tasks ended.
    if weights is None and world.config.own_networks:
        results = state.results[: mark.task] + results[mark.task :]
    seen = results[: mark.task + 1]
    return {
        "run": str(path),
        "checkpoint": mark.name,
        **({} if weights is None else {"weights": str(weights)}),
        "average_accuracy": float(np.mean([result["task_incremental"]["accuracy"] for result in seen])),
        "average_accuracy_class_incremental": None
        if any(result["class_incremental"] is None for result in seen)
        else float(np.mean([result["class_incremental"]["accuracy"] for result in seen])),
        "tasks": results,
    }


def put_weights(state: RunState, world: World, path: Path) -> None:
    """Load the network's parameters and buffers from an export, a merger, another run or a .safetensors file.

    Raises:
        ConfigError: they are of another network, or of other classes as far as that is known.
        DataError: they cannot be read.
    """
    if path.suffix != ".safetensors" and not path.is_dir():
        raise DataError(
            f"--weights '{path}' is neither a folder nor a .safetensors file; give the folder of a run, an export or "
            "a merged network, or a .safetensors file"
        )
    given, own = open_weights(path), state.engine.gather()
    theirs = {name: tuple(value.shape) for name, value in given.weights.items()}
    differing = sorted(
        name for name in {*theirs, *own} if name not in own or theirs.get(name) != tuple(own[name].shape)
    )
    if differing:
        raise ConfigError(
            f"--weights '{path}' is of another network: {', '.join(differing[:3])} differ in name or shape "
            f"({len(differing)} of {len({*theirs, *own})}); give weights of the network in config.yaml"
        )
    classes = list(world.stream.class_names)
    if given.config is not None and given.config["label_names"] != classes:
        raise ConfigError(
            f"--weights '{path}' has other classes than the run, or the same in another order ("
            f"{difference(given.config['label_names'], classes)}); give weights for the run's classes in its order"
        )
    state.engine.put(given.weights)


@contextlib.contextmanager
def reopened(path: Path, *, task: int | None = None) -> Iterator[tuple[RunState, World]]:
    """Open the newest checkpoint of a run, or the newest of `task`, on one process; nothing is logged.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint.
    """
    folder = RunFolder(path)
    find_checkpoint(folder, task)
    config = _in_one_process(load_recorded(folder.config))
    comm = Comm.solo(pick_device(config.engine.device))
    stream = open_for(config, folder)
    state = fresh_state(config, stream, comm, pretrained=False)
    with_newest(folder, task, lambda mark: _put_state(state, folder, mark, comm))
    with EventLog(folder.events, enabled=False) as log, make_progress(False) as progress:
        yield state, World(config, comm, stream, folder, log, progress, Stop())


def _in_one_process(config: RunConfig) -> RunConfig:
    """Return the configuration with a single-process engine; results do not depend on the engine."""
    engine = config.engine
    alone = DdpEngine(device=engine.device, precision=engine.precision, channels_last=engine.channels_last)
    return config.model_copy(update={"engine": alone})


def _put_state(state: RunState, folder: RunFolder, mark: Mark, comm: Comm) -> None:
    tree = load(folder.checkpoints, mark)
    state.load_state_dict(tree, mark, open_shards(folder.checkpoints, mark), comm)


def with_newest(folder: RunFolder, task: int | None, read: Callable[[Mark], None]) -> None:
    """Read the newest checkpoint (or the newest of a task), and retry if a run replaces it meanwhile.

    read: reads all that is needed of the checkpoint; may be called again

    Raises:
        CheckpointError: it is damaged.
        FolderError: as `find_checkpoint`.
    """
    for look in range(1, _LOOKS + 1):
        mark = find_checkpoint(folder, task)
        try:
            read(mark)
        except CheckpointError:
            if look == _LOOKS or (folder.checkpoints / mark.name).exists():
                raise
        else:
            return


def find_checkpoint(folder: RunFolder, task: int | None) -> Mark:
    """Find the newest checkpoint of a run, or the newest of `task`.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint.
    """
    folder.require()
    found = [mark for mark in marks(folder.checkpoints) if task is None or mark.task == task]
    if not found:
        wanted = "no checkpoint yet" if task is None else f"no checkpoint of task {task}"
        there = sorted({mark.task for mark in marks(folder.checkpoints)})
        raise FolderError(f"'{folder.path}' has {wanted}; tasks with checkpoints: {there or 'none'}")
    return found[-1]
