"""A diagnosis at the end of a task's training: how well its prior stood for the past. Nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.order import mix
from hpccl.data.protocols import Task
from hpccl.engine.sharded import is_spread, parameters_of
from hpccl.prior.reconstruct import Losses, compare_gradients, local_parts, summed_gradients
from hpccl.train.compose import Composer
from hpccl.train.loss import row_nats
from hpccl.train.passes import shared_images
from hpccl.train.state import RunState, World

__all__ = ["reconstruct"]

_SUBSAMPLE = 104


def reconstruct(task: Task, state: RunState, world: World) -> None:
    """Write the error of every term at the present weights, for the prior that the task was trained with."""
    fraction = world.config.log.reconstruction
    prior = state.prior
    if fraction == 0 or task.index == 0 or (prior.quadratic is None and len(prior.memory) == 0):
        return
    with world.phase(task, "reconstruction") as phase:
        engine, comm = state.engine, world.comm
        composer = Composer.build(world.config, world.stream, task, prior.memory, teacher=None, device=engine.device)
        past = np.arange(task.samples("train").start)
        count = max(1, round(fraction * len(past)))
        used = np.sort(past[np.argsort(mix(world.config.seed, _SUBSAMPLE, task.index, past), kind="stable")[:count]])
        phase.images = len(used) + len(prior.memory)
        (true,) = summed_gradients(engine.module, _true(used, composer, world), comm, num_terms=1)
        true = {name: value * (len(past) / len(used)) for name, value in true.items()}
        soft, replay = summed_gradients(engine.module, _memory(composer, world), comm, num_terms=2)
        weights, copies = parameters_of(engine.module)
        quadratic = {name: torch.zeros_like(value) for name, value in true.items()}
        if prior.quadratic is not None:
            quadratic = local_parts(prior.quadratic.force(weights, comm))
        total = {name: soft[name] + replay[name] + quadratic[name] for name in true}
        terms = {"soft": soft, "replay": replay, "quadratic": quadratic, "total": total}
        errors, true_norm = compare_gradients(true, terms, comm, spread=is_spread(engine.module), copies=copies)
    world.log.write(
        "reconstruction",
        task=task.index,
        past_tasks=list(range(task.index)),
        terms=errors,
        true_norm=true_norm,
    )


def _true(used: npt.NDArray[np.int64], composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    for seen in shared_images(used, world, size=world.stream_batch):
        samples = seen.sample if len(seen.sample) else used[:1]  # one that counts for nothing
        target, head = composer.hard_targets(composer.labels[torch.from_numpy(samples)])
        yield seen.pixels, _losses(target, head, [seen.valid], 1.0, world.comm.device)


def _memory(composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    memory = composer.memory
    start = world.comm.share(len(memory)).start
    for seen in shared_images(memory.sample.numpy(), world, size=world.stream_batch):
        slots = torch.arange(start, start + len(seen.sample)) if len(seen.sample) else torch.zeros(1, dtype=torch.int64)
        start += len(seen.sample)
        replayed = memory.replay[slots]
        hard, hard_head = composer.hard_targets(memory.label[slots])
        temperature = world.config.prior.temperature
        soft, soft_head = memory.soft_targets(slots, temperature=temperature, num_classes=hard.shape[1])
        tau = composer.memory_weights(slots) * seen.valid
        yield (
            seen.pixels,
            _pair(
                _losses(soft, soft_head, [tau * ~replayed], temperature, world.comm.device),
                _losses(hard, hard_head, [tau * replayed], 1.0, world.comm.device),
            ),
        )


def _losses(target: Tensor, head: Tensor, weights: list[Tensor], temperature: float, device: torch.device) -> Losses:
    target, head = target.to(device), head.to(device)
    weights = [weight.to(device) for weight in weights]

    def nats(logits: Tensor) -> list[Tensor]:
        rows = row_nats(logits / temperature, target, head)
        return [(weight * rows).sum() for weight in weights]

    return nats


def _pair(first: Losses, second: Losses) -> Losses:
    return lambda logits: [*first(logits), *second(logits)]
