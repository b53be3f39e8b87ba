"""A diagnostic at the end of a task's training: how well its prior reconstructed the past. Nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.order import subset
from hpccl.data.protocols import Task
from hpccl.dist.spread import aligned
from hpccl.engine.sharded import is_spread, parameters_of
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.prior.reconstruct import Losses, compare_gradients, local_parts, summed_gradients
from hpccl.train.compose import Composer
from hpccl.train.loss import row_loss
from hpccl.train.normal import normal_prior
from hpccl.train.passes import shared_images
from hpccl.train.state import RunState, World

__all__ = ["prior_gradients", "reconstruct", "true_gradient"]

_SUBSAMPLE = 104


def reconstruct(task: Task, state: RunState, world: World) -> None:
    """Log the gradient error of each term of the prior that the task was trained with, at the present weights."""
    fraction = world.config.log.reconstruction
    prior = state.prior
    past = prior.quadratic is not None or (len(prior.memory) > 0 and world.config.train.data != "memory")
    if fraction == 0 or task.index == 0 or not past:
        return
    with world.phase(task, "reconstruction") as phase:
        true = true_gradient(task, fraction, state, world)
        terms = prior_gradients(task, prior, state, world)
        phase.images = len(_used(task, fraction, world)) + len(prior.memory)
        _, copies = parameters_of(state.engine.module)
        spread = is_spread(state.engine.module)
        errors, true_norm = compare_gradients(true, terms, world.comm, spread=spread, copies=copies)
    world.log.write(
        "reconstruction",
        task=task.index,
        past_tasks=list(range(task.index)),
        terms=errors,
        true_norm=true_norm,
    )


def true_gradient(task: Task, fraction: float, state: RunState, world: World) -> dict[str, Tensor]:
    """Return the gradient of all earlier tasks' nats, and of a normal prior, at the present weights; collective.

    fraction: share of the earlier tasks' examples from which it is estimated
    """
    composer = _composer(task, Memory.empty(), state, world)
    past, used = task.samples("train").start, _used(task, fraction, world)
    (true,) = summed_gradients(state.engine.module, _true(used, composer, world), world.comm, num_terms=1)
    scaled = {name: value * (past / len(used)) for name, value in true.items()}
    precision = world.config.prior.normal.precision
    own = local_parts(parameters_of(state.engine.module)[0])
    return {name: value + precision * own[name] for name, value in scaled.items()} if precision > 0 else scaled


def prior_gradients(task: Task, prior: Prior, state: RunState, world: World) -> dict[str, dict[str, Tensor]]:
    """Return the gradients of a prior's terms while `task` is learned, and of their total, at the present weights."""
    composer = _composer(task, prior.memory, state, world)
    soft, replay = summed_gradients(state.engine.module, _memory(composer, world), world.comm, num_terms=2)
    weights, _ = parameters_of(state.engine.module)
    quadratic = {name: torch.zeros_like(value) for name, value in soft.items()}
    if prior.quadratic is not None:
        quadratic = local_parts(prior.quadratic.force(weights, world.comm))
    terms = {"soft": soft, "replay": replay, "quadratic": quadratic}
    normal = normal_prior(task, prior, world)
    if normal is not None and prior.anchor is not None:
        # An engine's saved weights may be sharded differently from the network of this pass.
        anchors = {name: aligned(prior.anchor[name], weights[name], world.comm) for name in soft}
        own, anchor = local_parts(weights), local_parts(anchors)
        terms["normal"] = {name: normal.force(own[name], anchor[name].to(own[name].device)) for name in soft}
    total = {name: torch.stack([term[name] for term in terms.values()]).sum(0) for name in soft}
    return {**terms, "total": total}


def _composer(task: Task, memory: Memory, state: RunState, world: World) -> Composer:
    return Composer.build(world.config, world.stream, task, memory, teacher=None, device=state.engine.device)


def _used(task: Task, fraction: float, world: World) -> npt.NDArray[np.int64]:
    """Return the examples of earlier tasks that represent all of them."""
    past = np.arange(task.samples("train").start)
    count = max(1, round(fraction * len(past)))
    return subset(past, count, world.config.seed, _SUBSAMPLE, task.index)


def _true(used: npt.NDArray[np.int64], composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    for seen in shared_images(used, world, size=world.stream_batch):
        samples = seen.sample if len(seen.sample) else used[:1]  # a placeholder, not valid
        target, head = composer.hard_targets(torch.from_numpy(samples))
        nats = _losses(target, head, [seen.valid], temperature=1.0, kind=composer.hard_kind, device=world.comm.device)
        yield seen.pixels, nats


def _memory(composer: Composer, world: World) -> Iterator[tuple[Tensor, Losses]]:
    memory = composer.memory
    start = world.comm.share(len(memory)).start
    for seen in shared_images(memory.sample.numpy(), world, size=world.stream_batch):
        slots = torch.arange(start, start + len(seen.sample)) if len(seen.sample) else torch.zeros(1, dtype=torch.int64)
        start += len(seen.sample)
        replayed = memory.replay[slots]
        hard, hard_head = composer.hard_targets(memory.sample[slots])
        soft, soft_head = composer.soft_targets(slots)
        tau, beta = (composer.memory_weights(slots, of) * seen.valid for of in (composer.tau, composer.beta))
        temperature, device = world.config.prior.temperature, world.comm.device
        soft_kind, hard_kind = composer.soft_kind, composer.hard_kind
        yield (
            seen.pixels,
            _pair(
                _losses(soft, soft_head, [tau * ~replayed], temperature=temperature, kind=soft_kind, device=device),
                _losses(hard, hard_head, [tau.where(replayed, beta)], temperature=1.0, kind=hard_kind, device=device),
            ),
        )


def _losses(
    target: Tensor, head: Tensor, weights: list[Tensor], *, temperature: float, kind: int, device: torch.device
) -> Losses:
    target, head = target.to(device), head.to(device)
    weights = [weight.to(device) for weight in weights]

    def nats(logits: Tensor) -> list[Tensor]:
        rows = row_loss(logits / temperature, target, head, kind)
        return [(weight * rows).sum() for weight in weights]

    return nats


def _pair(first: Losses, second: Losses) -> Losses:
    return lambda logits: [*first(logits), *second(logits)]
