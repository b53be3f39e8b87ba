"""Collectives: what a rank gets does not depend on how the work was cut."""

from pathlib import Path

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.dist.placement import owners
from tests.dist.world import Result, run_in_world


def collectives(comm: Comm) -> Result:
    """Each rank holds its share of range(10)."""
    mine = torch.tensor(list(comm.share(10)), dtype=torch.float32)
    several = [mine.sum().reshape(1), torch.ones(2, 2) * comm.rank, torch.tensor([comm.rank + 1])]
    comm.sum_(several)
    source = [torch.full((3,), float(comm.rank)), torch.tensor([comm.rank])]
    comm.broadcast_(source, source=comm.size - 1)
    return {
        "gathered": comm.gather(mine),
        "rows": comm.gather(mine[:, None].expand(-1, 2)),
        "nothing": comm.gather(torch.zeros(0, 3)),
        "equally many": comm.gather(torch.tensor([comm.rank, -1])),
        "flags": comm.gather(torch.tensor([comm.rank == 0] * (1 + comm.rank))),
        "sum": several[0],
        "ranks": several[1],
        "integers": several[2],
        "broadcast": source[0],
        "text": comm.broadcast_text(f"rank {comm.rank} ≥ 0", source=comm.size - 1),
        "empty": comm.broadcast_text("" if comm.rank == 0 else None),
        "any": comm.any(comm.rank == comm.size - 1),
        "none": comm.any(False),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size: int, tmp_path: Path) -> None:
    for found in run_in_world(collectives, size, tmp_path):
        assert torch.equal(found["gathered"], torch.arange(10.0))
        assert torch.equal(found["rows"], torch.arange(10.0)[:, None].expand(-1, 2))
        assert found["nothing"].shape == (0, 3)
        assert found["equally many"].tolist() == [number for rank in range(size) for number in (rank, -1)]
        assert found["flags"].tolist() == [rank == 0 for rank in range(size) for _ in range(1 + rank)]
        assert float(found["sum"]) == 45
        assert torch.equal(found["ranks"], torch.full((2, 2), float(sum(range(size)))))
        assert int(found["integers"]) == sum(range(1, size + 1))
        assert torch.equal(found["broadcast"], torch.full((3,), float(size - 1)))
        assert found["text"] == f"rank {size - 1} ≥ 0"
        assert found["empty"] == ""
        assert found["any"]
        assert not found["none"]


@pytest.mark.parametrize(("count", "size"), [(10, 3), (2, 4), (0, 2), (7, 7)])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [Comm(rank, size, torch.device("cpu")).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_placement_balances_and_does_not_depend_on_order() -> None:
    costs = {"a": 8.0, "b": 7.0, "c": 6.0, "d": 5.0, "e": 4.0}
    placed = owners(costs, 2)
    assert placed == owners(dict(reversed(costs.items())), 2)
    load = [sum(cost for name, cost in costs.items() if placed[name] == rank) for rank in range(2)]
    assert sorted(load) == [13.0, 17.0]  # longest first: a e d | b c -> 8+5+4, 7+6
    assert set(owners(costs, 1).values()) == {0}
