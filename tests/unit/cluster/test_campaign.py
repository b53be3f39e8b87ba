from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpccl.cluster.campaign import Campaign, Step, _cluster, _numbers, carry_out, options
from hpccl.cluster.submit import Submitted
from hpccl.errors import ConfigError
from tests.run.command import ROOT, SMALL, events


def chosen(*arguments: str) -> argparse.Namespace:
    return options(None).parse_args(arguments)


def training(name: str, folder: Path, *settings: str, after: tuple[str, ...] = ()) -> Step:
    return Step(name, ("train", *SMALL, "train.epochs=1", f"folder={folder / name}", *settings), after)


def test_steps_run_after_those_they_wait_for_and_a_failure_skips_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = (
        training("first", tmp_path),
        training("wrong", tmp_path, "memory.size=100000"),
        training("never", tmp_path, after=("wrong",)),
        Step("report", ("report", str(tmp_path / "first"), "--out", str(tmp_path / "report")), after=("first",)),
        Step(
            "of what there is",
            ("report", str(tmp_path / "first"), str(tmp_path / "never"), "--out", str(tmp_path / "those")),
            after=("first", "never"),
        ),
    )
    code = carry_out(lambda: Campaign(tmp_path, steps), chosen("--jobs", "2"))
    out, err = capfd.readouterr()
    assert code == 2
    assert "2 of 5 steps failed or could not begin: wrong, never" in err
    for name in ("report", "those"):
        assert (tmp_path / name / "comparison.html").exists()
    assert not (tmp_path / "never").exists()
    assert "memory.size=100000 is larger than task" in (tmp_path / "logs" / "wrong.txt").read_text()
    assert "first: done" in out


def test_settings_for_all_go_to_trainings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    steps = (Step("a", ("train", "x.yaml", "seed=1")), Step("b", ("report", "runs/a"), after=("a",)))
    campaign = Campaign(Path("runs"), steps)
    more = ("--add", "--with", "c.yaml", "seed=2", "train.epochs=[1, 2]")
    assert carry_out(lambda: campaign, chosen("--dry-run", *more)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "+ hpccl train x.yaml c.yaml seed=2 'train.epochs=[1, 2]' seed=1",  # what the campaign itself says counts
        "+ hpccl report runs/a --add",
    ]


def test_settings_that_the_campaign_itself_makes_are_told_and_sweeps_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = (training("a", Path("runs/a"), "seed=1"), training("b", Path("runs/b"), "seed=1"))
    assert (
        carry_out(lambda: Campaign(Path("runs"), steps), chosen("--dry-run", "--with", "seed=2", "memory.fraction=0.1"))
        == 0
    )
    told = capsys.readouterr().err
    assert "note: --with seed=2 has no effect in 2 steps, such as 'a', which sets seed=1" in told
    assert "fraction" not in told
    assert carry_out(lambda: Campaign(Path("runs"), steps), chosen("--dry-run", "--with", "train.epochs=1,2")) == 2
    assert "--with train.epochs=A,B is a sweep" in capsys.readouterr().err


def test_nothing_is_added_where_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign(Path("runs"), (Step("a", ("train", "x.yaml")),))
    assert carry_out(lambda: campaign, chosen("--dry-run", "--add")) == 2
    assert "--add has no effect, as this campaign writes no report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Step("a", ("report",)), Step("a", ("report",))), "occurs twice"),
        ((Step("a", ("report",), after=("b",)), Step("b", ("report",))), "waits for b, which does not come before"),
    ],
)
def test_campaigns_that_cannot_be(steps: tuple[Step, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Campaign(Path("runs"), steps)


def two_trainings(folder: Path) -> Path:
    """A campaign of two trainings, `a` and `b`, as a script."""
    script = folder / "campaign.py"
    script.write_text(
        "import sys; from pathlib import Path; from hpccl.cluster.campaign import *\n"
        f"small = {(*SMALL, 'checkpoint.every=1000')}\n"
        f"steps = (Step('a', ('train', *small, 'folder={folder}/a')), Step('b', ('train', *small, "
        f"'folder={folder}/b'), ('a',)))\n"
        f"sys.exit(carry_out(lambda: Campaign(Path('{folder}'), steps), options(None).parse_args()))\n"
    )
    return script


def wait_for(folder: Path, event: str, times: int) -> None:
    until = time.monotonic() + 100
    while len(events(folder, event)) < times:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_an_interrupted_campaign_saves_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    script = two_trainings(tmp_path)
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where tests run under nohup, the campaign would, too
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, former)
    wait_for(tmp_path / "a", "step", 5)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "start the same campaign again to continue" in err
    assert not (tmp_path / "b").exists()
    assert subprocess.run([sys.executable, str(script)], check=False, timeout=200).returncode == 0
    assert events(tmp_path / "a", "run")[-1]["resumed"] is not None
    assert events(tmp_path / "b", "done")


def test_a_campaign_that_is_killed_leaves_no_run_behind(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, str(two_trainings(tmp_path))])
    wait_for(tmp_path / "a", "step", 5)
    process.kill()
    process.wait()
    wait_for(tmp_path / "a", "stop", 1)
    assert events(tmp_path / "a", "stop")[-1]["reason"] == "signal SIGTERM"


def test_commands_at_the_same_time_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    steps = (
        training("a", tmp_path, "memory.size=100000"),
        training("b", tmp_path, "memory.size=100000"),
        training("both", tmp_path, "memory.size=100000", "cluster.nproc=2"),
    )
    carry_out(lambda: Campaign(tmp_path, steps), chosen("--jobs", "3"))
    shown = [(tmp_path / step.name / "env.txt").read_text() for step in steps]
    lines = [line for text in shown for line in text.splitlines() if line.startswith("CUDA_VISIBLE_DEVICES=")]
    assert [line.partition("=")[2] for line in lines] == ["2", "5", "2,5"]


def test_what_waits_for_a_part_of_an_older_array_does_not_wait_for_the_task_that_failed() -> None:
    kept = [Submitted(f"runs/{task}", "slurm", f"12_{task}", kept=True) for task in (1, 2)]
    new = [Submitted(f"runs/{task}", "slurm", f"20_{task}") for task in (0, 1)]
    assert _numbers([*new, *kept, Submitted("runs/9", "done")]) == ["20", "12_1", "12_2"]


def test_nothing_that_is_for_a_cluster_is_trained_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = (training("a", tmp_path / "a"), training("b", tmp_path / "b", after=("a",)))
    assert carry_out(lambda: Campaign(tmp_path, steps), chosen("--cluster", "slurm")) == 2
    assert "--cluster slurm queues trainings, but 'a' has cluster.kind=local" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_who_reads_the_commands_may_stop_early() -> None:
    steps = "tuple(Step(str(n), ('report', 1000 * 'a')) for n in range(200))"  # more than a pipe holds
    script = (
        "import sys; from pathlib import Path; from hpccl.cluster.campaign import Campaign, Step, carry_out, options; "
        f"sys.exit(carry_out(lambda: Campaign(Path('runs'), {steps}), options(None).parse_args(['--dry-run'])))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"+ hpccl report")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_commands_that_train_nothing_have_the_cluster_of_the_trainings() -> None:
    """Settings of the training that the default configuration does not know, or sweeps, are not about the cluster."""
    more = ("cluster.partition=long", "model.name=resnet18", "seed=0,1")
    train = ("train", "model={kind: timm, name: resnet50}", "data.image_size=32", *more)
    assert _cluster([Step("shards", ("shards", "build")), Step("a", train)], more).partition == "long"
    assert _cluster([Step("shards", ("shards", "build"))], more).partition == "long"


def test_values_that_cannot_be_are_told_by_all_scripts(tmp_path: Path) -> None:
    told = {
        ("split_cifar", "--seeds", "0", "0"): "step 'finetune-0' of the campaign occurs twice; give each value once",
        ("split_cifar", "--sizes", "0"): "argument --sizes: 0; allowed: whole numbers above 0",
        ("tune", "--sizes", "-5"): "argument --sizes",
        ("selection", "--sizes", "1.5"): "argument --sizes: 1.5; allowed: whole numbers above 0",
        ("sweep", "x", "configs/quickstart.yaml", "name=y"): "name follow from the name of the sweep, 'x'",
    }
    for (script, *arguments), message in told.items():
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / f"{script}.py", *arguments, "--dry-run"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_output_that_cannot_be_kept_is_told_before_a_step_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    campaign = Campaign(tmp_path / "file", (training("a", tmp_path),))
    assert carry_out(lambda: campaign, chosen("--jobs", "2")) == 1
    assert "a.txt' cannot be written: Not a directory" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_steps_go_on_when_nobody_reads_what_they_are(tmp_path: Path) -> None:
    steps = "tuple(Step(name, ('check', 'configs/quickstart.yaml')) for name in 'ab')"
    script = (
        "import sys; from pathlib import Path; from hpccl.cluster.campaign import Campaign, Step, carry_out, options; "
        f"sys.exit(carry_out(lambda: Campaign(Path('{tmp_path}'), {steps}), options(None).parse_args(['--jobs', '2'])))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a.txt", "b.txt"]
