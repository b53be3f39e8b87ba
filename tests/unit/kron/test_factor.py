from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpccl.errors import DivergedError
from hpccl.kron import factor as factors
from hpccl.kron.factor import Dense, LowRank, Spectrum, inner
from tests.unit.kron.oracle import dense, factor, low_rank, psd

KINDS = ["dense", "low"]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_matrix(kind: str, groups: int) -> None:
    one = factor(kind, 6, seed=1, groups=groups)
    matrix = dense(one)
    tall = torch.randn(groups, 6, 4, dtype=torch.float64)
    assert (one.size, one.groups) == (6, groups)
    torch.testing.assert_close(one.dense(), matrix)
    torch.testing.assert_close(one.left(tall), matrix @ tall)
    torch.testing.assert_close(one.trace(), torch.einsum("gii->g", matrix))
    torch.testing.assert_close(dense(one.times(2.5)), 2.5 * matrix)
    torch.testing.assert_close(dense(one.to(torch.device("cpu"))), matrix)


def test_num_bytes() -> None:
    assert Dense(torch.zeros(2, 6, 6)).num_bytes == 4 * 2 * 36
    assert LowRank(torch.zeros(2, 6, 3), torch.zeros(2, 3)).num_bytes == 4 * 2 * (18 + 3)


def test_low_rank_never_makes_its_matrix() -> None:
    one, delta = low_rank(40, 2, seed=0), torch.randn(1, 40, 10, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        one.left(delta)
    assert counter.get_total_flops() == 2 * 2 * 40 * 2 * 10


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_inner(first: str, second: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_ROWS", 3)  # 7 rows in uneven parts
    one, other = factor(first, 7, seed=3, groups=groups), factor(second, 7, seed=4, groups=groups)
    torch.testing.assert_close(inner(one, other), (dense(one) * dense(other)).sum((1, 2)))


def test_inner_of_fp32_adds_in_float64() -> None:
    one, other = (Dense(psd(300, seed=seed).float()) for seed in (0, 1))
    truth = (one.matrix.double() * other.matrix.double()).sum()
    assert float(inner(one, other)) == pytest.approx(float(truth), rel=1e-13)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_and_rows_of_a_split_factor(groups: int) -> None:
    whole, delta = psd(6, seed=5, groups=groups), torch.randn(groups, 6, 3, dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 6), slice(6, 6)):
        columns, rows = Dense(whole[:, :, part]), Dense(whole[:, part])
        assert columns.size == rows.size == 6
        torch.testing.assert_close(rows.left(delta), (whole @ delta)[:, part])


class TestLeading:
    def test_shares_of_the_trace(self) -> None:
        basis = torch.linalg.qr(psd(4, seed=1)).Q
        values = torch.tensor([8.0, 4.0, 3.0, 1.0], dtype=torch.float64)
        found = Spectrum.of(basis * values @ basis.mT)
        torch.testing.assert_close(found.shares, torch.tensor([[8.0, 12, 15, 16]], dtype=torch.float64) / 16)
        one = found.leading(2)
        assert isinstance(one, LowRank)
        torch.testing.assert_close(dense(one), basis[:, :, :2] * values[:2] @ basis[:, :, :2].mT)
        assert float(one.trace() / 16) == pytest.approx(float(found.shares[0, 1]))
        assert one.vectors.is_contiguous()

    def test_the_whole_matrix_stays_as_it_is(self) -> None:
        matrix = psd(4, seed=2)
        assert Spectrum.of(matrix).leading(None) == Dense(matrix)

    def test_every_group_has_shares_of_its_own(self) -> None:
        matrix = torch.diag_embed(torch.tensor([[9.0, 0.5, 0.5], [0, 0, 0], [2, 0, 0]]))
        truth = torch.tensor([[0.9, 0.95, 1], [1, 1, 1], [1, 1, 1]], dtype=torch.float64)
        found = Spectrum.of(matrix)
        torch.testing.assert_close(found.shares, truth)
        torch.testing.assert_close(dense(found.leading(3)), matrix.double())

    @pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
    def test_any_scale_in_fp32(self, scale: float) -> None:
        matrix = (psd(9, seed=3, rank=2) * scale).float()
        found = Spectrum.of(matrix)
        assert float(found.shares[0, 1]) == pytest.approx(1)
        assert float(found.shares[0, -1]) == 1
        one = found.leading(2)
        assert isinstance(one, LowRank)
        assert one.vectors.dtype == torch.float32
        torch.testing.assert_close(dense(one), matrix.double(), rtol=0, atol=2e-3 * float(matrix.max()))

    def test_not_finite(self) -> None:
        with pytest.raises(DivergedError, match="size 3 is not finite"):
            Spectrum.of(torch.full((1, 3, 3), torch.inf))
