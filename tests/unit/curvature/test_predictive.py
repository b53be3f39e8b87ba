from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from hpccl.curvature.predictive import drawn_logits, merits, monte_carlo, probabilities, probit
from hpccl.report.metrics import negative_log_likelihood


def variances(generator: torch.Generator, n: int, classes: int) -> torch.Tensor:
    root = torch.randn(n, classes, classes, generator=generator, dtype=torch.float64)
    return root @ root.mT


def test_probit_is_the_sigmoid_of_mackay_for_a_class_against_a_fixed_one() -> None:
    mean, spread = torch.tensor([[0.7, 0.0], [-2.0, 0.0]], dtype=torch.float64), torch.zeros(2, 2, 2).double()
    spread[:, 0, 0] = torch.tensor([0.0, 3.0])
    head = torch.ones(2, 2, dtype=torch.bool)
    expected = torch.sigmoid(torch.tensor([0.7, -2.0 / np.sqrt(1 + np.pi * 3 / 8)], dtype=torch.float64))
    torch.testing.assert_close(probit(mean, spread, head)[:, 0], expected)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    weight = torch.exp(-(grid**2) / 2)
    integral = float((weight * torch.sigmoid(-2.0 + np.sqrt(3) * grid)).sum() / weight.sum())
    assert float(probit(mean, spread, head)[1, 0]) == pytest.approx(integral, abs=0.01)
    torch.manual_seed(0)
    drawn = monte_carlo(mean, spread, head, torch.randn(200_000, 2, 2, dtype=torch.float64))
    assert float(drawn[1, 0]) == pytest.approx(integral, abs=2e-3)


def test_draws_have_the_covariance_and_no_class_outside_the_head_has_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(2, 4, generator=generator).double(), variances(generator, 2, 4)
    noise = torch.randn(100_000, 2, 4, generator=generator, dtype=torch.float64)
    draws = drawn_logits(mean, spread, noise)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
    for example in range(2):
        torch.testing.assert_close(torch.cov(draws[:, example].T), spread[example], atol=0.1, rtol=0.05)
    head = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for p in (probit(mean, spread, head), monte_carlo(mean, spread, head, noise[:10]), probabilities(mean, head)):
        assert bool((p[~head] == 0).all())
        torch.testing.assert_close(p.sum(1), torch.ones(2).double())


def test_merits_are_those_of_their_definitions() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    right, nats, confidence, brier, entropy = merits(p, labels).T
    assert right.tolist() == [1, 0, 0]
    assert confidence.tolist() == [0.7, 0.8, 0.5]
    assert float(nats.mean()) == pytest.approx(log_loss(labels, p.numpy()))
    assert float(nats.mean()) == pytest.approx(negative_log_likelihood(p.numpy(), labels.numpy()))
    assert brier.tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.01 + 0.81 + 0.64, 0.25 + 0.25])
    assert float(entropy[2]) == pytest.approx(np.log(2))
