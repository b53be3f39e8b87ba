"""Joining and leaving the world of processes that the launcher's environment describes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from hpccl.dist.allocator import keep_freed_memory
from hpccl.dist.comm import Comm
from hpccl.dist.lost import straggler, waited_in_vain
from hpccl.errors import WorldError
from hpccl.machine import slurm_gpus

__all__ = ["join", "leave", "meet_alone", "pick_device"]


def pick_device(wanted: str) -> torch.device:
    """Return the device of this process and set it up; `auto` is this rank's CUDA device if there is one.

    Raises:
        WorldError: `cuda` is wanted, or SLURM gave this step GPUs, and there is none; or there are more processes than
            devices.
    """
    given = slurm_gpus() if wanted == "auto" and not torch.cuda.is_available() else None
    if given is not None:
        raise WorldError(
            f"SLURM gave this job GPUs ({given}) but torch sees no CUDA device; check the node's driver and that torch "
            "is a build for CUDA (`hpccl doctor` there), or set engine.device=cpu"
        )
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError("engine.device is 'cuda' but torch sees no CUDA device; allowed: cpu, auto, or a GPU node")
    visible, local_size = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    masked = visible == 1 and "HPCCL_PARENT" not in os.environ  # a launcher shows each process only its own device
    if local_size > visible and not masked:
        raise WorldError(
            f"{local_size} processes but only {visible} CUDA devices on this machine, and each process needs its own; "
            f"use at most {visible} processes, or engine.device=cpu"
        )
    # If each process sees only its own device, the local rank is no index; hence the modulo.
    index = int(os.environ.get("LOCAL_RANK", "0")) % visible
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join(device: str = "auto", *, timeout: timedelta = timedelta(minutes=10)) -> Comm:
    """Join the process group given by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a world of one needs none.

    Raises:
        WorldError: a variable is missing or wrong, or the master address cannot be reached.
        StragglerError: the others did not join within `timeout`.
    """
    chosen = pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Comm.solo(chosen)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise WorldError(f"WORLD_SIZE={size} but {', '.join(missing)} not set; start with `hpccl train --nproc {size}`")
    rank = int(os.environ["RANK"])
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        if waited_in_vain(error):
            raise straggler(rank, size, timeout.total_seconds()) from error
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise WorldError(
            f"rank {rank} of {size} could not connect to the others at {where} ({error}); "
            "the port may be taken or blocked: set cluster.port to a free one, or 0 to have one chosen"
        ) from error
    return Comm(rank=rank, size=size, device=chosen, timeout=timeout)


def meet_alone(comm: Comm) -> None:
    """Create a process group for a world of one: engines that spread weights need one even then."""
    if comm.size == 1 and not dist.is_initialized():
        backend = "nccl" if comm.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in its stubs
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=comm.timeout)


def leave(*, failed: bool = False) -> None:
    """Destroy the process group, if there is one; a process whose run has failed must end soon after.

    NCCL waits for the other ranks when its communicators are destroyed, and they may wait in a collective that this
    process will not join: after a failure its connections are left open until the process ends.
    """
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1 and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
