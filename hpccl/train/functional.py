"""The functional prior (FROMP) in a run: built when a task ends, evaluated in every step of the next.

In a step each rank passes its share of the recalled examples through the network, in evaluation mode; their
probabilities, b K numbers, are all-gathered, as the kernel couples them; then each rank's share of (K^-1 d) m is
differentiated as a micro-batch of its own. Images are not exchanged, and the result does not depend on the shares.

In class-incremental streams the new task's classes compete in the softmax of a step, too (`prior.classes=seen`):
probability that they take from the old classes is a change like any other, and is penalised. With a softmax over the
old classes alone, new logits could grow beyond all old ones without any penalty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from hpccl.config.run import RunConfig
from hpccl.curvature.kernel import probability_kernel
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Precision
from hpccl.data.order import mix
from hpccl.data.protocols import Task
from hpccl.data.rows import Images, Request
from hpccl.dist.comm import Comm
from hpccl.engine.protocols import Engine
from hpccl.memory.store import Memory, head_columns
from hpccl.prior.fromp import Block, Fromp, cholesky, equal_blocks, probabilities
from hpccl.train.state import RunState, World

__all__ = ["Recalled", "functional_prior", "recalled", "rows_memory"]

_BLOCKS = 125  # purpose of a hash

# (pixels [n, c, h, w], K classes) -> covariance of the classes' probabilities
Kernel: TypeAlias = Callable[[Tensor, list[int]], Tensor]


# ---------------------------------------------------------------- at the end of a task


def functional_prior(
    task: Task, memory: Memory, precision: Precision | None, state: RunState, world: World
) -> Fromp | None:
    """Build the functional prior of all past tasks at the present weights; None if its weight is 0. Collective.

    precision: curvature of all past tasks' examples, memory included; None: the kernel is the identity.

    Raises:
        CoverageError: a trainable weight has no curvature.
        DivergedError: a kernel is not finite, or not positive definite.
    """
    config = world.config.prior.fromp
    if config.weight == 0:
        return None
    with world.phase(task, "kernel") as phase:
        phase.images = len(memory)
        model = state.engine.whole_module()
        kernel: Kernel | None = None
        if precision is not None:
            mean = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
            posterior = Posterior.of(precision, mean, prior_precision=config.precision, comm=world.comm)
            kernel = partial(probability_kernel, posterior, model)
        made = [_blocks(number, memory, kernel, state, world) for number in _with_memory(memory)]
    fromp = Fromp(config.weight, tuple(tuple(block for block, _ in blocks) for blocks in made), precision)
    world.log.write(
        "functional",
        task=task.index,
        kernel=config.kernel,
        blocks=[len(blocks) for blocks in made],
        bytes=fromp.num_bytes,
        jitter=max(used for blocks in made for _, used in blocks),
    )
    return fromp


def _with_memory(memory: Memory) -> list[int]:
    """Return the tasks with examples in memory."""
    found: list[int] = memory.task.unique().tolist()
    return found


def _blocks(
    number: int, memory: Memory, kernel: Kernel | None, state: RunState, world: World
) -> list[tuple[Block, float]]:
    """Return the blocks of one past task, each with the jitter that its Cholesky factor needed."""
    config = world.config.prior.fromp
    columns = memory.heads[number]
    classes = columns[columns >= 0]
    slots = (memory.task == number).nonzero().squeeze(1)
    order = slots.numpy()[np.argsort(mix(world.config.seed, _BLOCKS, number, memory.sample[slots].numpy()))]
    parts = equal_blocks(order.tolist(), config.block)
    requests = [Request(memory.sample[part].numpy(), np.zeros(len(part), dtype=np.uint64)) for part in parts]
    found = []
    with contextlib.closing(world.stream.load(requests, device=world.comm.device)) as images:
        for part, seen in zip(parts, images, strict=True):
            old = _old(state.engine, seen.pixels, classes)
            root, used = None, 0.0
            if kernel is not None:
                root, used = cholesky(kernel(seen.pixels, classes.tolist()), config.jitter)
            found.append((Block(torch.tensor(part), classes.clone(), old, root), used))  # own copy, for saving
    return found


@torch.no_grad()
def _old(engine: Engine, pixels: Tensor, classes: Tensor) -> Tensor:
    """Return probabilities [b, K] float64, computed as in a step, so that rounding is the same."""
    logits = engine.predict(pixels)
    return probabilities(logits, classes.to(logits.device).expand(len(pixels), -1)).double().contiguous()


# ---------------------------------------------------------------- in a step


@dataclass(frozen=True)
class Recalled:
    """What a step recalls: blocks of the past tasks, and the images of this rank's share of them.

    blocks: each with the number of blocks that it represents
    share: this rank's, among the examples of all blocks
    columns: [b, K + E] for the examples of all blocks, the classes of its probabilities, -1 beyond its head; then later
        classes that compete with them, -1 for none
    images: of the share; one image without effect where the share is empty
    weight: of R(w), per training example
    """

    blocks: list[tuple[Block, int]]
    share: range
    columns: Tensor
    images: Images
    weight: float
    comm: Comm

    def learn(self, engine: Engine) -> Tensor:
        """Add this term's gradient to the step's; return this rank's share of its value, in nats per training example.

        The leader's share is the whole value, that of other ranks 0.
        """
        device = engine.device
        own = range(self.share.start, self.share.stop)
        count = len(own)
        pixels = self.images.pixels.to(device)
        noise = torch.zeros(len(pixels), dtype=torch.int64)
        logits = engine.forward(pixels, noise, last=False, training=False)
        columns = self.columns.to(device)
        now = probabilities(logits[:count], columns[own.start : own.stop])
        valid = self.images.valid[:count].to(now)
        everywhere = self.comm.gather(torch.cat([now.detach(), valid[:, None]], dim=1))
        pull, value = self._pull(everywhere[:, :-1], everywhere[:, -1:] > 0)
        # An empty share has no loss, but a forward pass needs its backward pass, as these may be collective.
        loss = (pull[own.start : own.stop].to(now) * now).sum() + 0.0 * logits.sum()
        engine.backward(self.weight * loss)
        return self.weight * (value if self.comm.leader else torch.zeros_like(value))

    def _pull(self, now: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return K^-1 d [b, K] of all blocks and the sum of 1/2 d' K^-1 d; d is 0 for images that cannot be read."""
        pulls = torch.zeros(now.shape, dtype=torch.float64, device=now.device)
        value, start = torch.zeros((), dtype=torch.float64, device=now.device), 0
        for block, stands_for in self.blocks:
            rows, width = slice(start, start + len(block.slots)), len(block.classes)
            change = now[rows, :width].double().where(valid[rows], block.old)
            pull = stands_for * block.pull(change)
            pulls[rows, :width] = pull
            value += 0.5 * ((change - block.old) * pull).sum()
            start = rows.stop
        return pulls, value.float()


def recalled(
    fromp: Fromp, memory: Memory, world: World, *, task: int, num_train: int, first: int, stop: int
) -> Generator[Recalled, None, None]:
    """Yield what each step from `first` to `stop` of a task recalls; images are prefetched, in the evaluation view."""
    competing = _competing(memory.heads, world, task)

    def requests() -> Iterator[Request]:
        for step in range(first, stop):
            slots = _slots(fromp, step)
            share = world.comm.share(len(slots))
            mine = slots[share.start : share.stop] if len(share) else slots[:1]
            yield Request(memory.sample[mine].numpy(), np.zeros(len(mine), dtype=np.uint64))

    with contextlib.closing(world.stream.load(requests(), device=world.comm.device)) as images:
        for step in range(first, stop):
            slots = _slots(fromp, step)
            yield Recalled(
                blocks=fromp.at(step),
                share=world.comm.share(len(slots)),
                columns=competing[memory.task[slots]],
                images=next(images),
                weight=fromp.weight / num_train,
                comm=world.comm,
            )


def _competing(heads: Tensor, world: World, task: int) -> Tensor:
    """Return the competing classes [T, K + E] of past tasks: heads [T, K], then the seen classes that are not in them.

    E is 0 where old classes compete only among themselves.
    """
    config = world.config
    if config.train.head == "own" or config.prior.classes == "known":
        return heads
    seen = {number for other in world.stream.tasks[: task + 1] for number in other.classes}
    later = head_columns([sorted(seen - set(head)) for head in heads.tolist()])
    return torch.cat([heads, later], dim=1)


def _slots(fromp: Fromp, step: int) -> Tensor:
    """Return the memory slots of a step's blocks, in order."""
    return torch.cat([block.slots for block, _ in fromp.at(step)])


def rows_memory(config: RunConfig, memory: Memory) -> Memory:
    """Return the memory whose examples are rows of a step: empty with a functional prior, which recalls them itself."""
    return Memory.empty() if config.prior.fromp.weight > 0 else memory
