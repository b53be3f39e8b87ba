"""Nearest mean of exemplars (iCaRL: Rebuffi et al. 2017, alg. 1).

With features phi(x) of norm 1, kept examples P_c of class c, and x' the mirror image of x:

    mu_c = m_c / |m_c|,   m_c = sum_{x in P_c} phi(x) + phi(x');     the class of x is argmin_c |phi(x) - mu_c|

Scores are -|phi - mu_c|^2, so that the largest is the nearest. n examples, C classes, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClassMeans", "normalised"]


@dataclass(frozen=True)
class ClassMeans:
    """Class means under the network at the end of one task; they are valid for no other network.

    task: its index; means: [C, d] fp32 of norm 1, 0 for classes without examples
    """

    task: int
    means: Tensor

    @classmethod
    def of_sums(cls, task: int, sums: Tensor) -> ClassMeans:
        """Normalise each class's sum of features, [C, d] float64."""
        return cls(task, normalised(sums).float())

    def joined(self, newer: ClassMeans) -> ClassMeans:
        """Take the means of a later task for the classes that it has."""
        has = newer.means.norm(dim=1, keepdim=True) > 0
        return ClassMeans(newer.task, newer.means.where(has, self.means))

    def scores(self, features: Tensor) -> Tensor:
        """[n, C] scores of features [n, d] of any norm; -4, the minimum, for classes without examples."""
        means = self.means.to(features.device)
        found = -torch.cdist(normalised(features.double()), means.double()).square().float()
        return found.masked_fill(means.norm(dim=1) == 0, -4.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields for a checkpoint."""
        return dict(vars(self))


def normalised(vectors: Tensor) -> Tensor:
    """Scale vectors [n, d] to norm 1; 0 stays 0."""
    length = vectors.norm(dim=1, keepdim=True)
    found: Tensor = vectors / length.where(length > 0, torch.ones_like(length))
    return found
