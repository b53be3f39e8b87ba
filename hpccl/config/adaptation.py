"""Adaptation of a trained network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import NonNegativeFloat, NonNegativeInt, Section

__all__ = ["AdaptConfig", "AddData", "AnyAdaptation", "NewModel", "NewPrecision", "NoAdaptation", "RemoveData"]


class NoAdaptation(Section):
    """No adaptation: a normal run."""

    kind: Literal["none"] = "none"


class AnyAdaptation(Section):
    """Keys of every adaptation of a trained network; written by `hpccl adapt`."""

    source: str  # folder of the run whose network is adapted
    task: NonNegativeInt  # last task of that run, counted from 0; the network at its end is adapted
    retrain: bool = False  # reference: train a new network on all examples that the adapted one stands for


class AddData(AnyAdaptation):
    """Add examples of known classes."""

    kind: Literal["add"] = "add"
    data: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # folders or URLs of shards of new examples


class RemoveData(AnyAdaptation):
    """Remove examples, as if they had never been learned."""

    kind: Literal["remove"] = "remove"
    names: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # classes, or ids `<data set>/<key>`


class NewPrecision(AnyAdaptation):
    """Change the precision of the weights' normal prior."""

    kind: Literal["precision"] = "precision"
    precision: NonNegativeFloat  # replaces prior.normal.precision


class NewModel(AnyAdaptation):
    """Transfer to another network, given by `model`."""

    kind: Literal["model"] = "model"


AdaptConfig = Annotated[NoAdaptation | AddData | RemoveData | NewPrecision | NewModel, Field(discriminator="kind")]
