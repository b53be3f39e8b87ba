"""Greedy choices against brute force and scipy; what they promise."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

from hpccl.memory.greedy import herding, k_center, matching, welling


def rows(number: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, width)) + 0.3


def test_herding_of_the_published_example() -> None:
    """Pick 3 is a tie between rows 0 and 4, as computed by hand: the first row."""
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8], [0.6, -0.8]])
    assert herding(vectors, 5).tolist() == [1, 3, 0, 4, 2]


@pytest.mark.parametrize("normalise", [True, False])
def test_herding_is_that_of_the_paper(normalise: bool) -> None:
    """Rebuffi et al. 2017, algorithm 4, word by word; of rows as they are, the same."""
    given = rows(40, 6)
    x = given / np.linalg.norm(given, axis=1, keepdims=True) if normalise else given
    mean = x.mean(axis=0)
    chosen: list[int] = []
    for k in range(1, 21):
        distance = [
            np.inf if i in chosen else np.linalg.norm(mean - (x[i] + x[chosen].sum(axis=0)) / k) for i in range(40)
        ]
        chosen.append(int(np.argmin(np.array(distance))))
    assert herding(given.astype(np.float32), 20, normalise=normalise).tolist() == chosen
    assert herding(given, 7, normalise=normalise).tolist() == chosen[:7]


@pytest.mark.parametrize("turns", [1000, 30])
def test_welling_is_the_released_order(turns: int) -> None:
    """w += mu - x of the best product with w, rows may come again; after the last turn, by its products."""
    x = rows(40, 6)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    mean = x.mean(axis=0)
    w, met, again = mean.copy(), [], 0
    for _ in range(turns):
        best = int(np.argmax(x @ w))
        again += best in met
        met += [] if best in met else [best]
        w += mean - x[best]
    met += [int(row) for row in np.argsort(-(x @ w)) if row not in met]
    assert again > 0
    assert welling(rows(40, 6), 25, turns=turns).tolist() == met[:25]
    assert welling(rows(40, 6).astype(np.float32), 9, turns=turns).tolist() == met[:9]


def radius(given: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.linalg.norm(given[:, None] - given[chosen][None], axis=2).min(axis=1).max())


def test_k_center_is_within_twice_the_best_radius() -> None:
    given = rows(14, 2)
    best = min(radius(given, np.array(some)) for some in itertools.combinations(range(14), 3))
    found = k_center(given, 3)
    assert best <= radius(given, found) <= 2 * best
    assert found[0] == np.argmin(np.linalg.norm(given - given.mean(axis=0), axis=1))
    in_blocks = k_center(given, 3, block=5)
    assert radius(given, in_blocks) <= 4 * best
    assert k_center(given, 2).tolist() == found[:2].tolist()


def test_k_center_keeps_equals_apart() -> None:
    given = np.repeat(np.eye(3), 2, axis=0)
    assert sorted(k_center(given, 6).tolist()) == list(range(6))
    assert k_center(given, 0).tolist() == []


def error(given: np.ndarray, chosen: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(given.sum(axis=0) - weight @ given[chosen]))


def test_matching_beats_a_uniform_choice_and_improves_with_every_example() -> None:
    given = rows(60, 12) * np.random.default_rng(1).gamma(0.5, size=(60, 1))
    errors = []
    for keep in (1, 2, 4, 8, 16, 32, 60):
        chosen, weight = matching(given, keep)
        assert len(set(chosen.tolist())) == keep
        assert (weight >= 0).all()
        errors.append(error(given, chosen, weight))
        draws = [np.random.default_rng(seed).permutation(60)[:keep] for seed in range(200)]
        uniform = np.mean([error(given, draw, np.full(keep, 60 / keep)) for draw in draws])
        assert errors[-1] < uniform or keep == 60
    assert (np.diff(errors) <= 1e-6 * errors[0]).all()
    assert errors[-1] < 1e-6 * np.linalg.norm(given.sum(axis=0))


def test_all_rows_have_weight_one() -> None:
    given = rows(9, 20)
    chosen, weight = matching(given, 9, ridge=0.1)
    assert sorted(chosen.tolist()) == list(range(9))
    np.testing.assert_allclose(weight, 1.0, rtol=1e-9)


def test_weights_are_the_best_non_negative_ones() -> None:
    """Scipy solves the same problem as a stack of equations."""
    given, ridge, keep = rows(50, 6), 0.02, 15
    chosen, weight = matching(given, keep, ridge=ridge)
    pull = (ridge * np.square(given).sum(axis=1).mean()) ** 0.5
    left = np.vstack([given[chosen].T, pull * np.eye(keep)])
    expected, _ = nnls(left, np.concatenate([given.sum(axis=0), np.full(keep, pull * 50 / keep)]))
    np.testing.assert_allclose(weight, expected, atol=1e-8)


def test_what_something_else_says_is_not_matched_twice() -> None:
    """With c_i for all that is not chosen, by brute force: the first pick leaves the least, and the weights too."""
    given, other = rows(12, 5), rows(12, 5, seed=1) * 0.7
    target = (given - other).sum(axis=0)
    left = []
    for u, c in zip(given, other, strict=True):
        best = max(float((target + c) @ u) / float(u @ u), 0.0)
        left.append(np.linalg.norm(target + c - best * u))
    chosen, weight = matching(given, 4, given=other)
    assert chosen[0] == np.argmin(left)
    expected, missing = nnls(given[chosen].T, target + other[chosen].sum(axis=0))
    np.testing.assert_allclose(weight, expected, atol=1e-6)
    assert missing < left[chosen[0]]
    everything, ones = matching(given, 12, given=other)
    assert sorted(everything.tolist()) == list(range(12))
    np.testing.assert_allclose(ones, 1.0, atol=1e-4)  # more rows than numbers: solvable in many ways


@pytest.mark.parametrize("choice", [herding, welling, k_center, lambda given, keep: matching(given, keep)[0]])
def test_nothing_to_tell_apart_is_no_trouble(choice: Any) -> None:
    assert choice(np.zeros((4, 3)), 3).tolist() == [0, 1, 2]  # any of the three
