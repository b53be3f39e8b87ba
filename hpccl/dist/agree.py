"""Ranks go on together or fail together: a rank that fails tells the others before they wait for it in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hpccl.dist.comm import Comm
from hpccl.errors import HpcclError, WorldError

__all__ = ["agree", "all_or_none", "on_leader"]

Made = TypeVar("Made")


def agree(comm: Comm, failure: HpcclError | None, step: str) -> None:
    """Raise on every rank if any has failed: its own failure on that rank, a WorldError on the others. Collective.

    A WorldError comes from an earlier agreement, in which the failed rank took part; it is raised again without another
    exchange, which that rank would not join.

    Args:
        comm: the ranks.
        failure: what stopped this rank, or None.
        step: what could not be done, as in "another rank could not `step`".
    """
    if isinstance(failure, WorldError):
        raise failure
    if comm.any(failure is not None):
        raise failure or WorldError(f"another rank could not {step}; see its message")


def all_or_none(comm: Comm, make: Callable[[], Made], step: str) -> Made:
    """Return `make()` on each rank; if it fails on any, all ranks raise as in `agree`. Collective."""
    try:
        made = make()
    except HpcclError as error:
        agree(comm, error, step)
        raise
    agree(comm, None, step)
    return made


def on_leader(comm: Comm, make: Callable[[], Made], step: str) -> Made | None:
    """Return `make()` on the first rank and None on the others; if it fails, all ranks raise as in `agree`."""
    return all_or_none(comm, lambda: make() if comm.leader else None, step)
