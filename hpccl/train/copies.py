"""Copies of the memory's images (memory.keep=copy): written when a task ends, then read, dropped with the examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hpccl.config.adaptation import AddData, AnyAdaptation
from hpccl.config.run import RunConfig
from hpccl.data.build import open_stream
from hpccl.data.protocols import Stream, Task
from hpccl.data.shards.copies import copied_name, drop_copies
from hpccl.data.shards.reader import close_files
from hpccl.dist.agree import on_leader
from hpccl.errors import DataError
from hpccl.folder import RunFolder
from hpccl.memory.store import Memory
from hpccl.train.state import RunState, World

__all__ = [
    "added_data",
    "check_images",
    "copies_advised",
    "copies_of",
    "drop_images",
    "keep_images",
    "open_for",
    "reopened_stream",
]


def copies_of(config: RunConfig, folder: RunFolder) -> Path | None:
    """Return the folder with copies of the memory's images (an adaptation's source has them); None if not kept."""
    if config.memory.keep == "reference":
        return None
    return RunFolder(Path(config.adapt.source)).copies if isinstance(config.adapt, AnyAdaptation) else folder.copies


def added_data(config: RunConfig) -> tuple[str, ...]:
    """Return the folders of shards that an adaptation adds to the stream's."""
    return config.adapt.data if isinstance(config.adapt, AddData) else ()


def open_for(config: RunConfig, folder: RunFolder) -> Stream:
    """Open the run's stream; parts whose training shards are gone are opened if the run has copies of their memory.

    Raises:
        DataError: see open_stream.
    """
    return open_stream(config.stream, config.data, added_data(config), copies=copies_of(config, folder))


def reopened_stream(world: World) -> World:
    """Return the world with its stream reopened, so that it reads recent copies, as in a resumed run."""
    close_files()
    return replace(world, stream=open_for(world.config, world.folder))


def copies_advised(config: RunConfig, stream: Stream) -> str | None:
    """Advise memory.keep=copy if memory is read from shards that would be downloaded again and again; else None."""
    if config.memory.keep == "copy" or not config.memory.kept or len(stream.tasks) == 1:
        return None
    if stream.fetched <= config.data.shard_gib * 2**30:
        return None
    return (
        f"the training shards at URLs have {stream.fetched / 2**30:.1f} GiB, more than data.shard_gib="
        f"{config.data.shard_gib:g}: memory is read from all of them, which downloads shards again and again; "
        "set memory.keep=copy, or raise data.shard_gib"
    )


def keep_images(task: Task, memory: Memory, world: World) -> None:
    """Copy the memory's images that are not copied yet, with memory.keep=copy; collective.

    The leader writes. Nothing that an earlier checkpoint needs is touched.

    Raises:
        DataError: an image cannot be read (on the leader).
        FolderError: the run folder cannot be written (on the leader).
        WorldError: the leader failed (on the other ranks).
    """
    if world.config.memory.keep == "reference" or len(memory) == 0:
        return
    with world.phase(task, "copy") as phase:
        phase.images = len(memory)

        def copy() -> None:
            for number in memory.task.unique().tolist():
                world.stream.copy(number, memory.sample[memory.task == number].numpy(), world.folder.copies)

        on_leader(world.comm, copy, "copy the memory's images")


def drop_images(memory: Memory, world: World) -> None:
    """Delete the copies that are not of `memory`, which is the newest checkpoint's; collective."""
    world.comm.barrier()  # no rank is still opening them
    if world.comm.leader:
        counts = [(number, int((memory.task == number).sum())) for number in memory.task.unique().tolist()]
        drop_copies(world.folder.copies, [copied_name(number, count) for number, count in counts])
    world.comm.barrier()


def check_images(first: int, state: RunState, world: World) -> None:
    """Check that all training images that the run still needs exist: those of tasks from `first` on, and the memory's.

    An adaptation needs the memory's, which include removed examples, and the added ones.

    Raises:
        DataError: some are in shards that are gone, and not copied.
    """
    config, tasks = world.config, world.stream.tasks
    needed = [state.prior.memory.sample.numpy()]
    past = first < len(tasks) and (config.log.reconstruction > 0 or config.train.data == "seen")
    if isinstance(config.adapt, AnyAdaptation) and not config.adapt.retrain:
        needed.append(np.array(world.stream.added, dtype=np.int64))
    elif first < len(tasks):
        start = 0 if past else tasks[first].samples("train").start
        needed.append(np.arange(start, tasks[-1].samples("train").stop))
    wrong = world.stream.absent(np.unique(np.concatenate(needed)))
    if wrong is None:
        return
    advice = "; log.reconstruction > 0 needs all earlier examples: set it to 0" if past else ""
    raise DataError(
        f"training images that the run still needs are missing: {wrong}. Only shards of finished tasks may be removed, "
        f"and only with memory.keep=copy{advice}"
    )
