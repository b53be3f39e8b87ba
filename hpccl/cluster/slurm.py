"""From `cluster.kind=slurm` to submitit's parameters, by pure functions; queue.py talks to the cluster."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from hpccl.config.machine import Container, SlurmCluster
from hpccl.errors import ConfigError

__all__ = ["DEPENDENCY", "ENDED", "parameters", "python_command", "seconds", "setup_lines"]

_JOB = r"[0-9]+(_[0-9]+)?(\+[0-9]+)?"
_CONDITION = rf"(after|afterany|afternotok|afterok|aftercorr):{_JOB}(:{_JOB})*"
DEPENDENCY = re.compile(rf"{_CONDITION}(,{_CONDITION})*")
ENDED = "hpccl: the command ended with "  # in the log of a job that does not train, before its exit code
# Signals are blocked until handlers are set: one that arrives while python starts would kill it. Children inherit this.
_AGAIN = "if [ $code -eq 143 ]; then code=75; fi"  # 143 is SIGTERM
_FINISH_COMMAND = f"code=$?; echo '{ENDED}'$code; {_AGAIN}; hpccl_finish $code"
_BLOCKING = ("env", "--block-signal=USR1", "--block-signal=USR2")


def seconds(time: str) -> int:
    """Return a SLURM time limit in seconds.

    >>> seconds("90"), seconds("1:00:00"), seconds("2-12:00:00")
    (5400, 3600, 216000)
    """
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) == 1:
        return 60 * parts[0]
    hours, minutes, rest_seconds = parts
    return 86400 * int(days or "0") + 3600 * hours + 60 * minutes + rest_seconds


def parameters(
    cluster: SlurmCluster, *, name: str, dependency: str | None = None, command: bool = False
) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor.

    Args:
        cluster: nodes, limits and more.
        name: the job's name.
        dependency: as for `sbatch --dependency`.
        command: not a training: on SIGTERM it ends without saving, and is requeued.

    Raises:
        ConfigError: the dependency is malformed.
    """
    if dependency is not None and DEPENDENCY.fullmatch(dependency) is None:
        raise ConfigError(
            f"dependency '{dependency}' is invalid; allowed: afterok:ID, afterany:ID, afternotok:ID, after:ID, "
            "aftercorr:ID, with several as afterok:ID:ID, and several of these with commas"
        )
    found: dict[str, Any] = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.nproc,
        "cpus_per_task": cluster.cpus,
        "array_parallelism": cluster.array,
        "signal_delay_s": cluster.save,
        "stderr_to_stdout": True,
        "setup": setup_lines(cluster),
        "teardown": [_FINISH_COMMAND if command else "hpccl_finish $?"],
        "srun_args": srun_arguments(cluster),
    }
    if cluster.gpus:
        found["gpus_per_node"] = cluster.gpus
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        value = getattr(cluster, key)
        if value is not None:
            found[key] = value
    more: dict[str, Any] = {"time": cluster.time, "requeue": True}
    if command:
        more["signal"] = f"TERM@{cluster.save}"
    if cluster.mem is not None:
        more["mem"] = cluster.mem
    if dependency is not None:
        found["dependency"] = dependency
        more["kill-on-invalid-dep"] = "yes"  # else a job whose predecessor failed waits forever
    # submitit would write `False` as text; sbatch's flags are either there or not.
    more |= {key: value for key, value in cluster.extra.items() if value is not False}
    return {**found, "additional_parameters": more}


def setup_lines(cluster: SlurmCluster) -> list[str]:
    """Return the shell lines before the step: functions to requeue the job, variables, modules, the user's lines."""
    script = resources.files("hpccl.cluster").joinpath("requeue.sh").read_text(encoding="utf-8")
    variables = {
        "OMP_NUM_THREADS": str(cluster.threads or cluster.cpus),
        "SRUN_CPUS_PER_TASK": str(cluster.cpus),  # srun does not inherit it from SLURM 22.05 on
        "HPCCL_MAX_RESTARTS": str(cluster.restarts),
        "PYTHONFAULTHANDLER": "1",
    }
    if cluster.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    return [
        *script.rstrip().splitlines(),
        *(f"export {key}={shlex.quote(value)}" for key, value in {**variables, **cluster.environment}.items()),
        *(f"module load {shlex.join(shlex.split(module))}" for module in cluster.modules),
        *cluster.setup,
    ]


def srun_arguments(cluster: SlurmCluster) -> list[str]:
    """Return srun's arguments: end all tasks when one fails, the container if there is one, then the user's."""
    inside = _in_container(cluster.container) if cluster.container is not None else []
    return ["--kill-on-bad-exit=1", *inside, *cluster.srun]


def _in_container(container: Container) -> list[str]:
    here = str(Path.cwd())
    mounts = ",".join([f"{here}:{here}", *container.mounts])
    home = "--container-mount-home" if container.home else "--no-container-mount-home"
    return [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={here}", home]


def python_command(cluster: SlurmCluster) -> str:
    """Return the nodes' interpreter as shell words, with the signals that save a run blocked until it handles them."""
    python = shlex.quote(sys.executable) if cluster.python is None else cluster.python
    return f"{shlex.join(_BLOCKING)} {python}"
