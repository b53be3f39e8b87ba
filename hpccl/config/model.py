"""The network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from hpccl.config.base import PositiveInt, Section

__all__ = ["AnyModel", "MlpModel", "ModelConfig", "PaperModel", "TimmModel"]


class AnyModel(Section):
    """Keys of every network."""

    # file with initial weights, .safetensors or .pth; a head for another number of classes is left out; null: random
    checkpoint: str | None = None


class PaperModel(AnyModel):
    """The papers' small networks: CifarNet (1.28 M parameters) and a small VGG (3.6 M)."""

    kind: Literal["cifarnet", "vgg_small"]
    dropout: bool = True  # dropout of cifarnet, with rates .25 / .25 / .5; vgg_small has none


class MlpModel(AnyModel):
    """A multilayer perceptron with ReLU, for small images and tests."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[PositiveInt, ...], Strict(False)] = (128,)  # units of each hidden layer


class TimmModel(AnyModel):
    """Any model that timm.create_model knows."""

    kind: Literal["timm"] = "timm"
    name: str  # name of the model, such as resnet18
    options: dict[str, Any] = {}  # further keyword arguments of timm.create_model


ModelConfig = Annotated[PaperModel | MlpModel | TimmModel, Field(discriminator="kind")]
