"""Freed memory is used again without the system's help; whoever set the C library's habits by hand is left alone."""

import os
import platform
import subprocess
import sys

import pytest

from hpccl.dist.allocator import _BY_HAND

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Pages of 32 MiB, touched in each of ten turns and freed, one block at a time.
PROGRAM = """
import resource
import torch
from hpccl.dist.allocator import keep_freed_memory

print(keep_freed_memory() if {kept} else None)
torch.set_num_threads(1)
for _ in range(30):  # until the heap has found its shape
    torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*, kept: bool, **environ: str) -> tuple[str, int]:
    """What was said, and pages that the system had to give."""
    plain = {name: value for name, value in os.environ.items() if name not in _BY_HAND}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(kept=kept)],
        env={**plain, **environ},
        text=True,
        capture_output=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


def test_pages_are_used_again() -> None:
    pages = (1 << 25) // os.sysconf("SC_PAGE_SIZE")
    said, faults = run(kept=True)
    assert said == "True"
    assert faults < pages, "less than one of ten turns"
    assert run(kept=False)[1] > faults + 100, "ten times 16, where the system gives pages of 2 MiB"


def test_settings_by_hand_stay() -> None:
    said, _ = run(kept=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False"
