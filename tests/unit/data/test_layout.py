from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from hpccl.data.layout import Collection, Layout, align, arrange, extended, held_out, unique_titles
from hpccl.data.protocols import Split
from hpccl.errors import ConfigError, DataError


def collection(title: str, names: str, *, tasks: int, keep: int | None = None) -> Collection:
    """Three training images and one test image a class, a shard a class, classes interleaved as stored."""
    count = len(names)
    train, test = np.tile(np.arange(count), 3), np.arange(count)
    return Collection(
        title=title,
        class_names=tuple(names),
        labels={"train": train, "test": test},
        groups={"train": train, "test": test},
        tasks=tasks,
        keep=keep,
    )


def test_tasks_follow_each_other_in_the_given_order() -> None:
    layout = arrange([collection("a", "uvwx", tasks=2), collection("b", "yz", tasks=1)], order="given", seed=0)
    assert [task.name for task in layout.tasks] == ["a[1/2]", "a[2/2]", "b"]
    assert [task.classes for task in layout.tasks] == [(0, 1), (2, 3), (4, 5)]
    assert [task.index for task in layout.tasks] == [0, 1, 2]
    assert layout.class_names == ("u", "v", "w", "x", "y", "z")
    assert [task.samples("train") for task in layout.tasks] == [range(6), range(6, 12), range(12, 18)]
    assert [task.samples("test") for task in layout.tasks] == [range(2), range(2, 4), range(4, 6)]
    train = layout.index["train"]
    np.testing.assert_array_equal(train.label, np.repeat(np.arange(6), 3))
    np.testing.assert_array_equal(train.local[:6], [0, 4, 8, 1, 5, 9])
    np.testing.assert_array_equal(train.part, np.repeat([0, 1], [12, 6]))
    np.testing.assert_array_equal(train.group, np.repeat(np.arange(6), 3))  # shards of b come after those of a


def test_random_order_is_seeded_and_keeps_source_order_inside_a_task() -> None:
    names = "abcdefghijkl"
    layout = arrange([collection("s", names, tasks=3)], order="random", seed=1993)
    again = arrange([collection("s", names, tasks=3)], order="random", seed=1993)
    other = arrange([collection("s", names, tasks=3)], order="random", seed=1994)
    assert layout.class_names == again.class_names
    assert layout.class_names != other.class_names
    assert sorted(layout.class_names) == list(names)
    for start in (0, 4, 8):
        inside = layout.class_names[start : start + 4]
        assert list(inside) == sorted(inside)
    # Numbers still follow learning order, and each position names an image of its class.
    index = layout.index["train"]
    np.testing.assert_array_equal(index.label, np.repeat(np.arange(12), 3))
    assert [names[local % 12] for local in index.local] == [layout.class_names[label] for label in index.label]


@pytest.mark.parametrize("order", ["given", "random"])
def test_only_some_classes(order: Literal["given", "random"]) -> None:
    layout = arrange([collection("s", "abcdef", tasks=2, keep=4)], order=order, seed=5)
    assert len(layout.class_names) == 4
    assert len(layout.index["train"]) == 12
    if order == "given":
        assert layout.class_names == ("a", "b", "c", "d")


def test_a_class_name_of_two_data_sets_says_which() -> None:
    layout = arrange([collection("one", "ab", tasks=1), collection("two", "bc", tasks=1)], order="given", seed=0)
    assert layout.class_names == ("a", "one/b", "two/b", "c")


def test_impossible_splits_say_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"6 classes of 's' cannot be split into 4 tasks.* tasks can be 1, 2, 3, 6$"):
        arrange([collection("s", "abcdef", tasks=4)], order="given", seed=0)
    with pytest.raises(ConfigError, match="8 classes of 's' are asked for but it has 6; set classes to at most 6"):
        arrange([collection("s", "abcdef", tasks=1, keep=8)], order="given", seed=0)


def test_a_task_without_images_is_named() -> None:
    whole = collection("s", "abcd", tasks=2)
    empty = Collection(
        title="s",
        class_names=whole.class_names,
        labels={"train": whole.labels["train"], "test": np.array([0, 1])},
        groups={"train": whole.groups["train"], "test": np.array([0, 1])},
        tasks=2,
    )
    with pytest.raises(DataError, match=r"task s\[2/2\] has no test images; its classes: c, d"):
        arrange([empty], order="given", seed=0)


def test_titles_become_unique() -> None:
    assert unique_titles(["a", "b", "a", "a"]) == ("a", "b", "a#2", "a#3")


def many(title: str, *, tasks: int, count: int = 40) -> Collection:
    """`count` training images of each of four classes, interleaved as stored, which are given as test images too."""
    labels = np.tile(np.arange(4), count).astype(np.int64)
    both: dict[Split, npt.NDArray[np.int64]] = {"train": labels, "test": labels}
    return Collection(title=title, class_names=tuple("abcd"), labels=both, groups=both, tasks=tasks)


def test_held_out_examples_are_tested_on_and_not_trained_on() -> None:
    whole = arrange([many("s", tasks=2), many("t", tasks=1)], order="given", seed=0)
    layout = held_out(whole, 0.1)
    train, test = layout.index["train"], layout.index["test"]
    stored = [set(zip(index.part.tolist(), index.local.tolist(), strict=True)) for index in (train, test)]
    assert not stored[0] & stored[1]
    both = whole.index["train"]
    assert stored[0] | stored[1] == set(zip(both.part.tolist(), both.local.tolist(), strict=True))
    np.testing.assert_array_equal(np.bincount(test.label), 4)  # a tenth of each class
    np.testing.assert_array_equal(np.bincount(train.label), 36)
    assert [task.samples("train") for task in layout.tasks] == [range(72), range(72, 144), range(144, 288)]
    assert [task.samples("test") for task in layout.tasks] == [range(8), range(8, 16), range(16, 32)]
    for task in layout.tasks:
        for split in ("train", "test"):
            span = task.samples(split)
            assert set(layout.index[split].label[span.start : span.stop]) == set(task.classes)


def test_what_is_held_out_depends_on_where_it_is_stored_alone() -> None:
    def chosen(layout: Layout) -> set[int]:
        return set(layout.index["test"].local.tolist())

    one = held_out(arrange([many("s", tasks=2)], order="given", seed=0), 0.25)
    other = held_out(arrange([many("renamed", tasks=4)], order="random", seed=7), 0.25)
    assert other.class_names != one.class_names
    assert chosen(one) == chosen(other)
    more = held_out(arrange([many("s", tasks=2)], order="given", seed=0), 0.5)
    assert chosen(one) < chosen(more)
    # Not the first of each class, nor every fourth.
    assert len({local // 4 % 4 for local in chosen(one)}) == 4


@pytest.mark.parametrize("cut", [arrange, align])
def test_a_data_set_that_comes_again_holds_out_the_same(cut: Callable[..., Layout]) -> None:
    """Or a later task would train on what an earlier one is tested on."""
    parts = [replace(many(name, tasks=1), images=images) for name, images in (("a", "x"), ("b", "y"), ("a#2", "x"))]
    test = held_out(cut(parts, order="given", seed=0), 0.25).index["test"]
    first, other, again = (test.local[test.part == number].tolist() for number in range(3))
    assert sorted(first) == sorted(again) != sorted(other)


def test_at_least_one_example_is_held_out_and_one_is_left() -> None:
    few = held_out(arrange([many("s", tasks=1, count=3)], order="given", seed=0), 0.01)
    np.testing.assert_array_equal(np.bincount(few.index["test"].label), 1)
    with pytest.raises(ConfigError, match=r"class .a. has 1 training images; data\.validation=0\.1 would leave none"):
        held_out(arrange([many("s", tasks=1, count=1)], order="given", seed=0), 0.1)


def test_every_domain_holds_out_its_own_share() -> None:
    """By hand: a tenth of 100 and of 10 images of each class."""
    domains = [many("large", tasks=1, count=100), many("small", tasks=1, count=10)]
    layout = held_out(align(domains, order="given", seed=0), 0.1)
    classes = len(layout.class_names)
    assert [len(task.test) for task in layout.tasks] == [10 * classes, classes]
    assert [len(task.train) for task in layout.tasks] == [90 * classes, 9 * classes]
    for task in layout.tasks:
        labels = layout.index["test"].label[task.test.start : task.test.stop]
        assert len(set(np.bincount(labels).tolist())) == 1


def test_further_examples_come_behind_the_tasks_under_the_same_class_numbers() -> None:
    base = arrange([collection("a", "uvwx", tasks=2)], order="random", seed=3)
    more = Collection("b", ("x", "v"), {"train": np.array([0, 1, 0])}, {"train": np.array([0, 0, 1])}, tasks=1)
    layout = extended(base, [more], parts=1)
    assert layout.tasks == base.tasks
    assert layout.added == range(12, 15)
    index = layout.index["train"]
    names = [layout.class_names[number] for number in index.label[12:]]
    stored = [("x", "v", "x")[number] for number in index.local[12:]]
    assert names == stored
    assert sorted(names) == ["v", "x", "x"]
    assert set(index.part[12:]) == {1}
    assert index.group[12:].min() > index.group[:12].max()
    np.testing.assert_array_equal(index.label[:12], base.index["train"].label)


def test_further_examples_of_another_class_are_refused() -> None:
    base = arrange([collection("a", "uv", tasks=1)], order="given", seed=0)
    with pytest.raises(DataError, match=r"'b' has images of class 'z' .* allowed: u, v"):
        extended(base, [collection("b", "uz", tasks=1)], parts=1)
