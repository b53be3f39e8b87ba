"""Check what this machine offers and what is missing, with advice. Imports torch only in the checks that need it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import psutil
from rich.table import Table
from rich.text import Text

from hpccl.compat import import_timm
from hpccl.machine import usable_cores

__all__ = ["Check", "Status", "as_dict", "diagnose", "ready", "render"]

Status = Literal["ok", "warn", "missing"]

_GIB = 1 << 30
_STYLE: dict[Status, str] = {"ok": "green", "warn": "yellow", "missing": "red"}
# Errors on import of a broken installation: missing, not loadable, or of an incompatible version.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class Check:
    """The result of one check. `advice` is empty if there is nothing to do."""

    name: str
    status: Status
    found: str
    advice: str = ""
    required: bool = False  # hpccl cannot train while this is missing


def diagnose() -> list[Check]:
    """Run all checks."""
    return [
        check_python(),
        check_torch(),
        check_timm(),
        check_devices(),
        check_backends(),
        check_cores(),
        check_threads(),
        check_bf16(_cpu_flags()),
        check_memory(),
        check_shared_memory(),
        check_disk("disk for runs", Path.cwd()),
        check_disk("disk for cache", _user_cache()),
        check_hostname(socket.gethostname()),
        check_port(0),
        check_slurm(),
        check_package("submitit", extra="slurm", purpose="to submit jobs to SLURM"),
        check_package("deepspeed", extra="deepspeed", purpose="for ZeRO"),
    ]


def ready(checks: Sequence[Check]) -> bool:
    """Whether nothing that training needs is missing."""
    return not any(check.required and check.status == "missing" for check in checks)


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"ready": bool, "checks": [{"name", "status", "found", "advice", "required"}]}`, for JSON."""
    return {"ready": ready(checks), "checks": [asdict(check) for check in checks]}


def render(checks: Sequence[Check]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("status", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        # Text, not markup: what is found on a machine may hold square brackets.
        status = Text(check.status, style=_STYLE[check.status])
        table.add_row(status, Text(check.name), Text(check.found), Text(check.advice))
    return table


# ---------------------------------------------------------------- software


def check_python() -> Check:
    """Report the interpreter; hpccl cannot be installed on one older than 3.11."""
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}", required=True)


def check_torch() -> Check:
    """Check that torch can be imported and is new enough."""
    torch, problem = _import("torch")
    if torch is None:
        return Check(
            "torch", "missing", problem, "run `make venv`, or `pip install -c constraints.txt .`", required=True
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        return Check("torch", "warn", found, "hpccl is made for torch 2.7 or later: upgrade it", required=True)
    return Check("torch", "ok", found, required=True)


def check_timm() -> Check:
    """Check that timm, and with it torchvision, can be imported."""
    try:
        found = str(import_timm().__version__)
    except _BROKEN as error:
        advice = "install torch and torchvision of one release: `pip install -c constraints.txt timm torchvision`"
        return Check("timm", "missing", _one_line(error), advice, required=True)
    return Check("timm", "ok", found, required=True)


def check_package(name: str, *, extra: str, purpose: str) -> Check:
    """Check whether an optional package is installed."""
    if importlib.util.find_spec(name) is None:
        return Check(name, "missing", "not installed", f"optional, {purpose}: `pip install 'hpccl[{extra}]'`")
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "ok", "version unknown")


# ---------------------------------------------------------------- hardware


def check_devices() -> Check:
    """Report GPUs that torch can use, and GPUs that it cannot."""
    torch, _ = _import("torch")
    if torch is None:
        return Check("devices", "missing", "unknown without torch", "fix torch first")
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check("devices", "ok", ", ".join(f"{gpu.name} {_gib(gpu.total_memory)}" for gpu in properties))
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Check("devices", "ok", "CPU only")
    if torch.version.cuda is None:
        return Check("devices", "warn", "an NVIDIA GPU that this torch cannot use", "install a CUDA build of torch")
    advice = "check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES"
    return Check("devices", "warn", "an NVIDIA GPU that CUDA does not see", advice)


def check_backends() -> Check:
    """Check the backends of torch.distributed: gloo, and NCCL if there are GPUs."""
    torch, _ = _import("torch")
    if torch is None:
        return Check("distributed backends", "missing", "unknown without torch", "fix torch first")
    distributed = torch.distributed
    if not distributed.is_available():
        advice = "this torch was built without torch.distributed: only one process will work"
        return Check("distributed backends", "missing", "none", advice)
    has = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    found = ", ".join(name for name, available in has.items() if available) or "none"
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    if not has[needed]:
        return Check("distributed backends", "warn", found, f"install a torch with {needed} to use several processes")
    return Check("distributed backends", "ok", found)


def check_cores() -> Check:
    """Report the cores that this process may use, which a batch system or a container may limit."""
    installed, usable = os.cpu_count() or 1, usable_cores()
    if usable >= installed:
        return Check("cores", "ok", str(usable))
    advice = "a container, `taskset` or the batch system limits them; on SLURM, request more with --cpus-per-task"
    return Check("cores", "warn", f"{usable} of {installed} usable", advice)


def check_threads() -> Check:
    """Check that torch does not start more threads than there are cores."""
    torch, _ = _import("torch")
    if torch is None:
        return Check("threads", "missing", "unknown without torch", "fix torch first")
    threads, cores = torch.get_num_threads(), usable_cores()
    found = f"{threads} a process by default, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    if threads > cores:
        return Check(
            "threads", "warn", found, f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
        )
    return Check("threads", "ok", found)


def check_bf16(flags: frozenset[str]) -> Check:
    """Check whether engine.precision=bf16 is worthwhile on this processor."""
    known = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]
    if known:
        return Check("bf16 on the CPU", "ok", ", ".join(known), "try engine.precision=bf16 engine.channels_last=true")
    advice = "keep engine.precision=fp32 on the CPU: bf16 would be emulated"
    return Check("bf16 on the CPU", "warn", "no bf16 instructions (AMX or AVX-512)", advice)


def check_memory() -> Check:
    """Check the main memory that is available now."""
    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} free of {_gib(memory.total)}"
    if memory.available < 2 * _GIB:
        return Check(
            "memory", "warn", found, "less than 2 GiB: use a smaller train.batch_size and data.storage=encoded"
        )
    return Check("memory", "ok", found)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:  # noqa: S108 - a mount that is measured, not used
    """Check /dev/shm, through which decoding processes pass images; containers often have only 64 MiB."""
    if not path.is_dir():
        return Check("shared memory", "ok", "not a separate file system")
    free = shutil.disk_usage(path).free
    if free < _GIB:
        advice = "less than 1 GiB: start the container with --ipc=host or --shm-size=8g, or set data.workers=0"
        return Check("shared memory", "warn", f"{_gib(free)} free", advice)
    return Check("shared memory", "ok", f"{_gib(free)} free")


def check_disk(name: str, folder: Path) -> Check:
    """Check that a folder, or its nearest existing parent, can be written and has room."""
    place = folder.absolute()
    while not os.path.exists(place):  # False, without an error, if a parent folder may not be entered
        place = place.parent
    if not place.is_dir():
        return Check(name, "missing", f"'{place}' is a file", f"choose another folder than '{folder}'", required=True)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(
            name, "missing", f"'{place}' cannot be written", "choose another folder or ask its owner", required=True
        )
    usage = shutil.disk_usage(place)
    found = f"{_gib(usage.free)} free of {_gib(usage.total)} at {place}"
    if usage.free < 5 * _GIB:
        return Check(name, "warn", found, "less than 5 GiB: checkpoints and decoded images may not fit", required=True)
    return Check(name, "ok", found, required=True)


# ---------------------------------------------------------------- network and cluster


def check_hostname(hostname: str) -> Check:
    """Check that the machine's own name resolves; gloo listens at that address."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(hostname, None)}
    except (OSError, UnicodeError) as error:
        advice = (
            f"several processes may not find each other: add '{hostname}' to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
        )
        return Check("host name", "warn", f"'{hostname}' does not resolve ({error})", advice)
    return Check("host name", "ok", f"{hostname} ({', '.join(sorted(addresses))})")


def check_port(port: int) -> Check:
    """Check that a port for the process group is free."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            taken = listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        advice = "set cluster.port=0 for any free port, or choose another"
        return Check("port", "warn", f"{port} cannot be used ({error})", advice)
    return Check("port", "ok", f"{taken} is free" if port else "a free port exists")


def check_slurm() -> Check:
    """Check that the SLURM commands are on PATH and the controller answers."""
    commands = {name: shutil.which(name) for name in ("sinfo", "sbatch", "srun")}
    absent = [name for name, path in commands.items() if path is None]
    if len(absent) == len(commands):
        return Check(
            "SLURM", "missing", "no sinfo, sbatch, srun", "optional: to use a cluster, run hpccl on its login node"
        )
    if absent:
        found = f"{', '.join(name for name in commands if name not in absent)}; no {', '.join(absent)}"
        return Check("SLURM", "warn", found, "put the folder of the SLURM commands on PATH (`module load slurm`)")
    try:
        answer = _run("sinfo", "--noheader", "--format=%P %a %D")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        return Check(
            "SLURM",
            "warn",
            f"sinfo failed: {_one_line(detail)}",
            "check with `scontrol ping` that the controller is up",
        )
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return Check("SLURM", "ok", f"partitions: {'; '.join(answer.splitlines()) or 'none'}{job}")


# ---------------------------------------------------------------- helpers


def _import(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except _BROKEN as error:
        return None, _one_line(error)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM; the first core stands for all.
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hpccl"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _one_line(what: object) -> str:
    return " ".join(str(what).split()) or type(what).__name__
