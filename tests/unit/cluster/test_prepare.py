from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpccl.cluster.lock import holding
from hpccl.cluster.prepare import prepare, refuse_any_other
from hpccl.cluster.records import JobRecord, write_record
from hpccl.cluster.submit import check
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder
from hpccl.train.first_task import find_first_task


def config(folder: Path, *overrides: str) -> RunConfig:
    return load([], [f"folder={folder}", *overrides])


def test_the_folder_describes_the_run(tmp_path: Path) -> None:
    wanted = config(tmp_path / "a", "seed=3")
    folder = prepare(wanted, ["hpccl", "train", "x y"])
    assert load([folder.config], []) == wanted
    assert folder.code.read_text().startswith("hpccl ")
    text = folder.env.read_text()
    assert "command: hpccl train 'x y'\n" in text
    assert "pydantic==" in text
    assert "torch==" in text


def test_the_home_folder_is_meant_and_variables_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = config(Path("~/runs/a"))
    assert prepare(wanted, []).path == tmp_path / "home/runs/a"
    assert load([tmp_path / "home/runs/a/config.yaml"], []) == wanted, "unexpanded"
    from_home = load([], ["train.first_task_from=~/runs/a"])
    assert from_home.train.first_task_from == "~/runs/a"
    check([from_home])
    with pytest.raises(ConfigError, match=r"folder = '\$HOME/b': environment variables are not expanded"):
        prepare(config(Path("$HOME/b")), [])
    with pytest.raises(ConfigError, match=r"first_task_from = '\$HOME/b': environment variables are not expanded"):
        find_first_task(from_home, "$HOME/b")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_secrets_in_the_environment_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = prepare(config(tmp_path / "a"), []).env.read_text()
    assert "hush" not in text
    assert "OMP_NUM_THREADS=1" in text


def test_the_same_run_is_taken_up_again_and_machinery_may_change(tmp_path: Path) -> None:
    folder = prepare(config(tmp_path), ["first"])
    before = folder.env.read_text(), folder.code.stat().st_mtime_ns
    changed = config(tmp_path, "cluster.nproc=2", "checkpoint.every=7", "log.every=1", "name=other")
    prepare(changed, ["second"])
    assert (folder.env.read_text(), folder.code.stat().st_mtime_ns) == before
    assert load([folder.config], []) == changed


def test_a_run_goes_on_on_another_engine_in_its_precision(tmp_path: Path) -> None:
    configs, folder = Path(__file__).parents[3] / "configs", [f"folder={tmp_path}"]
    files = [configs / "imagenet_10x100.yaml", configs / "method" / "ewc.yaml"]
    prepare(load(files, folder), [])
    (tmp_path / "checkpoints" / "task-000-fit-00000005").mkdir()
    other = load([*files, configs / "engine" / "fsdp2.yaml"], folder)
    assert load([prepare(other, []).config], []) == other


def test_a_run_that_is_trained_keeps_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job reads the file again whenever it is queued again."""
    folder = prepare(config(tmp_path, "engine.kind=fsdp2", "checkpoint.every=50"), [])
    text = folder.config.read_text()
    code = (
        "import sys; from pathlib import Path; from hpccl.cluster.lock import holding; "
        "from hpccl.folder import RunFolder; lock = holding(RunFolder(Path(sys.argv[1]))); lock.__enter__(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr("hpccl.cluster.prepare.holding", functools.partial(holding, patience=0.1))
        with pytest.raises(FolderError, match="is training in run folder"):
            prepare(config(tmp_path, "checkpoint.every=0"), [])
        prepare(config(tmp_path, "engine.kind=fsdp2", "checkpoint.every=50"), [])  # changes nothing
        assert folder.config.read_text() == text
        other.communicate()
    prepare(config(tmp_path, "checkpoint.every=0"), [])
    assert folder.config.read_text() != text


def test_another_run_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    folder = prepare(config(tmp_path, "seed=1"), [])
    (folder.checkpoints / "task-000-fit-00000005").mkdir()
    text = folder.config.read_text()
    with pytest.raises(FolderError) as caught:
        prepare(config(tmp_path, "seed=2", "model.kind=cifarnet"), [])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"run folder '{tmp_path}' holds a run of another configuration:"
    assert set(lines[1:-1]) == {
        "  seed: 1 there, 2 here",
        "  model.kind: mlp there, cifarnet here",
        "  model.hidden: [128] there, absent here",
        "  model.dropout: absent there, True here",
    }
    assert "folder=..." in lines[-1]
    assert folder.config.read_text() == text


REFUSED = {"event": "error", "kind": "DataError", "message": "no such shard"}
STARTED: list[dict[str, Any]] = [{"event": "run"}, {"event": "evaluate", "task": -1}, {"event": "task", "task": 0}]


def ended(folder: RunFolder, *events: dict[str, Any]) -> None:
    """The diary of a start that ended just now."""
    lines = [json.dumps({"time": time.time(), **event}) + "\n" for event in events]
    folder.events.write_text("".join(lines))


@pytest.mark.parametrize("before", [[], STARTED])
def test_a_run_that_was_refused_leaves_its_folder(
    tmp_path: Path, before: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(config(tmp_path, "seed=1"), ["first"])
    write_record(folder, JobRecord("slurm", "7", time.time() - 60, "login"))
    folder.error.write_text("{}")
    ended(folder, *before, REFUSED)
    changed = config(tmp_path, "seed=2")
    prepare(changed, ["second"])
    said = capsys.readouterr().err
    assert "is reused: the run in it learned nothing, because it ended with DataError: no such shard" in said
    assert load([folder.config], []) == changed
    assert "command: second\n" in folder.env.read_text()
    assert not folder.events.exists()
    assert not folder.error.exists()
    with pytest.raises(FolderError, match="holds a run of another configuration"):
        prepare(config(tmp_path, "seed=3"), [])  # the second is on its way
    with pytest.raises(FolderError, match=r"seed: 2 there, 1 here"):
        refuse_any_other(config(tmp_path, "seed=1"))  # as the first would find, had it been started once more
    refuse_any_other(changed)


@pytest.mark.parametrize(
    ("events", "checkpoint"),
    [
        ([], ""),  # prepared, and not begun
        (STARTED, ""),  # killed, or on its way
        ([*STARTED, {"event": "step", "task": 0, "step": 1}, REFUSED], ""),
        ([*STARTED, {**REFUSED, "kind": "DivergedError"}], ""),
        ([*STARTED, {**REFUSED, "kind": "WorldError"}], ""),  # its job is put back into the queue
        ([REFUSED, *STARTED], ""),
        ([REFUSED], "task-000-fit-00000005"),
        ([REFUSED], ".task-000-fit-00000005.12.part"),
    ],
)
def test_a_run_that_may_have_learned_or_goes_on_keeps_its_folder(
    tmp_path: Path, events: list[dict[str, Any]], checkpoint: str
) -> None:
    folder = prepare(config(tmp_path, "seed=1"), [])
    write_record(folder, JobRecord("slurm", "7", time.time() - 60, "login"))
    if events:
        ended(folder, *events)
    if checkpoint:
        (folder.checkpoints / checkpoint).mkdir()
    with pytest.raises(FolderError, match="holds a run of another configuration"):
        prepare(config(tmp_path, "seed=2"), [])
    assert load([folder.config], []).seed == 1


@pytest.mark.parametrize("events", [[], STARTED])
def test_a_start_that_crashed_before_it_learned_leaves_its_folder(
    tmp_path: Path, events: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(config(tmp_path, "seed=1"), ["first"])
    if events:
        ended(folder, *events)
    changed = config(tmp_path, "seed=2")
    prepare(changed, ["second"])
    said = capsys.readouterr().err
    assert "is reused: the run in it learned nothing, because it ended before its first step" in said
    assert load([folder.config], []) == changed
    assert not folder.events.exists()


def test_a_start_that_is_on_its_way_keeps_its_folder(tmp_path: Path) -> None:
    prepare(config(tmp_path, "seed=1"), [])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderError, match="holds a run of another configuration"):
            prepare(config(tmp_path, "seed=2"), [])
        other.kill()


def test_a_file_of_settings_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(FolderError, match=r"cannot be continued.*\n.*is empty or cut off"):
        prepare(config(tmp_path, "seed=2"), [])
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("what", ["events", "checkpoints"])
def test_a_run_without_its_configuration_is_not_taken_over(tmp_path: Path, what: str) -> None:
    folder = prepare(config(tmp_path), [])
    if what == "events":
        ended(folder, *STARTED)
    else:
        (folder.checkpoints / "task-000-fit-00000005").mkdir()
    folder.config.unlink()
    with pytest.raises(FolderError, match=rf"has {what} of a run, but no config\.yaml.*put its config\.yaml back"):
        prepare(config(tmp_path, "seed=2"), [])
    assert not folder.config.exists()


def test_a_refused_run_that_was_submitted_again_keeps_its_folder(tmp_path: Path) -> None:
    folder = prepare(config(tmp_path, "seed=1"), [])
    ended(folder, {**REFUSED, "time": time.time() - 60})
    write_record(folder, JobRecord("slurm", "7", time.time(), "login"))
    with pytest.raises(FolderError, match="holds a run of another configuration"):
        prepare(config(tmp_path, "seed=2"), [])


def test_a_config_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("sed: 1\n")
    with pytest.raises(FolderError, match=r"cannot be continued(.|\n)*did you mean 'seed'"):
        prepare(config(tmp_path), [])


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(FolderError, match=r"a part of the path is a file|a file is in the way"):
        prepare(config(tmp_path / "a" / "b"), [])


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"File name too long \(a file name has at most 255 bytes"):
        prepare(config(tmp_path / ("x" * 300)), [])


PREPARE = """
import os, sys
from hpccl.cluster.prepare import prepare
from hpccl.config.load import load
from hpccl.errors import FolderError
config = load([], [f"folder={sys.argv[1]}"])
if os.geteuid() == 0:  # root may write anywhere
    os.setuid(65534)
try:
    prepare(config, [])
except FolderError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_no_permission(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    tmp_path.chmod(0o700)
    assert f"run folder '{tmp_path / 'a'}' cannot be" in done.stdout
    assert "Permission denied (no permission: choose another folder=... or ask its owner)" in done.stdout


HOLD = """
import sys, time
from pathlib import Path
from hpccl.cluster.lock import holding
from hpccl.folder import RunFolder
with holding(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        wanted = f"process {other.pid} on .* is training in run folder .* another folder .folder=..., or --out"
        with pytest.raises(FolderError, match=wanted), holding(folder, patience=0.2):
            pass
        other.kill()  # the lock goes with the process
        with holding(folder, patience=10):
            pass
