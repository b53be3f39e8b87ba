"""One optimiser step; the page to read first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpccl.data.rows import Rows
from hpccl.engine.protocols import Engine
from hpccl.train.loss import weighted_nats

__all__ = ["TERM_NAMES", "StepStats", "train_step"]

TERM_NAMES = ("new", "soft", "replay", "distill")  # of NEW, SOFT, REPLAY and DISTILL


@dataclass(frozen=True)
class StepStats:
    """terms: [4] this rank's share of the loss, in the order of TERM_NAMES; gradient_norm: [] over all ranks."""

    terms: Tensor
    gradient_norm: Tensor


def train_step(engine: Engine, batches: Sequence[Rows], *, num_rows: int) -> StepStats:
    """One step on J(w) / num_train,   J = sum_i v_i CE_i(w) + 1/2 (w - a)' P (w - a).

    batches: this rank's micro-batches; num_rows: rows of the step over all ranks and micro-batches.
    The quadratic was attached to the engine when the task began and enters the gradient there. An optimiser that draws
    or perturbs weights takes its gradients of all of J at those; the terms are those of its first pass.
    """
    terms = torch.zeros(len(TERM_NAMES), device=engine.device)
    for at in range(engine.passes):
        with engine.perturbed(at, num_rows=num_rows):
            for number, rows in enumerate(batches, start=1):
                logits = engine.forward(rows.pixels, rows.noise, last=number == len(batches))
                nats = weighted_nats(logits, rows) / num_rows
                engine.backward(nats.sum())
                if at == 0:
                    terms.index_add_(0, rows.term, nats.detach())
    return StepStats(terms, engine.step())
