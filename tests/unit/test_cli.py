from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hpccl
from hpccl.cli import app, main
from hpccl.cli.training import loss_of_what_stays
from hpccl.config.load import load

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "quickstart.yaml")
# One step a task: only the command is on trial here.
SMALL = ["stream.tasks=2", "train.epochs=1", "train.batch_size=1024", "model.hidden=[4]", "log.tensorboard=false"]


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "hpccl.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refusal(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """(exit code, what is on stderr) of a command that refuses at once, in this process."""
    monkeypatch.setattr(sys, "argv", ["hpccl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


INTERRUPTED = """
import sys

class Pressed:
    def find_spec(self, name, path, target=None):
        if name == "hpccl.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Pressed())
from hpccl.__main__ import run
run()
"""


def test_ctrl_c_while_the_command_is_starting() -> None:
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 130
    assert found.stderr == "stopped by Ctrl-C before anything began; run the same command again\n"


def test_what_an_adaptation_cost() -> None:
    assert loss_of_what_stays(0.95, 0.91) is None
    assert loss_of_what_stays(None, 0.5) is None
    told = loss_of_what_stays(0.953, 0.689)
    assert told is not None
    assert told.startswith(
        "the accuracy on the classes that stay fell from 95.3 to 68.9 %: adapt again, into another --out"
    )


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"hpccl {hpccl.__version__}\n")


def test_the_help_names_the_commands() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    for name in (
        "train",
        "plan",
        "evaluate",
        "report",
        "export",
        "curvature",
        "shards",
        "check",
        "doctor",
        "status",
        "logs",
        "cancel",
    ):
        assert f"  {name} " in output


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "train" in result.output


# ---------------------------------------------------------------- check


def test_check_prints_what_it_resolved_and_touches_nothing(tmp_path: Path) -> None:
    done = command("check", QUICK, "seed=7", "train.epochs=[1,2]", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert load([printed], []) == load([Path(QUICK)], ["seed=7", "train.epochs=[1,2]"])


def test_check_prints_a_document_for_each_run_of_a_sweep() -> None:
    output = CliRunner().invoke(app, ["check", "seed=1,2"]).output
    assert [document.split("folder: ")[1].split("\n")[0] for document in output.split("---\n")] == [
        "runs/run/seed=1",
        "runs/run/seed=2",
    ]


def test_check_tells_all_mistakes_without_a_traceback(tmp_path: Path) -> None:
    done = command("check", QUICK, "train.epohcs=3", "prior.replay=1", "seed=-1", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 3
    assert "did you mean 'train.epochs'?" in done.stderr


def test_a_file_whose_name_holds_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=3.yaml").write_text("seed: 9\n")
    assert "seed: 9\n" in CliRunner().invoke(app, ["check", "./seed=3.yaml"]).output


def test_check_imports_no_torch() -> None:
    code = f"""
import sys
sys.argv = ["hpccl", "check", {QUICK!r}]
from hpccl.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_home_folder_in_an_option(tmp_path: Path) -> None:
    """Shells expand `--out ~/x`, but not `--out=~/x`."""
    env = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hpccl.cli", "extend", "runs/none", "--out=~/x", "--part", "shards"]
    (tmp_path / "x").mkdir()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert f"--out '{tmp_path}/x' exists" in done.stderr


# ---------------------------------------------------------------- train, evaluate, report


def test_train_evaluate_and_report(tmp_path: Path) -> None:
    done = command("train", QUICK, *SMALL, "--quiet", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "done: runs/quickstart\n"), done.stderr
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    digest = report["weights_sha256"]
    assert len(digest) == 64
    count, _, right = (sum(row) for row in report["calibration"]["task_incremental"])
    accuracies = report["accuracy_matrix"][-1]
    assert min(accuracies) <= right / count <= max(accuracies), "all tasks' images together"

    refused = command("train", QUICK, *SMALL, "seed=5", folder=tmp_path)
    assert refused.returncode == 1
    assert "  seed: 0 there, 5 here\n" in refused.stderr

    figures = json.loads(command("evaluate", "runs/quickstart", folder=tmp_path).stdout)
    assert 0 <= figures["average_accuracy"] <= 1

    reported = command("report", "runs/quickstart", "--out", "comparison", folder=tmp_path)
    assert reported.returncode == 0, reported.stderr
    again = command("report", "comparison/runs.jsonl.xz", "--add", "--out", "comparison", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == reported.stdout, "the same run, once"
    refused = command("report", "runs/quickstart", "--add", folder=tmp_path)
    assert (refused.returncode, "--add needs --out" in refused.stderr) == (2, True)
    (tmp_path / "comparison" / "runs.jsonl.xz").unlink()
    refused = command("report", "runs/quickstart", "--add", "--out", "comparison", folder=tmp_path)
    assert (refused.returncode, "would be lost; give another --out" in refused.stderr) == (2, True)
    assert reported.stdout.endswith("comparison/comparison.html\n")
    assert (tmp_path / "comparison" / "comparison.html").exists()


def test_a_sweep_runs_all_and_a_failure_does_not_keep_others_from_running(tmp_path: Path) -> None:
    done = command("train", QUICK, *SMALL, "memory.size=100000,5", "--quiet", folder=tmp_path)
    assert done.returncode == 2
    assert "error: memory.size=100000 is larger than" in done.stderr
    assert "done: runs/quickstart/memory.size=5\n" in done.stderr
    assert "1 of 2 runs failed: runs/quickstart/memory.size=100000\n" in done.stderr


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("train", QUICK, f"cluster.port={port}", "--nproc", "2", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cluster.port={port} cannot be used: Address already in use")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for command in (["evaluate", "--posterior", "sampled"], ["memory", "map"], ["memory", "reconstruct"]):
        arguments = (*command, "nowhere", "--out", "file/within")
        code, told = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 1
        assert "'file/within' cannot be written: Not a directory (a part of the path is a file: choose --out" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a full disk for whoever writes")
def test_output_that_cannot_be_written_is_told_and_does_not_end_training(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "hpccl.cli"]
        run = partial(subprocess.run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, check=False)
        done = run([*arguments, "check", QUICK], stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the output cannot be written: No space left on device (the disk is full")
        assert done.stderr.count("\n") == 1
        assert run([*arguments, "train", QUICK, *SMALL, "name=full"], stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "runs" / "full" / "report.json").exists()
    read, write = os.pipe()
    os.close(read)
    closed = run([*arguments, "train", QUICK, *SMALL, "name=closed"], stdout=write, stderr=write)
    os.close(write)
    assert closed.returncode == 0


@pytest.mark.parametrize("name", [["evaluate"], ["report"], ["curvature", "show"]])
def test_what_is_no_run_is_told(
    name: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = refusal(*name, "nowhere", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert told.startswith("error: ")
    assert "nowhere" in told


# ---------------------------------------------------------------- doctor, shards


def test_doctor_speaks_json(tmp_path: Path) -> None:
    done = command("doctor", "--json", folder=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ready"] else 1)
    assert {check["name"] for check in found["checks"]} >= {"python", "torch"}


def test_shards_are_built_and_verified(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (source / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((8, 8, 3), 40 * number, dtype=np.uint8)
                Image.fromarray(pixels).save(source / split / name / f"{number}.png")
    (source / "test" / "bird").mkdir()
    Image.new("RGB", (8, 8)).save(source / "test" / "bird" / "0.png")
    (source / "test" / "bird" / "1.avif").touch()
    done = command("shards", "build", "source", "out", "--lossless", "--workers", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out/train: 6 images of 3 classes in 2 shards, 0 skipped" in done.stdout
    assert "note: split 'train' has no images of bird, which another split has\n" in done.stderr
    assert "note: 1 file was left out: .avif (1)\n" in done.stderr

    assert command("shards", "verify", "out", folder=tmp_path).returncode == 0
    shard = next((tmp_path / "out" / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-700])
    done = command("shards", "verify", "out", folder=tmp_path)
    assert done.returncode == 1
    assert shard.name in done.stdout
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for name in ("config.yaml", ".lock"):
        (tmp_path / "runs" / "one" / name).touch()
    done = command("shards", "verify", "runs", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no shards in 'runs'")


def test_two_ways_to_store_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("shards", "build", "source", "out", "--lossless", "--quality", "90")
    code, told = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert told == "error: --lossless together with --max-side or --quality: choose one way to store images\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", 300 * "x"],
        ["report", 300 * "x"],
        ["memory", "map", 300 * "x"],
        ["shards", "verify", 300 * "x"],
        ["export", 300 * "x", "out"],
        ["logs", 300 * "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_the_system_refuses_is_told(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert told.count("\n") == 1
    assert "File name too long (a file name has at most 255 bytes: choose another path)" in told


def test_an_encoding_without_a_character_loses_that_character_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command("train", QUICK, *SMALL, f"folder={folder}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = [sys.executable, "-m", "hpccl.cli", "report", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    shown = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "BWT" in shown.stdout
