"""The configuration of one run; when it is made, its sections are checked against each other."""

from __future__ import annotations

import os
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

# Where and how a run is executed and logged. These may change on resume, like all other keys that `identity` omits.
_MACHINERY = ("name", "folder", "log", "checkpoint", "cluster")
READING = (
    "cache",
    "shard_cache",
    "shard_gib",
    "retries",
    "workers",
    "timeout",
)  # in section data: how images are fetched, not which images
_LIMITS = ("batch_size", "max_factor", "max_parameters")  # in section curvature: limits of memory and size


class RunConfig(Section):
    """The whole configuration of a run."""

    # name in reports and of the run folder; if no file sets it: the names of the files, joined by '-'
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$")
    folder: Line | None = None  # run folder, ~ is the home folder; null: `runs/<name>`
    seed: Seed = 0  # seed of all randomness except that of the stream and of data.validation
    stream: StreamConfig = DigitsStream()  # data sets, and how they are split into tasks
    data: DataConfig = DataConfig()  # how images are read, resized and augmented
    model: ModelConfig = MlpModel()  # the network
    train: TrainConfig = TrainConfig()  # training on one task
    optim: OptimConfig = TimmOptim()  # the optimiser
    memory: MemoryConfig = MemoryConfig()  # which examples of past tasks are kept
    prior: PriorConfig = PriorConfig()  # terms for the past while a new task is learned
    curvature: CurvatureConfig = KroneckerCurvature()  # curvature of the quadratic term
    adapt: AdaptConfig = NoAdaptation()  # adaptation of a trained network; written by `hpccl adapt`
    evaluate: EvaluateConfig = EvaluateConfig()  # how the network is tested
    engine: EngineConfig = DdpEngine()  # where weights, gradients and optimiser state are held
    checkpoint: CheckpointConfig = CheckpointConfig()  # when to save, and how many checkpoints to keep
    log: LogConfig = LogConfig()  # what is logged during the run
    cluster: ClusterConfig = LocalCluster()  # processes and jobs

    @model_validator(mode="after")
    def _refuse_clashes(self) -> RunConfig:
        found = clashes(self)
        if found:
            raise ClashError(found)
        return self

    @property
    def path(self) -> str:
        """The run folder; `~` is the home folder of who runs it."""
        return os.path.expanduser(self.folder) if self.folder is not None else f"runs/{self.name}"

    @property
    def method(self) -> str:
        """The method's name in the literature: a reference, or the names of all terms for the past, joined by '+'."""
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
        """Names of methods that distil the previous network."""
        if self.prior.distill.weight == 0:
            return ["bic"] if self.prior.correct.share > 0 else []
        if self.train.loss == "sigmoid":
            return ["icarl"] if self.evaluate.classifier == "nearest_mean" else ["lwf.mc"]
        return ["bic"] if self.prior.correct.share > 0 else ["lwf"]

    def _remembered(self) -> list[str]:
        """Names of methods that keep examples; none for iCaRL and BiC, whose names imply a memory."""
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
        """Whether each weight's contribution to reducing the loss is summed over steps (SI); never in an adaptation."""
        si = isinstance(self.curvature, SiCurvature) and self.prior.quadratic.weight > 0
        return si and not isinstance(self.adapt, AnyAdaptation)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: two runs with equal identity give equal weights."""
        decided = self.model_dump(mode="json", exclude=set(_MACHINERY))
        for key in READING:
            del decided["data"][key]
        del decided["memory"]["keep"]
        for key in _LIMITS:
            decided["curvature"].pop(key, None)
        decided["engine"] = {"precision": self.engine.precision}  # a run may go on elsewhere, on another engine
        return decided
