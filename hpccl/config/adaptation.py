"""Of a trained network to something new."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import NonNegativeFloat, NonNegativeInt, Section

__all__ = ["AdaptConfig", "AddData", "AnyAdaptation", "NewModel", "NewPrecision", "NoAdaptation", "RemoveData"]


class NoAdaptation(Section):
    """A run of its own."""

    kind: Literal["none"] = "none"


class AnyAdaptation(Section):
    """What every adaptation of a trained network is told; written by `hpccl adapt`."""

    source: str  # folder of the run whose network is adapted
    task: NonNegativeInt  # the network after this task of it, counted from 0: its last
    retrain: bool = False  # the reference: learn anew from all examples that the adapted network stands for


class AddData(AnyAdaptation):
    """Further examples of known classes."""

    kind: Literal["add"] = "add"
    data: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # folders or URLs of shards


class RemoveData(AnyAdaptation):
    """Fewer examples: as if some had never been learned."""

    kind: Literal["remove"] = "remove"
    names: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # classes, or ids `<data set>/<key>`


class NewPrecision(AnyAdaptation):
    """Another normal prior of the weights."""

    kind: Literal["precision"] = "precision"
    precision: NonNegativeFloat  # takes the place of prior.normal.precision


class NewModel(AnyAdaptation):
    """Another network, which `model` names."""

    kind: Literal["model"] = "model"


AdaptConfig = Annotated[NoAdaptation | AddData | RemoveData | NewPrecision | NewModel, Field(discriminator="kind")]
