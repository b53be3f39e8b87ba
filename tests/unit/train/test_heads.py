from __future__ import annotations

import pytest

from hpccl.data.build import open_stream
from hpccl.errors import ConfigError
from hpccl.train.run import check_memory
from tests.run.method import merged


def test_a_class_alone_has_nothing_to_compete_with() -> None:
    config = merged({"stream": {"kind": "digits", "tasks": 10}})
    stream = open_stream(config.stream, config.data)
    with pytest.raises(ConfigError, match=r"task 'digits\[1/10\]' has one class \(10 such tasks\).*train.head=seen"):
        check_memory(config, stream)
    check_memory(merged({"stream": {"kind": "digits", "tasks": 10}, "train": {"head": "seen"}}), stream)
