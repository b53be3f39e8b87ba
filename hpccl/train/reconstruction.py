"""A diagnosis at the end of a task's training: how well its prior stood for the past. Nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.order import mix
from hpccl.data.protocols import Task
from hpccl.data.rows import Request
from hpccl.engine.protocols import trainable
from hpccl.prior.reconstruct import Losses, compare_gradients, summed_gradients
from hpccl.train.compose import Composer
from hpccl.train.loss import row_nats
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
        weights = {name: value.detach() for name, value in trainable(engine.module).items()}
        zero = {name: torch.zeros_like(value) for name, value in weights.items()}
        quadratic = prior.quadratic.force(weights, comm) if prior.quadratic is not None else zero
        total = {name: soft[name] + replay[name] + quadratic[name] for name in weights}
        terms = {"soft": soft, "replay": replay, "quadratic": quadratic, "total": total}
        errors = compare_gradients(true, terms)
    world.log.write(
        "reconstruction",
        task=task.index,
        past_tasks=list(range(task.index)),
        terms=errors,
        true_norm=float(torch.stack([value.norm() for value in true.values()]).norm()),
    )


def _true(used: npt.NDArray[np.int64], composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    share = world.comm.share(len(used))
    for samples, pixels, valid in _load(used[share.start : share.stop], world):
        target, head = composer.hard_targets(composer.labels[torch.from_numpy(samples)])
        yield pixels, _losses(target, head, [valid], 1.0, world.comm.device)


def _memory(composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    memory = composer.memory
    share = world.comm.share(len(memory))
    start = share.start
    for samples, pixels, valid in _load(memory.sample.numpy()[share.start : share.stop], world):
        slots = torch.arange(start, start + len(samples))
        start += len(samples)
        replayed = memory.replay[slots]
        hard, hard_head = composer.hard_targets(memory.label[slots])
        temperature = world.config.prior.temperature
        soft, soft_head = memory.soft_targets(slots, temperature=temperature, num_classes=hard.shape[1])
        tau = composer.tau[memory.task[slots]] * valid
        yield (
            pixels,
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


def _load(samples: npt.NDArray[np.int64], world: World) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor]]:
    """(samples [n], pixels, valid) in the evaluation view."""
    size = world.stream_batch
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    requests = (Request(part, np.zeros(len(part), dtype=np.uint64)) for part in parts)
    for part, images in zip(parts, world.stream.load(requests), strict=True):
        yield part, images.pixels.to(world.comm.device), images.valid
