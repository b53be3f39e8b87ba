"""One optimiser step; the page to read first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpccl.data.rows import Rows
from hpccl.engine.protocols import Engine
from hpccl.train.functional import Recalled
from hpccl.train.loss import weighted_nats

__all__ = ["TERM_NAMES", "StepStats", "train_step"]

TERM_NAMES = ("new", "soft", "replay", "distill")  # of NEW, SOFT, REPLAY and DISTILL


@dataclass(frozen=True)
class StepStats:
    """terms: [4] this rank's share of the loss, in the order of TERM_NAMES; gradient_norm: [] over all ranks.

    functional: [] this rank's share of the functional prior, per training example
    """

    terms: Tensor
    gradient_norm: Tensor
    functional: Tensor


def train_step(
    engine: Engine, batches: Sequence[Rows], *, num_rows: int, recalled: Recalled | None = None
) -> StepStats:
    """One step on J(w) / num_train,   J = sum_i v_i CE_i(w) + 1/2 (w - a)' P (w - a).

    batches: this rank's micro-batches; num_rows: rows of the step over all ranks and micro-batches.
    The quadratic was attached to the engine when the task began and enters the gradient there. What is recalled has a
    pass of its own, the step's first.
    """
    functional = torch.zeros((), device=engine.device) if recalled is None else recalled.learn(engine)
    terms = torch.zeros(len(TERM_NAMES), device=engine.device)
    for number, rows in enumerate(batches, start=1):
        logits = engine.forward(rows.pixels, rows.noise, last=number == len(batches))
        nats = weighted_nats(logits, rows) / num_rows
        engine.backward(nats.sum())
        terms.index_add_(0, rows.term, nats.detach())
    return StepStats(terms, engine.step(), functional)
