"""Nearest mean of exemplars against a loop."""

import torch

from hpccl.memory.means import ClassMeans, normalised


def test_scores_are_distances_to_normalised_means() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    sums = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, labels, normalised(features))
    found = ClassMeans.of_sums(2, sums)
    query = torch.randn(3, 5, generator=generator)
    scores = found.scores(query)
    for row, one in zip(scores, query.double(), strict=True):
        for label in range(3):
            members = [value / value.norm() for value, own in zip(features, labels, strict=True) if own == label]
            mean = torch.stack(members).mean(0)
            distance = (one / one.norm() - mean / mean.norm()).square().sum()
            torch.testing.assert_close(row[label].double(), -distance, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores[:, 3], torch.full((3,), -4.0))  # a class without examples


def test_the_length_of_a_feature_does_not_matter() -> None:
    means = ClassMeans.of_sums(0, torch.eye(3, dtype=torch.float64))
    features = torch.tensor([[0.1, 0.9, 0.0]])
    torch.testing.assert_close(means.scores(features), means.scores(7 * features))
    assert int(means.scores(features).argmax()) == 1
