"""Stop requests: received by one process, agreed on by all."""

from __future__ import annotations

import signal
from types import FrameType

from hpccl.dist.comm import Comm

__all__ = ["Stop", "Stopped"]


class Stopped(Exception):  # noqa: N818  (a wish, not an error)
    """Raised by all ranks together to leave a phase on a stop request; what was not saved is repeated later."""


class Stop:
    """A flag that signal handlers set; ranks agree on it in a collective between two steps, never in the handler."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask to stop at the next opportunity; the first reason is kept."""
        self.reason = self.reason or reason

    def on_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal: to be passed to signal.signal()."""
        self.request(f"signal {signal.Signals(number).name}")

    def requested(self, comm: Comm) -> bool:
        """Return True on every rank if any rank was asked to stop. Collective."""
        return comm.any(self.reason is not None)
