"""Interpret failed collectives: another process ended, or did not answer in time."""

from __future__ import annotations

import torch.distributed as dist

from hpccl.dist.comm import Comm
from hpccl.errors import StragglerError, WorldError

__all__ = ["lost_partner", "straggler", "waited_in_vain"]

_IN_GLOO = "/gloo/"  # gloo raises plain RuntimeErrors that begin with a path in its source


def lost_partner(error: RuntimeError, comm: Comm, timeout: float) -> WorldError | None:
    """Return hpccl's error for a failed collective, or None if `error` came from anything else.

    Args:
        error: the error that was raised.
        comm: the world it was raised in.
        timeout: seconds that a collective waits.
    """
    if comm.size == 1 or not (isinstance(error, dist.DistError) or _IN_GLOO in str(error)):
        return None
    if waited_in_vain(error):
        return straggler(comm.rank, comm.size, timeout)
    reason = str(error).splitlines()[0].partition(". This is typically")[0]
    return WorldError(
        f"rank {comm.rank} of {comm.size} lost the connection to another rank ({reason}); run the same command again "
        "to continue from the last checkpoint"
    )


def straggler(rank: int, size: int, timeout: float) -> StragglerError:
    """Return the error of a rank that waited for others until the timeout."""
    return StragglerError(
        f"rank {rank} of {size} waited {timeout:g} s (cluster.timeout) for another rank in vain; if it was only slow, "
        "raise cluster.timeout"
    )


def waited_in_vain(error: Exception) -> bool:
    """Whether an error of torch or its backends is a timeout."""
    words = str(error).lower()
    return any(word in words for word in ("timed out", "timeout", "time out"))
