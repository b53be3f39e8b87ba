"""The one loss: identities of the method (acceptance test 1 of the method: FR + correction is replay)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpccl.data.rows import CROSS_ENTROPY, SIGMOID, SQUARED, Rows
from hpccl.train.loss import row_nats, row_questions, row_squares, weighted_nats


def random_case(seed: int, classes: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.zeros(5, classes, dtype=torch.bool)
    head[:, 2:6] = True
    soft = torch.zeros(5, classes, dtype=torch.float64)
    soft[:, 2:6] = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(2, 6, (5,), generator=generator)
    hard = torch.nn.functional.one_hot(labels, classes).double()
    return logits, head, soft, hard


@given(st.integers(0, 10**6))
def test_fr_plus_correction_is_hard_label_cross_entropy(seed: int) -> None:
    logits, head, soft, hard = random_case(seed)
    corrected = row_nats(logits, soft, head).sum() + ((soft - hard) * logits).sum()
    replay = row_nats(logits, hard, head).sum()
    torch.testing.assert_close(corrected, replay)
    (gradient_1,) = torch.autograd.grad(corrected, logits)
    (gradient_2,) = torch.autograd.grad(replay, logits)
    torch.testing.assert_close(gradient_1, gradient_2)


def test_own_head_equals_cross_entropy_of_gathered_logits() -> None:
    logits, head, _, hard = random_case(0)
    expected = torch.nn.functional.cross_entropy(logits[:, 2:6], hard[:, 2:6].argmax(1), reduction="none")
    torch.testing.assert_close(row_nats(logits, hard, head), expected)
    (gradient,) = torch.autograd.grad(row_nats(logits, hard, head).sum(), logits)
    assert float(gradient[:, [0, 1, 6]].abs().max()) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradient_of_soft_row_has_no_t_squared(temperature: float) -> None:
    """d/dz of tau CE(q, z/T) is tau/T (softmax(z/T) - q)."""
    logits, head, soft, _ = random_case(3)
    rows = Rows(
        pixels=torch.zeros(5, 1), noise=torch.zeros(5), image=torch.arange(5), target=soft, head=head,
        weight=torch.full((5,), 0.25, dtype=torch.float64), temperature=torch.full((5,), temperature),
        term=torch.ones(5),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(weighted_nats(logits, rows).sum(), logits)
    expected = 0.25 / temperature * ((logits[:, 2:6] / temperature).softmax(1) - soft[:, 2:6])
    torch.testing.assert_close(gradient[:, 2:6], expected)


def test_two_rows_may_speak_of_one_image() -> None:
    logits, head, soft, hard = random_case(1)
    both = Rows(
        pixels=torch.zeros(5, 1), noise=torch.zeros(5), image=torch.tensor([0, 0]),
        target=torch.stack([soft[0], hard[0]]), weight=torch.tensor([1.0, 2.0]), head=head[:1].expand(2, -1),
        temperature=torch.ones(2), term=torch.tensor([1, 2]),
    )  # fmt: skip
    nats = weighted_nats(logits, both)
    torch.testing.assert_close(nats[0], row_nats(logits[:1], soft[:1], head[:1])[0])
    torch.testing.assert_close(nats[1], 2 * row_nats(logits[:1], hard[:1], head[:1])[0])


def rows_of(*rows: tuple[int, list[float], float, float, int]) -> Rows:
    """Of (image, target of all classes, -1e9 where a class does not compete; weight; temperature; kind)."""
    target = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    head = target > -1e8
    return Rows(
        pixels=torch.zeros(1, 1), noise=torch.zeros(1), image=torch.tensor([row[0] for row in rows]),
        target=target * head, head=head, weight=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        temperature=torch.tensor([row[3] for row in rows], dtype=torch.float64), term=torch.zeros(len(rows)),
        kind=torch.tensor([row[4] for row in rows]),
    )  # fmt: skip


def softened(logits: list[float], temperature: float) -> list[float]:
    return (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()


OUT = -1e9
KD = {  # temperature: cross-entropy, Kullback-Leibler divergence, gradient of both
    1.0: (0.877871, 0.436814, [-0.444495, 0.305008, 0.139486]),
    2.0: (1.003035, 0.170640, [-0.140795, 0.069462, 0.071333]),
    4.0: (1.068600, 0.048409, [-0.036653, 0.013168, 0.023485]),
}


@pytest.mark.parametrize("temperature", KD)
def test_distillation_by_hand(temperature: float) -> None:
    """Hinton et al. 2015: teacher (2, 0, -2), student (1, 1, 0); KL is that less the teacher's entropy."""
    cross_entropy, divergence, slope = KD[temperature]
    logits = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = rows_of((0, softened([2, 0, -2], temperature), 1.0, temperature, CROSS_ENTROPY))
    nats = weighted_nats(logits, rows)
    (gradient,) = torch.autograd.grad(nats.sum(), logits)
    least = weighted_nats(torch.tensor([[2.0, 0.0, -2.0]], dtype=torch.float64), rows)
    assert float(nats.detach()) == pytest.approx(cross_entropy, abs=1e-6)
    assert float(nats.detach() - least) == pytest.approx(divergence, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx(slope, abs=1e-6)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-12)
    shifted = torch.tensor([[5.0, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)  # the teacher's and a constant
    (still,) = torch.autograd.grad(weighted_nats(shifted, rows).sum(), shifted)
    assert still[0].tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_learning_without_forgetting_by_hand() -> None:
    """Li and Hoiem 2016, eq. 1 to 3: an old head of three classes, a new one of two."""
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.5, -0.5]], dtype=torch.float64)
    old, new = [*softened([2, 0, -2], 2.0), OUT, OUT], [OUT, OUT, OUT, 1.0, 0.0]
    nats = weighted_nats(logits, rows_of((0, new, 1.0, 1.0, CROSS_ENTROPY), (0, old, 1.0, 2.0, CROSS_ENTROPY)))
    assert nats.tolist() == pytest.approx([0.313262, 1.003035], abs=1e-6)
    assert float(nats.sum()) == pytest.approx(1.316297, abs=1e-6)


def test_first_stage_of_bias_correction_by_hand() -> None:
    """Wu et al. 2019, eq. 1 to 3: two old and two new classes, so lambda = 1/2."""
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]], dtype=torch.float64)
    old, new = [*softened([2, 0], 2.0), OUT, OUT], [0.0, 0.0, 1.0, 0.0]
    nats = weighted_nats(logits, rows_of((0, new, 0.5, 1.0, CROSS_ENTROPY), (0, old, 0.5, 2.0, CROSS_ENTROPY)))
    assert (2 * nats).tolist() == pytest.approx([0.440190, 0.608548], abs=1e-6)
    assert float(nats.sum()) == pytest.approx(0.524369, abs=1e-6)


def test_a_sigmoid_for_each_class_by_hand() -> None:
    """Rebuffi et al. 2017: logits (.5, -1, 2), the old network's (0, 1) of the first two classes, label 2."""
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    old = [*torch.tensor([0.0, 1.0], dtype=torch.float64).sigmoid().tolist(), OUT]
    for weight, total in ((1.0, 1.895325), (1 / 3, 0.631775)):  # the sum over classes, and their mean
        rows = rows_of((0, [OUT, OUT, 1.0], weight, 1.0, SIGMOID), (0, old, weight, 1.0, SIGMOID))
        assert float(weighted_nats(logits, rows).sum()) == pytest.approx(total, abs=1e-6)
    target = torch.tensor([[0.5, 0.731059, 1.0]], dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    torch.testing.assert_close(row_questions(logits, target, torch.ones(1, 3, dtype=torch.bool))[0], expected)


def test_dark_experience_by_hand() -> None:
    """Buzzega et al. 2020, eq. 6: alpha .2, beta .5; one new example, one of memory that speaks twice."""
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    first, kept = [1.0, 0.0, 0.0], [1.0, 0.0, -1.0]
    rows = rows_of((0, first, 1.0, 1.0, 0), (1, kept, 0.2, 1.0, SQUARED), (1, first, 0.5, 1.0, 0))
    nats = weighted_nats(logits, rows)
    assert nats.tolist() == pytest.approx([0.407606, 0.2 * 0.5, 0.5 * 0.958020], abs=1e-6)
    assert float(nats.sum()) == pytest.approx(0.986616, abs=1e-6)
    summed = rows_of((0, first, 1.0, 1.0, 0), (1, kept, 3 * 0.2, 1.0, SQUARED), (1, first, 0.5, 1.0, 0))
    assert float(weighted_nats(logits, summed).sum()) == pytest.approx(1.186616, abs=1e-6)  # a sum over three classes


@given(st.integers(0, 10**6))
def test_kinds_of_rows_do_not_touch_classes_that_do_not_compete(seed: int) -> None:
    logits, head, soft, _ = random_case(seed)
    for row in (row_questions, row_squares):
        (gradient,) = torch.autograd.grad(row(logits, soft, head).sum(), logits)
        assert float(gradient[:, [0, 1, 6]].abs().max()) == 0
    inside = torch.nn.functional.mse_loss(logits[:, 2:6], soft[:, 2:6], reduction="none").mean(1)
    torch.testing.assert_close(row_squares(logits, soft, head), inside)
