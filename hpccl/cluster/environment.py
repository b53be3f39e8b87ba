"""The world of processes that SLURM started, in the variables that torchrun would set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["expand", "from_slurm"]


def from_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; empty outside a SLURM step."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": expand(hosts)[0],
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 10000),
    }


def expand(hosts: str) -> list[str]:
    """Names of a SLURM node list: `n[1-2,04],login` is n1, n2, n04, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if found is None:
            names.append(part)
            continue
        before, ranges, after = found.groups()
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            names += [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last or first) + 1)]
    return names
