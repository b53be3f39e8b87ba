from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

import hpccl
from hpccl.cluster.slurm import ENDED, parameters, python_command, seconds
from hpccl.cluster.submit import script
from hpccl.config.load import load, sweep
from hpccl.config.machine import SlurmCluster
from hpccl.errors import ConfigError

SLURM = "cluster.kind=slurm"


def cluster(*settings: str) -> SlurmCluster:
    found = load([], [SLURM, *settings]).cluster
    assert isinstance(found, SlurmCluster)
    return found


def one(*settings: str, dependency: str | None = None) -> str:
    (text,) = script(sweep([], [SLURM, *settings]), dependency=dependency)
    return text


@pytest.mark.parametrize(("text", "limit"), [("90", 5400), ("1:00:00", 3600), ("0:05:30", 330), ("2-12:00:00", 216000)])
def test_time_limits(text: str, limit: int) -> None:
    assert seconds(text) == limit


def test_every_key_reaches_the_script() -> None:
    text = one(
        "cluster.nodes=3",
        "cluster.gpus=4",
        "cluster.cpus=6",
        "cluster.mem=64G",
        "cluster.time=2:00:00",
        "cluster.partition=long",
        "cluster.account=me",
        "cluster.qos=high",
        "cluster.constraint=a100&ib",
        "cluster.exclude=n[1-2]",
        "cluster.save=200",
        "cluster.restarts=7",
        "cluster.interface=ib0",
        'cluster.modules=["cuda/12.8 gcc"]',
        'cluster.setup=["ulimit -n 65536"]',
        "cluster.environment={WORD: 'it is $HOME'}",
        "cluster.srun=['--gpu-bind=none']",
        "cluster.extra={exclusive: true, nodelist: 'n3,n4', hold: false}",
        "name=mine",
        dependency="afterok:12",
    )
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=64G",
        "#SBATCH --time=2:00:00",
        "#SBATCH --partition=long",
        "#SBATCH --account=me",
        "#SBATCH --qos=high",
        "#SBATCH --constraint='a100&ib'",
        "#SBATCH --exclude='n[1-2]'",
        "#SBATCH --signal=USR2@200",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --exclusive",
        "#SBATCH --nodelist=n3,n4",
        "#SBATCH --job-name=mine",
        "#SBATCH --dependency=afterok:12",
        "#SBATCH --kill-on-invalid-dep=yes",
        "export HPCCL_MAX_RESTARTS=7",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export OMP_NUM_THREADS=6",
        "export WORD='it is $HOME'",
        "module load cuda/12.8 gcc",
        "ulimit -n 65536",
        "hpccl_finish $?",
    ):
        assert line in text.splitlines(), line
    assert "hold" not in text
    (step,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none", "--block-signal=USR2"} <= set(shlex.split(step))


@pytest.mark.parametrize("value", ["/opt/lib:$LD_LIBRARY_PATH", "${LD_LIBRARY_PATH}:/opt/lib", "$LD_LIBRARY_PATH"])
def test_a_variable_does_not_refer_to_itself(value: str) -> None:
    with pytest.raises(ConfigError, match=r"write `export LD_LIBRARY_PATH=\.\.\.` into cluster.setup"):
        one(f"cluster.environment={{LD_LIBRARY_PATH: '{value}'}}")
    one("cluster.environment={LD_LIBRARY: '$LD_LIBRARY_PATH'}")


def test_all_memory_of_a_node() -> None:
    assert "#SBATCH --mem=0" in one("cluster.mem=0").splitlines()
    assert cluster("cluster.mem='0'").mem == "0"
    with pytest.raises(ConfigError, match=r"expected 0, or a size such as 64G \(in quotes if a number\)"):
        cluster("cluster.mem=false")


def test_the_script_is_bash_and_ends_with_the_code_of_the_step(tmp_path: Path) -> None:
    text = one()
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    # Nothing between the step and the call that reads its exit code.
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[-2].startswith("srun ")
    assert lines[-1] == "hpccl_finish $?"


def test_ranks_that_are_ended_before_they_listen_do_not_run_again_for_ever() -> None:
    """143 may hide a failure of which hpccl could not say anything."""
    source = Path(hpccl.__file__).parent / "cluster" / "requeue.sh"
    done = subprocess.run(
        ["bash", "-c", '. "$1"; hpccl_finish 143', "bash", str(source)],
        env={**os.environ, "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "5"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 143
    assert "not requeued: ranks are ended before they listen, again and again" in done.stderr


def test_a_sweep_is_one_array_unless_it_asks_for_different_machines() -> None:
    assert "#SBATCH --array=0-2%2" in one("seed=0,1,2", "cluster.array=2")
    assert len(list(script(sweep([], [SLURM, "cluster.nodes=1,2", "seed=0,1"])))) == 2


def test_containers_are_for_pyxis() -> None:
    text = one("cluster.container={image: my.sqsh, mounts: ['/data:/data']}", "cluster.python=python3")
    (step,) = [shlex.split(line) for line in text.splitlines() if line.startswith("srun ")]
    here = str(Path.cwd())
    assert "--container-image=my.sqsh" in step
    assert f"--container-mounts={here}:{here},/data:/data" in step
    assert f"--container-workdir={here}" in step
    assert "--no-container-mount-home" in step
    assert "python3" in step


def test_the_interpreter_is_quoted() -> None:
    assert shlex.split(python_command(cluster()))[:3] == ["env", "--block-signal=USR1", "--block-signal=USR2"]


@pytest.mark.parametrize("dependency", ["12", "afterok", "afterok:x", "afterok:1;reboot", "before:1"])
def test_other_dependencies_are_refused(dependency: str) -> None:
    with pytest.raises(ConfigError, match="dependency"):
        parameters(cluster(), name="x", dependency=dependency)


@pytest.mark.parametrize("dependency", ["afterok:12", "afterany:12:13", "afterok:12_3", "after:12+5"])
def test_what_sbatch_knows_is_passed_on(dependency: str) -> None:
    assert parameters(cluster(), name="x", dependency=dependency)["dependency"] == dependency


def test_a_limit_that_leaves_no_time_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster.save"):
        one("cluster.time=0:03:00", "cluster.save=150")


@pytest.mark.parametrize("key", ["parsable", "quiet", "test-only", "wait", "chdir", "help", "version"])
def test_what_would_hide_the_number_of_the_job_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster.extra.{key}.*is set by hpccl"):
        one(f"cluster.extra={{{key}: true}}")


def test_a_quotation_that_does_not_end_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"cluster.modules.*has an unclosed quotation mark: it's"):
        one('cluster.modules=["it\'s"]')


def test_no_line_of_the_script_comes_from_the_folder() -> None:
    with pytest.raises(ConfigError, match="text of one line"):
        one(r'folder="/tmp/a\ntouch /tmp/b"')


@pytest.mark.parametrize("folder", ["runs/50%", "runs/%j", r"runs/a\b"])
def test_names_that_slurm_reads_otherwise_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="SLURM interprets %"):
        one(f"folder={folder}")


def test_a_command_is_warned_by_sigterm_and_goes_on_in_its_next_start() -> None:
    told = parameters(cluster("cluster.save=90"), name="shards", command=True)
    assert told["additional_parameters"]["signal"] == "TERM@90"
    ended = "hpccl_finish() { echo finish $1; }\n(exit 143)\n" + "\n".join(told["teardown"])
    told_of = subprocess.run(["bash", "-c", ended], capture_output=True, text=True, check=True).stdout
    assert told_of == f"{ENDED}143\nfinish 75\n"
