"""The one loss: identities of the method (acceptance test 1 of the method: FR + correction is replay)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpccl.data.rows import Rows
from hpccl.train.loss import row_nats, weighted_nats


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
