"""The machine, package versions and commit behind a result. Does not import torch."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "SlurmJob",
    "ask_git",
    "commit",
    "machine",
    "out_of_memory",
    "slurm_gpus",
    "slurm_job",
    "usable_cores",
    "variable",
    "versions",
    "visible_gpus",
]

_PACKAGES = ("hpccl", "torch", "timm", "webdataset", "numpy", "pydantic", "safetensors", "deepspeed", "submitit")


def machine() -> dict[str, Any]:
    """Return the CPU, the cores that this process may use, the memory in bytes and the host name."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "hostname": socket.gethostname(),
    }


def variable(name: str) -> int:
    """Return the whole number in an environment variable; 0 if it has none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def usable_cores() -> int:
    """Return the cores that this process may use, by its affinity and its container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")  # in messages of torch, CUDA and its libraries


def out_of_memory(error: BaseException) -> str | None:
    """Return the first line of an out-of-memory error of Python, torch or CUDA; None for any other error."""
    line = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError):
        return line
    return line if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of packages that affect results; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that this process belongs to.

    id: `123`, or `123_4` for a task of an array
    restart: how often the job was requeued
    """

    id: str
    restart: int


def slurm_job(environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the SLURM job of this process, or None outside of one."""
    if "SLURM_JOB_ID" not in environ:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else environ["SLURM_JOB_ID"]
    return SlurmJob(name, int(environ.get("SLURM_RESTART_COUNT") or "0"))


def slurm_gpus(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the variable that tells a SLURM step of its GPUs, as `NAME=value`; None outside of one or without GPUs.

    SLURM_GPUS_ON_NODE is a number, which some sites set to 0; the others, of older versions too, are lists of GPUs.
    """
    if "SLURM_STEP_ID" not in environ or environ.get("SLURM_GPUS_ON_NODE") == "0":
        return None
    names = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    return next((f"{name}={environ[name]}" for name in names if environ.get(name)), None)


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the NVIDIA GPUs that CUDA_VISIBLE_DEVICES lists, or all of this machine where it is not set."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def commit() -> str:
    """Return the commit of this code, with `+dirty` if tracked files differ; the version outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    head = ask_git(root, "rev-parse", "HEAD")
    dirty = ask_git(root, "status", "--porcelain", "--untracked-files=no")
    if head is None or dirty is None:
        return f"version {versions().get('hpccl', 'unknown')}"
    return head.strip() + ("+dirty" if dirty.strip() else "")


def ask_git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None if it fails, takes over half a minute or is not installed."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
