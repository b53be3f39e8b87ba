"""The configuration of one run, and the rules between its sections."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from hpccl.config.adaptation import AdaptConfig, AnyAdaptation, NoAdaptation
from hpccl.config.base import Line, Section, Seed
from hpccl.config.clash import ClashError
from hpccl.config.curvature import CurvatureConfig, KroneckerCurvature, MasCurvature, SiCurvature
from hpccl.config.data import DataConfig
from hpccl.config.engine import DdpEngine, EngineConfig
from hpccl.config.machine import CheckpointConfig, ClusterConfig, LocalCluster, LogConfig
from hpccl.config.memory import MemoryConfig
from hpccl.config.model import MlpModel, ModelConfig
from hpccl.config.optim import OptimConfig, TimmOptim
from hpccl.config.prior import PriorConfig
from hpccl.config.rules import clashes
from hpccl.config.stream import DigitsStream, StreamConfig
from hpccl.config.train import EvaluateConfig, TrainConfig

__all__ = ["READING", "RunConfig"]

# Where and how a run is watched or carried out; these may change on resume, as may what else `identity` leaves out.
_MACHINERY = ("name", "folder", "log", "checkpoint", "cluster")
READING = (
    "cache",
    "shard_cache",
    "shard_gib",
    "retries",
    "workers",
    "timeout",
)  # of section data: how images are fetched, not which
_LIMITS = ("batch_size", "max_factor", "max_parameters")  # of section curvature: memory, and what is refused


class RunConfig(Section):
    """Everything that a run is."""

    # of the run, in reports and in its folder; where no file gives one: the files' names, joined by '-'
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$")
    folder: Line | None = None  # null: runs/<name>
    seed: Seed = 0  # of everything random, but the order of classes
    stream: StreamConfig = DigitsStream()  # what is learned, task by task
    data: DataConfig = DataConfig()  # how examples become tensors
    model: ModelConfig = MlpModel()  # the network
    train: TrainConfig = TrainConfig()  # one task's training
    optim: OptimConfig = TimmOptim()  # the optimiser
    memory: MemoryConfig = MemoryConfig()  # examples of past tasks that are kept
    prior: PriorConfig = PriorConfig()  # what the past says while a new task is learned
    curvature: CurvatureConfig = KroneckerCurvature()  # of the quadratic
    adapt: AdaptConfig = NoAdaptation()  # of a trained network to something new
    evaluate: EvaluateConfig = EvaluateConfig()  # tests
    engine: EngineConfig = DdpEngine()  # where the weights live
    checkpoint: CheckpointConfig = CheckpointConfig()  # when to save
    log: LogConfig = LogConfig()  # what is written while running
    cluster: ClusterConfig = LocalCluster()  # processes

    @model_validator(mode="after")
    def _refuse_clashes(self) -> RunConfig:
        found = clashes(self)
        if found:
            raise ClashError(found)
        return self

    @property
    def path(self) -> str:
        """The run folder."""
        return self.folder if self.folder is not None else f"runs/{self.name}"

    @property
    def method(self) -> str:
        """The method's name in the field: a reference, or what the past says and how, as a sum of names."""
        if isinstance(self.adapt, AnyAdaptation):
            return "retrain" if self.adapt.retrain else f"adapt-{self.adapt.kind}"
        if self.train.restart:
            return {"seen": "joint", "task": "separate", "memory": "gdumb"}[self.train.data]
        parts = [*self._quadratic(), *(["topic"] if self.prior.topology.nodes > 0 else [])]
        parts += [*self._distilled(), *self._remembered()]
        if parts:
            return "+".join(parts)
        return "cumulative" if self.train.data == "seen" else self._without_past()

    def _quadratic(self) -> list[str]:
        if self.prior.quadratic.weight == 0:
            return []
        name = "ewc"
        if isinstance(self.curvature, MasCurvature):
            name = "mas" if self.curvature.variant == "global" else "mas_local"
        elif isinstance(self.curvature, SiCurvature):
            name = "si"
        return [f"online_{name}" if self.prior.quadratic.decay < 1 else name]

    def _distilled(self) -> list[str]:
        """Of methods that ask the previous network about new images."""
        if self.prior.distill.weight == 0:
            return ["bic"] if self.prior.correct.share > 0 else []
        if self.train.loss == "sigmoid":
            return ["icarl"] if self.evaluate.classifier == "nearest_mean" else ["lwf.mc"]
        return ["bic"] if self.prior.correct.share > 0 else ["lwf"]

    def _remembered(self) -> list[str]:
        """Of methods that keep examples; those that are named with their memory say nothing here."""
        prior, names = self.prior, self._distilled()
        if not self.memory.kept or (not prior.some_soft and names in (["icarl"], ["bic"])):
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
            replay = [self._replayed()] if prior.scale_to_new and not soft else ["replay"]
        return soft + replay

    def _replayed(self) -> str:
        return "er_ace" if self.train.competing == "task" else "er"

    def _without_past(self) -> str:
        if not self.train.frozen:
            return "finetune"
        if self.train.frozen == ("features",) and self.evaluate.classifier == "prototype":
            return "prototypes"
        named = {"features": "feature_extraction", "convolutions": "finetune_head"}
        return named.get("+".join(self.train.frozen), "finetune+frozen")

    @property
    def measures(self) -> bool:
        """Whether curvature is measured when a task ends."""
        fromp = self.prior.fromp
        return self.prior.quadratic.weight > 0 or (fromp.weight > 0 and fromp.kernel == "posterior")

    @property
    def follows(self) -> bool:
        """Whether what each weight does for the loss is added up, step by step; an adaptation measures nothing."""
        si = isinstance(self.curvature, SiCurvature) and self.prior.quadratic.weight > 0
        return si and not isinstance(self.adapt, AnyAdaptation)

    def identity(self) -> dict[str, Any]:
        """What decides the result: two runs with equal identity give equal weights."""
        decided = self.model_dump(mode="json", exclude=set(_MACHINERY))
        for key in READING:
            del decided["data"][key]
        del decided["memory"]["keep"]
        for key in _LIMITS:
            decided["curvature"].pop(key, None)
        decided["engine"] = {"precision": self.engine.precision}  # a run may go on elsewhere, on another engine
        return decided
