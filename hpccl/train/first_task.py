"""Adopting the first task from another run: it does not depend on the method, so runs can share it."""

from __future__ import annotations

from pathlib import Path

from hpccl.checkpoint.store import Mark, load, marks
from hpccl.config.first_task import first_task_folder
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Task
from hpccl.errors import ConfigError, FolderError
from hpccl.train.state import RunState, World

__all__ = ["adopt_first_task", "find_first_task"]


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
    other = first_task_folder(config, source)
    ends = [mark for mark in marks(other.checkpoints) if (mark.task, mark.phase) == (0, "fitted")]
    if not ends:
        raise FolderError(f"train.first_task_from='{source}' has not finished its first task; continue that run first")
    return other.checkpoints, ends[-1]
