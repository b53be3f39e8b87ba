"""The rank of a process in a SLURM job step, as torch.distributed's variables. Does not import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["first_host", "from_slurm"]

_FIRST_PORT, _PORTS = 20000, 10000  # below the systems' range of ephemeral ports


def from_slurm(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a job step.

    Empty outside of a step, in a step of one task (an interactive shell, say), and if a launcher such as torchrun or
    hpccl's own has already set RANK: under `srun torchrun` SLURM counts launchers, not ranks. Values of MASTER_ADDR
    and MASTER_PORT that are already set are kept.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return {}
    size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1")
    if size == 1:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    counts = _tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environ.get("SLURM_NODEID", "0"))
    job = int(environ["SLURM_JOB_ID"])  # unique also for tasks of an array
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[node] if node < len(counts) else size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_FIRST_PORT + job % _PORTS),
    }


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compact list, which runs rank 0.

    >>> first_host("gpu[07-09,12],cpu1"), first_host("rack[1-2]node[01,03]"), first_host("login")
    ('gpu07', 'rack1node01', 'login')
    """
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _tasks_of_nodes(text: str) -> list[int]:
    """Return the tasks of each node: `2(x3),1` is 2, 2, 2, 1."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or "1")
    return found
