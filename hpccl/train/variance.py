"""The variance of every example's logits under the posterior of the whole network, J P^-1 J': all layers, linearised.

P = F + delta I, F the Kronecker-factored curvature of the task, exact over labels, measured in passes of its own. An
example costs one backward pass for each competing class. With several ranks, every rank makes those of all examples,
each for its own layers (`hpccl.curvature.posterior`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpccl.config.curvature import KroneckerCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.posterior import Posterior
from hpccl.data.protocols import Task
from hpccl.engine.protocols import trainable
from hpccl.errors import ConfigError
from hpccl.report.text import size
from hpccl.train.passes import shared_images
from hpccl.train.score import competing
from hpccl.train.state import RunState, World
from hpccl.train.task_pass import TaskPass

__all__ = ["LogitVariance", "logit_variances", "only_classes", "refuse_large_jacobians"]

Ints = npt.NDArray[np.int64]

_LARGEST = 4 << 30  # bytes of one image's Jacobian with respect to one layer, including copies
_TOGETHER = 64  # images of a rank at a time


@dataclass(frozen=True)
class LogitVariance:
    """A batch of this rank's examples; n may be 0.

    sample: [n] positions; valid: [n] bool, could be decoded
    logits: [n, K] of the competing classes; variance: [n, K, K] their covariance
    """

    sample: Ints
    valid: npt.NDArray[np.bool_]
    logits: Tensor
    variance: Tensor


def logit_variances(
    task: Task, samples: Ints, state: RunState, world: World, *, prior_precision: float
) -> Iterator[LogitVariance]:
    """Yield this rank's share of the task's `samples` in batches; collective, with unsharded weights on every rank.

    Raises:
        ConfigError: the network is too large.
        CoverageError: its curvature cannot be measured.
        Stopped: the run was asked to stop.
    """
    comm, classes = world.comm, competing(task, world)
    network = state.engine.whole_module()
    refuse_large_jacobians(
        network, len(classes), wanted_by="memory.selector.network=all", instead="set memory.selector.network=last_layer"
    )
    estimator = build_estimator(KroneckerCurvature(fisher="ggn"), world.config.seed)
    precision = estimator.estimate(network, TaskPass(task, samples, world), comm)
    weights = {name: value.detach() for name, value in (*network.named_parameters(), *network.named_buffers())}
    posterior = Posterior.of(precision, weights, prior_precision=prior_precision, comm=comm)
    size = max(1, min(world.stream_batch, _TOGETHER // comm.size))
    for seen in shared_images(samples, world, size=size):
        number = len(seen.sample)
        counts = comm.gather(torch.tensor([number])).tolist()
        first = sum(counts[: comm.rank])
        pixels = comm.gather(seen.pixels[:number])  # each rank has some layers and needs all images for them
        logits = state.engine.predict(seen.pixels)[:number, classes]
        with only_classes(network, classes):
            variance = posterior.logit_variance(network, pixels)[first : first + number]
        yield LogitVariance(seen.sample, seen.valid.numpy()[:number], logits, variance)


@contextlib.contextmanager
def only_classes(module: nn.Module, classes: Sequence[int]) -> Iterator[None]:
    """Restrict the network's logits to these classes, so that no other Jacobians are computed."""
    handle = module.register_forward_hook(lambda _module, _arguments, out: out[:, list(classes)])
    try:
        yield
    finally:
        handle.remove()


def refuse_large_jacobians(module: nn.Module, num_classes: int, *, wanted_by: str, instead: str) -> None:
    """Check before long work that the Jacobian of one image's logits with respect to any parameter fits in memory.

    wanted_by: the setting or option that needs it; instead: the alternative to advise

    Raises:
        ConfigError: it does not.
    """
    name, largest = max(trainable(module).items(), key=lambda item: item[1].numel())
    needed = 4 * 4 * num_classes * largest.numel()
    if needed > _LARGEST:
        raise ConfigError(
            f"the network is too large for {wanted_by}: the Jacobian of one image by '{name}' takes {size(needed)} "
            f"with its copies; allowed: {size(_LARGEST)}; {instead}"
        )
