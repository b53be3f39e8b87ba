"""Run a function on several CUDA devices, a process each, and collect what each rank returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hpccl.dist.comm import Comm
from tests.dist.world import Result

__all__ = ["run_on_devices"]


def run_on_devices(
    function: Callable[..., Result], size: int, folder: Path, *arguments: Any, device: str = "cuda"
) -> list[Result]:
    """function(comm, *arguments) on `size` devices over NCCL (device="cpu": gloo); results on the CPU, in rank order.

    `function` lives at the top of an importable module. Processes are new each time, and end with it.
    """
    folder.mkdir(parents=True)
    spawn(_rank, ((function, size, folder, device), arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True, map_location="cpu") for rank in range(size)]


def _rank(rank: int, world: tuple[Callable[..., Result], int, Path, str], arguments: tuple[Any, ...]) -> None:
    function, size, folder, kind = world
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # engines are compared in fp32
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        backend, meet = "nccl" if kind == "cuda" else "gloo", f"file://{folder}/meet"
        dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=timedelta(minutes=2))
    try:
        torch.save(function(Comm(rank=rank, size=size, device=device), *arguments), folder / f"{rank}.pt")
    finally:
        if dist.is_initialized():  # engines that spread weights meet alone, too
            dist.destroy_process_group()
