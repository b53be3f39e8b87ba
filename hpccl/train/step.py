"""One optimiser step: the module to read first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpccl.data.rows import ANCHOR, Rows
from hpccl.engine.protocols import Engine
from hpccl.train.functional import Recalled
from hpccl.train.loss import feature_losses, weighted_nats

__all__ = ["TERM_NAMES", "StepStats", "train_step"]

TERM_NAMES = ("new", "soft", "replay", "distill", "anchor", "minmax")  # Rows.term, then FeatureRows.kind
_FEATURES = TERM_NAMES.index("anchor")


@dataclass(frozen=True)
class StepStats:
    """Loss terms and gradient norm of one step.

    terms: [6] this rank's share of the loss, in the order of TERM_NAMES
    gradient_norm: [] over all ranks
    functional: [] this rank's share of the functional prior, per training example
    """

    terms: Tensor
    gradient_norm: Tensor
    functional: Tensor


def train_step(
    engine: Engine,
    batches: Sequence[Rows],
    *,
    num_rows: int,
    recalled: Recalled | None = None,
) -> StepStats:
    """Take one step on J(w) / num_train,   J = sum_i v_i CE_i(w) + 1/2 (w - a)' P (w - a).

    batches: this rank's micro-batches
    num_rows: rows of the step over all ranks and micro-batches
    recalled: the functional prior's examples of this step; they have a pass of their own, the first of the step

    The quadratic was attached to the engine when the task began and enters the gradient there. An optimiser that draws
    or perturbs weights evaluates the gradient of all of J at those weights, perhaps in several passes; the returned
    terms are those of the first.
    """
    functional = torch.zeros((), device=engine.device)
    terms = torch.zeros(len(TERM_NAMES), device=engine.device)
    for at in range(engine.passes):
        with engine.perturbed(at, num_rows=num_rows):
            if recalled is not None:
                found = recalled.learn(engine)
                functional = found if at == 0 else functional
            for number, rows in enumerate(batches, start=1):
                learned = _learn(engine, rows, num_rows=num_rows, last=number == len(batches))
                for term, nats in learned if at == 0 else ():
                    terms.index_add_(0, term, nats)
    return StepStats(terms, engine.step(), functional)


def _learn(engine: Engine, rows: Rows, *, num_rows: int, last: bool) -> list[tuple[Tensor, Tensor]]:
    """Run a micro-batch forward and backward; return pairs (index into TERM_NAMES, loss), each by row."""
    engine.weigh(rows.image_weights)
    if rows.features is None:
        nats = weighted_nats(engine.forward(rows.pixels, rows.noise, last=last), rows) / num_rows
        engine.backward(nats.sum())
        return [(rows.term, nats.detach())]
    logits, features = engine.forward_features(rows.pixels, rows.noise, rows.features.layer, last=last)
    nats, extra = weighted_nats(logits, rows) / num_rows, feature_losses(features, rows.features)
    engine.backward(nats.sum() + extra.sum())
    return [(_FEATURES + (rows.features.kind != ANCHOR).long(), extra.detach()), (rows.term, nats.detach())]
