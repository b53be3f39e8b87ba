"""Handling signals for a time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

__all__ = ["handled"]


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Handle signals; yield the handlers that are set at the end by number: the former ones, unless changed."""
    afterwards: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield afterwards
    finally:
        for number, former in afterwards.items():
            signal.signal(number, former)
