"""How many examples of each task are kept."""

from hypothesis import given
from hypothesis import strategies as st

from hpccl.config.memory import MemoryConfig
from hpccl.memory.budget import kept_of, per_class, quotas, split_quotas


def test_each_kind_of_budget() -> None:
    assert quotas(MemoryConfig(size=7), [10, 20]) == [7, 7]
    assert quotas(MemoryConfig(fraction=0.1), [10, 25, 3]) == [1, 2, 1]
    assert quotas(MemoryConfig(total=10), [100]) == [10]
    assert quotas(MemoryConfig(total=10), [100, 100, 100]) == [4, 3, 3]
    assert quotas(MemoryConfig(total=10), [2, 100, 100]) == [2, 4, 4]
    assert quotas(MemoryConfig(), [5, 5]) == [0, 0]
    assert quotas(MemoryConfig(total=3), []) == []
    assert not MemoryConfig().kept


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 120))
def test_a_total_is_used_up_and_shares_only_shrink(sizes: list[int], total: int) -> None:
    config = MemoryConfig(total=total)
    before = [kept_of(config, size) for size in sizes]
    for count in range(1, len(sizes) + 1):
        found = quotas(config, sizes[:count])
        assert sum(found) == min(total, sum(sizes[:count]))
        assert all(0 <= now <= then for now, then in zip(found, before, strict=False))
        unfilled = [now for now, size in zip(found, sizes, strict=False) if now < size]
        assert not unfilled or max(found) - min(unfilled) <= 1
        before[:count] = found


def test_the_book_keeping_of_held_out_examples() -> None:
    """Wu et al. 2019, ImageNet-100: K = 2000, ten classes a step; (held out, kept) of each class by steps so far."""
    expected = [(20, 180), (10, 90), (6, 60), (5, 45), (4, 36), (3, 30), (2, 26), (2, 22), (2, 20)]
    assert [per_class(2000, 0.1, 10 * steps) for steps in range(1, 10)] == expected
    held = [number for number, _ in expected]
    totals = [held[steps - 1] * 10 * (steps + 1) for steps in range(1, 10)]
    assert totals == [400, 300, 240, 250, 240, 210, 160, 180, 200]


def test_quotas_beside_a_part_that_is_held_out() -> None:
    assert split_quotas(2000, 0.1, sizes=[1300] * 3, classes=[10] * 3) == [600] * 3
    assert split_quotas(2000, 0.1, sizes=[500, 1300], classes=[10, 10]) == [500, 900]
    assert split_quotas(2000, 0.1, sizes=[], classes=[]) == []
