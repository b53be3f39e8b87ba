from __future__ import annotations

import pytest

from hpccl.data.build import open_stream
from hpccl.errors import ConfigError
from hpccl.train.checks import check_memory
from tests.run.method import merged


def test_a_class_alone_has_nothing_to_compete_with() -> None:
    config = merged({"stream": {"kind": "digits", "tasks": 10}})
    stream = open_stream(config.stream, config.data)
    with pytest.raises(
        ConfigError, match=r"task 'digits\[1/10\]' has a single class \(10 such tasks\).*train.head=seen"
    ):
        check_memory(config, stream)
    check_memory(merged({"stream": {"kind": "digits", "tasks": 10}, "train": {"head": "seen"}}), stream)


@pytest.mark.parametrize(
    ("memory", "allowed", "problem"),
    [
        ({"total": 9}, {"total": 10}, r"memory\.total=9 is less than the 10 classes.*learned from memory alone"),
        ({"size": 4}, {"size": 5}, r"memory\.size=4 keeps 4 examples of task .* fewer than its 5 classes"),
    ],
)
def test_what_is_learned_from_memory_alone_needs_every_class(
    memory: dict[str, int], allowed: dict[str, int], problem: str
) -> None:
    learned = {
        "stream": {"kind": "digits", "tasks": 2},
        "train": {"data": "memory", "restart": True, "head": "seen"},
        "prior": {"replay": 1.0},
    }
    config = merged({**learned, "memory": memory})
    stream = open_stream(config.stream, config.data)
    with pytest.raises(ConfigError, match=problem):
        check_memory(config, stream)
    check_memory(merged({**learned, "memory": allowed}), stream)
    check_memory(
        merged({**learned, "train": {"head": "seen"}, "memory": memory}), stream
    )  # replay learns of tasks, too


def test_tasks_of_the_same_classes_share_a_total_among_all_of_them() -> None:
    """Each keeps the classes of its part whatever the others keep, so that one may be missing in all of them."""
    learned = {
        "stream": {"kind": "digits", "tasks": 3, "scenario": {"kind": "rotated"}},
        "train": {"data": "memory", "restart": True, "head": "seen"},
        "prior": {"replay": 1.0},
    }
    config = merged({**learned, "memory": {"total": 29}})
    stream = open_stream(config.stream, config.data)
    with pytest.raises(ConfigError, match=r"memory\.total=29 is less than the 30 classes of all tasks"):
        check_memory(config, stream)
    check_memory(merged({**learned, "memory": {"total": 30}}), stream)
    check_memory(merged({**learned, "memory": {"total": 10, "selector": {"kind": "greedy"}}}), stream)
