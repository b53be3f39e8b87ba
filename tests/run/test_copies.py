"""memory.keep=copy: training shards of finished tasks may go, and the run ends as if they had not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpccl.cluster.prepare import prepare
from hpccl.cluster.submit import check
from hpccl.config.adapt import adapted_config
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.config.stream import ShardStream
from hpccl.data.shards.build import build
from hpccl.data.shards.reader import ShardSet
from hpccl.data.shards.verify import verify
from hpccl.data.stream import ImageStream
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError, DataError
from hpccl.folder import RunFolder
from hpccl.tools.evaluate_run import evaluate_run, reopened
from hpccl.train.copies import copies_advised, open_for
from hpccl.train.run import run
from hpccl.train.stop import Stop
from tests.run.command import finish, kill_tree, start
from tests.run.method import After, go_on, weights
from tests.unit.data.tiny_images import tiny_set, write_folder

NAMES = ("one", "two", "three")
SETTINGS = [
    "data={image_size: 12, workers: 0}",
    "model={kind: mlp, hidden: [8]}",
    "train={epochs: 2, batch_size: 8}",
    "checkpoint.every=0",
    "log.tensorboard=false",
    "prior={replay: 0.5, quadratic: {weight: 1.0}}",
    "memory.size=6",
]


GDUMB = (
    *("train.data=memory", "train.restart=true", "memory.size=0", "memory.total=13", "memory.selector.kind=greedy"),
    *("prior.replay=1", "prior.quadratic.weight=0", "data.storage=encoded"),
)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three data sets of three classes; of train, a class has 9, 10 or 11 images."""
    for number, name in enumerate(NAMES):
        files = {f"set{number}/{path}": data for path, data in tiny_set(images=9).items()}
        build(write_folder(tmp_path / "images", files) / f"set{number}", tmp_path / "shards" / name)
    return tmp_path / "shards"


def settings(shards: Path, *more: str, url: bool = False) -> list[str]:
    paths = [f"{'file://' if url else ''}{shards / name}" for name in NAMES]
    parts = ", ".join(f"{{path: '{path}'}}" for path in paths)
    cache = f"data.shard_cache={shards.parent / 'fetched'}"
    return [f"stream={{kind: shards, parts: [{parts}]}}", *SETTINGS, "memory.keep=copy", cache, *more]


def config_of(shards: Path, folder: Path, *more: str, url: bool = False) -> RunConfig:
    return load([], [*settings(shards, *more, url=url), f"folder={folder}", f"data.cache={folder}-cache"])


def whole(shards: Path, tmp_path: Path, *more: str, url: bool = False) -> str:
    assert go_on(config_of(shards, tmp_path / "whole", *more, url=url)) == "done"
    return weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "url"),
    [
        (("data.storage=encoded",), False),
        pytest.param(("data.storage=encoded", "memory.size=0", "memory.total=13"), True, marks=pytest.mark.slow),
        (("data.storage=decoded", "memory.selector.kind=gini"), False),
        (GDUMB, False),
        pytest.param(
            ("data.storage=encoded", "data.workers=1", "data.augment.kind=timm", "prior.view=teacher"),
            False,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_first_shards_go_and_the_run_ends_the_same(shards: Path, tmp_path: Path, more: Any, url: bool) -> None:
    expected = whole(shards, tmp_path, *more, url=url)
    config = config_of(shards, tmp_path / "run", *more, url=url)
    assert go_on(config, 1) == "stopped"
    shutil.rmtree(shards / "one" / "train")
    shutil.rmtree(tmp_path / "fetched", ignore_errors=True)
    shutil.rmtree(tmp_path / "run-cache", ignore_errors=True)
    assert go_on(config, 2) == "stopped"
    shutil.rmtree(shards / "two" / "train")
    check([config])  # a job that goes on may be submitted
    assert go_on(config) == "done"
    assert weights(tmp_path / "run") == expected
    assert verify(tmp_path / "run" / "memory" / "shards") == []
    assert evaluate_run(tmp_path / "run")["tasks"]


class InTask(Stop):
    """Stops a run once it has saved a state of task 1's training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.checkpoints = folder / "checkpoints"

    def requested(self, comm: Comm) -> bool:
        if list(self.checkpoints.glob("task-001-fit*")):
            self.request("preempted")
        return super().requested(comm)


def test_stopped_in_a_task_whose_memory_is_chosen_before_it(shards: Path, tmp_path: Path) -> None:
    """While it trains, GDumb has less of earlier tasks than was copied; these copies are all that is left of them."""
    expected = whole(shards, tmp_path, *GDUMB)
    config = config_of(shards, tmp_path / "run", *GDUMB)
    assert go_on(config, 1) == "stopped"
    shutil.rmtree(shards / "one" / "train")
    assert run(config, Comm.solo(), InTask(tmp_path / "run"), quiet=True) == "stopped"
    assert go_on(config) == "done"
    assert weights(tmp_path / "run") == expected


def test_copies_are_the_images_of_the_memory_as_stored(shards: Path, tmp_path: Path) -> None:
    """With a total, copies are dropped with the examples; what a kill left is cleared away."""
    config = config_of(shards, tmp_path / "run", "memory.size=0", "memory.total=13")
    go_on(config, 2)
    copies = RunFolder(tmp_path / "run").copies
    (copies / ".task-001-000006.7").mkdir()
    (copies / "task-001-000099").mkdir()
    assert sorted(path.name for path in copies.glob("task-0*-00000*")) == ["task-000-000007", "task-001-000006"]
    go_on(config)
    assert sorted(path.name for path in copies.iterdir()) == [
        *("parts", "task-000-000005", "task-001-000004", "task-002-000004")
    ]
    with reopened(tmp_path / "run") as (state, world):
        memory = state.prior.memory
        assert isinstance(world.stream, ImageStream)
        index = world.stream.layout.index["train"]
        for task, name in enumerate(NAMES):
            original = ShardSet.open(shards / name, "train")
            found = ShardSet.open(copies, f"task-{task:03d}-{int((memory.task == task).sum()):06d}")
            local = np.sort(index.local[memory.sample[memory.task == task].numpy()])
            assert found.names(np.arange(len(found))) == original.names(local)
            assert [found.read(number) for number in range(len(found))] == [original.read(k) for k in local.tolist()]
            assert [found.classes[k] for k in found.labels] == [original.classes[k] for k in original.labels[local]]
            np.testing.assert_array_equal(found.sizes, original.sizes[local])


def test_a_job_without_shards_and_copies_is_not_submitted(shards: Path, tmp_path: Path) -> None:
    shutil.rmtree(shards / "one" / "train")
    with pytest.raises(DataError, match=r"one/train"):
        check([config_of(shards, tmp_path / "run")])


@pytest.mark.parametrize("left", ["half", "another"])
def test_a_kill_while_copying(shards: Path, tmp_path: Path, left: str) -> None:
    """Whatever is there of the copies of a task when it is consolidated again, the result is the same."""
    config = config_of(shards, tmp_path / "run")
    assert go_on(config, 1) == "stopped"
    copied = RunFolder(tmp_path / "run").copies / "task-000-000006"
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / next((tmp_path / "run" / "checkpoints").glob("task-000-done-*")))
    if left == "half":
        next(copied.glob("*.tar")).write_bytes(b"half")
    else:
        manifest = json.loads((copied / "manifest.json").read_text())
        (copied / "manifest.json").write_text(json.dumps({**manifest, "listing": "another"}))
    assert go_on(config, 1) == "stopped"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_what_may_not_go(shards: Path, tmp_path: Path) -> None:
    """Shards of tasks to come, test images, and whatever was not copied."""
    config = config_of(shards, tmp_path / "run")
    assert go_on(config, 1) == "stopped"
    shutil.move(shards / "two" / "train", tmp_path / "kept")
    with pytest.raises(DataError, match=r"'.*two' has no split 'train'"):  # nothing was copied of it
        go_on(config)
    shutil.move(tmp_path / "kept", shards / "two" / "train")
    shutil.move(shards / "one" / "test", tmp_path / "kept")
    with pytest.raises(DataError, match="the test images of every task are needed until the end"):
        go_on(config)
    shutil.move(tmp_path / "kept", shards / "one" / "test")
    shutil.rmtree(shards / "one" / "train")
    with pytest.raises(DataError, match=r"log.reconstruction > 0 needs all earlier examples: set it to 0"):
        go_on(config_of(shards, tmp_path / "run", "log.reconstruction=0.5"))
    with pytest.raises(DataError, match=r"'.*one' has no split 'train'"):  # memory.keep=reference asks for all
        go_on(config_of(shards, tmp_path / "run", "memory.keep=reference"))
    shutil.rmtree(RunFolder(tmp_path / "run").copies / "task-000-000006")
    with pytest.raises(DataError, match=r"images that the run still needs are missing: 6 images, such as 'c0000-000/"):
        go_on(config)


def test_an_adaptation_needs_the_memory_and_what_is_removed(shards: Path, tmp_path: Path) -> None:
    assert go_on(config_of(shards, tmp_path / "run", "train.epochs=1")) == "done"
    with reopened(tmp_path / "run") as (state, world):
        span, kept = world.stream.tasks[0].samples("train"), state.prior.memory.sample.numpy()
        (lost, *_) = world.stream.sample_names("train", np.setdiff1d(np.array(span), kept)[:1])
    shutil.rmtree(shards / "one" / "train")

    def adapted(**change: Any) -> RunConfig:
        out = tmp_path / str(change["kind"])
        return adapted_config(tmp_path / "run", out, task=2, change=change, model=None, settings=[])

    assert go_on(adapted(kind="precision", precision=2.0)) == "done"
    assert evaluate_run(tmp_path / "precision")["checkpoint"].startswith("task-002-done")
    with pytest.raises(DataError, match=r"is gone, and memory has no copy of it"):
        go_on(adapted(kind="remove", names=[lost]))


def test_some_shards_of_a_part_may_go(shards: Path, tmp_path: Path) -> None:
    """A data set cut into several tasks loses the files of those that are finished, and no others."""
    (tmp_path / "all").mkdir()
    stream = f"stream={{kind: shards, parts: [{{path: {shards / 'one'}, tasks: 3}}]}}"
    memory = ["memory.size=3", "model={kind: mlp, hidden: [4]}", "train.head=seen"]
    expected = config_of(shards, tmp_path / "whole", stream, *memory)
    assert go_on(expected) == "done"
    config = config_of(shards, tmp_path / "run", stream, *memory)
    assert go_on(config, 1) == "stopped"
    (shards / "one" / "train" / "c0000-000.tar").unlink()
    shutil.move(shards / "one" / "train" / "c0001-000.tar", tmp_path / "kept")
    with pytest.raises(DataError, match="10 images, such as 'c0001-000/img_00', are gone"):
        go_on(config)
    shutil.move(tmp_path / "kept", shards / "one" / "train" / "c0001-000.tar")
    assert go_on(config) == "done"
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_shards_go_while_the_run_goes_on(shards: Path, tmp_path: Path) -> None:
    class Removes(After):
        def requested(self, comm: Comm) -> bool:
            wanted = super().requested(comm)
            self.reason = None
            if wanted:
                shutil.rmtree(shards / "one" / "train", ignore_errors=True)
            return False

    expected = whole(shards, tmp_path, "data.storage=encoded")
    config = config_of(shards, tmp_path / "run", "data.storage=encoded")
    prepare(config, [])
    assert run(config, Comm.solo(), Removes(tmp_path / "run", 1), quiet=True) == "done"
    assert not (shards / "one" / "train").exists()
    assert weights(tmp_path / "run") == expected


def test_copies_are_advised_where_memory_would_be_downloaded_again(shards: Path, tmp_path: Path) -> None:
    small = ("data.shard_gib=1e-5", "memory.keep=reference")
    config = config_of(shards, tmp_path / "run", *small, "data.storage=encoded", url=True)
    stream = open_for(config, RunFolder(tmp_path / "run"))
    assert stream.fetched == sum(file.stat().st_size for file in shards.glob("*/train/*.tar")) > 1e-5 * 2**30
    assert isinstance(config.stream, ShardStream)
    half = config.stream.model_copy(update={"parts": [config.stream.parts[0]]})
    assert 0 < open_for(config.model_copy(update={"stream": half}), RunFolder(tmp_path)).fetched < stream.fetched
    advice = copies_advised(config, stream)
    assert advice is not None
    assert "set memory.keep=copy" in advice
    for more in (("memory.keep=copy",), ("data.shard_gib=1",), ("memory.size=0", "prior.replay=0")):
        assert copies_advised(config_of(shards, tmp_path / "run", *small, *more, url=True), stream) is None
    for other in (config_of(shards, tmp_path / "run", *small), load([], ["memory.size=10"])):
        assert open_for(other, RunFolder(tmp_path / "run")).fetched == 0


def test_digits_cannot_be_copied() -> None:
    with pytest.raises(ConfigError, match=r"memory\.keep = copy with stream.kind = digits: the digits are a part of"):
        load([], ["memory.keep=copy", "memory.size=10"])


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (("train.head=seen", "prior.correct.share=0.1"), "prior.correct.share"),
        (("train.head=seen", "evaluate.classifier=nearest_mean", "evaluate.means=data"), "evaluate.means"),
    ],
)
def test_what_reads_more_of_the_past_than_memory_is_refused(shards: Path, more: tuple[str, ...], key: str) -> None:
    plain = ("prior={replay: 1.0, quadratic: {weight: 0.0}}", "memory.size=0", "memory.total=90")
    with pytest.raises(ConfigError, match=rf"memory\.keep = copy with {key} = .*copies memory alone"):
        load([], [*settings(shards, *plain), *more])


@pytest.mark.slow
def test_two_processes_and_an_abrupt_end(shards: Path, tmp_path: Path) -> None:
    """Killed by the system right after the first task was saved; two processes before and after."""
    given = [*settings(shards, "data.storage=encoded"), "name=run"]
    code, output = finish(start(tmp_path / "whole", "--nproc=2", *given))
    assert code == 0, output
    process = start(tmp_path / "run", "--nproc=2", *given)
    while not list((tmp_path / "run" / "checkpoints").glob("task-000-done-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill_tree(process)
    shutil.rmtree(shards / "one" / "train")
    code, output = finish(start(tmp_path / "run", "--nproc=2", *given))
    assert code == 0, output
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
