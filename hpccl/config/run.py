"""The configuration of one run, and the rules between its sections."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from hpccl.config.optim import OptimConfig
from hpccl.config.rules import ClashError, clashes
from hpccl.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    DdpEngine,
    DigitsStream,
    EngineConfig,
    KroneckerCurvature,
    Line,
    LocalCluster,
    LogConfig,
    MemoryConfig,
    MlpModel,
    ModelConfig,
    PriorConfig,
    Section,
    StreamConfig,
    TimmOptim,
    TrainConfig,
)

__all__ = ["RunConfig"]

# Where and how a run is watched or carried out; these may change on resume, everything else may not.
_MACHINERY = ("name", "folder", "log", "checkpoint", "cluster")
_READING = (
    "cache",
    "shard_cache",
    "shard_gib",
    "retries",
    "workers",
)  # of section data: how images are fetched, not which
_LIMITS = ("batch_size", "max_factor", "max_parameters")  # of section curvature: memory, and what is refused


class RunConfig(Section):
    """Everything that a run is."""

    # of the run, in reports and in its folder; where no file gives one: the files' names, joined by '-'
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$")
    folder: Line | None = None  # null: runs/<name>
    seed: int = Field(default=0, ge=0)  # of everything random, but the order of classes
    stream: StreamConfig = DigitsStream()  # what is learned, task by task
    data: DataConfig = DataConfig()  # how examples become tensors
    model: ModelConfig = MlpModel()  # the network
    train: TrainConfig = TrainConfig()  # one task's training
    optim: OptimConfig = TimmOptim()  # the optimiser
    memory: MemoryConfig = MemoryConfig()  # examples of past tasks that are kept
    prior: PriorConfig = PriorConfig()  # what the past says while a new task is learned
    curvature: CurvatureConfig = KroneckerCurvature()  # of the quadratic
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
        """The method's name in the field: finetune, joint, separate, or a sum of ewc, fr and replay."""
        if self.train.restart:
            return "joint" if self.train.data == "seen" else "separate"
        parts = ["ewc"] if self.prior.quadratic.weight > 0 else []
        if self.memory.kept:
            parts += ["fr"] if self.prior.replay < 1 else []
            parts += ["replay"] if self.prior.replay > 0 else []
        return "+".join(parts) or ("cumulative" if self.train.data == "seen" else "finetune")

    def identity(self) -> dict[str, Any]:
        """What decides the result: two runs with equal identity give equal weights."""
        decided = self.model_dump(mode="json", exclude=set(_MACHINERY))
        for key in _READING:
            del decided["data"][key]
        for key in _LIMITS:
            decided["curvature"].pop(key, None)
        decided["engine"] = {"precision": self.engine.precision}  # a run may go on elsewhere, on another engine
        return decided
