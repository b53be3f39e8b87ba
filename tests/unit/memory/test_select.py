"""Choice of memory: uniform, balanced, independent of who chooses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.memory.select import choose, class_quotas


def test_choice_depends_on_samples_not_on_their_order() -> None:
    labels, samples = np.arange(100) % 5, np.arange(1000, 1100)
    chosen = choose(labels, samples, keep=20, balanced=True, words=(0, 1))
    shuffled = np.random.default_rng(0).permutation(100)
    again = choose(labels[shuffled], samples[shuffled], keep=20, balanced=True, words=(0, 1))
    assert set(samples[chosen]) == set(samples[shuffled][again])


def test_balanced_keeps_equally_many_of_each_class() -> None:
    labels = np.repeat(np.arange(4), [50, 30, 20, 3])
    chosen = choose(labels, np.arange(103), keep=43, balanced=True, words=(7,))
    assert sorted(np.bincount(labels[chosen]).tolist()) == [3, 13, 13, 14]


def test_uniform_is_uniform() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        counts[choose(np.zeros(20, np.int64), np.arange(20), keep=5, balanced=False, words=(seed,))] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


def test_a_reservoir_includes_every_item_alike() -> None:
    """Vitter 1985: 200 of 1000 over 10^4 seeds, each with chance .2, by the words of a run's reservoir.

    A count has a standard deviation of .004, so that of a fair reservoir, too, 12 of 1000 are further off than .01.
    """
    items, keep, seeds = 1000, 200, 10_000
    labels, samples, counts = np.zeros(items, np.int64), np.arange(items), np.zeros(items)
    for seed in range(seeds):
        counts[choose(labels, samples, keep=keep, balanced=False, words=(seed, 101))] += 1
    assert counts.sum() == keep * seeds
    off = np.abs(counts / seeds - 0.2)
    assert (off > 0.01).sum() < 12.4 + 4 * 3.5
    assert off.max() < 5 * 0.004
    variance = seeds * 0.2 * 0.8
    chi_square = float(((counts - seeds * 0.2) ** 2).sum()) / variance * (items - 1) / items
    assert chi_square == pytest.approx(items - 1, abs=4 * (2 * (items - 1)) ** 0.5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 99))
def test_quotas_sum_and_never_exceed(counts: list[int], share: float, seed: int) -> None:
    available = np.array(counts)
    keep = int(share * available.sum())
    ties = np.random.default_rng(seed).integers(0, 2**63, len(counts)).astype(np.uint64)
    quotas = class_quotas(available, keep, tie_break=ties)
    assert quotas.sum() == keep
    assert (quotas <= available).all()
    unfilled = quotas[quotas < available]
    if len(unfilled):
        assert quotas.max() - unfilled.min() <= 1


@pytest.mark.parametrize("balanced", [True, False])
def test_keeping_all_and_none(balanced: bool) -> None:
    labels = np.array([0, 1, 1, 2])
    assert choose(labels, np.arange(4), keep=4, balanced=balanced, words=(0,)).tolist() == [0, 1, 2, 3]
    assert choose(labels, np.arange(4), keep=0, balanced=balanced, words=(0,)).tolist() == []
