"""A memory that was drawn by scores and shrinks later."""

from dataclasses import replace

import numpy as np
import pytest

from hpccl.dist.comm import Comm
from hpccl.memory.select import Candidates, Choice, scored, thinned


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("first", [300, 90])
def test_a_sampled_choice_that_shrinks_is_one_of_fewer(first: int, balanced: bool) -> None:
    """With its weights; from all there are, or from some."""
    rng = np.random.default_rng(5)
    score, labels = rng.gamma(0.3, size=300), np.arange(300) % 3
    score[[7, 40]] = -np.inf
    whole = Candidates(np.arange(300), labels, first, balanced, (3, 9))
    few = replace(whole, keep=24)
    before = scored(score, whole.samples, whole, Comm.solo(), sampled=True)
    expected = scored(score, few.samples, few, Comm.solo(), sampled=True)
    left = before.order < 24
    group = labels[before.sample] if balanced else np.zeros(first, np.int64)
    weight = thinned(before, group, left, of=300, words=whole.words)
    np.testing.assert_array_equal(before.sample[left], expected.sample)
    np.testing.assert_allclose(weight[left], expected.weight, rtol=1e-9)
    assert weight[left].std() > 0.1
    # Once more: what the first time left of a class may be all that it had.
    half = replace(before, weight=weight)
    again = Choice(half.sample[left], half.order[left], half.weight[left], half.priority[left])
    last = replace(whole, keep=10)
    expected = scored(score, last.samples, last, Comm.solo(), sampled=True)
    fewer = again.order < 10
    weight = thinned(again, group[left], fewer, of=300, words=whole.words)
    np.testing.assert_allclose(weight[fewer], expected.weight, rtol=1e-9)


def test_a_class_that_loses_nothing_keeps_its_chances() -> None:
    whole = Candidates(np.arange(90), np.arange(90) % 3, 31, True, (3, 9))
    score = np.random.default_rng(5).gamma(0.3, size=90)
    before = scored(score, whole.samples, whole, Comm.solo(), sampled=True)
    few = replace(whole, keep=30)
    expected = scored(score, few.samples, few, Comm.solo(), sampled=True)
    weight = thinned(before, before.sample % 3, before.order < 30, of=90, words=whole.words)
    np.testing.assert_allclose(weight[before.order < 30], expected.weight, rtol=1e-9)
