"""The examples of a map, and the figures that a pass over them gives."""

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
    """Examples with the same competing classes.

    task: whose `competing` gives these classes
    samples: [n] positions of the examples in the map, ascending
    measured: [m] positions of the examples on which the curvature of all weights is measured
    total: number of training examples that the group represents
    """

    task: Task
    samples: Ints
    measured: Ints
    total: int


@dataclass(frozen=True)
class Found:
    """The figures of one group's examples.

    sample: [n] positions; columns: [n] figures by name
    removed: by class, mean nats of its examples if none of them had been learned, by one Newton step
    """

    sample: Ints
    columns: dict[str, Floats]
    removed: dict[int, float]


def joined(columns: Sequence[dict[str, Tensor]]) -> dict[str, Floats]:
    """Concatenate parts of columns."""
    return {name: torch.cat([each[name] for each in columns]).cpu().numpy() for name in columns[0]}
