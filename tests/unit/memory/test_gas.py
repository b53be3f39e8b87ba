from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.memory.gas import Gas, Rules, adapted, connected, fitted

LINE = np.array([[0.0], [1.0], [3.0]])


@pytest.mark.parametrize(
    ("first_rank", "expected"), [(1, [0.014715, 0.991880, 2.987055]), (0, [0.040000, 0.977927, 2.964813])]
)
def test_neural_gas_moves_nodes_by_rank(first_rank: int, expected: list[float]) -> None:
    rules = Rules(rate=0.1, spread=1.0, lifetime=9, first_rank=first_rank)
    np.testing.assert_allclose(adapted(LINE, np.array([0.4]), rules)[:, 0], expected, atol=5e-7)


def test_edges_come_age_and_go() -> None:
    rules = Rules(rate=0.1, spread=1.0, lifetime=2)
    ages, seen = np.zeros((3, 3), dtype=np.int64), []
    for value in (0.4, 1.9, 1.2, 1.2):
        ages = connected(ages, LINE, np.array([value]), rules)
        np.testing.assert_array_equal(ages, ages.T)
        seen.append({(i, j): int(ages[i, j]) for i in range(3) for j in range(i + 1, 3) if ages[i, j]})
    assert seen == [{(0, 1): 1}, {(0, 1): 2, (1, 2): 1}, {(0, 1): 1, (1, 2): 2}, {(0, 1): 1}]


@given(st.integers(0, 99), st.integers(2, 12), st.integers(0, 1), st.floats(0.2, 20), st.integers(1, 5))
def test_a_pass_is_that_of_the_definition(
    seed: int, num_nodes: int, first_rank: int, spread: float, lifetime: int
) -> None:
    """Against loops over nodes and dictionaries of edges."""
    generator = np.random.default_rng(seed)
    nodes, features = generator.normal(size=(num_nodes, 3)), generator.normal(size=(15, 3))
    rules = Rules(rate=0.3, spread=spread, lifetime=lifetime, first_rank=first_rank)
    found, ages = fitted(nodes, np.zeros((num_nodes, num_nodes), dtype=np.int64), features, rules)
    expected = [list(node) for node in nodes]
    edges: dict[tuple[int, ...], int] = {}
    for feature in features:
        order = sorted(range(num_nodes), key=lambda j: math.dist(expected[j], feature))
        for pair in [pair for pair in edges if order[0] in pair]:
            edges[pair] += 1
        edges[tuple(sorted(order[:2]))] = 1
        edges = {pair: age for pair, age in edges.items() if age <= lifetime}
        for number, j in enumerate(order):
            factor = 0.3 * math.exp(-(number + first_rank) / spread)
            expected[j] = [m + factor * (f - m) for m, f in zip(expected[j], feature, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert {(i, j): int(ages[i, j]) for i in range(num_nodes) for j in range(i) if ages[i, j]} == {
        (max(pair), min(pair)): age for pair, age in edges.items()
    }


def clusters(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around three corners, and which corner."""
    generator = np.random.default_rng(seed)
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    label = np.arange(count) % 3
    return corners[label] + 0.3 * generator.normal(size=(count, 2)), label


RULES = Rules(rate=0.1, spread=0.5, lifetime=20)


def net(count: int = 90) -> tuple[Gas, np.ndarray, np.ndarray]:
    features, label = clusters(count)
    samples = 100 + np.arange(count)
    gas = Gas.of(
        features, samples, label, RULES, start=np.arange(6), orders=[np.arange(count)] * 3, floor=0.1
    )  # fmt: skip
    return gas, features, label


def test_nodes_find_the_clusters_and_stand_for_their_nearest_image() -> None:
    gas, features, label = net()
    assert len(gas) == gas.old == 6
    for number in range(6):
        apart = np.linalg.norm(features - gas.nodes[number].numpy(), axis=1)
        nearest = int(apart.argmin())
        assert int(gas.sample[number]) == 100 + nearest
        assert int(gas.label[number]) == label[nearest]
        np.testing.assert_array_equal(gas.image[number].numpy(), features[nearest])
    assert sorted(gas.label.tolist()) == [0, 0, 1, 1, 2, 2]
    # Edges stay within clusters, once those between them have died.
    assert all(len(gas.rivals(number)) == 0 for number in range(6))


def test_variances_are_of_the_features_that_a_node_wins() -> None:
    gas, features, _ = net()
    apart = np.linalg.norm(features[:, None] - gas.nodes.numpy()[None], axis=2)
    least = 0.1 * features.var(axis=0).mean()
    for number in range(6):
        own = features[apart.argmin(axis=1) == number]
        np.testing.assert_allclose(gas.variance[number].numpy(), own.var(axis=0) + least)
    single = Gas.of(
        np.array([[0.0, 0.0], [5.0, 5.0]]), np.arange(2), np.arange(2), Rules(0.0, 1.0, 5), start=np.arange(2),
        orders=[], floor=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(single.variance.numpy(), 6.25 * 1.1)  # of all: a node that wins one feature has none


def test_a_session_adds_nodes_that_know_their_rivals() -> None:
    gas, *_ = net()
    shots = np.array([[3.0, 3.0], [3.2, 3.0], [3.6, 3.1], [-3.0, 0.0], [-3.1, 0.1]])
    labels, samples = np.array([3, 3, 3, 4, 4]), 500 + np.arange(5)
    grown = gas.grown(shots, samples, labels, RULES, each=1, floor=0.1)
    assert (len(grown), grown.old) == (8, 6)
    assert grown.sample[6:].tolist() == [501, 503]  # nearest to the mean of their class; of equally near, the first
    assert grown.label[6:].tolist() == [3, 4]
    np.testing.assert_array_equal(grown.nodes[:6].numpy(), gas.nodes.numpy())
    assert grown.shot.tolist() == samples.tolist()
    assert grown.shot_node.tolist() == [6, 6, 6, 7, 7]
    for number in (6, 7):
        rivals = grown.rivals(number).tolist()
        assert rivals
        assert all(int(grown.label[rival]) != int(grown.label[number]) for rival in rivals)
    moved = np.concatenate([grown.image.numpy()[:6] + 0.01, shots[[1, 3]] + 1.0])
    settled = grown.settled(shots + 1.0, labels, moved, RULES, floor=0.1)
    assert settled.old == 8
    assert len(settled.shot) == 0
    np.testing.assert_array_equal(settled.image.numpy(), moved)
    expected, ages = fitted(np.concatenate([gas.nodes.numpy(), moved[6:]]), grown.ages.numpy(), shots + 1.0, RULES)
    np.testing.assert_allclose(settled.nodes.numpy(), expected)
    np.testing.assert_array_equal(settled.ages.numpy(), ages)


def test_two_nodes_of_a_class_share_its_shots() -> None:
    gas, *_ = net()
    shots = np.array([[3.0, 3.0], [3.1, 3.0], [5.0, 5.0], [4.0, 4.0]])
    grown = gas.grown(shots, np.arange(4), np.full(4, 3), RULES, each=2, floor=0.1)
    assert grown.sample[6:].tolist() == [3, 1]  # the mean is (3.775, 3.75)
    assert grown.shot_node.tolist() == [7, 7, 6, 6]


def test_a_net_of_one_node_has_no_edges() -> None:
    ages = connected(np.zeros((1, 1), dtype=np.int64), np.zeros((1, 2)), np.ones(2), RULES)
    assert ages.tolist() == [[0]]
