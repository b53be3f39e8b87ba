"""A wider last layer: the old outputs' curvature is as it was, that of new ones is zero."""

from __future__ import annotations

import pytest
import torch

from hpccl.config.curvature import PooledTasks
from hpccl.curvature.blocks import Block, Layout, Term
from hpccl.curvature.dense import DensePrecision
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.widen import widened
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, LowRank
from hpccl.kron.pair import Pair

OLD, NEW, INPUTS = 4, 7, 3
ROWS = {"head.weight": NEW, "head.bias": NEW}


def psd(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def terms() -> list[Term]:
    pair = Pair(Dense(psd(INPUTS + 1, 0)), Dense(psd(OLD, 1)))
    low = Pair(pair.a, LowRank(torch.randn(1, OLD, 2, generator=torch.Generator().manual_seed(2)), torch.ones(1, 2)))
    return [pair, low, Eigen.of(pair)]


@pytest.mark.parametrize("term", terms(), ids=("dense", "low_rank", "eigen"))
def test_a_product_is_that_of_the_old_rows(term: Term) -> None:
    layout = Layout("head", "head.weight", "head.bias", (OLD, INPUTS))
    rest = Diagonal({"norm.weight": torch.ones(2)}, 5.0)
    precision = Kronecker((Block(layout, (term,), (5.0,)),), rest, 5.0, PooledTasks(), (layout,))
    wide = widened(precision, ROWS)
    assert isinstance(wide, Kronecker)
    (block,), (found,) = wide.blocks, wide.layouts
    assert block.layout == found
    assert found.shape == (1, NEW, INPUTS + 1)
    assert wide.rest.values["norm.weight"].shape == (2,)
    delta = torch.randn(1, NEW, INPUTS + 1, generator=torch.Generator().manual_seed(3))
    product = block.terms[0].matvec(delta)
    torch.testing.assert_close(product[:, :OLD], term.matvec(delta[:, :OLD]), rtol=1e-4, atol=1e-4)
    assert not product[:, OLD:].any()
    if isinstance(block.terms[0], Eigen):
        basis = block.terms[0].qb[0]
        torch.testing.assert_close(basis.T @ basis, torch.eye(NEW), rtol=1e-5, atol=1e-5)
        assert bool((block.terms[0].b.diff() >= 0).all())


def test_a_diagonal_and_a_dense_matrix_have_zeros() -> None:
    diagonal = widened(Diagonal({"head.weight": torch.ones(OLD, INPUTS), "body.bias": torch.ones(2)}, 5.0), ROWS)
    assert isinstance(diagonal, Diagonal)
    assert diagonal.values["head.weight"].sum(1).tolist() == [INPUTS] * OLD + [0] * (NEW - OLD)
    shapes = {"head.bias": (OLD,), "body.bias": (2,)}
    matrix = psd(OLD + 2, 0)[0]
    dense = widened(DensePrecision(matrix, shapes, 5.0), ROWS)
    assert isinstance(dense, DensePrecision)
    assert dense.shapes == {"head.bias": (NEW,), "body.bias": (2,)}
    kept = torch.tensor([*range(OLD), NEW, NEW + 1])
    assert torch.equal(dense.matrix[kept[:, None], kept], matrix)
    assert float(dense.matrix.abs().sum()) == pytest.approx(float(matrix.abs().sum()))
