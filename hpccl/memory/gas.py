"""Neural gas with competitive Hebbian learning: a graph of nodes in feature space, as TOPIC's losses use it.

Legend: N nodes m [N, d] with variances L [N, d], f a feature, r_i the node that is i-th nearest to it, a[i, j] the age
of the edge between nodes i and j (0: no edge).

Neural gas (Martinetz and Schulten 1991):      m_{r_i} <- m_{r_i} + rate exp(-i / spread) (f - m_{r_i})
Competitive Hebbian learning (Martinetz 1993): a[r_1, r_2] <- 1; other edges of r_1 age by 1 and are removed beyond
`lifetime`.

Few-shot sessions (Tao et al. 2020, TOPIC), with m~_j = phi(z_j) for the image z_j of a node, and its class c_j:

    anchor loss   AL  = sum_{old j} (m~_j - m_j)' L_j^-1 (m~_j - m_j)
    min-max loss  MML = sum_{(x, y), c_j = y} |phi(x) - m_j|  +  sum_{i: c_i != y, edge ij} max(0, xi - |m_i - m_j|)

All in float64 on the CPU and sequential: the same on every rank that has the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Gas", "Rules", "adapted", "connected", "distances", "fitted"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_NEGLIGIBLE = 40.0  # exp(-40) moves nothing


@dataclass(frozen=True)
class Rules:
    """How nodes move and edges age. first_rank: the rank i of the nearest node, 1 in TOPIC and 0 in Martinetz."""

    rate: float
    spread: float
    lifetime: int
    first_rank: int = 1


def distances(nodes: Floats, feature: Floats) -> Floats:
    """[N] Euclidean distances of nodes [N, d] from a feature [d]."""
    found: Floats = np.sqrt(np.square(nodes - feature).sum(axis=1))
    return found


def adapted(nodes: Floats, feature: Floats, rules: Rules) -> Floats:
    """Return the nodes [N, d] adapted to one feature [d]; of equally near nodes, the first counts as nearer."""
    moved = nodes.copy()
    _adapt_(moved, feature, np.argsort(distances(nodes, feature), kind="stable"), rules)
    return moved


def _adapt_(nodes: Floats, feature: Floats, order: Ints, rules: Rules) -> None:
    """Move the nodes in place. order: their indices, nearest first."""
    order = order[: int(_NEGLIGIBLE * rules.spread) + 1]
    share = rules.rate * np.exp(-(np.arange(len(order)) + rules.first_rank) / rules.spread)
    nodes[order] += share[:, None] * (feature - nodes[order])


def connected(ages: Ints, nodes: Floats, feature: Floats, rules: Rules) -> Ints:
    """Return the edge ages [N, N] (symmetric), updated by one feature [d]."""
    found = ages.copy()
    _connect_(found, np.argsort(distances(nodes, feature), kind="stable"), rules)
    return found


def _connect_(ages: Ints, order: Ints, rules: Rules) -> None:
    if len(order) < 2:
        return
    first, second = order[:2]
    older = np.where(ages[first] > 0, ages[first] + 1, 0)
    older[second] = 1
    older[older > rules.lifetime] = 0
    ages[first], ages[:, first] = older, older


def fitted(nodes: Floats, ages: Ints, features: Floats, rules: Rules) -> tuple[Floats, Ints]:
    """Return nodes and edge ages after features [n, d], one at a time: edges are updated first, then nodes."""
    nodes, ages = nodes.copy(), ages.copy()
    for feature in features:
        order = np.argsort(distances(nodes, feature), kind="stable")
        _connect_(ages, order, rules)
        _adapt_(nodes, feature, order, rules)
    return nodes, ages


@dataclass(frozen=True)
class Gas:
    """The graph at the end of a task, or at the start of a session.

    nodes, variance, image: [N, d] float64, centroids, variances (floor included), features of the nodes' images
    ages:   [N, N] int64
    sample: [N] int64, the training example that represents a node; label: [N] int64
    old:    number of nodes from before the session, which come first
    shot, shot_node: [n] int64, the session's training examples and the nearest node of their class; empty after it
    """

    nodes: Tensor
    variance: Tensor
    image: Tensor
    ages: Tensor
    sample: Tensor
    label: Tensor
    old: int
    shot: Tensor
    shot_node: Tensor

    def __len__(self) -> int:
        return len(self.nodes)

    @classmethod
    def of(
        cls, features: Floats, samples: Ints, labels: Ints, rules: Rules, *, start: Ints, orders: Sequence[Ints],
        floor: float,
    ) -> Gas:  # fmt: skip
        """Fit a graph to features [n, d] of examples.

        start: [N] features at which nodes start; orders: an order of the features per pass; floor: see `_variances`
        """
        nodes, ages = features[start], np.zeros((len(start), len(start)), dtype=np.int64)
        for order in orders:
            nodes, ages = fitted(nodes, ages, features[order], rules)
        nearest = np.array([int(np.argmin(distances(features, node))) for node in nodes])
        return cls(
            nodes=torch.from_numpy(nodes),
            variance=torch.from_numpy(_variances(nodes, features, floor)),
            image=torch.from_numpy(features[nearest]),
            ages=torch.from_numpy(ages),
            sample=torch.from_numpy(samples[nearest]),
            label=torch.from_numpy(labels[nearest]),
            old=len(nodes),
            shot=torch.zeros(0, dtype=torch.int64),
            shot_node=torch.zeros(0, dtype=torch.int64),
        )

    def grown(self, features: Floats, samples: Ints, labels: Ints, rules: Rules, *, each: int, floor: float) -> Gas:
        """Add `each` nodes per new class, at the shots [n, d] nearest to its mean, with edges to the old nodes."""
        new = np.concatenate([_central(features, labels, label, each) for label in np.unique(labels)])
        count, before = len(self) + len(new), len(self)
        nodes = np.concatenate([self.nodes.numpy(), features[new]])
        ages = np.zeros((count, count), dtype=np.int64)
        ages[:before, :before] = self.ages.numpy()
        for feature in features:
            ages = connected(ages, nodes, feature, rules)
        variance = np.concatenate([self.variance.numpy(), _of_classes(features, labels, labels[new], floor)])
        return Gas(
            nodes=torch.from_numpy(nodes),
            variance=torch.from_numpy(variance),
            image=torch.cat([self.image, torch.from_numpy(features[new])]),
            ages=torch.from_numpy(ages),
            sample=torch.cat([self.sample, torch.from_numpy(samples[new])]),
            label=torch.cat([self.label, torch.from_numpy(labels[new])]),
            old=before,
            shot=torch.from_numpy(samples),
            shot_node=torch.from_numpy(before + _nearest_of_class(nodes[before:], labels[new], features, labels)),
        )

    def settled(self, features: Floats, labels: Ints, image: Floats, rules: Rules, *, floor: float) -> Gas:
        """Adapt to a session's features [n, d] at its end; image: [N, d] features of the nodes' images, new network."""
        nodes = self.nodes.numpy().copy()
        nodes[self.old :] = image[self.old :]  # new nodes are where their images are now
        nodes, ages = fitted(nodes, self.ages.numpy(), features, rules)
        variance = self.variance.numpy().copy()
        variance[self.old :] = _of_classes(features, labels, self.label.numpy()[self.old :], floor)
        return replace(
            self,
            nodes=torch.from_numpy(nodes),
            ages=torch.from_numpy(ages),
            variance=torch.from_numpy(variance),
            image=torch.from_numpy(image),
            old=len(self),
            shot=self.shot[:0],
            shot_node=self.shot_node[:0],
        )

    def rivals(self, node: int) -> Tensor:
        """Return the nodes of other classes that share an edge with a node, ascending."""
        return ((self.ages[node] > 0) & (self.label != self.label[node])).nonzero().squeeze(1)

    @property
    def diameter(self) -> float:
        """The largest distance between two nodes."""
        return float(torch.cdist(self.nodes, self.nodes).max())

    def state_dict(self) -> dict[str, Any]:
        """Return the fields for a checkpoint."""
        return dict(vars(self))


def _variances(nodes: Floats, features: Floats, floor: float) -> Floats:
    """[N, d] variance, around their mean, of the features [n, d] that are nearest to each node.

    `floor` times the mean variance is added, because few features have no variance in some directions. A node that is
    nearest to fewer than two features gets the variance of all features.
    """
    winner = np.array([int(np.argmin(distances(nodes, feature))) for feature in features])
    overall = features.var(axis=0)
    found = np.stack([
        features[winner == number].var(axis=0) if (winner == number).sum() > 1 else overall
        for number in range(len(nodes))
    ])  # fmt: skip
    return found + _least(overall, floor)


def _of_classes(features: Floats, labels: Ints, wanted: Ints, floor: float) -> Floats:
    """[k, d] variance of the shots of each wanted class, with floor and fallback as in `_variances`."""
    overall = features.var(axis=0)
    own = [features[labels == label] for label in wanted]
    found = np.stack([each.var(axis=0) if len(each) > 1 else overall for each in own])
    return found + _least(overall, floor)


def _least(overall: Floats, floor: float) -> float:
    """Return the variance floor, which is positive even where all features are equal."""
    return floor * max(float(overall.mean()), 1e-12)


def _nearest_of_class(nodes: Floats, node_labels: Ints, features: Floats, labels: Ints) -> Ints:
    """[n] index of the nearest node of each feature's own class."""
    apart = np.sqrt(np.square(features[:, None] - nodes[None]).sum(axis=2))
    nearest: Ints = np.where(node_labels[None] == labels[:, None], apart, np.inf).argmin(axis=1)
    return nearest


def _central(features: Floats, labels: Ints, label: int, count: int) -> Ints:
    """Return the `count` shots of a class that are nearest to its mean, nearest first."""
    own = np.flatnonzero(labels == label)
    order = np.argsort(distances(features[own], features[own].mean(axis=0)), kind="stable")
    return own[order[:count]]
