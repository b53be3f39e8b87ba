"""Top-k of groups: against a full sort; streams; samples without replacement and their chances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.data.order import mix
from hpccl.dist.comm import Comm
from hpccl.errors import DivergedError
from hpccl.memory.topk import Chosen, Shortlist, exponential, group_means, inclusion, largest

WORDS = (3, 5)


def sorted_best(score: np.ndarray, sample: np.ndarray, group: np.ndarray, quotas: np.ndarray) -> list[int]:
    """Group by group, by a full sort."""
    found = []
    for number, quota in enumerate(quotas):
        members = np.flatnonzero(group == number)
        order = np.lexsort((mix(*WORDS, sample[members]), -score[members]))
        found += sample[members[order[:quota]]].tolist()
    return found


@given(
    st.lists(st.tuples(st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1e-300, 0.1, 0.1 + 1e-16, 7.0]), st.integers(0, 3))),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(1, 7),
)
def test_equals_a_full_sort(rows: list[tuple[float, int]], quotas: list[int], chunk: int) -> None:
    score, group = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.int64)
    sample, wanted = np.arange(len(rows)) * 7 + 1, np.array(quotas)
    found = largest(score, sample, group, wanted, words=WORDS, comm=Comm.solo(), chunk=chunk)
    assert found.sample.tolist() == sorted_best(score, sample, group, wanted)
    assert found.score.tolist() == [score[(each - 1) // 7] for each in found.sample]
    for number in range(4):
        assert found.place[found.group == number].tolist() == list(range((found.group == number).sum()))


def test_a_stream_is_forgotten_as_it_passes() -> None:
    random = np.random.default_rng(0)
    score, sample, group = random.normal(size=50_000), random.permutation(50_000), np.arange(50_000) % 7
    quotas = np.array([3, 0, 10, 1, 5, 100, 2])
    held = Shortlist(quotas, words=WORDS, slack=64)
    longest = 0
    for start in range(0, 50_000, 500):
        part = slice(start, start + 500)
        held.add(score[part], sample[part], group[part])
        longest = max(longest, len(held))
    assert longest <= quotas.sum() + 64 + 500
    assert held.finish(Comm.solo()).sample.tolist() == sorted_best(score, sample, group, quotas)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(DivergedError, match=r"score of sample 8 is not a number \(1 of 2 are not\)"):
        Shortlist(np.array([1]), words=WORDS).add(np.array([0.0, np.nan]), np.array([4, 8]), np.zeros(2, np.int64))


def test_a_sample_twice_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="twice"):
        largest(np.zeros(2), np.zeros(2, np.int64), np.zeros(2, np.int64), np.array([1]), words=WORDS, comm=Comm.solo())


def chosen_of(priority: np.ndarray, seed: int, keep: int) -> Chosen:
    number = len(priority)
    keys = exponential(priority, np.arange(number), words=(seed,))
    group = np.zeros(number, np.int64)
    return largest(keys, np.arange(number), group, np.array([keep]), words=(seed,), comm=Comm.solo())


def test_first_draw_has_the_priorities_as_probabilities() -> None:
    """Efraimidis and Spirakis 2006, proposition 4."""
    priority = np.array([1.0, 2.0, 0.0, 5.0])
    first = np.bincount([int(chosen_of(priority, seed, 1).sample[0]) for seed in range(4000)], minlength=4)
    np.testing.assert_allclose(first / 4000, priority / priority.sum(), atol=0.025)
    assert chosen_of(priority, 0, 4).sample[-1] == 2


def test_sums_divided_by_chances_are_unbiased() -> None:
    """Cohen and Kaplan 2007, rank conditioning: the mean over seeds comes to the sum over all."""
    random = np.random.default_rng(1)
    priority, value = random.gamma(0.7, size=30) + 0.05, random.normal(1.0, 1.0, size=30)
    found = []
    for seed in range(3000):
        chosen = chosen_of(priority, seed, 9)
        chance = inclusion(priority[chosen.sample[:8]], np.full(8, chosen.score[8]))
        found.append((value[chosen.sample[:8]] / chance).sum())
    error = np.std(found) / 3000**0.5
    assert abs(np.mean(found) - value.sum()) < 4 * error


def test_means_are_those_of_floats() -> None:
    random = np.random.default_rng(2)
    score, group = random.gamma(0.1, size=1000) * 1e-5, random.integers(0, 5, size=1000)
    counts = np.bincount(group, minlength=6)
    found = group_means(score, group, counts, Comm.solo())
    expected = [score[group == number].mean() for number in range(5)]
    np.testing.assert_allclose(found[:5], expected, rtol=1e-8)
    assert found[5] == 0
