"""What a resumed run of several processes must agree on: the checkpoint, and what dropout draws."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.checkpoint import store
from hpccl.checkpoint.store import Mark, latest_of_all
from hpccl.dist.comm import Comm
from hpccl.engine.ddp import DdpEngine
from hpccl.errors import WorldError
from tests.dist.world import Result, run_in_world
from tests.run.method import merged

OLD, NEW = Mark.at(0, "fit", 50), Mark.at(0, "fit", 100)


def seen_late(comm: Comm, folder: str, after: float) -> Result:
    """The second rank has a list of the folder that is older by one checkpoint, until `after` seconds have passed."""
    own = Path(folder) / str(comm.rank)
    (own / OLD.name).mkdir(parents=True)
    if comm.rank == 0:
        (own / NEW.name).mkdir()
    else:
        threading.Thread(target=_made, args=(own / NEW.name, after), daemon=True).start()
    usual, store._UNSEEN = store._UNSEEN, 2.0
    try:
        found = latest_of_all(own, comm)
    except WorldError as error:
        return {"name": str(error)}
    finally:
        store._UNSEEN = usual  # this process goes on to other tests
    return {"name": "" if found is None else found.name}


def _made(path: Path, after: float) -> None:
    time.sleep(after)
    path.mkdir()


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_sees(tmp_path: Path) -> None:
    for found in run_in_world(seen_late, 2, tmp_path, str(tmp_path), 0.7):
        assert found["name"] == NEW.name


def test_a_checkpoint_that_not_all_ranks_see_is_told(tmp_path: Path) -> None:
    for found in run_in_world(seen_late, 2, tmp_path, str(tmp_path), 6.0):
        assert f"{NEW.name}' of the first process in 2 s" in found["name"]


def none_there(comm: Comm, folder: str) -> Result:
    return {"none": latest_of_all(Path(folder) / "nothing", comm) is None}


@pytest.mark.parametrize("size", [1, 2])
def test_no_checkpoint(tmp_path: Path, size: int) -> None:
    assert all(found["none"] for found in run_in_world(none_there, size, tmp_path, str(tmp_path)))


class Dropping(nn.Module):
    """Dropout as a function, which draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.layer(functional.dropout(pixels.flatten(1), 0.5, self.training))
        return found


def two_first_steps(comm: Comm) -> Result:
    """The same step, as the first of a process and as a later one."""
    torch.manual_seed(0)
    engine = DdpEngine(Dropping(), merged(), comm)
    engine.start(num_steps=4, task=0)
    logits = []
    for _ in range(2):
        torch.manual_seed(7 + comm.rank)
        found = engine.forward(torch.ones(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64))
        found.sum().backward()
        logits.append(found.detach())
    return {"first": logits[0], "later": logits[1]}


def test_the_first_step_of_a_process_draws_what_a_later_one_would(tmp_path: Path) -> None:
    for found in run_in_world(two_first_steps, 2, tmp_path):
        assert torch.equal(found["first"], found["later"])
