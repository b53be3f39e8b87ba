"""Each identity against whole matrices in float64; equations are those at the top of hpccl/kron/merge.py."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpccl.kron import merge
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense
from hpccl.kron.merge import (
    closest,
    combine,
    gram,
    merge_error,
    nearest,
    nearest_weights,
    pooled_weights,
    refit,
    sum_norm,
)
from hpccl.kron.pair import Pair
from tests.unit.kron.oracle import IN, OUT, applied, low_rank, pair, pairs, psd, rearranged, whole, whole_sum


def dense_pair(a: Tensor, b: Tensor) -> Pair:
    return Pair(Dense(a), Dense(b))


def pooled(terms: Sequence[Pair], counts: Sequence[float]) -> Pair:
    return combine(terms, *pooled_weights(terms, counts))


def published() -> list[Pair]:
    """Two tasks whose merge errors are known: diag(2, 1), diag(1, 3) and [[1, .5], [.5, 1]], diag(2, 1)."""
    rows = [([[2.0, 0], [0, 1]], [[1.0, 0], [0, 3]]), ([[1.0, 0.5], [0.5, 1]], [[2.0, 0], [0, 1]])]
    return [dense_pair(*(torch.tensor([m], dtype=torch.float64) for m in row)) for row in rows]


class TestKnownNumbers:
    def error(self, found: Pair) -> float:
        truth = whole_sum(published())
        return float((whole(found) - truth).norm() / truth.norm())

    def test_pooled(self) -> None:
        assert self.error(pooled(published(), [7, 7])) == pytest.approx(0.1424, abs=5e-5)

    def test_nearest(self) -> None:
        assert self.error(nearest(published())) == pytest.approx(0.10165, abs=5e-6)

    def test_nearest_factors_up_to_what_moves_between_them(self) -> None:
        found = nearest(published())
        a = torch.tensor([[2.60359722, 0.30978913], [0.30978913, 1.61158774]], dtype=torch.float64)
        b = torch.diag(torch.tensor([1.65854331, 2.61095887], dtype=torch.float64))
        torch.testing.assert_close(whole(found)[0], torch.kron(b, a), rtol=0, atol=2e-8)
        torch.testing.assert_close(found.a.dense()[0] * a.trace() / found.a.trace(), a, rtol=0, atol=1e-8)

    def test_trace_ratios(self) -> None:
        total = sum(term.trace() for term in published())
        assert pooled(published(), [1, 1]).trace() / total == pytest.approx(0.972, abs=5e-4)
        assert nearest(published()).trace() / total == pytest.approx(0.9998, abs=5e-5)

    def test_error_from_grams_alone(self) -> None:
        K_A, K_B = gram(published())
        assert merge_error(K_A, K_B, [0, 1]) / sum_norm(K_A, K_B) == pytest.approx(0.10165, abs=5e-6)


def test_several_centres_cost_one_constant() -> None:
    """sum_t B_t (W - W_t) A_t = sum_t B_t (W - W_ref) A_t + sum_t B_t (W_ref - W_t) A_t."""
    terms = pairs(3, groups=2)
    weights, reference, *centres = torch.randn(5, 2, OUT, IN, dtype=torch.float64)
    truth = sum(applied(whole(term), weights - centre) for term, centre in zip(terms, centres, strict=True))
    constant = sum(term.matvec(reference - centre) for term, centre in zip(terms, centres, strict=True))
    found = sum(term.matvec(weights - reference) for term in terms) + constant
    torch.testing.assert_close(found, truth)


def test_the_error_of_pooling_is_a_covariance() -> None:
    """sum A_t (x) B_t - T Abar (x) Bbar = sum (A_t - Abar) (x) (B_t - Bbar)."""
    terms = pairs(4)
    a, b = torch.cat([term.a.dense() for term in terms]), torch.cat([term.b.dense() for term in terms])
    covariance = sum(torch.kron(y - b.mean(0), x - a.mean(0)) for x, y in zip(a, b, strict=True))
    found = whole_sum(terms) - whole(pooled(terms, [1.0] * 4))
    torch.testing.assert_close(found[0], covariance)


class TestGram:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("elements", [1, 1 << 22])
    def test_inner_products(self, groups: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merge, "_ELEMENTS", elements)
        terms = pairs(3, groups=groups)
        K_A, K_B = gram(terms)
        for found, factors in ((K_A, [t.a.dense() for t in terms]), (K_B, [t.b.dense() for t in terms])):
            flat = torch.stack(factors, 1).flatten(2)
            torch.testing.assert_close(found, torch.einsum("gsi,gti->gst", flat, flat))

    def test_of_low_rank(self) -> None:
        terms = [pair("low-dense", seed=1), pair("dense-low", seed=2), pair("low-low", seed=3)]
        dense = [dense_pair(term.a.dense(), term.b.dense()) for term in terms]
        for found, truth in zip(gram(terms), gram(dense), strict=True):
            torch.testing.assert_close(found, truth)

    def test_shares_of_split_factors_add_up(self) -> None:
        terms = pairs(3)
        parts = [slice(0, 3), slice(3, 3), slice(3, IN)]
        shares = [gram([Pair(Dense(t.a.dense()[:, :, part]), t.b) for t in terms]) for part in parts]
        torch.testing.assert_close(torch.stack([share[0] for share in shares]).sum(0), gram(terms)[0])

    def test_of_fp32_is_float64(self) -> None:
        terms = [dense_pair(t.a.dense().float(), t.b.dense().float()) for t in pairs(2)]
        wide = [dense_pair(t.a.dense().double(), t.b.dense().double()) for t in terms]
        for found, truth in zip(gram(terms), gram(wide), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-14, atol=0)


class TestNearest:
    @settings(max_examples=15)
    @given(st.integers(1, 5), st.integers(0, 1000))
    def test_is_the_first_singular_pair_and_positive(self, count: int, seed: int) -> None:
        terms = pairs(count, seed=seed)
        left, values, right = torch.linalg.svd(rearranged(whole_sum(terms)[0]))
        truth = values[0] * torch.kron(left[:, 0].view(OUT, OUT), right[0].view(IN, IN))
        found = nearest(terms)
        torch.testing.assert_close(whole(found)[0], truth)
        for factor in (found.a, found.b):
            assert float(torch.linalg.eigvalsh(factor.dense()).min()) >= -1e-12
        K_A, K_B = gram(terms)
        error = float(values[1:].norm())
        assert merge_error(K_A, K_B, range(count)) == pytest.approx(error, abs=1e-7 * float(values[0]))

    @pytest.mark.parametrize("count", [2, 3])
    def test_singular_values_of_the_rearrangement(self, count: int) -> None:
        terms = pairs(count)
        K_A, K_B = gram(terms)
        found = torch.linalg.eigvals(K_A[0] @ K_B[0]).real.clamp_min(0).sqrt().sort(descending=True).values
        truth = torch.linalg.svdvals(rearranged(whole_sum(terms)[0]))
        torch.testing.assert_close(found, truth[:count])
        assert float(truth[count:].max()) < 1e-10 * float(truth[0])

    def test_every_group_for_itself(self) -> None:
        terms = pairs(3, groups=2)
        together = whole(nearest(terms))
        for group in range(2):
            alone = [dense_pair(t.a.dense()[group, None], t.b.dense()[group, None]) for t in terms]
            torch.testing.assert_close(together[group, None], whole(nearest(alone)))

    def test_no_neighbour_is_nearer(self) -> None:
        terms = pairs(3)
        truth, found = whole_sum(terms), nearest(terms)
        least = float((whole(found) - truth).norm())
        for seed in range(8):
            a, b = psd(IN, seed=seed + 50), psd(OUT, seed=seed + 70)
            for sign in (-1e-3, 1e-3):
                other = dense_pair(found.a.dense() + sign * a, found.b.dense())
                assert float((whole(other) - truth).norm()) > least
                other = dense_pair(found.a.dense(), found.b.dense() + sign * b)
                assert float((whole(other) - truth).norm()) > least

    def test_a_is_a_mean_and_b_carries_the_sum(self) -> None:
        terms = pairs(3, groups=2)
        alpha, beta = nearest_weights(*gram(terms))
        assert bool((alpha >= 0).all())
        assert bool((beta >= 0).all())
        torch.testing.assert_close(alpha.sum(1), torch.ones(2, dtype=torch.float64))
        traces = torch.stack([term.a.trace() for term in terms], 1)
        torch.testing.assert_close(nearest(terms).a.trace(), (alpha * traces).sum(1))

    def test_identical_tasks(self) -> None:
        one = pair(seed=1)
        found = nearest([one] * 4)
        torch.testing.assert_close(found.a.dense(), one.a.dense())
        torch.testing.assert_close(found.b.dense(), 4 * one.b.dense())
        K_A, K_B = gram([one] * 4)
        assert merge_error(K_A, K_B, range(4)) <= 1e-7 * sum_norm(K_A, K_B)

    @pytest.mark.parametrize("shared", ["a", "b"])
    def test_exact_where_one_factor_is_shared(self, shared: str) -> None:
        first, second = pairs(2)
        second = Pair(first.a, second.b) if shared == "a" else Pair(second.a, first.b)
        torch.testing.assert_close(whole(nearest([first, second])), whole_sum([first, second]))

    def test_one_term_is_itself(self) -> None:
        (one,) = pairs(1)
        torch.testing.assert_close(whole(nearest([one])), whole(one))

    @pytest.mark.parametrize("zero", ["a", "b", "both"])
    def test_a_zero_term_changes_nothing(self, zero: str) -> None:
        first, second, third = pairs(3)
        a, b = (0 * third.a.dense() if zero != "b" else third.a.dense()), third.b.dense()
        nothing = dense_pair(1e20 * a, b if zero == "a" else 0 * b)
        alpha, beta = nearest_weights(*gram([first, nothing, second]))
        assert float(alpha[0, 1]) == float(beta[0, 1]) == 0
        found, truth = nearest([first, nothing, second]), nearest([first, second])
        torch.testing.assert_close(found.a.dense(), truth.a.dense())
        torch.testing.assert_close(found.b.dense(), truth.b.dense())

    @pytest.mark.parametrize("zero", ["a", "b", "both"])
    def test_only_zero_terms_in_one_group(self, zero: str) -> None:
        terms = pairs(2, groups=2)
        for term in terms:
            if zero != "b":
                term.a.dense()[0] = 0
            if zero != "a":
                term.b.dense()[0] = 0
        found = nearest(terms)
        assert not bool(whole(found)[0].any())
        assert bool(whole(found).isfinite().all())
        truth = nearest([dense_pair(t.a.dense()[1:], t.b.dense()[1:]) for t in terms])
        torch.testing.assert_close(whole(found)[1:], whole(truth))
        K_A, K_B = gram(terms)
        assert merge_error(K_A, K_B, [0, 1]) == pytest.approx(float((whole(found) - whole_sum(terms)).norm()))

    def test_positive_where_terms_do_not_overlap_and_tie(self) -> None:
        """K_A = K_B = 1: every combination leads, only those without a sign change are positive."""
        qa, qb = torch.linalg.qr(psd(IN, seed=1)).Q, torch.linalg.qr(psd(OUT, seed=2)).Q
        # Rotated, so that rounding hides the zeros that would keep a solver from mixing the terms.
        terms = [dense_pair(*(q[:, :, [place]] @ q[:, :, [place]].mT for q in (qa, qb))) for place in range(3)]
        found = nearest(terms)
        for factor in (found.a, found.b):
            assert float(torch.linalg.eigvalsh(factor.dense()).min()) >= -1e-12
        alpha, beta = nearest_weights(*gram(terms))
        torch.testing.assert_close(alpha, torch.full((1, 3), 1 / 3, dtype=torch.float64))
        torch.testing.assert_close(beta, torch.ones(1, 3, dtype=torch.float64))
        assert merge_error(*gram(terms), [0, 1, 2]) == pytest.approx(sqrt(2))
        assert float((whole(found) - whole_sum(terms)).norm()) == pytest.approx(sqrt(2))

    @pytest.mark.parametrize("scale", [1e-20, 1e20])
    def test_size_that_moves_between_the_factors_of_one_term(self, scale: float) -> None:
        terms = pairs(3)
        sizes = (1.0, scale, 1 / scale)
        moved = [dense_pair(t.a.dense() * size, t.b.dense() / size) for t, size in zip(terms, sizes, strict=True)]
        torch.testing.assert_close(whole(nearest(moved)), whole(nearest(terms)))

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_any_scale_in_fp32(self, scale: float) -> None:
        terms = [dense_pair((t.a.dense() * scale).float(), (t.b.dense() * scale).float()) for t in pairs(3)]
        found, truth = whole(nearest(terms)), whole(nearest(pairs(3))) * scale**2
        assert float((found - truth).norm() / truth.norm()) < 1e-6

    def test_low_rank_ones_give_a_dense_one(self) -> None:
        terms = [pair("low-low", seed=seed) for seed in range(3)]
        dense = [dense_pair(term.a.dense(), term.b.dense()) for term in terms]
        found = nearest(terms)
        assert isinstance(found.a, Dense)
        torch.testing.assert_close(whole(found), whole(nearest(dense)))

    def test_from_the_shares_of_split_factors(self) -> None:
        """As ranks do it: Gram matrices summed, then every rank combines its own columns."""
        terms = pairs(3)
        parts = [[Pair(Dense(t.a.dense()[:, :, some]), t.b) for t in terms] for some in (slice(0, 2), slice(2, IN))]
        K_A = sum((gram(part)[0] for part in parts), torch.zeros(1, 3, 3, dtype=torch.float64))
        weights = nearest_weights(K_A, gram(terms)[1])
        columns = [combine(part, *weights).a.dense() for part in parts]
        torch.testing.assert_close(torch.cat(columns, 2), nearest(terms).a.dense())


class TestPooled:
    def test_means_and_sums(self) -> None:
        first, second = pairs(2, groups=2)
        found = pooled([first, second], [30.0, 10.0])
        torch.testing.assert_close(found.a.dense(), 0.75 * first.a.dense() + 0.25 * second.a.dense())
        torch.testing.assert_close(found.b.dense(), first.b.dense() + second.b.dense())

    def test_exact_for_equal_factors(self) -> None:
        first, second = pairs(2)
        same_a = [first, Pair(first.a, second.b)]
        torch.testing.assert_close(whole(pooled(same_a, [3, 5])), whole_sum(same_a))
        same_b = [Pair(first.a, first.b.times(3)), Pair(second.a, first.b.times(5))]  # sums of 3 and 5 equal examples
        torch.testing.assert_close(whole(pooled(same_b, [3, 5])), whole_sum(same_b))

    def test_without_examples(self) -> None:
        assert bool(whole(pooled(pairs(2), [0.0, 0.0])).isfinite().all())


class TestErrors:
    def test_sum_norm(self) -> None:
        terms = pairs(3, groups=2)
        assert sum_norm(*gram(terms)) == pytest.approx(float(whole_sum(terms).norm()))

    @pytest.mark.parametrize("subset", [[0, 1], [0, 2, 3], [1], [3, 1]])
    def test_of_a_subset(self, subset: list[int]) -> None:
        terms = pairs(4, groups=2)
        chosen = [terms[place] for place in subset]
        truth = float((whole(nearest(chosen)) - whole_sum(chosen)).norm())
        assert merge_error(*gram(terms), subset) == pytest.approx(truth, abs=1e-6)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_closest_is_the_least_of_all(self, groups: int) -> None:
        terms = pairs(5, groups=groups)
        errors = {
            (i, j): float((whole(nearest([terms[i], terms[j]])) - whole(terms[i]) - whole(terms[j])).norm())
            for i in range(5)
            for j in range(i + 1, 5)
        }
        i, j, error = closest(*gram(terms))
        assert (i, j) == min(errors, key=errors.__getitem__)
        assert error == pytest.approx(errors[i, j])

    def test_closest_finds_the_twins(self) -> None:
        terms = pairs(4)
        i, j, error = closest(*gram([*terms, terms[1].times(0.5)]))
        assert (i, j) == (1, 4)
        assert error <= 1e-7 * terms[1].norm()

    def test_closest_needs_two(self) -> None:
        with pytest.raises(AssertionError, match="two terms"):
            closest(*gram(pairs(1)))


class TestRefit:
    def diagonal(self, found: Eigen, truth: Tensor) -> Tensor:
        basis = torch.stack([torch.kron(qb, qa) for qb, qa in zip(found.qb, found.qa, strict=True)])
        return (basis.mT @ truth @ basis).diagonal(dim1=1, dim2=2).view_as(found.values)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_the_diagonal_is_that_of_the_exact_sum(self, groups: int) -> None:
        low, eigen = pair("low-low", seed=7, groups=groups), Eigen.of(pair(seed=9, groups=groups))
        terms: list[Pair | Eigen] = [*pairs(2, groups=groups), low, eigen]
        found = refit(terms)
        torch.testing.assert_close(found.values, self.diagonal(found, whole_sum(terms)))
        assert found.trace() == pytest.approx(float(torch.einsum("gii->", whole_sum(terms))))

    def test_the_basis_is_that_of_the_nearest(self) -> None:
        terms = pairs(3)
        found, truth = refit(terms), nearest(terms)
        torch.testing.assert_close(found.qa * found.a[:, None] @ found.qa.mT, truth.a.dense())
        torch.testing.assert_close(found.qb * found.b[:, None] @ found.qb.mT, truth.b.dense())

    def test_no_other_diagonal_is_nearer(self) -> None:
        terms = pairs(3)
        truth, found = whole_sum(terms), refit(terms)
        least = float((whole(found) - truth).norm())
        for outputs in range(OUT):
            for inputs in range(IN):
                for step in (-0.1, 0.1):
                    values = found.values.clone()
                    values[0, outputs, inputs] += step
                    other = Eigen(found.qa, found.qb, values, found.a, found.b)
                    assert float((whole(other) - truth).norm()) > least

    def test_at_least_as_near_as_the_nearest_pair(self) -> None:
        terms = pairs(3)
        truth = whole_sum(terms)
        assert float((whole(refit(terms)) - truth).norm()) < float((whole(nearest(terms)) - truth).norm())

    def test_exact_where_terms_share_their_eigenvectors(self) -> None:
        generator = torch.Generator().manual_seed(1)
        qa, qb = torch.linalg.qr(psd(IN, seed=1)).Q, torch.linalg.qr(psd(OUT, seed=2)).Q
        terms = []
        for _ in range(3):
            a, b = (torch.rand(size, generator=generator, dtype=torch.float64) for size in (IN, OUT))
            terms.append(dense_pair(qa * a @ qa.mT, qb * b @ qb.mT))
        truth = whole_sum(terms)
        torch.testing.assert_close(whole(refit(terms)), truth)
        assert float((whole(nearest(terms)) - truth).norm()) > 1e-2 * float(truth.norm())
        # and one after the other, as tasks come
        torch.testing.assert_close(whole(refit([refit(terms[:2]), terms[2]])), truth)

    def test_of_one_eigen_is_itself(self) -> None:
        one = refit(pairs(2))
        torch.testing.assert_close(whole(refit([one])), whole(one))

    def test_again_keeps_the_trace(self) -> None:
        first, second, third = pairs(3)
        found = refit([refit([first, second]), third])
        assert found.trace() == pytest.approx(first.trace() + second.trace() + third.trace())
        assert bool((found.values >= 0).all())

    def test_low_rank_terms(self) -> None:
        terms = [Pair(low_rank(IN, 1, seed=seed), low_rank(OUT, 1, seed=seed + 5)) for seed in range(2)]
        found = refit(terms)
        torch.testing.assert_close(found.values, self.diagonal(found, whole_sum(terms)))

    def test_nothing_at_all(self) -> None:
        nothing = dense_pair(torch.zeros(2, IN, IN), torch.zeros(2, OUT, OUT))
        found = refit([nothing, nothing])
        assert found.trace() == 0
        assert bool(found.qa.isfinite().all())
