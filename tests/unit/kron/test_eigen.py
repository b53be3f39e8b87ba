from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hpccl.errors import DivergedError
from hpccl.kron.eigen import Eigen, symmetric_eigh
from tests.unit.kron.oracle import IN, OUT, applied, pair, psd, whole


def check(matrix: Tensor, *, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors and ascending values that rebuild the matrix; returns both."""
    values, vectors = symmetric_eigh(matrix)
    assert values.dtype == vectors.dtype == matrix.dtype
    assert values.shape == matrix.shape[:2]
    assert vectors.shape == matrix.shape
    assert bool((values >= 0).all())
    assert bool((values.diff(dim=1) >= 0).all())
    identity = torch.eye(matrix.shape[1], dtype=torch.float64).expand_as(matrix)
    wide_values, wide = values.double(), vectors.double()
    torch.testing.assert_close(wide.mT @ wide, identity, rtol=0, atol=tolerance)
    for one, mine, basis in zip(matrix.double(), wide_values, wide, strict=True):
        torch.testing.assert_close(basis * mine @ basis.mT, one, rtol=0, atol=tolerance * float(one.abs().max()))
    return values, vectors


class TestSymmetricEigh:
    @pytest.mark.parametrize("groups", [1, 3])
    def test_rebuilds_the_matrix(self, groups: int) -> None:
        matrix = psd(7, seed=0, groups=groups)
        values, _ = check(matrix)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix))

    def test_dead_channels_get_exact_unit_vectors(self) -> None:
        matrix = psd(8, seed=1)
        dead = [0, 3, 4]
        matrix[:, dead] = 0
        matrix[:, :, dead] = 0
        values, vectors = check(matrix)
        assert values[0, :3].tolist() == [0, 0, 0]
        assert vectors[0, dead, [0, 1, 2]].tolist() == [1, 1, 1]
        assert not bool(vectors[0, dead, 3:].any())

    def test_other_dead_channels_in_every_group(self) -> None:
        matrix = psd(5, seed=2, groups=4)
        for group, dead in enumerate(([1], [1, 4], [], [1])):
            matrix[group, dead] = 0
            matrix[group, :, dead] = 0
        check(matrix)

    def test_zero(self) -> None:
        values, vectors = check(torch.zeros(2, 4, 4))
        assert not bool(values.any())
        assert torch.equal(vectors, torch.eye(4).expand(2, 4, 4))

    def test_one_group_is_zero(self) -> None:
        matrix = psd(4, seed=3, groups=3)
        matrix[1] = 0
        values, _ = check(matrix)
        assert values.any(1).tolist() == [True, False, True]

    def test_repeated_eigenvalues(self) -> None:
        check(torch.eye(50)[None] * 3, tolerance=1e-6)
        basis = torch.linalg.qr(psd(30, seed=4)).Q
        values, _ = check(basis * torch.tensor([2.0] * 15 + [0.5] * 15, dtype=torch.float64) @ basis.mT)
        torch.testing.assert_close(values[0], torch.tensor([0.5] * 15 + [2.0] * 15, dtype=torch.float64))

    def test_rank_far_below_size(self) -> None:
        values, _ = check(psd(120, seed=5, rank=3).float(), tolerance=1e-5)
        assert bool((values[0, :-3] <= 1e-6 * values[0, -1]).all())

    def test_rank_one_of_many_equal_rows(self) -> None:
        values, _ = check(torch.ones(1, 90, 90), tolerance=1e-5)
        torch.testing.assert_close(values[0, -1], torch.tensor(90.0))

    @pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e20, 1e35])
    def test_any_scale_in_fp32(self, scale: float) -> None:
        matrix = psd(20, seed=6, rank=8, groups=2)
        matrix[0] *= scale
        check(matrix.float(), tolerance=1e-5)

    def test_symmetrises(self) -> None:
        matrix = psd(6, seed=7) + torch.triu(torch.full((6, 6), 1e-3, dtype=torch.float64), 1)
        values, vectors = symmetric_eigh(matrix)
        torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, (matrix + matrix.mT) / 2)

    def test_leaves_its_argument_alone(self) -> None:
        matrix = psd(6, seed=7)
        before = matrix.clone()
        symmetric_eigh(matrix)
        assert torch.equal(matrix, before)

    @settings(max_examples=20)
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99))
    def test_any_size_rank_and_dead_channels(self, size: int, rank: int, groups: int, dead: int, seed: int) -> None:
        matrix = psd(size, seed=seed, rank=min(rank, size), groups=groups)
        matrix[0, :dead] = 0
        matrix[0, :, :dead] = 0
        check(matrix, tolerance=1e-11)

    def test_falls_back_to_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        solve, seen = torch.linalg.eigh, []

        def fails_in_fp32(matrix: Tensor) -> object:
            seen.append(matrix.dtype)
            if matrix.dtype == torch.float32:
                matrix.fill_(torch.nan)  # as a failed solver leaves it
                raise RuntimeError("the algorithm failed to converge")
            return solve(matrix)

        monkeypatch.setattr(torch.linalg, "eigh", fails_in_fp32)
        check(psd(6, seed=8).float(), tolerance=1e-6)
        assert seen == [torch.float32, torch.float64]

    def test_falls_back_where_the_solver_silently_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        solve = torch.linalg.eigh

        def silent(matrix: Tensor) -> tuple[Tensor, Tensor]:
            values, vectors = solve(matrix)
            return values, vectors * (torch.nan if matrix.dtype == torch.float32 else 1)

        monkeypatch.setattr(torch.linalg, "eigh", silent)
        check(psd(6, seed=8).float(), tolerance=1e-6)

    def test_no_solver_converges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(matrix: Tensor) -> object:
            raise RuntimeError("the algorithm failed to converge")

        monkeypatch.setattr(torch.linalg, "eigh", fails)
        with pytest.raises(DivergedError, match="size 6") as caught:
            symmetric_eigh(psd(6, seed=8))
        assert "failed to converge" in str(caught.value.__cause__)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_not_finite(self, bad: float) -> None:
        matrix = psd(3, seed=0)
        matrix[0, 1, 2] = bad
        with pytest.raises(DivergedError, match="size 3 is not finite"):
            symmetric_eigh(matrix)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kinds", ["dense-dense", "low-dense", "low-low"])
def test_of_a_pair_is_the_pair(kinds: str, groups: int) -> None:
    one = pair(kinds, seed=3, groups=groups)
    found = Eigen.of(one)
    torch.testing.assert_close(whole(found), whole(one))
    delta = torch.randn(groups, OUT, IN, dtype=torch.float64)
    torch.testing.assert_close(found.matvec(delta), one.matvec(delta))


def test_equals_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    of = Eigen.of(pair(seed=3, groups=2))
    values = torch.rand(2, OUT, IN, generator=generator, dtype=torch.float64)
    found = Eigen(of.qa, of.qb, values, of.a, of.b)
    matrix, delta = whole(found), torch.randn(2, OUT, IN, dtype=torch.float64)
    torch.testing.assert_close(found.matvec(delta), applied(matrix, delta))
    assert found.trace() == pytest.approx(float(torch.einsum("gii->", matrix)))
    assert found.norm() == pytest.approx(float(matrix.norm()))
    torch.testing.assert_close(whole(found.times(0.25)), 0.25 * matrix)
    torch.testing.assert_close(whole(found.to(torch.device("cpu"))), matrix)
    assert found.num_bytes == 8 * 2 * (IN * IN + OUT * OUT + OUT * IN + IN + OUT)


def test_flops_are_those_executed() -> None:
    found, delta = Eigen.of(pair(seed=3, groups=2)), torch.randn(2, OUT, IN, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found.matvec(delta)
    assert found.flops == counter.get_total_flops() == 2 * 2 * 2 * OUT * IN * (OUT + IN)


def test_times_scales_what_the_next_basis_is_found_from() -> None:
    found = Eigen.of(pair(seed=3))
    scaled = found.times(4.0)
    torch.testing.assert_close(scaled.values, scaled.b[:, :, None] * scaled.a[:, None, :])
