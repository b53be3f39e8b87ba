"""Shared by all benchmarks: the machine and versions, timing in turns, and the printing of results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

__all__ = [
    "forget_peak",
    "giving_back",
    "interleaved",
    "machine",
    "median_ratio",
    "memory_status",
    "print_result",
    "spawn",
    "versions",
]

_PACKAGES = ("torch", "torchvision", "numpy", "timm", "pillow", "simplejpeg", "opencv-python-headless", "webdataset")


def machine() -> dict[str, Any]:
    """Describe the processor, the cores that this process may use, and the memory."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages whose speed is measured."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def print_result(name: str, headline: Mapping[str, float], **details: Any) -> None:
    """Print the result as one machine-readable line; call it last."""
    result = {
        "name": name,
        "headline": {key: round(value, 4) for key, value in headline.items()},
        "machine": machine(),
        "versions": versions(),
        "details": details,
    }
    print(json.dumps(result), flush=True)


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], nproc: int = 1) -> None:
    """Run work(rank, *arguments) in `nproc` new processes until all return; raise what one of them raises."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(work, arguments, nprocs=nproc)  # type: ignore[attr-defined, no-untyped-call] # torch's


@contextmanager
def giving_back() -> Iterator[None]:
    """Make processes started here return freed memory to the system at once, so that resident memory is used memory."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(1 << 16)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def memory_status() -> dict[str, int]:
    """Return this process's resident bytes: VmRSS, the current ones, and VmHWM, the peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


def forget_peak() -> None:
    """Reset VmHWM of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def interleaved(runs: Mapping[str, Callable[[], int]], repetitions: int) -> dict[str, list[float]]:
    """Measure items per second of each run, in turns, so that other load on the machine affects all alike.

    A run returns how many items it made. The first turn is for warm-up and does not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            items = run()
            if turn:
                rates[name].append(items / (time.perf_counter() - start))
    return rates


def median_ratio(rates: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over turns of the ratio of two runs in the same turn."""
    return median(one / other for one, other in zip(rates[above], rates[below], strict=True))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
