"""The configuration of one run; when it is made, its sections are checked against each other."""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field, model_validator

from hpccl.config.adaptation import AdaptConfig, AnyAdaptation, NoAdaptation
from hpccl.config.base import Line, Section, Seed
from hpccl.config.clash import ClashError
from hpccl.config.curvature import CurvatureConfig, KroneckerCurvature, SiCurvature
from hpccl.config.data import DataConfig
from hpccl.config.engine import DdpEngine, EngineConfig
from hpccl.config.machine import CheckpointConfig, ClusterConfig, LocalCluster, LogConfig
from hpccl.config.memory import MemoryConfig
from hpccl.config.method import method_name
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
        """The method's name in the literature."""
        return method_name(self)

    @property
    def own_networks(self) -> bool:
        """Whether every task has a network of its own: each starts from the initial weights and sees its task alone."""
        return self.train.restart and self.train.data == "task" and not isinstance(self.adapt, AnyAdaptation)

    @property
    def measures_curvature(self) -> bool:
        """Whether curvature is measured when a task ends."""
        fromp = self.prior.fromp
        return self.prior.quadratic.weight > 0 or (fromp.weight > 0 and fromp.kernel == "posterior")

    @property
    def records_path(self) -> bool:
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
