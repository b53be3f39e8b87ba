"""Tensors that no rank has whole come together, whatever part each rank has."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpccl.curvature.moments import InputMoment
from hpccl.curvature.sweep import zeros_for
from hpccl.dist import spread
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaf, Slab, Span, aligned, elements, fetch, streamed
from hpccl.engine.sharded import Mesh, shard
from tests.dist.world import Result, run_in_world


def tensors() -> dict[str, Tensor]:
    """Several dtypes, and sizes that no number of ranks divides."""
    return {
        "matrix": torch.arange(35.0).view(5, 7),
        "one": torch.tensor([3.5]),
        "double": torch.arange(11, dtype=torch.float64),
        "counts": torch.arange(100, 113).view(13, 1),
        "half": torch.arange(10).to(torch.bfloat16).view(2, 5),
        "tensor": torch.arange(24.0).view(2, 3, 4),
    }


def by_rows(value: Tensor, comm: Comm) -> Slab:
    """As FSDP2 cuts it: of few rows, some ranks have none."""
    span = Span.of_rows(tuple(value.shape), comm.rank, comm.size)
    return Slab(elements(value, span.start, span.stop).clone(), span)


def by_chance(value: Tensor, comm: Comm, seed: int) -> Slab:
    """Cut anywhere, parts given to ranks in another order; often empty."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(value.numel() + 1, (comm.size - 1,), generator=generator).sort().values.tolist()
    order = torch.randperm(comm.size, generator=generator).tolist()
    start, stop = list(zip([0, *cuts], [*cuts, value.numel()], strict=True))[order[comm.rank]]
    return Slab(elements(value, start, stop).clone(), Span(tuple(value.shape), start, stop))


def parts(comm: Comm, cut: str) -> dict[str, Leaf]:
    """All tensors in parts, and one that is whole among them."""
    made: dict[str, Leaf] = {
        name: by_rows(value, comm) if cut == "rows" else by_chance(value, comm, number)
        for number, (name, value) in enumerate(tensors().items())
    }
    return {"buffer": torch.tensor([1.0, 2.0]), **made}


def come_together(comm: Comm, cut: str, together: int) -> Result:
    """What `streamed` gives, and `fetch` where each rank asks for something else."""
    leaves = parts(comm, cut)
    wanted = [["matrix", "buffer"], ["double", "half"], []][comm.rank]
    before, spread._TOGETHER = spread._TOGETHER, together  # elements in one message
    try:
        return {"all": dict(streamed(leaves, comm)), "wanted": fetch(leaves, wanted, comm), "names": wanted}
    finally:
        spread._TOGETHER = before


@pytest.mark.parametrize("together", [1, 1 << 22])
@pytest.mark.parametrize("cut", ["rows", "chance"])
@pytest.mark.parametrize("size", [2, 3])
def test_streamed_and_fetched(tmp_path: Path, size: int, cut: str, together: int) -> None:
    expected = {"buffer": torch.tensor([1.0, 2.0]), **tensors()}
    for found in run_in_world(come_together, size, tmp_path, cut, together):
        assert list(found["all"]) == list(expected)
        assert sorted(found["wanted"]) == sorted(found["names"])
        for name, value in (*found["all"].items(), *found["wanted"].items()):
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name]), name


def realigned(comm: Comm) -> Result:
    """From one division to another, to none, and back."""
    wrong = []
    for number, (name, value) in enumerate(tensors().items()):
        there, other = by_rows(value, comm), by_chance(value, comm, number)
        moved = aligned(there, other, comm)
        assert isinstance(moved, Slab)
        full = aligned(other, value, comm)
        assert isinstance(full, Tensor)
        back = aligned(full, there, comm)
        assert isinstance(back, Slab)
        same = aligned(there, by_rows(value, comm), comm) is there
        right = (moved.span, back.span) == (other.span, there.span) and torch.equal(full, value)
        if not (same and right and torch.equal(moved.local, other.local) and torch.equal(back.local, there.local)):
            wrong.append(name)
    return {"wrong": wrong}


@pytest.mark.parametrize("size", [2, 3])
def test_aligned(tmp_path: Path, size: int) -> None:
    assert run_in_world(realigned, size, tmp_path) == [{"wrong": []}] * size


def measured_where_passes_are(comm: Comm) -> Result:
    """Devices of sums over a network whose shards rest elsewhere between passes: here, nowhere at all."""
    with torch.device("meta"):
        resting = torch.nn.Linear(4, 6)
    shard(resting, Mesh.of(comm, None))
    moment = InputMoment(resting, bias=True, sharing="expand")
    moment.add_(torch.ones(3, 4), 3, None)
    return {"sum": zeros_for(resting.weight).device.type, "moment": moment.matrix()}


def test_sums_are_where_passes_are(tmp_path: Path) -> None:
    for found in run_in_world(measured_where_passes_are, 2, tmp_path):
        assert found["sum"] == "cpu"
        torch.testing.assert_close(found["moment"], torch.full((1, 5, 5), 3.0))
