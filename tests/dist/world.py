"""Run a function on several gloo processes and collect what each rank returns."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hpccl.dist.comm import Comm

__all__ = ["dismiss", "run_in_world"]

Result = dict[str, Any]  # nested dicts of tensors, numbers and text: what torch.load reads with weights_only


@dataclass(frozen=True)
class _Worker:
    """A process that waits for work: starting one, and importing torch there, takes longer than most tests."""

    process: BaseProcess
    line: Connection


_workers: list[_Worker] = []


def run_in_world(function: Callable[..., Result], size: int, folder: Path, *arguments: Any) -> list[Result]:
    """function(comm, *arguments) on every rank of a world of `size`; results in rank order.

    A world of one runs here, without a process group. `function` lives at the top of an importable module. The
    exception of a rank that fails is raised here, and ends the others.
    """
    if size == 1:
        return [function(Comm.solo(), *arguments)]
    meeting = folder / f"world-{size}-{function.__name__}"
    meeting.mkdir(parents=True)
    while len(_workers) < size:
        _workers.append(_hired())
    waiting = {worker.line: rank for rank, worker in enumerate(_workers[:size])}
    for line, rank in waiting.items():
        line.send((function, rank, size, str(meeting), arguments))
    while waiting:
        ready = set(wait(list(waiting)))
        for line in [line for line in waiting if line in ready]:
            rank = waiting.pop(line)
            if failure := _answer(line):
                dismiss()
                raise RuntimeError(f"rank {rank} of {size} failed:\n{failure}")
    return [torch.load(meeting / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _hired() -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def dismiss() -> None:
    """End the processes: after the last test, or because nobody knows what a world that failed left behind."""
    for worker in _workers:
        worker.process.kill()
        worker.process.join()
    _workers.clear()


def _answer(line: Connection) -> str:
    """Why it failed, or nothing."""
    try:
        return str(line.recv())
    except EOFError:
        return "the process died"


def _work(line: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with contextlib.suppress(EOFError):
        while True:
            job = line.recv()
            try:
                _rank(*job)
            except Exception:  # noqa: BLE001  (whatever it is, it is raised where the test runs)
                line.send(traceback.format_exc())
            else:
                line.send("")


def _rank(function: Callable[..., Result], rank: int, size: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    meet = f"file://{meeting}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=timedelta(minutes=1))
    try:
        result = function(Comm(rank=rank, size=size, device=torch.device("cpu")), *arguments)
        torch.save(result, Path(meeting) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
        _forget_groups()


def _forget_groups() -> None:
    """DeepSpeed keeps the first process group that it sees for good; here processes serve one world after another."""
    if "deepspeed" in sys.modules:
        from deepspeed import comm
        from deepspeed.utils import groups

        groups._WORLD_GROUP, comm.comm.cdb = None, None
