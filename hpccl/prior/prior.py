"""All that training on a new task takes from the past: memory, a quadratic, and the old model itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hpccl.curvature.protocols import Precision, Shards, Weights
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, Place
from hpccl.memory.gas import Gas
from hpccl.memory.means import ClassMeans
from hpccl.memory.store import Memory
from hpccl.prior.correction import Correction
from hpccl.prior.fromp import Fromp
from hpccl.prior.quadratic import Quadratic

__all__ = ["Prior"]


@dataclass(frozen=True)
class Prior:
    """What training on a new task takes from the past; each part may be absent.

    memory:    kept examples (may be empty)
    quadratic: curvature of the past that is not in memory, or None
    anchor:    weights and buffers of the newest old model (whole or spread), or None before the first task ends
    correction: bias correction of the logits of the anchor's newest classes, or None
    means:     means of the anchor's features of each class's memory (or training examples), or None
    fromp:     coupled predictions on the memory, which then adds no other loss, or None
    gas:       neural gas: a net of nodes over features, or None
    """

    memory: Memory
    quadratic: Quadratic | None = None
    anchor: Leaves | None = None
    correction: Correction | None = None
    means: ClassMeans | None = None
    fromp: Fromp | None = None
    gas: Gas | None = None

    def to(self, device: torch.device) -> Prior:
        """Return the prior with what a step needs on a device (the memory's few tensors stay on the CPU)."""
        anchor = None if self.anchor is None else {name: value.to(device) for name, value in self.anchor.items()}
        quadratic = None
        if self.quadratic is not None and anchor is not None:
            quadratic = self.quadratic.to(device, anchor)
        fromp = None if self.fromp is None else self.fromp.to(device)
        return replace(self, quadratic=quadratic, anchor=anchor, fromp=fromp)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint that all ranks hold."""
        return {
            "memory": self.memory.state_dict(),
            "quadratic": None if self.quadratic is None else self.quadratic.state_dict(),
            "anchor": self.anchor,
            "correction": None if self.correction is None else self.correction.state_dict(),
            "means": None if self.means is None else self.means.state_dict(),
            "fromp": None if self.fromp is None else self.fromp.state_dict(),
            "gas": None if self.gas is None else self.gas.state_dict(),
        }

    @property
    def precision(self) -> Precision | None:
        """The curvature of the past, used by the quadratic or by FROMP; None if there is none."""
        if self.quadratic is not None:
            return self.quadratic.precision
        return None if self.fromp is None else self.fromp.precision

    @property
    def curvature_shard(self) -> dict[str, Any]:
        """The state of the curvature that this rank alone holds."""
        return {} if self.precision is None else self.precision.shard_dict()

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], shards: Shards, comm: Comm, place: Place, like: Weights) -> Prior:
        """The inverse of `state_dict`; `shards` reads the ranks' `curvature_shard`.

        place: spreads weights as the engine does
        like: the network's weights, whose memory layout matters
        """
        anchor, quadratic = state["anchor"], state["quadratic"]
        placed = None if anchor is None else place(anchor)
        restored = None
        if quadratic is not None and placed is not None:
            restored = Quadratic.from_state_dict(quadratic, placed, shards, comm, place=place, like=like)
        # Earlier checkpoints have none of these.
        correction, means, fromp, gas = (state.get(name) for name in ("correction", "means", "fromp", "gas"))
        return cls(
            memory=Memory.from_state_dict(state["memory"]),
            quadratic=restored,
            anchor=placed,
            correction=None if correction is None else Correction.from_state_dict(correction),
            means=None if means is None else ClassMeans(**means),
            fromp=None if fromp is None else Fromp.from_state_dict(fromp, shards, comm, place, like),
            gas=None if gas is None else Gas(**gas),
        )
