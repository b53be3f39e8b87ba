"""Figures of a test, beside those of a loop over images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpccl.data.rows import Request
from hpccl.dist.spread import wholes
from hpccl.errors import DataError, DivergedError
from hpccl.train.evaluate import evaluate_all
from hpccl.train.passes import answers
from tests.run.method import learn, make_world, merged


def test_top_5_is_the_share_of_images_whose_class_is_among_the_five_likeliest(tmp_path: Path) -> None:
    config = merged({"stream": {"kind": "digits", "tasks": 2}, "train": {"epochs": 1, "head": "seen"}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    results = evaluate_all(state, world, last=1)
    labels = world.stream.labels("test")
    for task, result in zip(world.stream.tasks, results, strict=True):
        span = task.samples("test")
        request = Request(np.arange(span.start, span.stop), np.zeros(len(span), dtype=np.uint64))
        (images,) = list(world.stream.load([request], "test"))
        likeliest = state.engine.predict(images.pixels).topk(5, dim=1).indices
        right = (likeliest == torch.from_numpy(labels[span.start : span.stop])[:, None]).any(dim=1)
        assert result["class_incremental"]["top5"] == pytest.approx(float(right.float().mean()))
        assert result["class_incremental"]["accuracy"] < result["class_incremental"]["top5"] <= 1
        assert "top5" not in result["task_incremental"], "all of five classes are among five"
    results = evaluate_all(state, world, last=0)
    assert "top5" not in results[0]["class_incremental"]


def test_a_network_that_has_diverged_has_no_figures(tmp_path: Path) -> None:
    """Its weights may be finite, and its logits too large."""
    state, world = make_world(merged({"stream": {"kind": "digits", "tasks": 2}}), tmp_path)
    state.engine.put({name: value * 1e37 for name, value in wholes(state.engine.gather()).items()})
    with pytest.raises(
        DivergedError, match=r"logits are not finite for \d+ of \d+ test images of task 0 \('digits\[1/2\]'\)"
    ):
        evaluate_all(state, world, last=0)


def test_a_task_without_readable_test_images_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, world = make_world(merged({"stream": {"kind": "digits", "tasks": 2}}), tmp_path)
    second = world.stream.tasks[1].samples("test")

    def torn(classify: Any, samples: Any, world: Any, *, split: Any) -> Any:
        for sample, logits, readable in answers(classify, samples, world, split=split):
            yield sample, logits, readable & torch.from_numpy(sample < second.start)

    monkeypatch.setattr("hpccl.train.evaluate.answers", torn)
    with pytest.raises(DataError, match=r"task 1 \('digits\[2/2\]'\) has no test images that can be decoded"):
        evaluate_all(state, world, last=0)
