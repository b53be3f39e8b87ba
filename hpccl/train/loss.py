"""The one loss: weighted cross-entropy over new, soft-labelled, replayed and distilled rows.

With logits z, competing classes H, target q, temperature T and weight v of a row:

    CROSS_ENTROPY:  v * CE(q, z / T),   CE(q, z) = logsumexp_{c in H} z_c - sum_c q_c z_c
    SIGMOID:        v * sum_{c in H} [log(1 + exp(z_c / T)) - q_c z_c / T],  binary cross-entropy per class (iCaRL)
    SQUARED:        v * mean_{c in H} (z_c / T - q_c)^2,  q are logits (DER: Buzzega et al. 2020, eq. 4)

Functional regularisation with its error correction, CE(p_old, z) + <p_old - e_y, z>, is CE(e_y, z): exactly replay
(Daxberger et al. 2023; checked in tests/unit/train/test_loss.py). So every method is a choice of targets and weights.

Losses on features (TOPIC: Tao et al. 2020), with feature phi, target m, stiffness s and margin xi:

    ANCHOR:  v * sum_k s_k (phi_k - m_k)^2        PULL:  v * |phi - m|        PUSH:  v * max(0, xi - |phi - m|)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpccl.data.rows import ANCHOR, PULL, SIGMOID, SQUARED, FeatureRows, Rows

__all__ = ["feature_losses", "row_loss", "row_nats", "row_questions", "row_squares", "weighted_nats"]

_SAME = 1e-4  # a distance below this share of the target's norm counts as zero


def row_nats(logits: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """Return the cross-entropy [r] in nats of logits [r, C] (fp32) against target [r, C] over the classes in head."""
    competing = logits.masked_fill(~head, -torch.inf)
    return competing.logsumexp(dim=1) - (target * logits).sum(dim=1)


def row_questions(logits: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """Return the binary cross-entropy [r] in nats, summed over the classes in head [r, C]; target [r, C] in [0, 1]."""
    nats = torch.nn.functional.softplus(logits) - target * logits
    return nats.masked_fill(~head, 0.0).sum(dim=1)


def row_squares(logits: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """Return the mean squared difference [r] of logits and target [r, C] over the classes in head [r, C]."""
    return (logits - target).square().masked_fill(~head, 0.0).sum(dim=1) / head.sum(dim=1)


def row_loss(logits: Tensor, target: Tensor, head: Tensor, kind: int) -> Tensor:
    """Return the unweighted loss [r] of rows that are all of one kind, at temperature 1."""
    if kind == SIGMOID:
        return row_questions(logits, target, head)
    return row_squares(logits, target, head) if kind == SQUARED else row_nats(logits, target, head)


def weighted_nats(logits: Tensor, rows: Rows) -> Tensor:
    """Return the weighted loss [r] of each row; logits [n, C] are by image."""
    scaled = logits[rows.image] / rows.temperature[:, None]
    nats = row_nats(scaled, rows.target, rows.head)
    if rows.kind is not None:
        nats = torch.where(rows.kind == SIGMOID, row_questions(scaled, rows.target, rows.head), nats)
        nats = torch.where(rows.kind == SQUARED, row_squares(scaled, rows.target, rows.head), nats)
    return rows.weight * nats


def feature_losses(features: Tensor, rows: FeatureRows) -> Tensor:
    """Return the weighted loss [q] of each row; features [n, d], the last layer's input, are by image."""
    phi = torch.nn.functional.normalize(features, dim=1) if rows.normalised else features
    difference = phi[rows.image] - rows.target
    anchored = (rows.stiff * difference.square()).sum(dim=1)
    square = difference.square().sum(dim=1)
    # The distance has no gradient at 0, where the image that represents a node starts: rounding must not choose one.
    apart = square > _SAME**2 * rows.target.square().sum(dim=1)
    distance = square.where(apart, torch.ones_like(square)).sqrt() * apart
    pushed = (rows.margin - distance).clamp(min=0)
    found = torch.where(rows.kind == PULL, distance, pushed)
    return rows.weight * torch.where(rows.kind == ANCHOR, anchored, found)
