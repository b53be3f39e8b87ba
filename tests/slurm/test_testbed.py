"""The test bed is a cluster of several hosts, breaks as told, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.testbed.testbed import Settings, Testbed, TestbedError
from tests.slurm.cluster import ask, kill_rank, state, submit, wait_for, wait_for_state
from tests.slurm.conftest import ROOT

SCRIPT = ROOT / "slurm" / "testbed" / "testbed.py"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name."""
    folder = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def command(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, str(SCRIPT), *arguments], text=True, capture_output=True, check=False, timeout=60
    )


def processes_in(namespaces: set[str]) -> list[str]:
    """Numbers of the processes, zombies apart, that live in one of these namespaces of process numbers."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended
            if entry.name.isdecimal() and os.readlink(entry / "ns" / "pid") in namespaces:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [entry.name] if state != "Z" else []
    return found


def namespaces_of(testbed: Testbed) -> set[str]:
    hosts = ("ctl", *testbed.nodes)
    return {os.readlink(f"/proc/{testbed.processes()[host][0]}/ns/pid") for host in hosts}


def test_tasks_of_a_step_are_on_hosts_of_their_own(cluster: Testbed) -> None:
    told = ask("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURM_PROCID $(hostname) $(hostname -I)")
    seen = {tuple(line.split()) for line in told.splitlines()}
    first, second = ("n1", "10.231.77.1"), ("n2", "10.231.77.2")
    assert seen == {("0", *first), ("1", *first), ("2", *second), ("3", *second)}


def test_jobs_that_ask_for_gpus_see_which(cluster: Testbed) -> None:
    assert ask("srun", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES").strip() == "0,1"


@pytest.mark.slow
def test_a_job_of_a_higher_partition_takes_the_nodes_of_a_lower_one(cluster: Testbed, tmp_path: Path) -> None:
    low = submit(tmp_path, "sleep 300", options=["-N3", "--exclusive", "-p", "low", "--requeue"])
    wait_for_state(low, "RUNNING")
    high = submit(tmp_path, "true", options=["-N3", "--exclusive", "-p", "high"])
    assert wait_for_state(high)["JobState"] == "COMPLETED"
    assert wait_for_state(low, "RUNNING")["Restarts"] == "1"


def test_sacct_answers_without_a_database(cluster: Testbed, tmp_path: Path) -> None:
    job = submit(tmp_path, "exit $SLURM_ARRAY_TASK_ID", options=["--array=0-1"])
    wait_for_state(f"{job}_0")
    wait_for_state(f"{job}_1")
    told = ask("sacct", "-o", "JobID,State,ExitCode", "--parsable2", "--noheader", "-j", job)
    assert set(told.splitlines()) == {f"{job}_0|COMPLETED|0:0", f"{job}_1|FAILED|1:0"}


def test_a_killed_daemon_leaves_the_job_alone(cluster: Testbed, tmp_path: Path) -> None:
    job = submit(tmp_path, "srun -n2 sleep 10", options=["-N2", "--no-requeue"])
    wait_for_state(job, "RUNNING")
    time.sleep(6)  # slurmctld saves what it knows every 5 seconds, and forgets the rest when it is killed
    cluster.kill_controller()
    cluster.kill_slurmd("n2")
    cluster.start_controller()
    cluster.start_slurmd("n2")
    assert wait_for_state(job)["JobState"] == "COMPLETED"


@pytest.mark.slow
def test_a_job_leaves_a_node_without_power(cluster: Testbed, tmp_path: Path) -> None:
    job = submit(tmp_path, "sleep 300", options=["-N2", "--requeue"])
    wait_for_state(job, "RUNNING")
    cluster.power_off("n2")
    wait_for("the job to run elsewhere", lambda: state(job) == "RUNNING" and "n[1,3]" in ask("squeue", "-h"))
    with pytest.raises(TestbedError, match="'n2' is not running"):
        cluster.run(["true"], "n2")


def test_a_pulled_cable_cuts_a_node_off(cluster: Testbed) -> None:
    reach = ["bash", "-c", "exec 3<>/dev/tcp/n2/6818"]
    cluster.run(reach, "n1", timeout=10)
    cluster.link("n2", up=False)
    with pytest.raises((TestbedError, subprocess.TimeoutExpired)):
        cluster.run(reach, "n1", timeout=4)
    cluster.link("n2", up=True)
    cluster.run(reach, "n1", timeout=10)


def test_a_node_that_was_off_is_reached_at_once(cluster: Testbed) -> None:
    reach = ["bash", "-c", "until exec 3<>/dev/tcp/n2/6818; do sleep 0.1; done"]
    cluster.run(reach, "n1", timeout=10)  # and remembers where n2 is
    cluster.power_off("n2")
    cluster.power_on("n2")
    cluster.run(reach, "n2", timeout=10)  # its daemon is there
    cluster.run([*reach[:2], "exec 3<>/dev/tcp/n2/6818"], "n1", timeout=2)


def test_a_rank_can_be_killed_from_outside(cluster: Testbed, tmp_path: Path) -> None:
    job = submit(tmp_path, "srun -n4 --kill-on-bad-exit=1 sleep 300", options=["-N2", "-n4"])
    wait_for_state(job, "RUNNING")
    kill_rank(job, 3)
    assert wait_for_state(job, timeout=60)["JobState"] == "FAILED"
    assert "task 3: Killed" in (tmp_path / f"{job}.log").read_text()


def test_nothing_is_left_after_down(place: Path, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    with Testbed(place / "c", Settings(nodes=2, gpus=0)) as testbed:
        testbed.run(["sbatch", "--wrap=srun -N2 sleep 300", "-N2", "-o", "/dev/null"])
        wait_for("the job", lambda: "RUNNING" in testbed.run(["squeue", "-h", "-o", "%T"]))
        namespaces = namespaces_of(testbed)
        assert len(processes_in(namespaces)) > 8
        numbers = [pid for pid, _ in testbed.processes().values()]
    assert not processes_in(namespaces)
    assert not [number for number in numbers if Path(f"/proc/{number}").exists()]
    assert Path("/proc/self/mounts").read_text() == mounts
    assert str(place) not in ask("ps", "-eo", "args")


def test_the_cluster_dies_with_its_python(place: Path) -> None:
    text = (
        "import sys; from slurm.testbed.testbed import Testbed\n"
        f"with Testbed('{place}/c'): print('up', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    namespaces = namespaces_of(Testbed.load(place / "c"))
    assert processes_in(namespaces)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for("the end of all", lambda: not processes_in(namespaces), 10)
    with Testbed(place / "c"):  # what a dead cluster left is no obstacle
        pass


def test_the_command_line_brings_up_runs_and_takes_down(place: Path) -> None:
    folder = str(place / "c")
    told = command("up", "-d", folder, "--nodes", "3", "--set", "KillWait=7")
    assert told.returncode == 0
    assert re.match(r"up in [\d.]+ s: login host ctl, nodes n1, n2, n3\n", told.stdout)
    try:
        again = command("up", "-d", folder)
        assert again.returncode == 1
        assert (
            again.stderr
            == f"testbed: a cluster is up in '{folder}' already; use it, or end it with `down -d {folder}`\n"
        )
        assert command("exec", "-d", folder, "--", "scontrol", "show", "config").stdout.count(
            "KillWait                = 7 "
        )
        assert command("exec", "-d", folder, "--node", "n3", "--", "hostname").stdout == "n3\n"
        assert (
            command("kill-slurmd", "-d", folder, "n4").stderr
            == "testbed: no node is called 'n4'; there are n1, n2, n3\n"
        )
        assert command("kill-node", "-d", folder, "n3").returncode == 0
        assert re.search(r"^n3 +dead$", command("status", "-d", folder).stdout, re.MULTILINE)
        assert command("start-node", "-d", folder, "n3").returncode == 0
        assert command("link", "-d", folder, "n3").stderr.startswith("testbed: wrong arguments of link: n3")
    finally:
        assert command("down", "-d", folder).returncode == 0
    assert command("down", "-d", folder).stderr.startswith(f"testbed: no cluster is up in '{folder}'")


# Another user, who may read all the same: the clone may lie where only its owner may.
NOBODY = (
    *("setpriv", "--reuid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@pytest.mark.parametrize(
    ("folder", "prefix", "message"),
    [
        ("/tmp/tb", NOBODY, "testbed: only root may make namespaces"),
        ("/tmp/" + "long" * 20, (), "testbed: DIR '/tmp/longlong"),
        ("/tmp/a b", (), "testbed: DIR '/tmp/a b' has 8 characters; allowed: 60, of letters"),
        ("/dev/shm/tb", (), "testbed: DIR '/dev/shm/tb' would differ"),
        (
            "/tmp/tb-never",
            ("unshare", "--net", "setpriv", "--bounding-set=-sys_admin"),
            "testbed: this machine makes no",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(folder: str, prefix: tuple[str, ...], message: str) -> None:
    told = command("up", "-d", folder, prefix=prefix)
    assert told.returncode == 1
    assert told.stderr.startswith(message)
    assert told.stderr.count("\n") == 1
