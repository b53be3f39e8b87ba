"""Memory that tensors on a CPU have freed stays with the process, for the next step to use.

The C library gives a large block back to the system when it is freed, and the system fills every page of the next one
with zeros as it is first touched: about a microsecond for 4 KiB, so that a training step of a small network with large
activations spends a sixth of its time there (benchmarks/allocator.py). Peaks of memory rise by some percent, since free
blocks between others are too small for the next; after them a process keeps up to 2 GiB that it does not use.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt numbers them
_KEPT = (1 << 31) - 1  # bytes; mallopt takes an int
_LARGE = (1 << 30, 1 << 25)  # bytes; old C libraries allow no more than the latter
_BY_HAND = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell the C library, in this process; False where that is not glibc, or where the environment says otherwise."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _BY_HAND):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in _LARGE) and mallopt(_TRIM_THRESHOLD, _KEPT) == 1
