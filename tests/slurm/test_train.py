"""Whatever happens to a job on a real SLURM, its run ends with the weights of a run that nothing happened to."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from slurm.testbed.testbed import Testbed
from tests.run.command import SMALL, environment, events
from tests.slurm.cluster import ask, kill_rank, show, state, submit, wait_for, wait_for_state, wait_until_saved
from tests.slurm.runs import enter, hpccl, sha, steps, submitted, wait_for_steps, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of two local processes."""
    run = tmp_path_factory.mktemp("local") / "run"
    hpccl("train", *SMALL, f"folder={run}", "cluster.nproc=2", "cluster.threads=1", "log.quiet=true")
    return sha(run)


@pytest.mark.slow
def test_two_nodes_with_two_tasks_learn_what_four_local_processes_learn(cluster: Testbed, tmp_path: Path) -> None:
    job = submitted(tmp_path / "run", "cluster.tasks=2")
    here = tmp_path / "here"
    hpccl("train", *SMALL, f"folder={here}", "cluster.nproc=4", "cluster.threads=1", "log.quiet=true")
    assert weights(tmp_path / "run", job) == sha(here)
    (run,) = events(tmp_path / "run", "run")
    assert (run["world_size"], run["job"]) == (4, {"id": job, "restart": 0})
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").glob("rank-*"))
    assert logs == [f"rank-{rank}.txt" for rank in range(4)]


def test_a_run_survives_signal_preemption_a_killed_rank_and_a_lost_controller(
    cluster: Testbed, tmp_path: Path, undisturbed: str
) -> None:
    run = tmp_path / "run"
    job = submitted(run, "cluster.partition=low", "checkpoint.every=1000", "train.epochs=6")
    enter(run, job)
    ask("scancel", "--signal=USR2", job)  # what the time limit sends
    wait_for("the first restart", lambda: show(job)["Restarts"] == "1")
    saved = steps(run)
    enter(run, job)
    other = submit(tmp_path, "true", options=["-N3", "--exclusive", "-p", "high"])
    assert wait_for_state(other)["JobState"] == "COMPLETED"
    wait_for("the second restart", lambda: show(job)["Restarts"] == "2")
    enter(run, job)
    assert steps(run) > saved
    kill_rank(job, 1)
    wait_for("the third restart", lambda: show(job)["Restarts"] == "3")
    wait_for_state(job, "RUNNING")
    wait_until_saved(cluster)  # of a restart that it forgets slurmctld may think for minutes that it never was
    enter(run, job)
    assert state(job) == "RUNNING"
    cluster.kill_controller()
    cluster.start_controller()
    assert weights(run, job) == undisturbed
    assert show(job)["Restarts"] == "3", "the run went on without its controller"
    told = {(event["phase"], event["reason"]) for event in events(run, "stop")}
    assert ("fit", "signal SIGUSR2") in told
    assert not (run / "logs" / "error.json").exists(), "nobody had to mend anything"


@pytest.mark.slow
def test_a_restart_that_the_controller_forgot_can_be_asked_for_again(
    cluster: Testbed, tmp_path: Path, undisturbed: str
) -> None:
    run = tmp_path / "run"
    job = submitted(run)
    enter(run, job)
    wait_until_saved(cluster)
    kill_rank(job, 1)
    wait_for("the restart", lambda: show(job)["Restarts"] == "1")
    cluster.kill_controller()
    cluster.start_controller()
    wait_for("its answer", lambda: state(job) in ("RUNNING", "PENDING"))
    if show(job)["Restarts"] == "0":  # it takes the job for running, on nodes where nothing of it is left
        assert not _processes(job)
        ask("scontrol", "requeue", job)
    assert weights(run, job) == undisturbed


def test_a_run_goes_on_elsewhere_when_a_node_is_lost(cluster: Testbed, tmp_path: Path, undisturbed: str) -> None:
    run = tmp_path / "run"
    job = submitted(run)
    enter(run, job)
    cluster.power_off("n2")
    wait_for("another node", lambda: "n[1,3]" in ask("squeue", "-h", "-j", job, "-o", "%N"), 120)
    assert weights(run, job) == undisturbed


@pytest.mark.slow
def test_a_run_does_not_notice_that_a_daemon_was_killed_and_came_back(
    cluster: Testbed, tmp_path: Path, undisturbed: str
) -> None:
    run = tmp_path / "run"
    job = submitted(run)
    enter(run, job)
    cluster.kill_slurmd("n2")
    wait_for_steps(run, 3)
    cluster.start_slurmd("n2")
    assert weights(run, job) == undisturbed


@pytest.mark.slow
def test_the_time_limit_is_only_a_pause(cluster: Testbed, tmp_path: Path) -> None:
    # SLURM sends the signal up to a minute early and looks at limits every half minute: the run lasts longer.
    long = ("cluster.nodes=1", "train.epochs=300", "log.every=50")
    run, here = tmp_path / "run", tmp_path / "here"
    job = submitted(run, *long, "cluster.time=0:01:30", "cluster.save=25")
    hpccl("train", *SMALL, *long[1:], f"folder={here}", "cluster.threads=1", "log.quiet=true", timeout=300)
    assert weights(run, job, timeout=400) == sha(here)
    assert int(show(job)["Restarts"]) >= 1


def test_a_cancelled_run_can_be_submitted_again(cluster: Testbed, tmp_path: Path, undisturbed: str) -> None:
    run = tmp_path / "run"
    job = submitted(run, "checkpoint.every=1000")
    enter(run, job, more=20)
    ask("scancel", job)
    assert wait_for_state(job, "CANCELLED")["Restarts"] == "0"
    again = submitted(run, "checkpoint.every=1000")
    assert again != job
    assert weights(run, again) == undisturbed
    resumed = events(run, "run")[-1]["resumed"]
    assert resumed["step"] > 0, "what was learned before scancel was saved"


def test_an_error_of_the_users_ends_the_job(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = wait_for_state(submitted(run, "optim.lr=1e30", "train.clip_norm=null"))
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "1:0")
    told = (run / "logs" / "error.json").read_text()
    assert '"kind": "DivergedError"' in told


def test_a_job_that_never_gets_anywhere_is_not_started_for_ever(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run, "cluster.nodes=1")
    run.joinpath("logs/starts.jsonl").write_text(5 * f'{{"job": "{job}", "restart": 0, "place": "the beginning"}}\n')
    ended = wait_for_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "all began at the beginning" in run.joinpath("logs/error.json").read_text()


def test_an_array_of_four(cluster: Testbed, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    job = submitted(sweep, "cluster.nodes=1", "seed=0,1,2,3").partition("_")[0]
    runs = [sweep / f"seed={seed}" for seed in range(4)]
    found = [weights(run, f"{job}_{number}") for number, run in enumerate(runs)]
    assert len(set(found)) == 4
    again = hpccl("submit", *SMALL, "cluster.kind=slurm", f"folder={sweep}", "seed=0,1,2,3")
    assert [line.partition(":")[0] for line in again.splitlines()] == ["done already"] * 4


def test_a_run_is_not_submitted_twice(cluster: Testbed, tmp_path: Path) -> None:
    job = submitted(tmp_path / "run", "cluster.extra={hold: true}")
    arguments = [f"folder={tmp_path / 'run'}", *SMALL, "cluster.kind=slurm"]
    done = subprocess.run(
        ["hpccl", "submit", *arguments], text=True, capture_output=True, check=False, env={**os.environ}
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"already has job {job}" in done.stderr


@pytest.mark.slow
def test_a_campaign_is_a_chain_and_a_failure_cancels_what_waits(cluster: Testbed, tmp_path: Path) -> None:
    script = tmp_path / "campaign.py"
    script.write_text(CAMPAIGN.format(small=SMALL))
    command: list[str | Path] = [
        script,
        "--cluster",
        "slurm",
        "--with",
        "cluster.kind=slurm",
        "cluster.threads=1",
        "cluster.mem=1G",
    ]
    told = ask("python", *command, folder=tmp_path)
    jobs = [line.partition(":")[0] for line in told.splitlines()[:-1]]
    assert [wait_for_state(job)["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED"]
    assert (tmp_path / "runs" / "report" / "comparison.html").exists()
    assert steps(tmp_path / "runs" / "after") == 0
    found = json.loads(hpccl("status", tmp_path / "runs", "--json"))
    assert {Path(each["run"]).name: each["state"] for each in found} == {
        "first": "done",
        "bad": "failed",
        "after": "cancelled",
        "report": "done",
    }


@pytest.mark.slow
def test_a_report_that_waits_is_replaced_by_that_of_more_runs(cluster: Testbed, tmp_path: Path) -> None:
    script = tmp_path / "campaign.py"
    script.write_text(REPORTED.format(small=SMALL))
    settings = ("cluster.kind=slurm", "cluster.threads=1", "cluster.mem=1G", "cluster.extra={hold: true}")
    more = ("--cluster", "slurm", "--with", *settings)
    (first, report), (kept, second, new) = (
        [line.partition(":")[0] for line in ask("python", script, *seeds, *more, folder=tmp_path).splitlines()[:-1]]
        for seeds in (["--seeds=0"], ["--seeds=0,1"])
    )
    assert kept == first
    assert state(report) == "CANCELLED"
    assert show(new)["Dependency"].count("afterany") == 2
    hpccl("cancel", tmp_path / "runs")
    assert [wait_for_state(job)["JobState"] for job in (first, second, new)] == ["CANCELLED"] * 3


REPORTED = """
import sys
from pathlib import Path
from hpccl.cluster.campaign import Campaign, Step, carry_out, options
parser = options(None)
parser.add_argument("--seeds")
chosen = parser.parse_args()
runs = [f"runs/{{seed}}" for seed in chosen.seeds.split(",")]
steps = [Step(run, ("train", *{small}, f"folder={{run}}")) for run in runs]
steps.append(Step("report", ("report", *runs, "--out", "runs/report"), after=tuple(runs)))
sys.exit(carry_out(lambda: Campaign(Path("runs"), tuple(steps)), chosen))
"""


CAMPAIGN = """
import sys
from pathlib import Path
from hpccl.cluster.campaign import Campaign, Step, carry_out, options
small = {small}
steps = (
    Step("first", ("train", *small, "folder=runs/first")),
    Step("report", ("report", "runs/first", "--out", "runs/report"), after=("first",)),
    Step("bad", ("train", *small, "train.clip_norm=null", "optim.lr=1e30", "folder=runs/bad"), after=("first",)),
    Step("after", ("train", *small, "folder=runs/after"), after=("bad",)),
)
sys.exit(carry_out(lambda: Campaign(Path("runs"), steps), options(None).parse_args()))
"""


@pytest.mark.slow
def test_data_workers_survive_the_signal_and_leave_no_orphans(cluster: Testbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards = _shards(tmp_path)
    settings = (
        f"stream={{kind: shards, parts: [{{path: {shards}, tasks: 2}}]}}",
        "data={image_size: 16, storage: encoded, workers: 2}",
        "memory.size=8",
        "train.batch_size=8",
        "train.epochs=40",
    )
    job = submitted(run, *settings)
    enter(run, job)
    assert len(_processes(job)) > 5, "decoding processes are there"
    ask("scancel", "--signal=USR2", job)
    wait_for("the restart", lambda: show(job)["Restarts"] == "1")
    assert not (run / "logs" / "error.json").exists()
    assert events(run, "stop")[-1]["reason"] == "signal SIGUSR2"
    enter(run, job)
    kill_rank(job, 0)
    wait_for("no process of the job", lambda: state(job) != "RUNNING" and not _processes(job))
    weights(run, job)


def _shards(folder: Path) -> Path:
    """Four classes of ten images, of two sizes so that they are decoded each time."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for name in "abcd":
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                size = 20 + number % 2
                pixels = noise.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    hpccl("shards", "build", folder / "images", folder / "shards")
    return folder / "shards"


def _processes(job: str) -> list[int]:
    """All processes of a job's step."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    variables = {number: environment(number) for number in numbers}
    return [number for number, each in variables.items() if each.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in each]
