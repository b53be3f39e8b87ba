"""The one loss: weighted cross-entropy over new, soft-labelled and replayed rows.

With logits z, competing classes H, target q, temperature T and weight v of a row:

    v * CE(q, z / T),   CE(q, z) = logsumexp_{c in H} z_c - sum_c q_c z_c

Functional regularisation with its error correction, CE(p_old, z) + <p_old - e_y, z>, is CE(e_y, z): exactly replay
(Daxberger et al. 2023; checked in tests/unit/train/test_loss.py). So every method is a choice of targets and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpccl.data.rows import Rows

__all__ = ["row_nats", "weighted_nats"]


def row_nats(logits: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """[r] cross-entropy in nats of logits [r, C] (fp32) against target [r, C], among the classes in head [r, C]."""
    competing = logits.masked_fill(~head, -torch.inf)
    return competing.logsumexp(dim=1) - (target * logits).sum(dim=1)


def weighted_nats(logits: Tensor, rows: Rows) -> Tensor:
    """[r] weight * nats of each row; logits are [n, C], one an image."""
    scaled = logits[rows.image] / rows.temperature[:, None]
    return rows.weight * row_nats(scaled, rows.target, rows.head)
