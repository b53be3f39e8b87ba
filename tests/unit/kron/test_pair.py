from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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


def spectrum(size: int, *, decay: float, seed: int, groups: int = 1) -> Dense:
    """With eigenvalues from 1 down to 10^-decay."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(groups, size, size, generator=generator, dtype=torch.float64)).Q
    return Dense(basis * torch.logspace(0, -decay, size, dtype=torch.float64) @ basis.mT)


def choices(one: Pair) -> Iterator[Pair]:
    """Every pair of leading eigenvectors and whole matrices."""
    factors = []
    for each in (one.a, one.b):
        spectral = Spectrum.of(each.dense())
        factors.append([each, *(spectral.leading(rank) for rank in range(1, each.size + 1))])
    return (Pair(a, b) for a, b in product(*factors))


def kept(some: Pair, one: Pair) -> Tensor:
    """[g] share of the trace of each group."""
    return torch.einsum("gii->g", whole(some)) / torch.einsum("gii->g", whole(one))


def halved(one: Pair, keep: float) -> Pair:
    """Each factor by itself, of low rank up to half of its size."""
    spectra = [Spectrum.of(factor.dense()) for factor in (one.a, one.b)]
    ranks = [int((spectral.shares < keep**0.5).sum(1).max()) + 1 for spectral in spectra]
    sizes = [one.a.size, one.b.size]
    low = [rank if 2 * rank <= size else None for rank, size in zip(ranks, sizes, strict=True)]
    return Pair(*(spectral.leading(rank) for rank, spectral in zip(low, spectra, strict=True)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.tuples(st.integers(1, 6), st.integers(1, 8)),
    st.tuples(st.floats(0, 3), st.floats(0, 3)),
    st.floats(0.3, 0.999),
)
def test_truncation_is_the_cheapest_that_keeps_its_share(
    groups: int, sizes: tuple[int, int], decays: tuple[float, float], keep: float
) -> None:
    b, a = (spectrum(size, decay=decay, seed=size, groups=groups) for size, decay in zip(sizes, decays, strict=True))
    one = Pair(a, b)
    found = one.truncated(keep)
    assert float(kept(found, one).min()) >= keep - 1e-9
    best = min((some.flops, some.num_bytes) for some in choices(one) if float(kept(some, one).min()) >= keep + 1e-9)
    assert (found.flops, found.num_bytes) <= best
    assert found.flops <= min(one.flops, halved(one, keep).flops)
    assert found.num_bytes <= one.num_bytes
    delta = torch.randn(groups, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.matvec(delta), applied(whole(found), delta))
    assert float(torch.linalg.eigvalsh(whole(one) - whole(found)).min()) >= -1e-9


def test_b_of_more_than_half_its_rank_spares_a_rows() -> None:
    """A 3 x 3 convolution: nearly all operations are those with A, one row of D at a time."""
    values = torch.ones(8, dtype=torch.float64)
    values[6:] = 1e-3
    one = Pair(Dense(torch.eye(72, dtype=torch.float64)[None]), Dense(torch.diag(values)[None]))
    found = one.truncated(0.99)
    assert isinstance(found.b, LowRank)
    assert found.b.values.shape == (1, 6)
    assert isinstance(found.a, Dense)
    assert found.flops == 2 * (6 * 8 * 72 + 6 * 72 * 72 + 8 * 6 * 72)
    assert found.flops < 0.9 * one.flops


def test_the_neediest_group_decides_the_ranks() -> None:
    rows = torch.tensor([[9.0, 0.5, 0.5, 0, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.float64)
    one = Pair(Dense(torch.diag_embed(rows)), Dense(torch.ones(2, 1, 1, dtype=torch.float64)))
    found = one.truncated(0.9)
    assert isinstance(found.a, LowRank)
    assert found.a.values.shape == (2, 3)
    torch.testing.assert_close(whole(found), whole(one))


def test_a_group_without_trace_needs_nothing() -> None:
    rows = torch.tensor([[9.0, 0.5, 0.3, 0.2, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    found = Pair(Dense(torch.diag_embed(rows)), Dense(torch.ones(2, 1, 1, dtype=torch.float64))).truncated(0.9)
    assert isinstance(found.a, LowRank)
    assert found.a.values.shape == (2, 1)


def test_whole_where_nothing_is_cheaper() -> None:
    one = Pair(Dense(torch.eye(4, dtype=torch.float64)[None]), Dense(torch.eye(4, dtype=torch.float64)[None]))
    assert one.truncated(0.9) == one


def test_truncating_again() -> None:
    once = pair("low-low", seed=5)
    torch.testing.assert_close(whole(once.truncated(1 - 1e-12)), whole(once))


def test_single_precision_stays_single() -> None:
    one = Pair(Dense(psd(IN, seed=0).float()), LowRank(torch.randn(1, OUT, 2), torch.rand(1, 2)))
    delta = torch.randn(1, OUT, IN)
    assert one.matvec(delta).dtype == torch.float32
    torch.testing.assert_close(one.matvec(delta).double(), applied(whole(one), delta), rtol=1e-4, atol=1e-4)
