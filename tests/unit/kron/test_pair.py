from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hpccl.kron.factor import Dense, LowRank, Spectrum
from hpccl.kron.pair import Pair
from tests.unit.kron.oracle import IN, OUT, applied, low_rank, pair, psd, whole

KINDS = ["dense-dense", "dense-low", "low-dense", "low-low"]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kinds", KINDS)
def test_equals_the_whole_kronecker_product(kinds: str, groups: int) -> None:
    one = pair(kinds, seed=1, groups=groups)
    matrix = whole(one)
    delta = torch.randn(groups, OUT, IN, dtype=torch.float64)
    torch.testing.assert_close(one.matvec(delta), applied(matrix, delta))
    assert one.trace() == pytest.approx(float(torch.einsum("gii->", matrix)))
    assert one.norm() == pytest.approx(float(matrix.norm()))
    torch.testing.assert_close(whole(one.times(0.3)), 0.3 * matrix)
    torch.testing.assert_close(whole(one.to(torch.device("cpu"))), matrix)
    assert one.num_bytes == one.a.num_bytes + one.b.num_bytes


@pytest.mark.parametrize("kinds", KINDS)
def test_halves(kinds: str) -> None:
    """The last product of all is left to the caller, who may add it to something; delta stays as it was."""
    one = pair(kinds, seed=1, groups=2)
    delta = torch.randn(2, OUT, IN, dtype=torch.float64)
    before = delta.clone()
    left, right = one.halves(delta)
    torch.testing.assert_close(left @ right, applied(whole(one), delta))
    assert torch.equal(delta, before)


def test_scaling_leaves_the_mean_alone() -> None:
    one = pair(seed=1)
    assert one.times(3.0).a is one.a


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from(KINDS))
def test_symmetric_and_never_negative(groups: int, outputs: int, inputs: int, kinds: str) -> None:
    a: Dense | LowRank = Dense(psd(inputs, seed=1, groups=groups))
    b: Dense | LowRank = Dense(psd(outputs, seed=2, groups=groups))
    if kinds.startswith("low"):
        a = low_rank(inputs, 2, seed=1, groups=groups)
    if kinds.endswith("low"):
        b = low_rank(outputs, 2, seed=2, groups=groups)
    one = Pair(a, b)
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, groups, outputs, inputs, generator=generator, dtype=torch.float64)
    assert float((first * one.matvec(first)).sum()) >= 0
    torch.testing.assert_close((first * one.matvec(second)).sum(), (second * one.matvec(first)).sum())


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 40), (40, 8)])
@pytest.mark.parametrize("kinds", KINDS)
def test_flops_are_those_executed(outputs: int, inputs: int, kinds: str) -> None:
    a: Dense | LowRank = low_rank(inputs, 2, seed=1) if kinds.startswith("low") else Dense(psd(inputs, seed=1))
    b: Dense | LowRank = low_rank(outputs, 2, seed=2) if kinds.endswith("low") else Dense(psd(outputs, seed=2))
    one = Pair(a, b)
    with FlopCounterMode(display=False) as counter:
        one.matvec(torch.randn(1, outputs, inputs, dtype=torch.float64))
    assert one.flops == counter.get_total_flops()
    dense = 2 * outputs * inputs * (outputs + inputs)
    assert one.flops == dense if kinds == "dense-dense" else one.flops < dense


def test_low_rank_on_one_side_spares_the_other() -> None:
    """B works on the r columns of D V, not on the d of D."""
    one = Pair(low_rank(100, 2, seed=1), Dense(psd(50, seed=2)))
    assert one.flops == 2 * (50 * 100 * 2 + 50 * 50 * 2 + 50 * 2 * 100)


def test_parts_of_a_split_factor_give_parts_of_the_product() -> None:
    one = pair(seed=4)
    delta = torch.randn(1, OUT, IN, dtype=torch.float64)
    parts = [Pair(Dense(one.a.dense()[:, :, some]), one.b) for some in (slice(0, 2), slice(2, IN))]
    torch.testing.assert_close(torch.cat([part.matvec(delta) for part in parts], 2), one.matvec(delta))
    rows = Pair(one.a, Dense(one.b.dense()[:, 1:3]))
    torch.testing.assert_close(rows.matvec(delta), one.matvec(delta)[:, 1:3])
    assert parts[0].flops < one.flops


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9])
def test_truncation_keeps_its_share_of_the_trace_of_every_group(keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = []
    for size in (20, 12):
        basis = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64)).Q
        factors.append(Dense(basis * torch.logspace(0, -3, size, dtype=torch.float64) @ basis.mT))
    one = Pair(*factors)
    found = one.truncated(keep)
    kept = torch.einsum("gii->g", whole(found)) / torch.einsum("gii->g", whole(one))
    assert bool((kept >= keep).all())
    assert bool((kept <= 1 + 1e-12).all())
    assert found.num_bytes < one.num_bytes
    assert found.flops < one.flops
    equally = Pair(*(Spectrum.of(factor.dense()).truncated(keep**0.5) for factor in (one.a, one.b)))
    assert found.flops <= equally.flops
    left_out = whole(one) - whole(found)
    assert float(torch.linalg.eigvalsh(left_out).min()) >= -1e-12


def test_truncating_again() -> None:
    once = pair("low-low", seed=5)
    torch.testing.assert_close(whole(once.truncated(1 - 1e-12)), whole(once))


def test_single_precision_stays_single() -> None:
    one = Pair(Dense(psd(IN, seed=0).float()), LowRank(torch.randn(1, OUT, 2), torch.rand(1, 2)))
    delta = torch.randn(1, OUT, IN)
    assert one.matvec(delta).dtype == torch.float32
    torch.testing.assert_close(one.matvec(delta).double(), applied(whole(one), delta), rtol=1e-4, atol=1e-4)
