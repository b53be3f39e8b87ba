"""How a run is executed and logged: checkpoints, logs, processes, jobs."""

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
    """When to save and how many checkpoints to keep. The one at the end of every task is always kept."""

    every: NonNegativeInt = 500  # steps between checkpoints; 0: only when a task's training ends and when the task ends
    keep: PositiveInt = 2  # number of newest checkpoints kept within a task
    background: bool = False  # write while training continues; a step waits for the copy to host memory only


class LogConfig(Section):
    """What is logged during the run."""

    every: PositiveInt = 20  # steps between two logged lines of loss terms
    quiet: bool = False  # no progress display
    tensorboard: bool = True  # write TensorBoard curves to the run folder
    reconstruction: Fraction = (
        0.0  # share of the past for measuring the gradient-reconstruction error, with memory or a quadratic; 0: off
    )


class AnyCluster(Section):
    """Keys of every kind of cluster."""

    # threads per process; null: OMP_NUM_THREADS, else an equal share of the cores (slurm: cluster.cpus)
    threads: PositiveInt | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0  # seconds that a process waits for another before it ends


class InlineCluster(AnyCluster):
    """Runs in this process alone."""

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
    nproc: PositiveInt = 1  # number of processes: one per GPU, or a few per CPU
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # port at which the processes meet; 0: a free one

    @property
    def nodes(self) -> int:
        """Machines."""
        return 1


class Container(Section):
    """A container image in which the processes run, by pyxis (srun --container-image)."""

    image: Line  # a .sqsh file, or anything that enroot can import
    mounts: Annotated[tuple[Line, ...], Strict(False)] = ()  # HOST:INSIDE; the working directory is always mounted
    home: bool = False  # mount the home folder


class SlurmCluster(AnyCluster):
    """Jobs of a SLURM cluster, for `hpccl submit`."""

    kind: Literal["slurm"] = "slurm"
    nodes: PositiveInt = 1  # number of nodes
    gpus: NonNegativeInt = 0  # GPUs per node; one process each
    tasks: PositiveInt | None = None  # processes per node; null: one per GPU, or one without GPUs
    cpus: PositiveInt = 1  # cores per process
    mem: Memory | None = None  # memory per node; 0: all of it; null: the cluster's default
    time: TimeLimit = "1:00:00"  # time limit: h:mm:ss, d-hh:mm:ss or minutes
    partition: Word | None = None  # partition; null: the cluster's default
    account: Word | None = None  # account to charge
    qos: Word | None = None  # quality of service
    constraint: Line | None = None  # features that nodes must have
    exclude: Word | None = None  # nodes to avoid
    array: PositiveInt = 256  # runs of a sweep that may run at the same time
    save: PositiveInt = 120  # seconds before the time limit at which a run saves and asks to be queued again
    restarts: NonNegativeInt = 1000  # how often a job may requeue itself
    interface: Word | None = None  # network interface of NCCL and gloo, such as ib0; null: their own choice
    container: Container | None = None  # container in which the processes run; null: none
    modules: Annotated[tuple[Line, ...], Strict(False)] = ()  # modules to load (`module load`) before the start
    setup: Annotated[tuple[Line, ...], Strict(False)] = ()  # further shell commands before the start
    environment: dict[Variable, Line] = {}  # further environment variables; taken literally ($NAME: use setup)
    python: Line | None = None  # Python interpreter on the nodes; null: the one that submits
    srun: Annotated[tuple[Line, ...], Strict(False)] = ()  # further arguments of srun, such as --gpu-bind=none
    extra: dict[str, bool | int | Line] = {}  # further parameters of sbatch, by long names without leading dashes

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return self.tasks or self.gpus or 1


ClusterConfig = Annotated[InlineCluster | LocalCluster | SlurmCluster, Field(discriminator="kind")]
