from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import cast

import pytest

from hpccl.data.ahead import ahead


def closed(items: Iterator[int]) -> None:
    cast("Generator[int]", items).close()


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hpccl-data")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_the_same_items_in_order(count: int) -> None:
    assert list(ahead(iter(range(count)))) == list(range(count))
    assert not names()


def test_at_most_so_many_in_advance_and_none_after_closing() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    source = ahead(items(), depth=2)
    assert not made  # nothing starts before the first item is asked for
    assert [next(source), next(source)] == [0, 1]
    closed(source)
    assert len(made) <= 4
    assert not names()


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("two is missing")

    source = ahead(items())
    assert next(source) == 1
    with pytest.raises(ValueError, match="two is missing"):
        next(source)
    assert not names()
