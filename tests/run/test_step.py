"""Tasks of a SLURM step, without SLURM: real processes with its variables."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpccl.cluster.local import pick_port
from tests.run.command import events, finish, kill_tree, ranks, start, wait_for_steps
from tests.run.method import weights


@contextmanager
def step(size: int, folder: Path, *settings: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The tasks of a step; what is left of them in the end is killed."""
    port, tasks = str(pick_port(0)), []
    with ExitStack() as cleanup:
        for rank in range(size):
            variables = {
                "HPCCL_STEP": "1",
                "SLURM_JOB_ID": "77",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NUM_TASKS": str(size),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": str(size),
                "SLURM_CPUS_PER_TASK": "1",
                "MASTER_PORT": port,
            }
            task = start(folder, *settings, **variables)
            tasks.append(task)
            cleanup.callback(kill_tree, task)
        yield tasks


def codes(tasks: Sequence[subprocess.Popen[str]]) -> list[int]:
    return [task.wait(timeout=200) for task in tasks]


SHORT = ("train.epochs=1", "stream.tasks=2", "cluster.timeout=60")


def test_a_sweep_in_one_step_goes_on_after_a_run_that_is_done(tmp_path: Path) -> None:
    """Ranks begin the next run while one of them still writes the report of the last."""
    done, sweep = tmp_path / "done", tmp_path / "sweep"
    with step(2, sweep / "seed=0", *SHORT, "seed=0") as tasks:
        assert codes(tasks) == [0, 0]
    with step(2, sweep, *SHORT, "seed=0,1") as tasks:
        assert codes(tasks) == [0, 0]
    assert len(events(sweep / "seed=0", "run")) == 1
    code, output = finish(start(done, *SHORT, "seed=1", "--nproc=2"))
    assert code == 0, output
    assert weights(sweep / "seed=1") == weights(done)


def test_a_wrong_command_has_a_code_that_others_do_not_hide(tmp_path: Path) -> None:
    with step(2, tmp_path, "train.epoch=1") as tasks:
        assert codes(tasks) == [202, 202]


def test_ranks_that_a_failure_parted_do_not_meet_again_in_another_run(tmp_path: Path) -> None:
    (tmp_path / "seed=0").mkdir()
    (tmp_path / "seed=0" / "events.jsonl").write_text('{"event": "run", "time": 1}\n')  # and no config.yaml
    with step(2, tmp_path, *SHORT, "seed=0,1") as (first, other):
        assert first.wait(timeout=200) == 201, "srun then ends the others"
        assert first.stdout is not None
        assert "the remaining runs (1) were not started" in first.stdout.read()
        assert other.poll() is None
    assert not (tmp_path / "seed=1" / "events.jsonl").exists()


def test_a_killed_rank_of_a_task_with_ranks_of_its_own_asks_to_run_again(tmp_path: Path) -> None:
    with step(1, tmp_path, "cluster.nproc=2", "train.epochs=2000") as (task,):
        wait_for_steps(tmp_path, task, 3)
        os.kill(ranks(task.pid)[1], signal.SIGKILL)
        assert task.wait(timeout=100) == 75
