from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpccl.curvature.columns import Fisher, hessian_root, num_columns, output_columns, uniform_draws
from tests.unit.curvature.oracle import HEAD, NUM_CLASSES, examples


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=12))
def test_root_of_the_hessian(logits: list[float]) -> None:
    p = torch.tensor([logits], dtype=torch.float64).softmax(1)
    root = hessian_root(p)[0]
    assert root.shape == (len(logits), len(logits) - 1)
    torch.testing.assert_close(root @ root.T, torch.diag(p[0]) - p[0, :, None] * p[0], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("fisher", "count"), [("ggn", 3), ("mc", 5), ("empirical", 1), ("weighted", 1), ("predicted", 1)]
)
def test_columns_ignore_other_heads(fisher: Fisher, count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, NUM_CLASSES)
    data = examples(torch.zeros(6, 1), weight=torch.arange(6.0))
    columns = output_columns(logits, data, fisher, samples=5, seed=0)
    assert columns.shape == (count, 6, NUM_CLASSES)
    assert num_columns(fisher, len(HEAD), 5) == count
    assert not columns[:, :, ~data.head].any()
    assert not columns[:, 0].any()  # weight 0
    torch.testing.assert_close(columns.sum(2), torch.zeros(count, 6), rtol=0, atol=1e-6)


def test_the_likeliest_label_is_of_the_own_head() -> None:
    logits = torch.full((1, NUM_CLASSES), 50.0)
    logits[:, list(HEAD)] = torch.tensor([0.1, 0.2, 0.5, 0.2]).log()
    columns = output_columns(
        logits, examples(torch.zeros(1, 1), weight=torch.tensor([4.0])), "predicted", samples=1, seed=0
    )
    expected = 2 * torch.tensor([0.1, 0.2, -0.5, 0.2])
    torch.testing.assert_close(columns[0, 0, list(HEAD)], expected, atol=1e-6, rtol=1e-6)


def test_draws_belong_to_the_sample() -> None:
    sample = np.arange(50_000)
    draws = uniform_draws(sample, 3, seed=4)
    assert np.array_equal(draws[100:200], uniform_draws(sample[100:200], 3, seed=4))
    assert np.array_equal(draws[:, :2], uniform_draws(sample, 2, seed=4))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 5e-3
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.02
    assert np.abs(np.corrcoef(draws[:, 0], uniform_draws(sample, 1, seed=5)[:, 0])[0, 1]) < 0.02
    assert np.abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.02


def test_drawn_labels_follow_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.0, 0.7, 0.2])
    logits = torch.full((40_000, NUM_CLASSES), 50.0)
    logits[:, list(HEAD)] = p.log()
    columns = output_columns(logits, examples(torch.zeros(40_000, 1)), "mc", samples=1, seed=0)
    drawn = (columns[0][:, list(HEAD)] - p < -0.5).float().mean(0)
    torch.testing.assert_close(drawn, p, rtol=0, atol=0.01)
    assert drawn[1] == 0
