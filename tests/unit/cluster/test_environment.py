from __future__ import annotations

import pytest

from hpccl.cluster.environment import first_host, from_slurm
from hpccl.machine import SlurmJob, slurm_gpus, slurm_job

# As SLURM 22.05 sets them for rank 3 of `srun -N2 -n4` in the second start of a job.
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert from_slurm(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20041",
    }


def test_nodes_may_have_different_numbers_of_tasks() -> None:
    uneven = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}
    assert from_slurm(uneven)["LOCAL_WORLD_SIZE"] == "1"
    assert from_slurm({**uneven, "SLURM_NODEID": "0"})["LOCAL_WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script itself
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {**STEP, "RANK": "0"},  # torchrun's workers
    ],
)
def test_everything_else_is_none(environ: dict[str, str]) -> None:
    assert from_slurm(environ) == {}


def test_a_meeting_point_that_is_set_stays() -> None:
    found = from_slurm({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("rack[1-2]node[01,03]", "rack1node01"),
        ("a-b-[003-004].site", "a-b-003.site"),
    ],
)
def test_the_first_host_of_a_compact_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_job_of_a_process() -> None:
    assert slurm_job({}) is None
    assert slurm_job(STEP) == SlurmJob("41", 1)
    assert slurm_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == SlurmJob("7_2", 0)


def test_a_step_knows_its_gpus() -> None:
    assert slurm_gpus(STEP) is None
    assert slurm_gpus({"SLURM_JOB_GPUS": "0"}) is None, "not in a step"
    assert slurm_gpus({**STEP, "SLURM_JOB_GPUS": "0"}) == "SLURM_JOB_GPUS=0"
    assert slurm_gpus({**STEP, "SLURM_GPUS_ON_NODE": "2", "SLURM_STEP_GPUS": "0,1"}) == "SLURM_GPUS_ON_NODE=2"
    for none in ({"SLURM_GPUS_ON_NODE": "0"}, {"SLURM_STEP_GPUS": ""}):
        assert slurm_gpus({**STEP, **none}) is None
