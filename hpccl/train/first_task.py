"""Adopting the first task from another run: it does not depend on the method, so runs can share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpccl.checkpoint.store import Mark, load, marks
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Task
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder, expanded
from hpccl.train.state import RunState, World

__all__ = ["adopt_first_task", "find_first_task", "first_task_identity"]


def adopt_first_task(task: Task, state: RunState, world: World) -> bool:
    """Take the first task's weights from the run that train.first_task_from names; False if there is nothing to take.

    Raises:
        ConfigError: that run is no run, or learned its first task otherwise or from other data.
        FolderError: it has not ended its first task.
    """
    if world.config.train.first_task_from is None or task.index > 0:
        return False
    checkpoints, mark = find_first_task(world.config, world.config.train.first_task_from)
    tree, ours = load(checkpoints, mark), world.stream.fingerprint
    if tree["data"] != ours:
        raise ConfigError(
            f"train.first_task_from='{world.config.train.first_task_from}' learned its first task from other data "
            f"(fingerprint {tree['data'][:12]}, now {ours[:12]}), as the shards were rebuilt since; train that run "
            "again, or set train.first_task_from=null"
        )
    state.engine.put(tree["engine"]["weights"])
    world.save(state, Mark.at(0, "fitted", mark.step))
    return True


def find_first_task(config: RunConfig, source: str) -> tuple[Path, Mark]:
    """Find the checkpoint that ended the first task of run `source`; return the checkpoints' folder and its mark.

    Raises:
        ConfigError: it is no run, or learned its first task otherwise.
        FolderError: it has not ended its first task.
    """
    other = RunFolder(expanded("train.first_task_from", source))
    if not other.config.is_file():
        problem = "it has no config.yaml" if other.path.is_dir() else "it does not exist"
        raise ConfigError(
            f"train.first_task_from='{source}' is not a run folder: {problem}; give the folder of a run with the same "
            "first task, such as runs/NAME, or null to train the first task here"
        )
    theirs, ours = first_task_identity(load_recorded(other.config)), first_task_identity(config)
    differing = sorted(key for key in theirs if theirs[key] != ours[key])
    if differing:
        raise ConfigError(
            f"train.first_task_from='{source}' trained its first task differently: {', '.join(differing)} differ"
        )
    ends = [mark for mark in marks(other.checkpoints) if (mark.task, mark.phase) == (0, "fitted")]
    if not ends:
        raise FolderError(f"train.first_task_from='{source}' has not finished its first task; continue that run first")
    return other.checkpoints, ends[-1]


def first_task_identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine the weights after the first task.

    Settings that act on later tasks only are left out, and of per-task values all but the first.
    """
    identity = config.identity()
    train, optim, prior = identity["train"], identity["optim"], identity["prior"]
    correct = prior["correct"]
    # Settings without effect on a first task.
    later = {"head_epochs": 0, "frozen": [], "norms": "batch", "first_task_from": None}
    later |= {"competing": "seen"} if train["competing"] == "task" else {}
    return {
        **{key: identity[key] for key in ("seed", "stream", "data", "model", "engine")},
        "train": {**train, "epochs": train["epochs"][0], **later},
        "held_out": [correct["share"], identity["memory"]["total"]] if correct["share"] else None,
        "optim": {**optim, "lr": optim["lr"][0]},
        "prior": {"normal": {"precision": prior["normal"]["precision"]}},
    }
