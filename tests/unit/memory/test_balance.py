"""GDumb's sampler: counts by hand, invariants, and a stream in parts."""

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.data.order import mix
from hpccl.memory.balance import greedy_balance

NONE = np.zeros(0, dtype=np.int64)


def draw(event: int, count: int) -> int:
    return int(mix(3, event) % np.uint64(count))


def drawn(seed: int, event: int, count: int) -> int:
    return int(mix(seed, event) % np.uint64(count))


def kept(stream: str, capacity: int) -> Counter[str]:
    labels = np.array([ord(label) for label in stream])
    return Counter(stream[position] for position in greedy_balance(NONE, labels, capacity=capacity, draw=draw))


@pytest.mark.parametrize(
    ("stream", "counts"),
    [
        ("AAAA", {"A": 4}),
        ("AAAAB", {"A": 3, "B": 1}),
        ("AAAABB", {"A": 2, "B": 2}),
        ("AAAABBC", {"A": 1, "B": 2, "C": 1}),
        ("AAAABBCC", {"A": 1, "B": 1, "C": 2}),
        ("AAAABBCCC", {"A": 1, "B": 1, "C": 2}),
    ],
)
def test_by_hand(stream: str, counts: dict[str, int]) -> None:
    """Prabhu et al. 2020, algorithm 1, a memory of four."""
    assert kept(stream, 4) == counts


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 40))
def test_classes_are_balanced(labels: list[int], capacity: int) -> None:
    stream = np.array(labels)
    found = greedy_balance(NONE, stream, capacity=capacity, draw=draw)
    assert len(found) == len(set(found.tolist())) <= capacity
    counts = Counter(stream[found].tolist())
    enough = [label for label, number in Counter(labels).items() if number >= capacity]
    if len(enough) > 1:
        numbers = [counts[label] for label in enough]
        assert max(numbers) - min(numbers) <= 1
    arrived = Counter(labels)
    if min(arrived.values()) * len(arrived) >= capacity >= len(arrived):  # each class could fill its share
        assert len(found) == capacity
        assert max(counts.values()) - min(counts[label] for label in arrived) <= 1


def test_who_stays_is_drawn_evenly() -> None:
    """Two of eight of a class that came first: each stays with probability 1/4."""
    stream = np.array([0] * 8 + [1] * 8)
    stays = np.zeros(8)
    for seed in range(2000):
        found = greedy_balance(NONE, stream, capacity=4, draw=functools.partial(drawn, seed))
        stays[found[found < 8]] += 1
    # The first four fill the memory; two of these four are dropped.
    assert stays[4:].sum() == 0
    np.testing.assert_allclose(stays[:4] / 2000, 0.5, atol=0.05)


def test_a_stream_may_come_in_parts() -> None:
    """What was kept stands before what arrives, in the order of arrival."""
    first, second = np.array([0, 0, 1, 0, 1]), np.array([2, 2, 3, 2, 3])
    before = greedy_balance(NONE, first, capacity=4, draw=draw)
    after = greedy_balance(first[before], second, capacity=4, seen=2, draw=draw)
    labels = np.concatenate([first[before], second])[after]
    assert Counter(labels.tolist()) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert (np.diff(after) > 0).all()
