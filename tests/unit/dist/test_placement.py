"""Who owns what: balanced, complete, and the same however the items are listed."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hpccl.dist.placement import owners, pieces

FEW = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(0.1, 100), min_size=1, max_size=6)
COSTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(0.1, 100), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(costs=FEW, size=st.integers(1, 4))
def test_owners_are_within_a_third_of_the_best(costs: dict[str, float], size: int) -> None:
    """Graham 1969: the largest load is at most 4/3 - 1/(3 size) of that of the best of all placements."""
    placed = owners(costs, size)

    def largest(ranks: tuple[int, ...]) -> float:
        return max(
            sum(cost for cost, of in zip(costs.values(), ranks, strict=True) if of == rank) for rank in set(ranks)
        )

    best = min(map(largest, itertools.product(range(size), repeat=len(costs))))
    assert largest(tuple(placed[name] for name in costs)) <= (4 / 3 - 1 / (3 * size)) * best + 1e-6
    assert placed == owners(dict(reversed(costs.items())), size)


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, size=st.integers(1, 6))
def test_pieces_are_never_dearer_than_a_fair_share(costs: dict[str, float], size: int) -> None:
    shared = pieces(costs, size, most=dict.fromkeys(costs, size))
    fair = sum(costs.values()) / size
    load = [0.0] * size
    for name, ranks in shared.items():
        assert costs[name] / len(ranks) <= fair * (1 + 1e-6)
        for rank in ranks:
            load[rank] += costs[name] / len(ranks)
    assert max(load) <= 2 * fair + 1e-6
    assert all(len(ranks) == 1 for ranks in shared.values()) or size > 1


def test_what_may_not_be_cut_stays_whole() -> None:
    assert pieces({"large": 90.0, "small": 10.0}, 4, most={"large": 1, "small": 1}) == {"large": [0], "small": [1]}
    assert [len(r) for r in pieces({"large": 90.0, "small": 10.0}, 4, most={"large": 3, "small": 1}).values()] == [3, 1]
