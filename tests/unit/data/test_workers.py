"""Processes that decode: one that dies is one clear error, never a silence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from hpccl.data.workers import in_workers
from hpccl.errors import DataError, WorldError
from tests.dist.world import dismiss


class Numbers:
    """Its item is (number, pid of who made it)."""

    def __init__(self, ends_at: int | None = None, pause: float = 0.0) -> None:
        self.ends_at, self.pause = ends_at, pause

    def __call__(self, number: int) -> tuple[int, int]:
        if number == self.ends_at:
            os._exit(7)
        time.sleep(self.pause)
        return number, os.getpid()


@pytest.fixture(autouse=True, scope="module")
def alone() -> None:
    """Processes that other tests keep for the next of theirs are no workers, and are not to be killed as such."""
    dismiss()


def workers() -> list[int]:
    return [cast("int", child.pid) for child in multiprocessing.active_children()]


def test_items_come_in_order_from_all_workers() -> None:
    items = list(in_workers(Numbers(), range(20), 3))
    assert [number for number, _ in items] == list(range(20))
    assert len({pid for _, pid in items}) == 3
    assert os.getpid() not in {pid for _, pid in items}
    assert not workers()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_named(number: signal.Signals) -> None:
    made = in_workers(Numbers(pause=0.01), range(10_000), 2)
    next(made)
    victim = workers()[1]
    os.kill(victim, number)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(made)
    assert time.monotonic() - began < 20
    assert f"a decoding process (pid {victim}, one of 2) was killed by signal {int(number)}" in str(caught.value)
    assert "Run the same command again to continue" in str(caught.value)
    assert "data.workers below 2" in str(caught.value)
    assert not workers()


def test_a_worker_that_stands_still_is_named() -> None:
    """As one does whose images lie on a mount that hangs."""
    made = in_workers(Numbers(), range(1000), 2, timeout=1.5)
    next(made)
    victim = workers()[0]
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(WorldError, match=rf"\(pid {victim}, one of 2\) did not answer for 1.5 s.*data.timeout"):
        list(made)
    assert not workers()


def test_a_death_is_no_exception_where_the_trainer_happens_to_be() -> None:
    """Torch's own handler of SIGCHLD raises in the middle of whatever the main thread does."""
    made = in_workers(Numbers(), range(1000), 1)
    next(made)
    os.kill(workers()[0], signal.SIGKILL)
    time.sleep(0.5)  # SIGCHLD arrives here
    with pytest.raises(DataError, match="was killed by signal 9, as the system does when memory is short"):
        list(made)


def test_a_worker_that_ends_by_itself() -> None:
    with pytest.raises(DataError, match="ended with code 7"):
        list(in_workers(Numbers(ends_at=5), range(9), 2))


def test_an_error_of_the_requests_is_itself() -> None:
    def requests() -> Iterator[int]:
        yield 1
        raise RuntimeError("of the requests")

    with pytest.raises(RuntimeError, match="of the requests"):
        list(in_workers(Numbers(), requests(), 2))
    assert not workers()


def test_a_kill_while_many_pixels_travel() -> None:
    """At any moment: also in the middle of a message."""

    def large(number: int) -> list[npt.NDArray[np.uint8]]:
        return [np.full(size, number, np.uint8) for size in (1 << 20, 0, 3)]

    for pause in np.linspace(0, 0.02, 20):
        made = in_workers(large, range(10_000), 2)
        first = next(made)
        assert [len(array) for array in first] == [1 << 20, 0, 3]
        first[0][:] = 1  # writable
        time.sleep(pause)
        os.kill(workers()[0], signal.SIGKILL)
        rest: list[list[npt.NDArray[np.uint8]]] = []
        with pytest.raises(DataError, match="was killed by signal 9"):
            rest.extend(made)
        assert all((array == number % 256).all() for number, arrays in enumerate(rest, 1) for array in arrays)
    assert not workers()


def test_an_error_in_a_worker_says_where() -> None:
    def broken(_: int) -> int:
        return 1 // 0

    with pytest.raises(RuntimeError, match=r"in broken\n.*\n.*\nZeroDivisionError"):
        list(in_workers(broken, [1], 1))


def test_an_iterator_that_is_never_closed_does_not_keep_the_process() -> None:
    script = (
        "from hpccl.data.workers import in_workers\nimport time\n"
        "made = in_workers(lambda n: time.sleep(n) or n, [0, 60, 60], 2)\nprint(next(made))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"
