"""Keep memory that CPU tensors have freed in the process, for the next step to reuse.

By default the C library returns large freed blocks to the system, which zeroes every page of the next one at its first
touch: about a microsecond per 4 KiB, so that a training step of a small network with large activations spends a sixth
of its time there (benchmarks/allocator.py). Peak memory rises by a few percent, because of fragmentation; afterwards a
process keeps up to 2 GiB that it does not use.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameter numbers
_KEPT = (1 << 31) - 1  # bytes; mallopt takes an int
_LARGE = (1 << 30, 1 << 25)  # bytes; old C libraries allow no more than the latter
_BY_HAND = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Configure this process's C library; False if it is not glibc, or if the environment configures it already."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _BY_HAND):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in _LARGE) and mallopt(_TRIM_THRESHOLD, _KEPT) == 1
