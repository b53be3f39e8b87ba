from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from hpccl.cli.jobs import _together
from hpccl.cluster.prepare import prepare
from hpccl.cluster.queue import JobState
from hpccl.cluster.records import JobRecord, birth, read_records, write_record
from hpccl.cluster.slurm import parameters
from hpccl.cluster.submit import check, script, submit, submit_command
from hpccl.config.load import load, sweep
from hpccl.config.machine import SlurmCluster
from hpccl.errors import ConfigError, DataError, FolderError, WorldError
from hpccl.folder import RunFolder
from tests.run.command import SMALL, events, hpccl

Patch: TypeAlias = Callable[[str, object], None]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    return monkeypatch.setattr


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without SLURM, wherever the tests run."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def test_a_machine_without_slurm_says_so(no_slurm: None, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"no sbatch, srun, scontrol, squeue on PATH"):
        submit(sweep([], ["cluster.kind=slurm", f"folder={tmp_path / 'run'}"]), argv=["test"])
    assert not (tmp_path / "run").exists(), "nothing is made before all is known to be well"


def test_files_are_looked_for_before_a_job_waits_for_hours(tmp_path: Path) -> None:
    shards = f"stream={{kind: shards, parts: [{{path: {tmp_path}/none}}]}}"
    with pytest.raises(DataError, match="none/train"):
        check([load([], [shards])])
    with pytest.raises(DataError, match=r"model.checkpoint '.*w.pth' is not a file"):
        check([load([], [f"model.checkpoint={tmp_path}/w.pth"])])
    with pytest.raises(ConfigError, match=r"train.first_task_from='.*' is not a run folder: it does not exist"):
        check([load([], [f"train.first_task_from={tmp_path}/other"])])
    prepare(load([], [f"folder={tmp_path}/first", "optim.lr=[0.5, 0.1]"]), [])
    with pytest.raises(ConfigError, match=r"differently:\n  optim.lr: 0.5 there, 0.01 here\nset the same"):
        check([load([], [f"train.first_task_from={tmp_path}/first", "optim.lr=0.01"])])
    for key in ("data.cache", "data.shard_cache", "model.checkpoint"):
        with pytest.raises(ConfigError, match=rf"{key} = '\$TMPDIR/x': environment variables are not expanded"):
            check([load([], [f"{key}=$TMPDIR/x"])])


def test_a_run_that_has_begun_needs_no_first_task_of_others(tmp_path: Path) -> None:
    """That of an extended run is of a shorter stream."""
    config = load([], [f"train.first_task_from={tmp_path}/gone", f"folder={tmp_path}/run"])
    prepare(config, [])
    with pytest.raises(ConfigError, match="is not a run folder"):
        check([config])
    (tmp_path / "run" / "checkpoints" / "task-000-done-00000010").mkdir(parents=True)
    check([config])


@pytest.mark.parametrize(
    ("word", "others", "awaited", "dependency"),
    [
        ("PENDING", (), False, None),
        ("PENDING", ("b",), True, None),
        ("PENDING", ("b",), False, "afterany:5"),
        ("RUNNING", ("b",), False, "afterany:5,afterany:7"),
    ],
)
def test_a_report_of_other_runs_is_queued_anew(
    word: str, others: tuple[str, ...], *, awaited: bool, dependency: str | None, tmp_path: Path, patch: Patch
) -> None:
    """dependency: of the new job; None: the one that is there is kept."""
    cancelled: list[str] = []
    queued: list[dict[str, Any]] = []

    def queue(_jobs: object, cluster: SlurmCluster, **told: Any) -> list[str]:
        parameters(cluster, name=told["name"], dependency=told["dependency"], command=True)  # is it valid?
        queued.append(told)
        return [str(8 + len(queued))]

    def cancel(ids: list[str]) -> str:
        cancelled.extend(ids)
        return ""

    patch("hpccl.cluster.submit._check_site", lambda clusters: None)
    patch("hpccl.cluster.submit._queue", queue)
    patch("hpccl.cluster.submit.cancel", cancel)
    states = {"7": JobState("7", word), "9": JobState("9", "PENDING")}
    patch("hpccl.cluster.submit.states", lambda ids: states)
    patch("hpccl.cluster.submit.shutil.which", lambda name: name)
    write_record(RunFolder(tmp_path), JobRecord("slurm", "7", 1.0, "here", command="report a", dependency="afterany:5"))
    cluster = SlurmCluster(kind="slurm")
    told: dict[str, Any] = {"name": "report", "folder": tmp_path, "dependency": "afterany:5", "awaited": awaited}
    number = submit_command(("report", "a", *others), cluster, **told)
    expected = ("7", []) if dependency is None else ("9", [dependency])
    assert (number, [each["dependency"] for each in queued]) == expected
    assert cancelled == (["7"] if dependency == "afterany:5" else [])
    if word == "RUNNING":
        assert submit_command(("report", "a", *others), cluster, **told) == "9", "what it asked for is what is compared"
        assert submit_command(("report", "c"), cluster, **told) == "10"
        assert (cancelled, queued[-1]["dependency"]) == (["9"], "afterany:5,afterany:7")


def test_hidden_partitions_are_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "sinfo").write_text('#!/bin/sh\necho long; case "$*" in *--all*) echo hidden; esac\n')
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check([load([], ["cluster.kind=slurm", "cluster.partition=hidden,long"])])
    with pytest.raises(ConfigError, match=r"cluster.partition = other: no such partition; there are: hidden, long"):
        check([load([], ["cluster.kind=slurm", "cluster.partition=other"])])


def test_shards_are_divided_before_a_job_waits_for_hours(capfd: pytest.CaptureFixture[str]) -> None:
    job = ["cluster.kind=slurm", "cluster.nodes=2", "cluster.gpus=4", "engine.kind=fsdp2"]
    list(script([load([], [*job, "engine.shard_size=4"]), load([], job)]))
    assert "note" not in capfd.readouterr().err
    list(script(sweep([], [*job, "engine.shard_size=8", "seed=0,1"])))
    assert capfd.readouterr().err.count("note: engine.shard_size=8, but a node has 4 ranks") == 1
    with pytest.raises(ConfigError, match=r"engine.shard_size=3 does not divide the 8 ranks .* allowed: 1, 2, 4, 8 "):
        list(script([load([], [*job, "engine.shard_size=3"])]))


def test_the_shipped_engines_fit_the_shipped_cluster() -> None:
    configs = Path(__file__).parents[3] / "configs"
    for engine in sorted((configs / "engine").glob("*.yaml")):
        list(script([load([engine, configs / "cluster" / "slurm_gpu.yaml"], [])]))


def test_a_dependency_is_for_slurm() -> None:
    with pytest.raises(ConfigError, match="dependency"):
        check([load([], [])], "afterok:12")


def test_dry_run_needs_no_slurm_and_touches_nothing(no_slurm: None, tmp_path: Path) -> None:
    code, out = hpccl("submit", "cluster.kind=slurm", f"folder={tmp_path}/run", "--dry-run")
    assert code == 0
    assert "\n#!/bin/bash\n" in out
    assert not (tmp_path / "run").exists()


def test_torch_is_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from hpccl.cluster.submit import submit, script; from hpccl.config.load import sweep;"
        "list(script(sweep([], ['cluster.kind=slurm', 'seed=0,1'])));"
        "import hpccl.cli, hpccl.cluster.campaign, hpccl.cluster.status; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_runs_in_the_background_of_this_machine(tmp_path: Path) -> None:
    code, out = hpccl("submit", *SMALL, "train.epochs=1", f"folder={tmp_path}/sweep", "seed=0,1")
    assert code == 0, out
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in (0, 1)]
    ((first,), (second,)) = (read_records(RunFolder(run)) for run in runs)
    assert (first.kind, first.id) == ("local", second.id)
    assert f"process {first.id}: {runs[0]}" in out
    until = time.monotonic() + 120
    while not all(events(run, "done") for run in runs):
        assert time.monotonic() < until, Path(first.log).read_text()
        time.sleep(0.1)
    code, out = hpccl("submit", *SMALL, "train.epochs=1", f"folder={tmp_path}/sweep", "seed=0,1", "--wait")
    assert (code, out.count("done already")) == (0, 2)


def test_inline_trains_here(tmp_path: Path) -> None:
    code, out = hpccl("submit", *SMALL, "train.epochs=1", "cluster.kind=inline", f"folder={tmp_path}/run")
    assert code == 0, out
    assert events(tmp_path / "run", "done")
    assert not os.path.exists(tmp_path / "run" / "jobs.jsonl")


def test_a_run_that_is_done_is_not_taken_for_another_one(tmp_path: Path) -> None:
    folder = f"folder={tmp_path}/run"
    prepare(load([], [folder]), ["test"])
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "done", "time": 0}\n')
    assert [each.kind for each in submit([load([], [folder])], argv=["test"])] == ["done"]
    with pytest.raises(FolderError, match="holds a run of another configuration"):
        submit([load([], [folder, "train.epochs=77"])], argv=["test"])


def test_a_process_is_not_started_twice(tmp_path: Path) -> None:
    config = load([], [f"folder={tmp_path}/run"])
    run, me = prepare(config, ["test"]), os.getpid()
    write_record(run, JobRecord("local", str(me), time.time(), os.uname().nodename, born=birth(me)))
    with pytest.raises(FolderError, match=rf"already has process {me} \(running\)"):
        submit([config], argv=["test"])
    (kept,) = submit([config], argv=["test"], keep_live=True)
    assert (kept.kind, kept.id, kept.kept) == ("local", str(me), True)
    assert len(read_records(run)) == 1


@pytest.mark.parametrize(
    ("folders", "others", "words"),
    [
        (["runs/it is"], [], "'runs/it is'"),
        (["runs/s/seed=0", "runs/s/seed=1"], ["runs/other"], "runs/s"),
        (["runs/a", "runs/b"], ["runs/c"], "runs/a runs/b"),  # or `hpccl cancel runs` would end others
        (["a", "b"], ["c"], "a b"),
        (["{root}/a", "b"], [], "{root}"),
    ],
)
def test_what_is_said_to_be_cancelled_is_what_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], others: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [folder.format(root=tmp_path) for folder in folders]
    for folder in (*folders, *others):
        prepare(load([], [f'folder="{folder}"']), ["test"])
    assert _together(folders) == words.format(root=tmp_path)
