"""The name in the literature of the method that a configuration describes: there is no switch to choose one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.curvature import MasCurvature, SiCurvature

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["method_name"]


def method_name(config: RunConfig) -> str:
    """Return a reference's name, or the names of all terms for the past, joined by '+'."""
    if isinstance(config.adapt, AnyAdaptation):
        return "retrain" if config.adapt.retrain else f"adapt-{config.adapt.kind}"
    if config.train.restart:
        return {"seen": "joint", "task": "separate", "memory": "gdumb"}[config.train.data]
    parts = [*_quadratic(config), *(["topic"] if config.prior.topology.nodes > 0 else [])]
    parts += [*_distilled(config), *_remembered(config)]
    if parts:
        return "+".join(parts)
    return "cumulative" if config.train.data == "seen" else _without_past(config)


def _quadratic(config: RunConfig) -> list[str]:
    if config.prior.quadratic.weight == 0:
        return []
    name = "ewc"
    if isinstance(config.curvature, MasCurvature):
        name = "mas" if config.curvature.variant == "global" else "mas_local"
    elif isinstance(config.curvature, SiCurvature):
        name = "si"
    return [f"online_{name}" if config.prior.quadratic.decay < 1 else name]


def _distilled(config: RunConfig) -> list[str]:
    """Names of methods that distil the previous network."""
    if config.prior.distill.weight == 0:
        return ["bic"] if config.prior.correct.share > 0 else []
    if config.train.loss == "sigmoid":
        return ["icarl"] if config.evaluate.classifier == "nearest_mean" else ["lwf.mc"]
    return ["bic"] if config.prior.correct.share > 0 else ["lwf"]


def _remembered(config: RunConfig) -> list[str]:
    """Names of methods that keep examples; none for iCaRL and BiC, whose names imply a memory."""
    prior, names = config.prior, _distilled(config)
    if not config.memory.kept or (not prior.some_soft and names in (["icarl"], ["bic"])):
        return []
    soft, replay = ["kpriors" if prior.normal.precision > 0 else "fr"], []
    if prior.loss == "squared":
        soft = ["der++" if prior.label_weight else "der"]
    elif prior.fromp.weight > 0:
        soft = ["fromp"]
    soft = soft if prior.some_soft else []
    if prior.mixes and soft == ["fr"]:
        return ["both"]
    if prior.some_true:
        replay = [_replayed(config)] if prior.scale_to_new and not soft else ["replay"]
    return soft + replay


def _replayed(config: RunConfig) -> str:
    return "er_ace" if config.train.competing == "task" else "er"


def _without_past(config: RunConfig) -> str:
    if not config.train.frozen:
        return "finetune"
    if config.train.frozen == ("features",) and config.evaluate.classifier == "prototype":
        return "prototypes"
    named = {"features": "feature_extraction", "convolutions": "finetune_head"}
    return named.get("+".join(config.train.frozen), "finetune+frozen")
