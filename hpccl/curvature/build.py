"""From a configuration to an estimator, and from a checkpoint to a precision: one case a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpccl.config.sections import CurvatureConfig, DiagonalCurvature
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.protocols import Estimator, Precision
from hpccl.errors import CheckpointError

__all__ = ["build_estimator", "precision_from_state"]


def build_estimator(config: CurvatureConfig, seed: int) -> Estimator:
    """The estimator that `config` asks for; `seed` is the run's."""
    match config:
        case DiagonalCurvature():
            return DiagonalEstimator(config.fisher, config.samples, seed)


def precision_from_state(state: Mapping[str, Any]) -> Precision:
    """The precision that `state_dict` described.

    Raises:
        CheckpointError: of an unknown kind, or damaged.
    """
    match state.get("kind"):
        case "diagonal":
            return Diagonal.from_state_dict(state)
        case kind:
            raise CheckpointError(f"curvature of unknown kind {kind!r} in a checkpoint; this version reads: 'diagonal'")
