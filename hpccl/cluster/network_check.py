"""Check that all ranks of a job connect, and how fast: `srun python -m hpccl.cluster.network_check`.

gloo on CPUs, NCCL on GPUs, as in training. Rank 0 prints a table of ranks with the bandwidth between each and rank 0,
the time of a small all-reduce, the bandwidth of a large one, and a verdict.

The bandwidth of an all-reduce of `bytes` over n ranks is the bus bandwidth, 2 (n - 1) / n * bytes / seconds.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hpccl.cluster.environment import from_slurm
from hpccl.cluster.outcome import DONE, FAILED, tell
from hpccl.dist.comm import Comm
from hpccl.dist.mesh import join, leave
from hpccl.errors import HpcclError

__all__ = ["main"]

_SLOW = 3.0  # a rank is reported if its bandwidth is this factor below the median of its peers


@dataclass(frozen=True)
class _Member:
    """One rank, and the bandwidth between it and rank 0 in bytes per second."""

    rank: int
    host: str
    device: str
    bandwidth: float


@dataclass(frozen=True)
class _AllReduce:
    """Seconds of a small all-reduce, bytes per second of a large one, and whether sums are right."""

    latency: float
    bandwidth: float
    right: bool


def main() -> int:
    """Run the check; return 0 if all ranks connected and sums are right, else 1."""
    if "RANK" not in os.environ:
        os.environ.update(from_slurm())
    try:
        comm = join(timeout=timedelta(seconds=float(os.environ.get("HPCCL_CHECK_TIMEOUT", "120"))))
    except HpcclError as error:
        return tell(error)
    reduced, members = _all_reduce(comm), _members(comm)
    if comm.leader:
        sys.stdout.write("".join(f"{line}\n" for line in _lines(members, reduced)))
    leave()
    return DONE if reduced.right else FAILED


def _members(comm: Comm) -> list[_Member]:
    name = torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else ""
    mine = f"{socket.gethostname()}\t{comm.device} {name}"
    members = []
    for rank in range(comm.size):
        host, device = comm.broadcast_text(mine, source=rank).split("\t")
        members.append(_Member(rank, host, device, _pair_bandwidth(comm, rank) if rank else math.inf))
    return members


def _all_reduce(comm: Comm) -> _AllReduce:
    number = torch.tensor([float(comm.rank + 1)], device=comm.device)
    comm.sum_([number])
    right = number.item() == comm.size * (comm.size + 1) / 2
    large = torch.zeros(2**26 if comm.device.type == "cuda" else 2**22, device=comm.device)
    seconds = _seconds(comm, lambda: comm.sum_([large]), repeat=5)
    return _AllReduce(
        latency=_seconds(comm, lambda: comm.sum_([large[:1]]), repeat=30),
        bandwidth=2 * (comm.size - 1) / comm.size * large.nbytes / seconds,
        right=right,
    )


def _seconds(comm: Comm, act: Callable[[], None], *, repeat: int) -> float:
    act()  # connections are set up at the first use
    times = []
    for _ in range(repeat):
        comm.barrier()
        began = time.perf_counter()
        act()
        if comm.device.type == "cuda":
            torch.cuda.synchronize(comm.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _pair_bandwidth(comm: Comm, other: int) -> float:
    """Return the bytes per second of a round trip between rank 0 and `other`, while the other ranks wait."""
    message = torch.zeros(2**24 if comm.device.type == "cuda" else 2**20, device=comm.device)

    def there_and_back() -> None:
        if comm.rank == 0:
            dist.send(message, other)
            dist.recv(message, other)
        elif comm.rank == other:
            dist.recv(message, 0)
            dist.send(message, 0)

    return 2 * message.nbytes / _seconds(comm, there_and_back, repeat=3)


def _lines(members: list[_Member], reduced: _AllReduce) -> Iterator[str]:
    yield f"{'rank':>5}  {'host':24}  {'device':36}  GB/s with rank 0"
    for member in members:
        reached = f"{member.bandwidth / 1e9:.2f}" if member.rank else "-"
        yield f"{member.rank:5}  {member.host:24}  {member.device:36}  {reached}"
    backend = dist.get_backend() if dist.is_initialized() else "none"
    hosts = len({member.host for member in members})
    yield f"{len(members)} ranks on {hosts} hosts, backend {backend}, torch {torch.__version__}"
    yield from (f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("NCCL_", "GLOO_")))
    yield f"all-reduce: {reduced.latency * 1e6:.0f} us for 4 bytes, {reduced.bandwidth / 1e9:.2f} GB/s for a large one"
    slow = ", ".join(f"{member.rank} on {member.host}" for member in _slow(members))
    if not reduced.right:
        yield "verdict: WRONG. The sum over ranks is incorrect: do not train here"
    elif slow:
        yield f"verdict: works, but rank 0 is over {_SLOW:g} times slower with rank {slow} than with equally near ranks"
    else:
        yield "verdict: good. All ranks met, the sum is right, and no rank is slower than equally near ones"


def _slow(members: list[_Member]) -> list[_Member]:
    slow = []
    for near in (True, False):
        fellows = [member for member in members[1:] if (member.host == members[0].host) == near]
        usual = statistics.median(member.bandwidth for member in fellows) if fellows else 0.0
        slow += [member for member in fellows if member.bandwidth * _SLOW < usual]
    return slow


if __name__ == "__main__":
    sys.exit(main())
