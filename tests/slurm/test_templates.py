"""The scripts of slurm/, submitted as a user without submitit does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slurm.testbed.testbed import Testbed
from tests.run.command import SMALL, events, report
from tests.slurm.cluster import ask, kill_rank, rank_pid, submit, wait_for, wait_for_state
from tests.slurm.conftest import ROOT

TEMPLATES = ROOT / "slurm"


def log(folder: Path, name: str) -> str:
    path = folder / f"{name}.log"
    return path.read_text() if path.exists() else ""


def test_the_network_check_meets_all_ranks(cluster: Testbed, tmp_path: Path) -> None:
    job = submit(tmp_path, TEMPLATES / "nccl_check.sbatch", options=["--nodes=2", "--ntasks-per-node=2"])
    ended = wait_for_state(job)
    told = log(tmp_path, job)
    assert ended["JobState"] == "COMPLETED", told
    ranks = [line.split()[:3] for line in told.splitlines() if line.split()[1:2] in (["n1"], ["n2"])]
    assert ranks == [["0", "n1", "cpu"], ["1", "n1", "cpu"], ["2", "n2", "cpu"], ["3", "n2", "cpu"]]
    assert "4 ranks on 2 hosts, backend gloo" in told
    assert "verdict: good" in told or "verdict: works" in told  # how fast is not for this machine to say


@pytest.mark.slow
def test_the_network_check_says_that_it_failed(cluster: Testbed, tmp_path: Path) -> None:
    """Rank 1 looks for the others on a host that is none of theirs."""
    environment = "--export=ALL,MASTER_ADDR=10.231.77.200,HPCCL_CHECK_TIMEOUT=2"
    job = submit(tmp_path, TEMPLATES / "nccl_check.sbatch", options=["--nodes=2", environment])
    assert wait_for_state(job)["JobState"] == "FAILED"
    assert "hpccl: verdict: FAILED with " in log(tmp_path, job)


@pytest.mark.slow
def test_shards_are_built_on_a_node_in_spite_of_a_warning(cluster: Testbed, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    for name in range(40):
        (tmp_path / "images" / f"{name:02}").mkdir(parents=True)
        for number in range(20):
            Image.fromarray(noise + number).save(tmp_path / "images" / f"{name:02}" / f"{number}.png")
    out = tmp_path / "shards"
    job = submit(tmp_path, TEMPLATES / "shards.sbatch", tmp_path / "images", out, options=["--cpus-per-task=2"])
    wait_for("the first shard", lambda: any(out.glob("train/*.tar")))
    ask("scancel", "--signal=TERM", job)
    assert wait_for_state(job)["JobState"] == "COMPLETED", log(tmp_path, job)
    assert "ended with 75 after 0 restarts: requeue\n" in log(tmp_path, job)
    assert (out / "train" / "manifest.json").exists()
    assert len(list((out / "train").glob("*.tar"))) == 40


def test_a_run_for_each_line_of_a_file(cluster: Testbed, tmp_path: Path) -> None:
    quick = " ".join((*SMALL, "train.epochs=1", "stream.tasks=2"))
    runs = [f"{quick} folder={tmp_path}/run-*'`id`-{number}" for number in range(2)]  # nothing is expanded
    (tmp_path / "runs.txt").write_text("# two runs\n\n" + "\n  ".join(runs) + "\n")
    job = submit(tmp_path, TEMPLATES / "array.sbatch", "runs.txt", options=["--array=0-2%2"])
    ended = [wait_for_state(f"{job}_{task}") for task in range(3)]
    assert [task["JobState"] for task in ended] == ["COMPLETED", "COMPLETED", "FAILED"], log(tmp_path, f"{job}_0")
    assert ended[2]["ExitCode"] == "2:0"
    assert "'runs.txt' has 2 runs, none with number 2; the first is 0" in log(tmp_path, f"{job}_2")
    assert all(report(tmp_path / f"run-*'`id`-{number}") for number in range(2))


@pytest.mark.slow
def test_a_run_on_two_nodes_survives_a_signal_and_a_killed_rank(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--nodes=2", "--ntasks-per-node=1", "--time=5"]
    job = submit(tmp_path, TEMPLATES / "train.sbatch", *SMALL, f"folder={run}", options=options)

    def steps() -> int:
        return len(events(run, "step"))

    wait_for("the first steps", lambda: steps() > 10)
    ask("scancel", "--signal=USR2", job)
    wait_for("the requeue", lambda: "ended with 75 after 0 restarts: requeue\n" in log(tmp_path, job))
    saved = steps()
    wait_for_state(job, "RUNNING")
    wait_for("more steps", lambda: steps() > saved + 10)
    assert rank_pid(job, 0) != rank_pid(job, 1)
    kill_rank(job, 1)
    ended = wait_for_state(job, timeout=200)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log(tmp_path, job)
    assert report(run)


def test_a_wrong_setting_is_told_and_not_run_again(cluster: Testbed, tmp_path: Path) -> None:
    options = ["--nodes=2", "--ntasks-per-node=1"]
    job = submit(tmp_path, TEMPLATES / "train.sbatch", "train.epoch=1", f"folder={tmp_path}/run", options=options)
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "train.epoch" in log(tmp_path, job)


@pytest.mark.parametrize("script", sorted(TEMPLATES.glob("*.sbatch")), ids=lambda path: str(path.name))
def test_outside_the_repository_a_template_says_where_it_looked(
    cluster: Testbed, tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HPCCL_HOME")
    job = submit(tmp_path, script, options=["--array=0-0"] if script.name == "array.sbatch" else [])
    task = f"{job}_0" if script.name == "array.sbatch" else job
    assert wait_for_state(task)["ExitCode"] == "2:0"
    assert f"{tmp_path}/slurm/env.sh: No such file" in log(tmp_path, task)
