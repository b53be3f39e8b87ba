"""What goes wrong on a cluster: one clear message, nothing lost, and the same command continues."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpccl.data.shards.manifest import Manifest, file_sha256
from tests.run.command import events, finish, hpccl, kill_tree, ranks, report, start, wait_for_steps


def test_a_dead_rank_ends_the_others_and_nothing_is_lost(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    process = start(folder, "--nproc=2")
    wait_for_steps(folder, process, 30)
    victim = ranks(process.pid)[1]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code, output = finish(process, timeout=60)
    assert code == 1
    assert time.monotonic() - began < 60
    assert output.count("was killed by signal 9") == 1, output
    assert "run the same command again to continue" in output
    assert "Traceback" not in output
    for arguments in ((folder, "--nproc=2"), (whole, "--nproc=2")):
        code, output = finish(start(*arguments))
        assert code == 0, output
    assert report(folder)["weights_sha256"] == report(whole)["weights_sha256"]


def test_a_gradient_that_is_not_finite_stops_with_a_diagnosis(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = finish(start(folder, "optim.lr=1e30", "train.clip_norm=1e30", "optim.name=momentum"))
    assert code == 1
    assert "the gradient is not finite at step" in output
    assert "of task 0 ('digits[1/5]')" in output
    assert "Lower optim.lr (1e+30 in this task), or lower train.clip_norm (1e+30): in another folder=..." in output
    assert "Traceback" not in output
    note = json.loads((folder / "diverged-rank-0.json").read_text())
    assert note["task"] == 0
    assert len(note["new_offsets"]) <= 32
    assert (folder / "diverged-rank-0.safetensors").stat().st_size > 0
    assert events(folder, "error")[-1]["kind"] == "DivergedError"
    assert not list((folder / "checkpoints").glob(".*")), "half a checkpoint was left"


def test_a_diagnosis_that_cannot_be_kept_is_told_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "diverged-rank-0.safetensors" / "in the way").mkdir(parents=True)
    code, output = finish(start(folder, "optim.lr=1e30", "train.clip_norm=1e30", "optim.name=momentum"))
    assert code == 1
    assert "the gradient is not finite at step" in output
    assert "Not all processes could write the batch and the weights" in output
    assert "Traceback" not in output


def test_a_quadratic_that_is_too_stiff_is_named(tmp_path: Path) -> None:
    stiff = ("prior.quadratic.weight=1e30", "optim.lr=0.1", "optim.name=sgd", "train.epochs=1")
    folder = tmp_path / "run"
    code, output = finish(start(folder, *stiff))
    assert code == 1
    assert "of task 1 ('digits[2/5]')" in output
    assert "lower prior.quadratic.weight (1e+30; steps overshoot" in output
    assert (
        f"in another folder=... (or name=...), as the settings of this run are fixed; train.first_task_from={folder}"
        in output
    )
    mild = ("prior.quadratic.weight=1", *stiff[1:], f"train.first_task_from={folder}")
    code, output = finish(start(tmp_path / "mild", *mild))
    assert code == 0, output


def test_a_first_task_that_is_nowhere(tmp_path: Path) -> None:
    for source, problem in ((tmp_path / "nowhere", "it does not exist"), (tmp_path, "it has no config.yaml")):
        code, output = finish(start(tmp_path / "run", f"train.first_task_from={source}"))
        assert code == 2
        assert f"train.first_task_from='{source}' is not a run folder: {problem}; give the folder of a run" in output


def test_memory_that_runs_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = finish(start(folder, "model.hidden=[1000000000000]"))
    assert code == 1
    assert output.count("error: out of memory on rank 0 of 1 (") == 1, output
    assert "a lower curvature.batch_size (now 256)" in output
    assert "in another folder=..., a higher train.accumulate (now 1), a lower train.batch_size (now 32)" in output
    assert "Traceback" not in output
    assert events(folder, "error")[-1]["kind"] == "CapacityError"
    code, output = hpccl("plan", "model.hidden=[1000000000000]", "curvature.kind=diagonal")
    assert (code, output.count("error: memory ran out (")) == (1, 1), output


def test_memory_larger_than_a_task(tmp_path: Path) -> None:
    code, output = finish(start(tmp_path / "run", "memory.size=5000"))
    assert code == 2
    assert "memory.size=5000 is larger than task 'digits[" in output
    assert "allowed: 0 to 2" in output


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_refused_run_does_not_block_the_corrected_command(tmp_path: Path, nproc: int) -> None:
    folder, settings = tmp_path / "run", ("train.epochs=1", f"--nproc={nproc}")
    assert finish(start(folder, "memory.size=5000", *settings))[0] == 2
    code, output = finish(start(folder, *settings))
    assert code == 0, output
    assert output.count("is reused: the run in it learned nothing, because it ended with ConfigError") == 1
    assert not events(folder, "error")
    code, output = finish(start(folder, "memory.size=20", *settings))
    assert code == 1
    assert "holds a run of another configuration" in output


def test_folder_of_another_configuration_says_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(start(folder, "train.epochs=1"))[0] == 0
    code, output = finish(start(folder, "train.epochs=1", "seed=3"))
    assert code == 1
    assert "seed: 0 there, 3 here" in output
    assert "folder=" in output


@pytest.mark.slow
def test_checkpoint_of_an_unknown_format(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(start(folder, "train.epochs=1"))[0] == 0
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    state = newest / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 7}))
    code, output = finish(start(folder, "train.epochs=1"))
    assert code == 1
    assert "has format 7, this version reads 1" in output
    assert "Traceback" not in output


def test_no_write_permission(tmp_path: Path) -> None:
    """Root may write anywhere, so the folder is put below a file."""
    (tmp_path / "file").write_text("")
    code, output = finish(start(tmp_path / "file" / "run"))
    assert code == 1
    assert "choose another folder=" in output


def test_occupied_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = finish(start(tmp_path / "run", "--nproc=2", f"cluster.port={port}"))
    assert code == 1
    assert str(port) in output
    assert "cluster.port" in output


def small_shards(folder: Path) -> Path:
    """Shards of two classes of six 8x8 images, made by the command."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    code, output = hpccl("shards", "build", str(folder / "images"), str(folder / "shards"))
    assert code == 0, output
    return folder / "shards"


def shard_settings(shards: Path, cache: Path) -> list[str]:
    """A stream of those shards, a class a task; all classes seen compete, for one alone has nothing to compete with."""
    parts = f"stream.parts=[{{path: {shards}, tasks: 2}}]"
    return ["stream.kind=shards", parts, f"data.cache={cache}", "train.head=seen"]


@pytest.mark.slow
def test_shards_that_are_missing_or_truncated(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    own = [*shard_settings(shards, tmp_path), "memory.size=4"]
    code, output = finish(start(tmp_path / "good", *own))
    assert code == 0, output
    victim = sorted((shards / "train").glob("*.tar"))[1]
    content = victim.read_bytes()
    for damage, word in ((content[:600], "truncated"), (None, "missing")):
        if damage is None:
            victim.unlink()
        else:
            victim.write_bytes(damage)
        code, output = finish(start(tmp_path / word, *own))
        assert code == 1
        assert victim.name in output, output
        assert "Traceback" not in output
        code, output = hpccl("shards", "verify", str(shards))
        assert code == 1
        assert victim.name in output


@pytest.mark.slow
def test_other_images_in_the_same_place_are_refused(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    own = [*shard_settings(shards, tmp_path / "cache"), "memory.size=4"]
    assert finish(start(tmp_path / "run", *own))[0] == 0
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # so that there is something left to learn
    shutil.rmtree(shards)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / "cat" / "3.png")
    assert hpccl("shards", "build", str(tmp_path / "images"), str(shards))[0] == 0
    code, output = finish(start(tmp_path / "run", *own))
    assert code == 1
    assert "the data changed since" in output
    assert "Traceback" not in output


def test_checkpoints_that_are_gone(tmp_path: Path) -> None:
    """Of a run that is done nothing is missed; any other does not begin anew behind the user's back."""
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(folder, process, 60)
    kill_tree(process)
    shutil.rmtree(folder / "checkpoints")
    figures = (folder / "events.jsonl").read_bytes()
    code, output = finish(start(folder))
    assert code == 1
    assert f"'{folder / 'checkpoints'}' is empty, but '{folder / 'events.jsonl'}' records checkpoints" in output
    assert (folder / "events.jsonl").read_bytes().startswith(figures)
    (folder / "events.jsonl").unlink()
    assert finish(start(folder))[0] == 0
    shutil.rmtree(folder / "checkpoints")
    whole = (folder / "events.jsonl").read_bytes()
    assert finish(start(folder))[0] == 0
    assert (folder / "events.jsonl").read_bytes() == whole


def test_mistakes_in_the_command_are_all_reported(tmp_path: Path) -> None:
    code, output = finish(start(tmp_path / "run", "train.epoch=3", "optim.lr=fast", "prior.replay=2"))
    assert code == 2
    for word in ("train.epoch", "train.epochs", "optim.lr", "fast", "prior.replay"):
        assert word in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluate_agrees_with_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(start(folder, "train.epochs=2"))[0] == 0
    code, output = hpccl("evaluate", str(folder))
    assert code == 0, output
    found, there = json.loads(output), report(folder)
    assert found["average_accuracy"] == pytest.approx(there["average_accuracy"])
    assert found["average_accuracy_class_incremental"] == pytest.approx(there["average_accuracy_class_incremental"])
    for setting in ("task_incremental", "class_incremental"):
        bins = there["calibration"][setting]
        count, confidence, right = np.array(bins).sum(axis=1)
        assert count == sum(task["num"] for task in found["tasks"])
        assert right == pytest.approx(sum(task["num"] * task[setting]["accuracy"] for task in found["tasks"]))
        assert 0.1 * count < confidence < count
    assert "<h2>Calibration</h2>" in (folder / "report.html").read_text()
    code, output = hpccl("evaluate", str(folder), "--task", "9")
    assert code == 1
    assert "tasks with checkpoints: [0, 1, 2, 3, 4]" in output
    code, output = hpccl("evaluate", str(tmp_path))
    assert code == 1
    assert "is not a run folder" in output


@pytest.mark.parametrize("storage", ["decoded", pytest.param("encoded", marks=pytest.mark.slow)])
def test_an_undecodable_image_stops_or_is_skipped_and_counted(tmp_path: Path, storage: str) -> None:
    """Where only decoding can see it: the manifest is that of whole shards."""
    shards = small_shards(tmp_path)
    victim = min((shards / "train").glob("*.tar"))
    content = bytearray(victim.read_bytes())
    start_of_image = content.index(b"\x89PNG")
    content[start_of_image : start_of_image + 60] = b"\0" * 60
    victim.write_bytes(content)
    manifest = Manifest.load(shards / "train")
    entries = [dataclasses.replace(each, sha256=file_sha256(shards / "train" / each.file)) for each in manifest.shards]
    dataclasses.replace(manifest, shards=tuple(entries)).save(shards / "train")
    own = [*shard_settings(shards, tmp_path / "cache"), f"data.storage={storage}", "data.workers=0", "memory.size=0"]
    own += ["prior.replay=0", "prior.temperature=1.0"]
    # With images decoded on demand, only one of the two ranks meets it: its message must be the one that is shown.
    code, output = finish(start(tmp_path / "stop", *own, "--nproc=2"))
    assert code == 1
    assert victim.stem in output
    assert "bad_images" in output
    assert "Traceback" not in output
    code, output = finish(start(tmp_path / "skip", *own, "data.bad_images=skip", "--nproc=2"))
    assert code == 0, output
    assert report(tmp_path / "skip")["skipped"] == 1


def test_a_last_step_that_goes_too_far_is_no_result(tmp_path: Path) -> None:
    """No later step has a gradient that would show it."""
    settings = ("stream.tasks=1", "train.epochs=1", "train.batch_size=5000", "optim.name=sgd", "optim.lr=1e38")
    code, output = finish(start(tmp_path / "run", *settings, "optim.warmup=0", "prior.quadratic.weight=0"))
    assert code == 1
    assert "the network's logits are not finite for" in output
    assert "Traceback" not in output
    assert not events(tmp_path / "run", "done")
