"""Training steps on random images through the trainer's own functions, without the cost of making images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpccl.config.curvature import SiCurvature
from hpccl.config.run import RunConfig
from hpccl.data.layout import SPLITS, Collection, arrange
from hpccl.data.order import BatchPlan
from hpccl.data.protocols import Split, Task
from hpccl.data.rows import Images, Request, Rows
from hpccl.data.stream import ImageStream
from hpccl.data.transfer import CPU
from hpccl.dist.allocator import keep_freed_memory
from hpccl.dist.comm import Comm
from hpccl.engine.protocols import Engine
from hpccl.folder import RunFolder
from hpccl.prior.normal import NormalPrior
from hpccl.prior.prior import Prior
from hpccl.report.events import EventLog
from hpccl.report.progress import make_progress
from hpccl.train.compose import Composer, MicroBatch, split
from hpccl.train.distill import Distilled
from hpccl.train.plan import plan_task
from hpccl.train.state import World
from hpccl.train.step import train_step
from hpccl.train.stop import Stop

__all__ = ["RandomImages", "Steps", "Take", "make_world", "random_stream", "traffic", "usual_step"]

# (engine, this rank's rows, rows of the step on all ranks) -> the gradient's norm.
Take = Callable[[Engine, Sequence[Rows], int], Tensor]


@dataclass(frozen=True, eq=False)
class RandomImages:
    """An ImageSource of noise that is made once: loading images costs an indexing, whatever the sample.

    made: [n, channels, size, size] float32, channels_last as the real sources make it
    """

    made: Tensor

    @classmethod
    def of(cls, size: int, *, count: int = 512) -> RandomImages:
        """Make `count` different images of `size` pixels."""
        pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        return cls(pixels.contiguous(memory_format=torch.channels_last))

    def load(
        self, requests: Iterable[Request], split: Split, device: torch.device = CPU
    ) -> Generator[Images, None, None]:
        """Yield one Images per request, in order."""
        for request in requests:
            where = torch.from_numpy(request.sample) % len(self.made)
            yield Images(self.made[where].to(device), torch.ones(len(request), dtype=torch.bool))

    def raw(self, sample: int, split: Split) -> npt.NDArray[np.uint8]:
        """Return the pixels [h, w, channels] uint8 of one image."""
        pixels = self.made[sample % len(self.made)].permute(1, 2, 0)
        shown: npt.NDArray[np.uint8] = (pixels * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
        return shown

    def skipped(self) -> list[tuple[Split, int, str]]:
        """Return an empty list: every image can be decoded."""
        return []


def random_stream(size: int, *, tasks: int, classes: int, train: int, test: int = 1) -> ImageStream:
    """Make `tasks` tasks of `classes` classes with `train` and `test` images per class, of `size` pixels."""
    names = [str(number) for number in range(tasks * classes)]
    labels = {
        which: np.repeat(np.arange(len(names)), count) for which, count in zip(SPLITS, (train, test), strict=True)
    }
    groups = {which: np.zeros_like(found) for which, found in labels.items()}
    layout = arrange([Collection("random", names, labels, groups, tasks)], order="given", seed=0)
    return ImageStream(
        layout, (3, size, size), RandomImages.of(size), lambda which, sample: f"random/{which}-{sample}", "random"
    )


def make_world(config: RunConfig, comm: Comm, stream: ImageStream, folder: Path) -> World:
    """Make the world of a run that writes nothing but checkpoints and pictures."""
    if comm.device.type == "cpu":
        keep_freed_memory()
    run_folder = RunFolder(folder)
    run_folder.create()
    log = EventLog(run_folder.events, enabled=False)
    return World(config, comm, stream, run_folder, log, make_progress(False), Stop())


def usual_step(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
    """Take a step as in training."""
    return train_step(engine, batches, num_rows=num_rows).gradient_norm


@dataclass(eq=False)
class Steps:
    """`count` training steps of a task under a prior, as `fit` takes them, on images that are in memory already.

    Each call continues where the last one ended and returns the number of rows trained on. Work done once per task is
    not measured: `rates` collects rows per second by the clock, over all ranks; `cpu` the processor seconds of this
    rank, which depend less on other load. With `loads`, images are requested in every step instead of once.
    """

    world: World
    engine: Engine
    task: Task
    prior: Prior
    count: int
    take: Take = usual_step
    loads: bool = False
    rates: list[float] = field(default_factory=list, init=False)
    cpu: list[float] = field(default_factory=list, init=False)
    _done: int = field(default=0, init=False)
    _loaded: dict[tuple[int, ...], list[Images]] = field(default_factory=dict, init=False)

    @cached_property
    def plan(self) -> BatchPlan:
        """The rows of every step."""
        return plan_task(self.world.config, self.world.stream, self.task, self.prior.memory)

    @cached_property
    def composer(self) -> Composer:
        """The composer of targets and weights for these rows."""
        anchor = self.prior.anchor
        distilled = Distilled.of(self.world.config, self.world.stream, self.task)
        asked = self.world.config.prior.view == "teacher" or (distilled is not None and distilled.config.view == "same")
        teacher = self.engine.frozen(anchor) if asked and anchor is not None else None
        composer = Composer.build(
            self.world.config,
            self.world.stream,
            self.task,
            self.prior.memory,
            teacher=teacher,
            device=self.engine.device,
            distilled=distilled,
        )
        if distilled is None or distilled.config.view == "same":
            return composer
        # Logits that the old network recorded; their values do not affect the time.
        said = torch.randn(len(composer.samples) + len(self.prior.memory), len(distilled.columns))
        return replace(composer, distilled=replace(distilled, recorded=said))

    def _images(self, parts: list[MicroBatch]) -> list[Images]:
        """Return this rank's images of a step, the same for all steps of equal size (sizes differ by one row)."""
        sizes = tuple(len(part.rows) for part in parts)
        if self.loads or sizes not in self._loaded:
            self._loaded[sizes] = list(self.world.stream.load(self.composer.request(part) for part in parts))
        return self._loaded[sizes]

    def _parts(self, step: int) -> list[MicroBatch]:
        return split(self.plan.batch(step), self.world.comm, accumulate=self.world.config.train.accumulate)

    def __call__(self) -> int:
        """Take the steps."""
        comm, plan = self.world.comm, self.plan
        detach = self._attach(plan.num_train)
        first, self._done = self._done, self._done + self.count
        comm.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        try:
            rows = sum(self._step(number) for number in range(first, self._done))
        finally:
            detach()
        self.cpu.append(time.process_time() - cpu)
        comm.barrier()
        self.rates.append(rows / (time.perf_counter() - start))
        return rows

    def _attach(self, num_train: int) -> Callable[[], None]:
        """Attach the priors of the weights, until the returned function is called."""
        normal, quadratic = NormalPrior.of(self.world.config, self.prior.anchor), self.prior.quadratic
        with ExitStack() as stack:
            for part in (normal, quadratic):
                if part is not None:
                    stack.callback(part.attach(self.engine, self.world.comm, num_train=num_train))
            if quadratic is not None and isinstance(self.world.config.curvature, SiCurvature):
                stack.callback(self.engine.follow(quadratic.pull_on(num_train)))
            return stack.pop_all().close

    def _step(self, number: int) -> int:
        parts = self._parts(number % self.plan.num_steps)
        for part in parts:
            self.composer.request(part)  # in a run, the thread that makes images does this on the same cores
        rows = [self.composer.rows(part, images) for part, images in zip(parts, self._images(parts), strict=True)]
        num_rows = len(parts[0].batch)
        self.take(self.engine, rows, num_rows)
        return num_rows


# ---------------------------------------------------------------- communication


def traffic(steps: Steps, comm: Comm) -> dict[str, int]:
    """Return by collective the bytes that all ranks together pass to it in one step."""
    counted: Counter[str] = Counter()

    def take(engine: Engine, batches: Sequence[Rows], num_rows: int) -> Tensor:
        with Collectives(counted):
            return usual_step(engine, batches, num_rows)

    replace(steps, count=1, take=take)()
    kinds = sorted(counted)
    total = torch.tensor([counted[kind] for kind in kinds])
    comm.sum_([total])
    return dict(zip(kinds, total.tolist(), strict=True))


class Collectives(TorchDispatchMode):
    """Counts the bytes that torch.distributed passes to its backend, on behalf of DDP, FSDP2 or DeepSpeed.

    A collective's bytes are those of the whole tensor, its input or its output, whichever is larger: n for an
    all-reduce, an all-gather or a reduce-scatter of n bytes.
    """

    def __init__(self, num_bytes: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.num_bytes = num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it if it is a collective."""
        if func.namespace == "c10d":
            sizes = [_num_bytes(argument) for argument in (*args, *(kwargs or {}).values())]
            self.num_bytes[func.__name__.partition(".")[0].strip("_")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def _num_bytes(node: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(node) if isinstance(leaf, Tensor))
