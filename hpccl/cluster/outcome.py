"""The exit codes of runs, and printing their errors."""

from __future__ import annotations

import signal
from typing import Final

from hpccl.errors import ConfigError, HpcclError
from hpccl.output import say

__all__ = ["ASKED_TO_STOP", "DONE", "FAILED", "INTERRUPTED", "STOPPED", "WRONG_CONFIG", "code_of", "tell"]

DONE: Final = 0
FAILED: Final = 1
WRONG_CONFIG: Final = 2
STOPPED: Final = 75  # EX_TEMPFAIL: stopped on request and saved; a scheduler may run the same command again
INTERRUPTED: Final = 130  # by Ctrl-C before training handles it, or by a second one

# Signals that ask a run to save and end.
ASKED_TO_STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def code_of(error: HpcclError) -> int:
    """Return the exit code of an error."""
    return WRONG_CONFIG if isinstance(error, ConfigError) else FAILED


def tell(error: HpcclError) -> int:
    """Print an error without a traceback, and return its exit code."""
    say(f"error: {error}")
    return code_of(error)
