"""Make the next items of an iterator in one background thread while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["ahead"]

Item = TypeVar("Item")


def ahead(items: Iterator[Item], *, depth: int = 2) -> Generator[Item, None, None]:
    """Yield the same items; up to `depth` are made in advance, and closing the iterator ends the thread.

    An exception raised while an item is made is raised where that item is requested.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hpccl-data") as pool:
        # A list of at most one item distinguishes the end of the iterator from any item.
        pending = deque(pool.submit(_take, items) for _ in range(depth))
        try:
            while taken := pending.popleft().result():
                pending.append(pool.submit(_take, items))
                yield taken[0]
        finally:
            for future in pending:
                future.cancel()


def _take(items: Iterator[Item]) -> list[Item]:
    return list(islice(items, 1))
