"""Parts of tensors: what ranks have is the whole, once; any run of elements can be asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, Slab, Span, aligned, elements, fetch, placed_whole, streamed, whole, wholes

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@given(shape=SHAPES, size=st.integers(1, 9))
def test_rows_of_all_ranks_are_the_tensor_once(shape: tuple[int, ...], size: int) -> None:
    value = numbered(shape)
    spans = [Span.of_rows(shape, rank, size) for rank in range(size)]
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert (spans[0].start, spans[-1].stop, sum(span.numel for span in spans)) == (0, value.numel(), value.numel())
    parts = [elements(value, span.start, span.stop) for span in spans]
    assert torch.equal(torch.cat(parts), value.flatten())


@given(shape=SHAPES, size=st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(shape: tuple[int, ...], size: int) -> None:
    """Which is how FSDP2 cuts a parameter."""
    value = numbered(shape)
    chunks = [chunk.flatten() for chunk in value.chunk(size)]
    chunks += [value.new_zeros(0)] * (size - len(chunks))
    for rank, chunk in enumerate(chunks):
        span = Span.of_rows(shape, rank, size, copy=2)
        assert span.copy == 2
        assert torch.equal(elements(value, span.start, span.stop), chunk)


def test_elements_are_in_row_major_order_whatever_the_layout_in_memory() -> None:
    value = numbered((2, 3, 4, 5))
    other = value.contiguous(memory_format=torch.channels_last)
    assert torch.equal(elements(other, 7, 100), torch.arange(7.0, 100.0))


def test_elements_of_a_part_are_counted_in_the_whole() -> None:
    slab = Slab(torch.arange(6.0, 12.0), Span((4, 5), 6, 12))
    assert slab.shape == (4, 5)
    assert elements(slab, 6, 12).tolist() == [6, 7, 8, 9, 10, 11]
    assert elements(slab, 8, 10).tolist() == [8, 9]
    assert elements(slab, 9, 9).tolist() == []
    for start, stop in ((5, 8), (8, 13)):
        with pytest.raises(AssertionError, match="its own part only"):
            elements(slab, start, stop)


class InFiles:
    """The Stored protocol on a tensor."""

    shape = (3, 4)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.arange(float(start), float(stop))


def test_what_is_stored_is_read_by_elements_and_whole() -> None:
    assert elements(InFiles(), 5, 8).tolist() == [5, 6, 7]
    assert torch.equal(whole(InFiles()), numbered((3, 4)))
    slab = Slab(torch.zeros(1), Span((1,), 0, 1))
    placed = placed_whole({"a": InFiles(), "b": torch.ones(2), "c": slab})
    assert placed.keys() == {"a", "b"}
    assert torch.equal(placed["a"], numbered((3, 4)))


def full(value: Tensor) -> Slab:
    """What one rank has of a tensor that is spread over one."""
    return Slab(value.flatten(), Span(tuple(value.shape), 0, value.numel()))


def test_one_rank_has_everything() -> None:
    comm = Comm.solo()
    leaves: dict[str, Leaf] = {
        "whole": torch.ones(2),
        "spread": full(numbered((3, 2))),
        "double": full(numbered((2, 2)).double()),
        "counts": full(torch.arange(4)),
    }
    found = dict(streamed(leaves, comm))
    assert list(found) == list(leaves)
    assert torch.equal(found["spread"], numbered((3, 2)))
    assert (found["double"].dtype, found["counts"].dtype) == (torch.float64, torch.int64)
    assert torch.equal(found["counts"], torch.arange(4))
    assert fetch(leaves, ["double", "whole"], comm).keys() == {"double", "whole"}
    assert fetch({"whole": torch.ones(2)}, [], comm) == {}


def test_a_tensor_becomes_a_part_and_a_part_a_tensor() -> None:
    comm, value = Comm.solo(), numbered((3, 2))
    assert aligned(value, torch.zeros(3, 2), comm) is value
    part = aligned(value, full(torch.zeros(3, 2)), comm)
    assert isinstance(part, Slab)
    assert torch.equal(part.local, value.flatten())
    assert aligned(part, full(torch.zeros(3, 2)), comm) is part
    back = aligned(part, torch.zeros(3, 2), comm)
    assert isinstance(back, Tensor)
    assert torch.equal(back, value)


def test_parts_are_refused_where_all_must_be_whole() -> None:
    assert wholes({"a": torch.ones(1)}).keys() == {"a"}
    with pytest.raises(AssertionError, match="spread over ranks"):
        wholes({"a": torch.ones(1), "b": full(torch.ones(1))})
