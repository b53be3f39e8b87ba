"""Build an estimator from a configuration, and a precision from a checkpoint: one case per kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, assert_never

from hpccl.config.curvature import (
    DenseCurvature,
    DiagonalCurvature,
    EkfacCurvature,
    KroneckerCurvature,
    LayerMeasured,
    MasCurvature,
    PassCurvature,
)
from hpccl.curvature.coverage import Coverage
from hpccl.curvature.dense import DenseEstimator, DensePrecision
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.grouped import GroupedEstimator
from hpccl.curvature.kfac import EkfacEstimator, KroneckerEstimator
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.mas_local import LocalMasEstimator
from hpccl.curvature.protocols import Estimator, Precision, Shards, Weights
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Place, placed_whole
from hpccl.errors import CheckpointError

__all__ = ["build_estimator", "precision_from_state"]


def build_estimator(config: PassCurvature, seed: int, known: Coverage | None = None) -> Estimator:
    """Build the estimator of `config`; `seed` is the run's, `known` as in KroneckerPass.

    With `config.group` above 1, the estimator takes each batch as one group.
    """
    match config:
        case KroneckerCurvature():
            return KroneckerEstimator(_sweep(config, seed, known), config.tasks, config.keep_trace)
        case EkfacCurvature():
            return EkfacEstimator(_sweep(config, seed, known))
        case DiagonalCurvature(group=group) if group > 1:
            return GroupedEstimator("empirical", config.batch_size)
        case DiagonalCurvature():
            return DiagonalEstimator(config.fisher, config.samples, seed, known)
        case MasCurvature(variant="local"):
            return LocalMasEstimator(known)
        case MasCurvature(group=group) if group > 1:
            return GroupedEstimator("outputs", config.batch_size)
        case MasCurvature():
            return DiagonalEstimator("outputs", known=known)
        case DenseCurvature():
            return DenseEstimator(config.fisher, config.samples, seed, config.max_parameters)
        case _:
            assert_never(config)


def precision_from_state(
    state: Mapping[str, Any],
    shards: Shards,
    comm: Comm,
    place: Place = placed_whole,
    like: Weights = MappingProxyType({}),
) -> Precision:
    """Rebuild the precision from its `state_dict` and the ranks' `shard_dict`, spread over the ranks of `comm`.

    like: see Kronecker.from_state_dict.

    Raises:
        CheckpointError: the state is of an unknown kind, or damaged.
    """
    match state.get("kind"):
        case "kronecker":
            return Kronecker.from_state_dict(state, shards, comm, place, like)
        case "diagonal":
            return Diagonal.from_state_dict(state, place)
        case "dense":
            return DensePrecision.from_state_dict(state)
        case kind:
            raise CheckpointError(
                f"curvature of unknown kind {kind!r} in a checkpoint; "
                "this version reads: 'kronecker', 'diagonal', 'dense'"
            )


def _sweep(config: LayerMeasured, seed: int, known: Coverage | None) -> KroneckerPass:
    return KroneckerPass(
        fisher=config.fisher,
        samples=config.samples,
        seed=seed,
        sharing=config.sharing,
        precision=config.precision,
        diagonal=config.diagonal,
        max_factor=config.max_factor,
        known=known,
    )
