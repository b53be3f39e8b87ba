"""Run a function on several gloo processes and collect what each rank returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hpccl.dist.comm import Comm

__all__ = ["run_in_world"]

Result = dict[str, Any]  # nested dicts of tensors, numbers and text: what torch.load reads with weights_only


def run_in_world(function: Callable[..., Result], size: int, folder: Path, *arguments: Any) -> list[Result]:
    """function(comm, *arguments) on every rank of a world of `size`; results in rank order.

    A world of one runs here, without a process group. `function` lives at the top of an importable module. The
    exception of a rank that fails is raised here, and ends the others.
    """
    if size == 1:
        return [function(Comm.solo(), *arguments)]
    meeting = folder / f"world-{size}-{function.__name__}"
    meeting.mkdir(parents=True)
    mp.spawn(_rank, (function, size, str(meeting), arguments), size)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(meeting / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, function: Callable[..., Result], size: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}/meet", rank=rank, world_size=size)
    try:
        result = function(Comm(rank=rank, size=size, device=torch.device("cpu")), *arguments)
        torch.save(result, Path(meeting) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
