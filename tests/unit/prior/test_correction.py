"""Bias correction: numbers by hand, an applied distortion is found and taken back."""

import pytest
import torch
from torch import Tensor

from hpccl.errors import DivergedError
from hpccl.prior.correction import Correction, corrected, corrected_nats

Z = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
LABELS, NEW, SEEN = torch.tensor([0, 3]), torch.tensor([False, False, True, True]), torch.ones(4, dtype=torch.bool)


def test_the_objective_by_hand() -> None:
    """Wu et al. 2019, eq. 4 and 5: two old and two new classes, two examples."""
    values = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    nats = corrected_nats(values, Z, LABELS, new=NEW, seen=SEEN, penalty=0.1)
    (gradient,) = torch.autograd.grad(nats, values)
    assert float(nats.detach()) == pytest.approx(0.952251, abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.319968, 0.295431], abs=1e-6)
    after = values.detach() - 0.1 * gradient
    assert after.tolist() == pytest.approx([0.968003, -0.029543], abs=1e-6)
    assert float(corrected_nats(after, Z, LABELS, new=NEW, seen=SEEN, penalty=0.1)) == pytest.approx(0.934247, abs=1e-6)


def test_the_optimum_by_hand() -> None:
    """The minimum by Newton steps; the published example (1.180784, -1.267060) stopped a little short of it."""
    found = Correction.fitted(Z, LABELS, task=1, classes=(2, 3), seen=SEEN, penalty=0.1)
    assert (found.alpha, found.beta) == pytest.approx((1.18080602, -1.26712454), abs=1e-7)
    assert (found.alpha, found.beta) == pytest.approx((1.180784, -1.267060), abs=1e-4)
    values = torch.tensor([found.alpha, found.beta], dtype=torch.float64, requires_grad=True)
    best = corrected_nats(values, Z, LABELS, new=NEW, seen=SEEN, penalty=0.1)
    (gradient,) = torch.autograd.grad(best, values)
    assert float(best.detach()) == pytest.approx(0.790679, abs=1e-6)
    assert float(gradient.norm()) < 1e-8


def drawn(number: int) -> tuple[Tensor, Tensor]:
    """Logits of six classes of which five are seen, and labels drawn from their softmax: calibrated."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(number, 6, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits[:, :5].softmax(1), 1, generator=generator).squeeze(1)
    return logits, labels


def test_an_applied_distortion_is_recovered() -> None:
    logits, labels = drawn(20000)
    seen, new = torch.arange(6) < 5, torch.isin(torch.arange(6), torch.tensor([3, 4]))
    calibrated = Correction.fitted(logits, labels, task=1, classes=(3, 4), seen=seen, penalty=0.0)
    assert (calibrated.alpha, calibrated.beta) == pytest.approx((1.0, 0.0), abs=0.03)
    spoilt = corrected(logits, new, 1.6, 0.9)
    found = Correction.fitted(spoilt, labels, task=1, classes=(3, 4), seen=seen, penalty=0.0)
    assert (found.alpha, found.beta) == pytest.approx((1 / 1.6, -0.9 / 1.6), abs=0.02)
    # q = alpha z + beta undoes z = 1.6 q + 0.9, up to what the sample itself says.
    assert found.alpha * 1.6 == pytest.approx(calibrated.alpha, abs=1e-4)
    assert found.alpha * 0.9 + found.beta == pytest.approx(calibrated.beta, abs=1e-4)
    torch.testing.assert_close(found(spoilt), calibrated(logits), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found(spoilt)[:, :3], logits[:, :3])


def test_state_and_what_is_not_finite() -> None:
    found = Correction(3, (2, 3), 0.5, -0.25, 9)
    assert Correction.from_state_dict(found.state_dict()) == found
    with pytest.raises(DivergedError, match="not finite"):
        Correction.fitted(Z * torch.nan, LABELS, task=1, classes=(2, 3), seen=SEEN, penalty=0.0)
