"""The state of a run, which checkpoints save, and its surroundings, which they do not."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hpccl.checkpoint.store import Content, Mark, Shard, Writing
from hpccl.config.run import RunConfig
from hpccl.curvature.coverage import Coverage
from hpccl.curvature.protocols import Shards
from hpccl.data.layout import SPLITS
from hpccl.data.protocols import Stream, Task
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Slab
from hpccl.engine.protocols import Engine
from hpccl.folder import RunFolder
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.report.events import EventLog
from hpccl.report.progress import Progress
from hpccl.train.stop import Stop

__all__ = ["Phase", "RunState", "World"]

_VALUES = 8_000_000


@dataclass
class RunState:
    """Everything a checkpoint holds: weights and optimiser, the prior from the past, progress, results so far.

    shard, writing: this rank's shard, and the checkpoint that is being written; not saved
    coverage: how curvature will be measured, if it was planned before weights were sharded; not saved
    """

    engine: Engine
    prior: Prior = field(default_factory=lambda: Prior(Memory.empty()))
    mark: Mark = field(default_factory=lambda: Mark.at(0, "fit", 0))
    results: list[dict[str, Any]] = field(default_factory=list)
    shard: Shard = field(default_factory=Shard)
    writing: Writing | None = None
    coverage: Coverage | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the nested dict that a checkpoint saves."""
        engine = self.engine.state_dict(ended=self.mark.phase == "done")
        return {"engine": engine, "prior": self.prior.state_dict(), "results": self.results}

    def load_state_dict(self, state: dict[str, Any], mark: Mark, shards: Shards, comm: Comm) -> None:
        """Restore a state_dict that was saved at `mark`; `shards` reads the parts of all ranks, however many saved."""
        self.engine.load_state_dict(state["engine"])
        engine = self.engine
        self.prior = Prior.from_state_dict(state["prior"], shards, comm, engine.place, engine.like).to(engine.device)
        self.results = state["results"]
        self.mark = mark


@dataclass
class Phase:
    """The cost of a phase of a task so far.

    images: images processed
    spent: logs the cost up to a step at which the phase may have to be resumed
    """

    images: int = 0
    spent: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class World:
    """A run's surroundings: configuration, ranks, data, folder, logs, stop requests. Nothing here is saved."""

    config: RunConfig
    comm: Comm
    stream: Stream
    folder: RunFolder
    log: EventLog
    progress: Progress
    stop: Stop

    @property
    def stream_batch(self) -> int:
        """Batch size of passes outside training: as many images as fit in some tens of megabytes, 16 to 500."""
        largest = max(math.prod(self.stream.shape(split)) for split in SPLITS)
        return min(max(_VALUES // largest, 16), 500)

    def save(self, state: RunState, mark: Mark) -> None:
        """Write a checkpoint: the leader what all ranks have in common, each rank its share of the curvature."""
        state.mark = mark
        self.settle(state)
        config, start = self.config.checkpoint, time.perf_counter()
        tree = {**state.state_dict(), "data": self.stream.fingerprint}
        source = state.prior.precision
        copied = _copied(tree, whole=self.comm.leader) if config.background else tree
        content = Content(copied, source, state.prior.curvature_shard)
        state.writing = Writing.begin(
            self.folder.checkpoints,
            mark,
            content,
            keep=config.keep,
            comm=self.comm,
            shard=state.shard,
            wait=not config.background,
        )
        state.writing.stalled = time.perf_counter() - start
        if not config.background or mark.phase != "fit":
            self.settle(state)

    def settle(self, state: RunState, *, wait: bool = True) -> None:
        """Finish the checkpoint that is being written, if any; collective. wait: False to do so only if it is ready."""
        writing = state.writing
        if writing is None or (not wait and self.comm.any(not writing.written)):
            return
        state.writing = None
        saved = writing.finish()
        mark = writing.mark
        self.log.write(
            "checkpoint",
            task=mark.task,
            phase=mark.phase,
            step=mark.step,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
            stalled_seconds=writing.stalled if self.config.checkpoint.background else saved.seconds,
        )

    @contextlib.contextmanager
    def phase(self, task: Task, name: str, *, part: int = 0) -> Iterator[Phase]:
        """Time a phase and log its cost; `part` is the step at which it was entered or resumed."""
        start = time.perf_counter()

        def write(event: str, **more: int) -> None:
            seconds = time.perf_counter() - start
            cost = {"seconds": seconds, "images": phase.images, "images_per_second": phase.images / seconds}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            fields = {"task": task.index, "phase": name, "part": part, **more, **cost, "peak_memory_bytes": peak}
            self.log.write(event, **fields)

        phase = Phase(spent=lambda step: write("spent", step=step))
        yield phase
        write("phase")


def _copied(node: Any, *, whole: bool) -> Any:
    """Copy what this rank writes of a nested structure to host memory, as training goes on while it is written.

    whole: whether it writes the tensors that are whole on every rank; else they are empty
    """
    if isinstance(node, Tensor):
        return node.detach().to("cpu", copy=True) if whole else torch.empty(0)
    if isinstance(node, Slab):
        return replace(node, local=node.local.detach().to("cpu", copy=True))
    if isinstance(node, dict):
        return {key: _copied(value, whole=whole) for key, value in node.items()}
    return [_copied(value, whole=whole) for value in node] if isinstance(node, (list, tuple)) else node
