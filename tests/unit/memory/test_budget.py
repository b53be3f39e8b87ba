"""How many examples of each task are kept."""

from hypothesis import given
from hypothesis import strategies as st

from hpccl.config.memory import MemoryConfig
from hpccl.memory.budget import kept_of, per_class, quotas, split_quotas


def test_each_kind_of_budget() -> None:
    assert quotas(MemoryConfig(size=7), [10, 20], [2, 2]) == [7, 7]
    assert quotas(MemoryConfig(fraction=0.1), [10, 25, 3], [2, 2, 2]) == [1, 2, 1]
    assert quotas(MemoryConfig(total=10), [100], [5]) == [10]
    assert quotas(MemoryConfig(total=10), [100, 100, 100], [5, 5, 5]) == [4, 3, 3]
    assert quotas(MemoryConfig(total=10), [2, 100, 100], [5, 5, 5]) == [2, 4, 4]
    assert quotas(MemoryConfig(), [5, 5], [2, 2]) == [0, 0]
    assert quotas(MemoryConfig(total=3), [], []) == []
    assert not MemoryConfig().kept


def test_classes_share_a_total_and_tasks_do_where_memory_is_not_balanced() -> None:
    """Rebuffi et al. 2017: K / classes of each, whatever the task; few-shot streams begin with many classes."""
    assert quotas(MemoryConfig(total=2000), [25000, 2500], [50, 5]) == [1815, 185]
    assert quotas(MemoryConfig(total=2000, balanced=False), [25000, 2500], [50, 5]) == [1000, 1000]
    assert quotas(MemoryConfig(total=2000), [30000, 25, 25], [60, 5, 5]) == [1950, 25, 25]


tasks_with_classes = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=8)


@given(tasks_with_classes, st.integers(1, 120), st.booleans())
def test_a_total_is_used_up_and_shares_only_shrink(tasks: list[tuple[int, int]], total: int, balanced: bool) -> None:
    config = MemoryConfig(total=total, balanced=balanced)
    sizes, classes = [size for size, _ in tasks], [number if balanced else 1 for _, number in tasks]
    before = [kept_of(config, size) for size in sizes]
    for count in range(1, len(sizes) + 1):
        found = quotas(config, sizes[:count], classes[:count])
        assert sum(found) == min(total, sum(sizes[:count]))
        assert all(0 <= now <= then for now, then in zip(found, before, strict=False))
        each = list(zip(found, sizes, classes, strict=False))
        # Of whole rounds, nobody has more than one more than one who could take more.
        unfilled = [now // number for now, size, number in each if now < size]
        assert not unfilled or max(-(-now // number) for now, _, number in each) - min(unfilled) <= 1
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


def test_what_is_kept_of_a_task_never_grows() -> None:
    """Of 100 in all, 35 % held out: 3 of each of 17 classes by the book-keeping, but 4 of each of 18."""
    assert [per_class(100, 0.35, classes)[1] for classes in (17, 18)] == [3, 4]
    assert split_quotas(100, 0.35, sizes=[99] * 2, classes=[17, 1]) == [3 * 17, 4]
    before: list[int] = []
    for tasks in range(1, 30):
        now = split_quotas(100, 0.35, sizes=[99] * tasks, classes=[2] * tasks)
        assert all(new <= old for new, old in zip(now, before, strict=False))
        before = now
