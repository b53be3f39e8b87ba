from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hpccl.kron.product import chain, chain_flops, matmul


def matrices(sizes: list[int], groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
        for rows, columns in itertools.pairwise(sizes)
    ]


@pytest.mark.parametrize("groups", [1, 3])
def test_matmul(groups: int) -> None:
    left, right = matrices([2, 5, 3], groups)
    torch.testing.assert_close(matmul(left, right), torch.einsum("gij,gjk->gik", left, right))


def fewest(sizes: tuple[int, ...]) -> int:
    """Multiplications of the best order, by trying all."""
    if len(sizes) == 2:
        return 0
    return min(
        sizes[place - 1] * sizes[place] * sizes[place + 1] + fewest(sizes[:place] + sizes[place + 1 :])
        for place in range(1, len(sizes) - 1)
    )


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 2))
def test_chain_is_the_product_in_the_cheapest_order(sizes: list[int], groups: int) -> None:
    chained = matrices(sizes, groups)
    truth = chained[0]
    for matrix in chained[1:]:
        truth = truth @ matrix
    counter = FlopCounterMode(display=False)
    with counter:
        found = chain(*chained)
    torch.testing.assert_close(found, truth)
    planned = chain_flops(*(matrix.shape for matrix in chained))
    assert counter.get_total_flops() == planned == 2 * groups * fewest(tuple(sizes))
