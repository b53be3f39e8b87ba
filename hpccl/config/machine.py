"""How a run is carried out and watched: checkpoints, logs, processes, jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from hpccl.config.base import Fraction, Line, Memory, NonNegativeInt, PositiveInt, Section, TimeLimit, Variable, Word

__all__ = [
    "AnyCluster",
    "CheckpointConfig",
    "ClusterConfig",
    "Container",
    "InlineCluster",
    "LocalCluster",
    "LogConfig",
    "SlurmCluster",
]


class CheckpointConfig(Section):
    """When to save and how many to keep. The end of every task is always kept."""

    every: NonNegativeInt = 500  # steps; 0: only at the end of a phase
    keep: PositiveInt = 2  # newest ones kept within a task
    background: bool = False  # write while training goes on; a step waits for the copy to host memory only


class LogConfig(Section):
    """What is written while running."""

    every: PositiveInt = 20  # steps between two lines of loss terms
    quiet: bool = False  # no progress display
    tensorboard: bool = True  # write curves to the run folder
    reconstruction: Fraction = (
        0.0  # share of the past on which the error of reconstructed gradients is measured, where there is a prior
    )


class AnyCluster(Section):
    """What every kind of cluster is told."""

    threads: PositiveInt | None = None  # of each process; null: an equal share of the cores
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0  # seconds that a process waits for another before it ends


class InlineCluster(AnyCluster):
    """This process alone."""

    kind: Literal["inline"] = "inline"

    @property
    def nodes(self) -> int:
        """Machines."""
        return 1

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return 1


class LocalCluster(AnyCluster):
    """Processes on this machine."""

    kind: Literal["local"] = "local"
    nproc: PositiveInt = 1  # processes; one a GPU, or a few a CPU
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0: a free one

    @property
    def nodes(self) -> int:
        """Machines."""
        return 1


class Container(Section):
    """An image in which processes run, by pyxis (srun --container-image)."""

    image: Line  # a .sqsh file or what enroot can import
    mounts: Annotated[tuple[Line, ...], Strict(False)] = ()  # HOST:INSIDE; the folder of the command is always mounted
    home: bool = False  # mount the home folder


class SlurmCluster(AnyCluster):
    """Jobs of a SLURM cluster, for `hpccl submit`."""

    kind: Literal["slurm"] = "slurm"
    nodes: PositiveInt = 1  # machines
    gpus: NonNegativeInt = 0  # of each node; one process each
    tasks: PositiveInt | None = None  # processes on each node; null: one a GPU, or one
    cpus: PositiveInt = 1  # cores of each process
    mem: Memory | None = None  # of each node; null: the cluster's default
    time: TimeLimit = "1:00:00"  # limit; h:mm:ss, d-hh:mm:ss or minutes
    partition: Word | None = None  # null: the cluster's default
    account: Word | None = None  # whom to charge
    qos: Word | None = None  # quality of service
    constraint: Line | None = None  # features that nodes must have
    exclude: Word | None = None  # nodes to avoid
    array: PositiveInt = 256  # runs of a sweep that may run at the same time
    save: PositiveInt = 120  # seconds before the time limit at which a run saves and asks to be queued again
    restarts: NonNegativeInt = 1000  # how often a job may be queued again by itself
    interface: Word | None = None  # network of NCCL and gloo, such as ib0; null: theirs to choose
    container: Container | None = None  # null: none
    modules: Annotated[tuple[Line, ...], Strict(False)] = ()  # `module load` each before the start
    setup: Annotated[tuple[Line, ...], Strict(False)] = ()  # further lines of shell before the start
    environment: dict[Variable, Line] = {}  # further variables of all processes
    python: Line | None = None  # interpreter on the nodes; null: the one that submits
    srun: Annotated[tuple[Line, ...], Strict(False)] = ()  # further arguments of srun, such as --gpu-bind=none
    extra: dict[str, bool | int | Line] = {}  # further parameters of sbatch, by their long names without dashes

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return self.tasks or self.gpus or 1


ClusterConfig = Annotated[InlineCluster | LocalCluster | SlurmCluster, Field(discriminator="kind")]
