from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpccl.kron.pack import pack, packed_size, unpack
from tests.unit.kron.oracle import psd


@settings(max_examples=15)
@given(st.integers(1, 3), st.sampled_from([1, 2, 127, 128, 129, 256, 300]))
def test_there_and_back(groups: int, size: int) -> None:
    matrix = psd(size, seed=0, rank=2, groups=groups)
    flat = pack(matrix)
    assert flat.shape == (packed_size(groups, size),)
    assert torch.equal(unpack(flat, groups, size), (matrix.tril() + matrix.tril(-1).mT))


def test_reads_the_lower_triangle_only() -> None:
    matrix = torch.rand(2, 200, 200)
    back = unpack(pack(matrix), 2, 200)
    assert torch.equal(back, matrix.tril() + matrix.tril(-1).mT)
    assert torch.equal(back, back.mT)


def test_sums_of_packed_are_packed_sums() -> None:
    first, second = psd(150, seed=1, rank=3), psd(150, seed=2, rank=3)
    torch.testing.assert_close(unpack(pack(first) + pack(second), 1, 150), first + second)


@pytest.mark.parametrize(("size", "overhead"), [(577, 0.25), (1153, 0.12), (4608, 0.03)])
def test_is_about_half(size: int, overhead: float) -> None:
    triangle = size * (size + 1) / 2
    assert triangle <= packed_size(1, size) <= (1 + overhead) * triangle


def test_a_column_view_packs_too() -> None:
    matrix = torch.rand(2, 140, 140)
    assert torch.equal(pack(matrix.mT), pack(matrix.mT.contiguous()))
    assert pack(matrix).dtype == torch.float32


def test_the_wrong_length_is_noticed() -> None:
    with pytest.raises(AssertionError, match="as long as"):
        unpack(torch.zeros(10), 1, 4)
