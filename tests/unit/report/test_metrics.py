from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpccl.report import metrics
from tests.unit.report.synthetic import UNTRAINED, evaluation

NAN = float("nan")
A = np.array([[0.9, 0.2, 0.3], [0.6, 0.8, 0.4], [0.5, 0.9, 0.7]])

square = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 1)))


def test_figures_of_a_matrix_worked_by_hand() -> None:
    assert metrics.last_task(A) == 2
    assert metrics.average_accuracy(A) == pytest.approx((0.5 + 0.9 + 0.7) / 3)
    assert metrics.average_accuracy(A, after=1) == pytest.approx((0.6 + 0.8) / 2)
    assert metrics.average_incremental_accuracy(A) == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    # task 0: max(.9, .6) - .5; task 1: max(.2, .8) - .9, negative because the last task helped
    assert metrics.forgetting(A) == pytest.approx((0.4 - 0.1) / 2)
    assert metrics.backward_transfer(A) == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert metrics.forward_transfer(A, np.array([0.5, 0.1, 0.2])) == pytest.approx(((0.2 - 0.1) + (0.4 - 0.2)) / 2)
    assert metrics.learning_accuracy(A) == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_the_union_of_test_images_counts_images_not_tasks() -> None:
    a = np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.4, 0.6, 1.0]])
    curve = metrics.union_accuracy(a, np.array([100.0, 300.0, 100.0]))
    np.testing.assert_allclose(curve, [0.9, (50 + 240) / 400, (40 + 180 + 100) / 500])
    assert metrics.average_of_curve(curve) == pytest.approx((0.9 + 0.725 + 0.64) / 3)
    assert metrics.average_of_curve(curve, include_first=False) == pytest.approx((0.725 + 0.64) / 2)
    assert metrics.performance_drop(curve) == pytest.approx(0.26)
    a[2] = NAN  # under way
    under_way = metrics.union_accuracy(a, np.array([100.0, 300.0, NAN]))
    np.testing.assert_allclose(under_way, [0.9, 0.725, NAN])
    assert metrics.average_of_curve(under_way) == pytest.approx((0.9 + 0.725) / 2)
    assert metrics.performance_drop(under_way) == pytest.approx(0.175)
    assert math.isnan(metrics.performance_drop(curve[:1]))


def test_two_conventions_of_the_average_explain_two_published_numbers() -> None:
    bic = np.array([84.0, 74.69, 67.93, 61.25, 56.69])  # CIFAR-100, five steps; WA's table says 65.1
    assert metrics.average_of_curve(bic) == pytest.approx(68.912)
    assert metrics.average_of_curve(bic, include_first=False) == pytest.approx(65.14)
    topic = np.array([64.10, 55.88, 47.07, 45.16, 40.11, 36.38, 33.96, 31.55, 29.37])
    assert metrics.performance_drop(topic) == pytest.approx(34.73)


@given(square)
def test_the_union_is_the_average_where_tasks_are_equally_large(a: metrics.Floats) -> None:
    curve = metrics.union_accuracy(a, np.full(len(a), 7.0))
    np.testing.assert_allclose(curve, [metrics.average_accuracy(a, after=t) for t in range(len(a))])


def test_a_run_under_way_is_judged_by_the_tasks_it_learned() -> None:
    a = A.copy()
    a[2] = NAN
    assert metrics.last_task(a) == 1
    assert metrics.average_accuracy(a) == pytest.approx(0.7)
    assert metrics.forgetting(a) == pytest.approx(0.9 - 0.6)
    assert metrics.backward_transfer(a) == pytest.approx(0.6 - 0.9)
    assert metrics.learning_accuracy(a) == pytest.approx(0.85)


def test_a_run_of_the_last_task_only_has_an_average_but_no_history() -> None:
    a = np.full((3, 3), NAN)
    a[2] = A[2]
    assert metrics.average_accuracy(a) == pytest.approx(0.7)
    figures = (metrics.forgetting, metrics.backward_transfer, metrics.learning_accuracy)
    assert all(math.isnan(figure(a)) for figure in (*figures, metrics.average_incremental_accuracy))


def test_one_task_has_no_transfer() -> None:
    a = np.array([[0.5]])
    assert metrics.average_accuracy(a) == metrics.learning_accuracy(a) == 0.5
    assert math.isnan(metrics.forgetting(a))
    assert math.isnan(metrics.backward_transfer(a))
    assert math.isnan(metrics.forward_transfer(a, np.array([0.1])))


@pytest.mark.parametrize("a", [np.zeros((0, 0)), np.full((2, 2), NAN)])
def test_nothing_measured_is_nothing(a: metrics.Floats) -> None:
    assert metrics.last_task(a) == -1
    assert math.isnan(metrics.average_accuracy(a))
    assert math.isnan(metrics.average_incremental_accuracy(a))
    assert math.isnan(metrics.learning_accuracy(a))


def test_matrices_come_from_evaluate_events() -> None:
    events = [evaluation(-1), evaluation(0, shift=0.1), evaluation(0), evaluation(1)]
    own = metrics.accuracy_matrix(events, 3, "task_incremental")
    np.testing.assert_array_equal(own, [[0.875, 0.5, 0.25], [0.75, 0.875, 0.5], [NAN] * 3])
    seen = metrics.accuracy_matrix(events, 3, "class_incremental")
    np.testing.assert_array_equal(seen, [[0.875, NAN, NAN], [0.5, 0.75, NAN], [NAN] * 3])
    nll = metrics.matrix(events, 3, setting="class_incremental", figure="nll")
    assert nll[1, 0] == 1.5
    np.testing.assert_array_equal(metrics.untrained(events, 3), UNTRAINED)
    assert np.isnan(metrics.untrained(events[1:], 3)).all()


@given(square)
def test_forgetting_is_at_least_the_loss_since_learning(a: metrics.Floats) -> None:
    if len(a) > 1:
        assert metrics.forgetting(a) >= -metrics.backward_transfer(a) - 1e-12


@given(square)
def test_figures_stay_in_their_range(a: metrics.Floats) -> None:
    assert 0 <= metrics.average_accuracy(a) <= 1
    assert 0 <= metrics.learning_accuracy(a) <= 1
    if len(a) > 1:
        assert -1 <= metrics.backward_transfer(a) <= 1
        assert -1 <= metrics.forgetting(a) <= 1


@given(square, st.floats(-0.5, 0.5))
def test_transfer_does_not_see_a_shift_of_all_accuracies(a: metrics.Floats, shift: float) -> None:
    if len(a) > 1:
        assert metrics.backward_transfer(a + shift) == pytest.approx(metrics.backward_transfer(a), abs=1e-9)
        assert metrics.forgetting(a + shift) == pytest.approx(metrics.forgetting(a), abs=1e-9)
        assert metrics.average_accuracy(a + shift) == pytest.approx(metrics.average_accuracy(a) + shift, abs=1e-9)


P = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.7, 0.3, 0.0]])
Y = np.array([0, 1, 1, 1])


def test_a_classifier_worked_by_hand() -> None:
    assert metrics.accuracy(P, Y) == 0.5
    assert metrics.negative_log_likelihood(P, Y) == pytest.approx(-math.log(0.7 * 0.6 * 0.3 * 0.3) / 4)
    assert metrics.negative_log_likelihood(P, [0, 1, 1, 2]) == math.inf
    # With 2 bins: (0, .5] has one example, .5 sure and wrong; (.5, 1] has three, 2 sure in sum, 2 right.
    bins = metrics.calibration_bins(P.max(axis=1), P.argmax(axis=1) == Y, num_bins=2)
    np.testing.assert_allclose(bins, np.array([[1.0, 3.0], [0.5, 2.0], [0.0, 2.0]]))
    assert metrics.expected_calibration_error(P, Y, num_bins=2) == pytest.approx(0.5 / 4)


def test_bins_are_closed_above() -> None:
    confidence = np.array([0.0, 1 / 15, 2 / 15, 1.0])
    counts = metrics.calibration_bins(confidence, np.ones(4))[0]
    assert counts[0] == 2
    assert counts[1] == 1
    assert counts[14] == 1


def test_no_examples_have_no_figures() -> None:
    empty, none = np.zeros((0, 3)), np.zeros(0, dtype=np.int64)
    assert math.isnan(metrics.accuracy(empty, none))
    assert math.isnan(metrics.negative_log_likelihood(empty, none))
    assert math.isnan(metrics.expected_calibration_error(empty, none))


def test_a_calibrated_classifier_has_no_error() -> None:
    p = np.tile([0.75, 0.25], (100, 1))
    y = np.arange(100) % 4 == 0
    assert metrics.expected_calibration_error(p, y) == pytest.approx(0)
    assert metrics.expected_calibration_error(p, np.ones(100)) == pytest.approx(0.75)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2), st.data())
def test_bins_of_parts_add_up(examples: list[tuple[float, bool]], data: st.DataObject) -> None:
    confidence, correct = (np.array(column) for column in zip(*examples, strict=True))
    cut = data.draw(st.integers(0, len(examples)))
    whole = metrics.calibration_bins(confidence, correct)
    first = metrics.calibration_bins(confidence[:cut], correct[:cut])
    second = metrics.calibration_bins(confidence[cut:], correct[cut:])
    np.testing.assert_allclose(first + second, whole)
    assert 0 <= metrics.calibration_error(whole) <= 1
