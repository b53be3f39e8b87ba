"""The normal prior while a task is learned: how much it pulls to the old weights depends on the memory's labels.

The pull stands for the errors of the old network on its past, whose sum at a minimum is  sum_i J_i' (p*_i - y_i) =
-delta w*  (prior/normal.py). Rows with true labels keep these errors for their examples. If they stand for a share
kappa of the past, what is left to the pull is (1 - kappa) delta: exact for soft labels (kappa 0) and for true labels of
the whole past (kappa 1, no pull), and in the mean for a uniform choice between.
"""

from __future__ import annotations

import numpy as np
import torch

from hpccl.config.adaptation import RemoveData
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Stream, Task
from hpccl.memory.store import Memory
from hpccl.prior.normal import NormalPrior
from hpccl.prior.prior import Prior
from hpccl.train.kept import num_learned
from hpccl.train.removal import removed_samples
from hpccl.train.row_weights import memory_weights, true_shares
from hpccl.train.state import World

__all__ = ["labelled_share", "normal_prior"]


def normal_prior(task: Task, prior: Prior, world: World) -> NormalPrior | None:
    """Return the normal prior with which `task` is learned; None if it is 0."""
    labelled = 0.0
    if prior.anchor is not None and world.config.prior.normal.precision > 0:
        labelled = labelled_share(world.config, world.stream, task, prior.memory)
    return NormalPrior.of(world.config, prior.anchor, labelled=labelled)


def labelled_share(config: RunConfig, stream: Stream, task: Task, memory: Memory) -> float:
    """Return kappa, from 0 to 1: the total weight of memory's true labels, as a share of all past examples."""
    past = sum(num_learned(config, stream, other) for other in stream.tasks[: len(memory.heads)])
    if not past or not len(memory):
        return 0.0
    prior = config.prior
    alone = memory_weights(config, stream, task, memory, prior.weight)
    beside = memory_weights(config, stream, task, memory, (prior.label_weight,))
    if prior.mixes:
        beside = alone * true_shares(config, stream, memory)
    by_label = torch.where(memory.replay, alone[memory.task], beside[memory.task])
    labelled = float((by_label * memory.weight).sum())
    if isinstance(config.adapt, RemoveData) and not config.adapt.retrain:
        # Those that memory held with true labels have left it, and with them what they said (train/adapt.py).
        labelled += int((~np.isin(removed_samples(config.adapt, stream), memory.sample.numpy())).sum())
    return min(labelled / past, 1.0)
