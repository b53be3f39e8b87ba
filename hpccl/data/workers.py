"""Worker processes that make items of a data set ahead of time, in order; if one dies, a clear error is raised at once.

Every worker has a socket of its own, so that a killed worker cannot leave a lock taken or a reader waiting for the rest
of its message. (With the queue that torch's DataLoader shares among its workers, a kill at the wrong moment leaves the
trainer waiting for ever.) Large arrays do not pass through the socket: as pickle's out-of-band buffers, they are handed
over in anonymous memory.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from hpccl.errors import DataError, WorldError

__all__ = ["in_workers"]

Key = TypeVar("Key")
Item = TypeVar("Item")

_NOT_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_AHEAD = 2  # items that are requested from every worker in advance
_LENGTH = struct.Struct("<Q")


def in_workers(
    make: Callable[[Key], Item], keys: Iterable[Key], workers: int, *, timeout: float | None = None
) -> Generator[Item, None, None]:
    """Yield make(key) for every key, in order, from `workers` processes that start now and end with the iterator.

    Arrays in the items should be numpy arrays, which are handed over without pickling their data.

    Raises:
        DataError: a worker died.
        WorldError: it did not answer for `timeout` seconds (None: wait for ever).
        RuntimeError: `make` raised an exception, whose traceback is in the message.
    """
    return _received(_Crew.start(make, workers, timeout), iter(keys))


def _received(crew: _Crew, keys: Iterator[Any]) -> Generator[Any, None, None]:
    waiting: deque[_Worker] = deque()
    with contextlib.closing(crew):
        for turn in range(_AHEAD * len(crew.workers)):
            crew.ask(turn, keys, waiting)
        turn = _AHEAD * len(crew.workers)
        while waiting:
            item = waiting.popleft().receive(len(crew.workers))
            crew.ask(turn, keys, waiting)
            turn += 1
            yield item


@dataclass(frozen=True, eq=False)
class _Worker:
    process: BaseProcess
    channel: _Channel

    def ask(self, key: Any, crew: int) -> None:
        try:
            self.channel.send(key)
        except TimeoutError as error:
            raise WorldError(self._silence(crew)) from error
        except OSError as error:
            raise DataError(self._obituary(crew)) from error

    def receive(self, crew: int) -> Any:
        try:
            item = self.channel.receive()
        except TimeoutError as error:
            raise WorldError(self._silence(crew)) from error
        except (OSError, EOFError) as error:
            raise DataError(self._obituary(crew)) from error
        if isinstance(item, _Failure):
            raise RuntimeError(f"in a decoding process:\n{item.trace}")
        return item

    def _silence(self, crew: int) -> str:
        return (
            f"a decoding process (pid {self.process.pid}, one of {crew}) did not answer for "
            f"{self.channel.socket.gettimeout():g} s: it was stopped, or the disk or mount with the images hangs. Fix "
            "that and run the same command again to continue; data.timeout sets the limit"
        )

    def _obituary(self, crew: int) -> str:
        self.process.join(5)
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            how = "was killed by signal 9, as the system does when memory is short"
        elif code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            how = f"ended with code {code}"
        return (
            f"a decoding process (pid {self.process.pid}, one of {crew}) {how}. Run the same command again to "
            f"continue; if it happens again, ask for more memory or set data.workers below {crew} (0 decodes in the "
            "training process)"
        )


@dataclass(frozen=True, eq=False)
class _Crew:
    workers: list[_Worker]

    @classmethod
    def start(cls, make: Callable[[Any], Any], count: int, timeout: float | None) -> _Crew:
        crew = cls([])
        atexit.register(crew.close)  # before multiprocessing waits for its children
        with _signals_held():
            for _ in range(count):
                crew.workers.append(_hired(make, timeout))
        return crew

    def ask(self, turn: int, keys: Iterator[Any], waiting: deque[_Worker]) -> None:
        for key in keys:
            worker = self.workers[turn % len(self.workers)]
            worker.ask(key, len(self.workers))
            waiting.append(worker)
            return

    def close(self) -> None:
        """Kill the workers, which hold nothing that could be lost."""
        atexit.unregister(self.close)
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.channel.socket.close()


def _hired(make: Callable[[Any], Any], timeout: float | None) -> _Worker:
    ours, theirs = socket.socketpair()
    ours.settimeout(timeout)  # of the trainer's end alone: a worker waits as long as the trainer takes
    # Forked, because indices are large and torch takes seconds to import.
    process = multiprocessing.get_context("fork").Process(target=_work, args=(make, _Channel(theirs)), daemon=True)
    with warnings.catch_warnings(), theirs:
        # Python 3.12 warns of forking a process with threads; the workers only read files and decode.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        process.start()
    return _Worker(process, _Channel(ours))


# ---------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class _Failure:
    trace: str


def _work(make: Callable[[Any], Any], channel: _Channel) -> None:
    _leave_signals_to_the_main_process()
    torch.set_num_threads(1)  # threads do not survive a fork
    while True:
        try:
            key = channel.receive()
        except EOFError:
            return
        try:
            item = make(key)
        except Exception:  # noqa: BLE001 - whatever it is, the main process reports it
            item = _Failure(traceback.format_exc())
        channel.send(item)


def _leave_signals_to_the_main_process() -> None:
    """Ignore the signals that the main process handles, but (on Linux) do not outlive it."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Block signals while workers start: a signal that arrives before a worker ignores it would kill the worker."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------- between them


@dataclass(frozen=True, eq=False)
class _Channel:
    """Passes objects through a socket: a length, a pickle, and a file descriptor of the memory with its arrays."""

    socket: socket.socket

    def send(self, item: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        message = pickle.dumps((body, [view.nbytes for view in views]), protocol=5)
        with _shared(views) as number:
            socket.send_fds(self.socket, [_LENGTH.pack(len(message))], [number])
            self.socket.sendall(message)

    def receive(self) -> Any:
        """Receive an object. Raises EOFError if the other side is gone, TimeoutError if it does not answer."""
        start, numbers, _, _ = socket.recv_fds(self.socket, _LENGTH.size, 1)
        try:
            start += self._exactly(_LENGTH.size - len(start))
            body, lengths = pickle.loads(self._exactly(_LENGTH.unpack(start)[0]))  # noqa: S301 - from our own fork
            memory = memoryview(mmap.mmap(numbers[0], sum(lengths))) if sum(lengths) else memoryview(bytearray())
        finally:
            for number in numbers:
                os.close(number)
        views, first = [], 0
        for length in lengths:
            views.append(memory[first : first + length])
            first += length
        return pickle.loads(body, buffers=views)  # noqa: S301 - from our own fork

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


@contextlib.contextmanager
def _shared(views: list[memoryview]) -> Iterator[int]:
    """Yield a file descriptor of anonymous memory that holds the views, one after the other."""
    number = os.memfd_create("hpccl")
    try:
        for view in views:
            written = 0
            while written < view.nbytes:
                written += os.write(number, view[written:])
        yield number
    finally:
        os.close(number)
