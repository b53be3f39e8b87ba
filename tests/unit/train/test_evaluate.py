"""Figures of a test, beside those of a loop over images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hpccl.data.rows import Request
from hpccl.train.evaluate import evaluate_all
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
