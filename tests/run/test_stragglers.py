"""A process that stands still: the others wait for it as long as they were told to, and say so."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.run.command import environment, events, finish, ranks, start, wait_for_steps

_TIMEOUT = 8


@pytest.mark.parametrize("held", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_is_held_while_it_trains(tmp_path: Path, held: int) -> None:
    folder = tmp_path / "run"
    process = start(folder, "--nproc=2", f"cluster.timeout={_TIMEOUT}")
    wait_for_steps(folder, process, 30)
    victims = ranks(process.pid)
    os.kill(victims[held], signal.SIGSTOP)
    began = time.monotonic()
    code, output = finish(process, timeout=90)
    assert code == 1
    assert time.monotonic() - began > _TIMEOUT - 1
    assert f"error: rank {1 - held} of 2 waited {_TIMEOUT} s (cluster.timeout) for another rank in vain" in output
    assert f"rank {held} did not answer (it was held by SIGSTOP) and was ended" in output
    assert "run the same command again to continue from the last checkpoint" in output
    assert output.count("error:") == 1, output
    assert "Traceback" not in output
    assert not any(environment(pid) for pid in victims.values()), "a rank was left behind"
    code, output = finish(start(folder, "--nproc=2"))  # another cluster.timeout is no other run
    assert code == 0, output
    assert events(folder, "run")[-1]["resumed"] is not None


def test_a_rank_is_held_before_it_meets_the_others(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--nproc=2", f"cluster.timeout={_TIMEOUT}")
    deadline = time.monotonic() + 60
    while 1 not in ranks(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks(process.pid)[1], signal.SIGSTOP)
    code, output = finish(process, timeout=120)
    assert code == 1
    assert f"error: rank 0 of 2 waited {_TIMEOUT} s (cluster.timeout) for another rank in vain" in output
    assert "rank 1 did not answer (it was held by SIGSTOP) and was ended" in output
    assert "Traceback" not in output
