"""What a map is of, and what a pass over its examples finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.data.protocols import Task

__all__ = ["Found", "Group", "joined"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Examples that are judged among the same classes.

    task: of which `competing` names the classes
    samples: [n] of the map, ascending
    measured: [m] of which the curvature of all weights is
    total: training examples of these tasks
    """

    task: Task
    samples: Ints
    measured: Ints
    total: int


@dataclass(frozen=True)
class Found:
    """What one group's pass over its examples found.

    sample: [n]; columns: [n] by name
    removed: by class, mean nats of its examples if none of them had been learned, after one Newton step
    """

    sample: Ints
    columns: dict[str, Floats]
    removed: dict[int, float]


def joined(columns: Sequence[dict[str, Tensor]]) -> dict[str, Floats]:
    """Parts of columns one after the other."""
    return {name: torch.cat([each[name] for each in columns]).cpu().numpy() for name in columns[0]}
