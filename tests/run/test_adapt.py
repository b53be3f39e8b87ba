"""hpccl adapt: the four adaptations come close to training anew, exactly so for a linear network with full memory."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from typer.testing import CliRunner

from hpccl.cli import app
from hpccl.cluster.prepare import prepare
from hpccl.config.adapt import SETTINGS, adapted_config, named, reference_config
from hpccl.config.load import dump
from hpccl.config.run import RunConfig
from hpccl.data.shards.build import build
from hpccl.data.shards.encodings import Lossless
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.errors import ConfigError, DataError, FolderError, HpcclError
from hpccl.memory.store import Memory
from hpccl.prior.normal import NormalPrior
from hpccl.prior.prior import Prior
from hpccl.report.adaptation import Adaptation, write_adaptation
from hpccl.report.events import latest, read_events
from hpccl.report.summary import summarise
from hpccl.tools.adapt_compare import check_reference, compare_adaptation
from hpccl.tools.evaluate_run import reopened
from hpccl.tools.export import export
from hpccl.tools.memory_map.build import map_memory
from hpccl.tools.merge import merge
from hpccl.tools.uncertainty import evaluate_posterior
from hpccl.train.adapt import adaptation_task, begin_adapting, check_adaptation
from hpccl.train.compose import Composer, split
from hpccl.train.copies import open_for
from hpccl.train.evaluate import evaluate_all
from hpccl.train.fit import fit
from hpccl.train.loss import weighted_nats
from hpccl.train.normal import labelled_share
from hpccl.train.plan import plan_task
from hpccl.train.row_weights import counted_examples
from hpccl.train.run import run
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop
from tests.dist.world import Result, run_in_world
from tests.run.command import ROOT, hpccl, kill_tree, wait_for_steps
from tests.run.method import AfterEvent, make_world, merged

SECTIONS: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 1},
    "model": {"kind": "mlp", "hidden": [16]},
    "train": {"epochs": 25, "batch_size": 128, "head": "seen"},
    "optim": {"name": "adamw", "lr": 1e-2},
    "memory": {"fraction": 0.2},
    "prior": {"normal": {"precision": 1.0}, "scale_to_task": True},
    "cluster": {"kind": "inline"},
}
REMOVE: dict[str, Any] = {"kind": "remove", "names": ["3"]}
PRECISION: dict[str, Any] = {"kind": "precision", "precision": 10.0}
MODEL: dict[str, Any] = {"kind": "model"}


def learn(config: RunConfig, comm: Comm | None = None, stop: Stop | None = None) -> str:
    comm = comm or Comm.solo()
    if comm.leader:
        prepare(config, [])
    comm.barrier()
    return run(config, comm, stop or Stop(), quiet=True)


def source(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The folder of a run to adapt."""
    config = merged(SECTIONS, changes or {}).model_copy(update={"folder": str(folder)})
    assert learn(config) == "done"
    return folder


def both(run_folder: Path, out: Path, change: dict[str, Any], *settings: str) -> tuple[RunConfig, RunConfig]:
    """Configurations of an adaptation and its reference."""
    model = "mlp" if change["kind"] == "model" else None
    given: dict[str, Any] = {"task": 0, "change": change, "model": model, "settings": settings}
    return adapted_config(run_folder, out, **given), reference_config(run_folder, out / "reference", **given)


def adapt(run_folder: Path, out: Path, change: dict[str, Any], *settings: str) -> Adaptation:
    config, reference = both(run_folder, out, change, *settings)
    check_adaptation(config)
    assert learn(config) == learn(reference) == "done"
    return compare_adaptation(out, reference)


def digest(folder: Path) -> str:
    (done,) = [event for event in read_events(folder / "events.jsonl") if event["event"] == "done"]
    return str(done["weights_sha256"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of digits: 20 training images a class to learn first, 40 others to add, and tests."""
    folder = tmp_path_factory.mktemp("images")
    data, taken = load_digits(), dict.fromkeys(range(10), 0)
    for number, (picture, label) in enumerate(zip(data.images, data.target, strict=True)):
        seen = taken[int(label)]
        taken[int(label)] += 1
        where = "base/train" if seen < 20 else "more/train" if seen < 60 else "base/test"
        path = folder / where / f"digit_{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).convert("RGB").save(path)
    for name in ("base", "more"):
        build(folder / name, folder / "shards" / name, encoding=Lossless(), workers=1)
    return folder


def shards(images: Path, cache: Path) -> dict[str, Any]:
    """Sections of a run on the first of these shards."""
    return {
        "stream": {"kind": "shards", "parts": [{"path": str(images / "shards" / "base")}]},
        "data": {"cache": str(cache), "storage": "decoded"},
    }


def test_a_run_whose_new_images_compete_in_their_task_alone_can_be_adapted(tmp_path: Path) -> None:
    """An adaptation keeps no further examples, which would compete among all classes."""
    few = {"stream": {"tasks": 2}, "train": {"epochs": 2, "competing": "task"}, "memory": {"fraction": 0.0, "size": 20}}
    run_folder = source(tmp_path / "run", few)
    settings = ("train.epochs=2",)
    config = adapted_config(run_folder, tmp_path / "out", task=0, change=PRECISION, model=None, settings=settings)
    assert learn(config) == "done"
    given: dict[str, Any] = {"task": 0, "change": PRECISION, "model": None, "settings": ()}
    reference = reference_config(run_folder, tmp_path / "reference", **given)
    assert reference.train.competing == "seen", "all classes are there at once"


def test_an_adaptation_in_a_step_of_slurm_is_compared_by_its_first_task(digits: Path, tmp_path: Path) -> None:
    words = ["adapt", str(digits), "--remove", "3", "--out", str(tmp_path / "out"), "train.epochs=1", "log.quiet=true"]
    step: dict[str, Any] = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "HPCCL_STEP": "1"}
    code, output = hpccl(*words, **step, SLURM_PROCID="0")
    assert code == 0, output
    (tmp_path / "out" / "adaptation.json").unlink()
    code, output = hpccl(*words, **step, SLURM_PROCID="1")
    assert code == 0, output
    assert not (tmp_path / "out" / "adaptation.json").exists()


def test_an_export_names_the_classes_that_were_removed(digits: Path, tmp_path: Path) -> None:
    settings = ("train.epochs=1",)
    config = adapted_config(digits, tmp_path / "out", task=0, change=REMOVE, model=None, settings=settings)
    assert learn(config) == "done"
    export(tmp_path / "out", tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["hpccl"]["removed"] == ["3"]
    assert "made to forget these outputs; ignore them: 3 (3)." in (tmp_path / "export" / "README.md").read_text()


# ---------------------------------------------------------------- close to retraining


@pytest.mark.parametrize(
    "change", [REMOVE, pytest.param(PRECISION, marks=pytest.mark.slow)], ids=lambda change: change["kind"]
)
def test_an_adapted_network_is_closer_to_retraining_than_before(
    digits: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    found = adapt(digits, tmp_path / "out", change)
    assert found.adapted.total_variation is not None
    assert found.start.total_variation is not None
    assert found.adapted.total_variation < 0.75 * found.start.total_variation
    assert found.cost.images < 0.4 * (found.reference_cost.images if found.reference_cost else 0)
    if change is REMOVE:
        assert found.adapted.accuracy_removed == 0
        assert found.adapted.accuracy_kept is not None
        assert found.adapted.accuracy_kept > 0.9
        assert found.start.accuracy_removed is not None
        assert found.start.accuracy_removed > 0.8
    page = write_adaptation(found, tmp_path / "out").read_text()
    assert "| adapted | retrained |" in page
    assert (tmp_path / "out" / "report.json").exists()


def test_what_is_frozen_stays_in_an_adaptation_of_a_single_task(digits: Path, tmp_path: Path) -> None:
    config, _ = both(digits, tmp_path / "out", REMOVE, "train.frozen=[features]", "train.epochs=1")
    assert learn(config) == "done"
    with reopened(digits) as (state, _), reopened(tmp_path / "out") as (other, _):
        before, after = wholes(state.engine.gather()), wholes(other.engine.gather())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == set(list(before)[-2:])  # weight and bias of the last layer


def test_an_adaptation_is_tested_as_its_run_was(tmp_path: Path) -> None:
    """With mirrored images, too: the accuracy beside the reference is that of the run's own report."""
    folder = source(tmp_path / "run", {"train": {"flip_test": True, "epochs": 5}})
    config, _ = both(folder, tmp_path / "out", REMOVE, "train.epochs=1")
    assert learn(config) == "done"
    found = compare_adaptation(tmp_path / "out", None)
    for network, run_folder in ((found.start, folder), (found.adapted, tmp_path / "out")):
        assert network.accuracy == pytest.approx(summarise(run_folder).average_accuracy_class_incremental)


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_removed_examples_count_in_neither_number(tmp_path: Path, replay: float) -> None:
    """Also those that memory replayed, which have left it."""
    folder = source(tmp_path / "run", {"train": {"epochs": 1}, "prior": {"replay": replay}})
    config, _ = both(folder, tmp_path / "out", REMOVE)
    state, world = begun(config, tmp_path / "state")
    labels, memory = world.stream.labels("train"), state.prior.memory
    left, kept = counted_examples(config, world.stream, memory)
    assert left == [int((labels != 3).sum())]
    assert kept == [int((labels[memory.sample.numpy()] != 3).sum())]


@pytest.mark.parametrize(("replay", "share"), [(1.0, 1.0), (0.0, 0.0)])
def test_true_labels_that_are_removed_leave_as_little_to_the_old_weights(
    tmp_path: Path, replay: float, share: float
) -> None:
    """With the whole past in memory, retraining has no pull, and nor has the adaptation."""
    folder = source(tmp_path / "run", {**LINEAR, "train": {"epochs": 1}, "prior": {"replay": replay}})
    config, _ = both(folder, tmp_path / "out", REMOVE)
    state, world = begun(config, tmp_path / "state")
    task = adaptation_task(config, world.stream)
    assert labelled_share(config, world.stream, task, state.prior.memory) == pytest.approx(share)


@pytest.mark.slow
def test_added_images_help_and_the_past_stays(images: Path, tmp_path: Path) -> None:
    folder = source(tmp_path / "run", shards(images, tmp_path / "cache"))
    change = {"kind": "add", "data": [str(images / "shards" / "more")]}
    found = adapt(folder, tmp_path / "out", change)
    assert found.adapted.total_variation is not None
    assert found.start.total_variation is not None
    assert found.adapted.total_variation < found.start.total_variation
    assert found.adapted.accuracy > found.start.accuracy
    tuned = finetuned(both(folder, tmp_path / "tuned", change)[0], tmp_path / "tuned", keep=False)
    assert found.adapted.distance is not None
    assert found.adapted.distance < distance(tuned, tmp_path / "out" / "reference")


@pytest.mark.slow
def test_another_network_learns_more_of_soft_labels_than_of_true_ones(digits: Path, tmp_path: Path) -> None:
    settings = ("model.hidden=[24,24]", "train.epochs=60")
    found = adapt(digits, tmp_path / "out", MODEL, *settings)
    assert found.adapted.distance is not None  # the reference is of the student's kind
    assert found.start.distance is None
    config, _ = both(digits, tmp_path / "tuned", MODEL, *settings)
    state = finetuned(config, tmp_path / "tuned", keep=True)
    assert found.adapted.accuracy > accuracy(state, config, tmp_path / "again")


def finetuned(config: RunConfig, folder: Path, *, keep: bool) -> RunState:
    """What fine-tuning makes of the network: on what is new alone, or (`keep`) on the true labels of the memory."""
    state, world = begun(config, folder)
    memory = state.prior.memory
    state.prior = Prior(Memory.empty())
    if keep:
        state.prior = Prior(Memory(**{**vars(memory), "replay": torch.ones_like(memory.replay)}))
    assert fit(adaptation_task(config, world.stream), state, world)
    return state


def begun(config: RunConfig, folder: Path) -> tuple[RunState, World]:
    """The state from which an adaptation begins; of a reference, a fresh one."""
    state, world = make_world(config, folder)
    world = replace(world, stream=open_for(config, world.folder))
    begin_adapting(state, world)
    return state, world


def distance(state: RunState, reference: Path) -> float:
    own = wholes(state.engine.gather())
    with reopened(reference) as (other, _):
        theirs = wholes(other.engine.gather())
    squares = [float((value - theirs[name]).square().sum()) for name, value in own.items()]
    return math.sqrt(sum(squares))


def accuracy(state: RunState, config: RunConfig, folder: Path) -> float:
    _, world = make_world(config, folder)
    (result,) = evaluate_all(state, world, last=0)
    return float(result["class_incremental"]["accuracy"])


# ---------------------------------------------------------------- exact


LINEAR: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": []},
    "memory": {"fraction": 1.0},
    "train": {"epochs": 3},
}


def objective_gradient(config: RunConfig, weights: dict[str, Tensor], folder: Path) -> Tensor:
    """Of the whole objective in nats, at some weights: all rows of one epoch, and the prior of the weights."""
    state, world = begun(config, folder)
    task = adaptation_task(config, world.stream)
    memory, model = state.prior.memory, state.engine.module.double()
    plan = plan_task(config, world.stream, task, memory)
    assert plan.steps_per_epoch == 1
    composer = Composer.build(config, world.stream, task, memory, teacher=None, device=state.engine.device)
    model.load_state_dict(weights)
    (part,) = split(plan.batch(0), world.comm, accumulate=1)
    (images,) = world.stream.load([composer.request(part)])
    rows = composer.rows(part, images)
    loss = weighted_nats(model(rows.pixels.double()), rows).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    prior = NormalPrior.of(config, state.prior.anchor)
    assert prior is not None
    anchor = None if prior.anchor is None else wholes(prior.anchor)
    forces = [
        prior.force(weights[name], None if anchor is None else anchor[name].double())
        for name, _ in model.named_parameters()
    ]
    return torch.cat([(grad + force).reshape(-1) for grad, force in zip(grads, forces, strict=True)])


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear network with its whole task in memory; far from its minimum, where exactness is hardest."""
    return source(tmp_path_factory.mktemp("linear") / "run", LINEAR)


@pytest.mark.parametrize(
    "change",
    [REMOVE, {"kind": "remove", "names": ["digits/10", "digits/7", "4"]}, PRECISION],
    ids=["class", "class and examples", "precision"],
)
def test_the_gradient_is_that_of_retraining_up_to_what_the_run_left_undone(
    linear: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Both objectives differ by a linear function of the weights: the run's own gradient where it ended."""
    configs = both(linear, tmp_path / "out", change, "train.batch_size=4000")
    configs = (
        configs[0],
        configs[1].model_copy(update={"train": configs[0].train.model_copy(update={"data": "seen"})}),
    )
    past = both(linear, tmp_path / "past", {"kind": "precision", "precision": 1.0}, "train.batch_size=4000")[1]
    past = past.model_copy(update={"train": configs[1].train})
    with reopened(linear) as (state, _):
        old = {name: value.double() for name, value in wholes(state.engine.gather()).items()}
    left = objective_gradient(past, old, tmp_path / "a")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        weights = {
            name: value + 0.3 * torch.randn(value.shape, generator=generator).double() for name, value in old.items()
        }
        adapted, retrained = (
            objective_gradient(config, weights, tmp_path / f"{number}-{config.adapt.kind}-{side}")
            for side, config in enumerate(configs)
        )
        assert float((retrained - left - adapted).norm()) < 1e-5 * float(retrained.norm())
        assert float(left.norm()) > 1e-2 * float(retrained.norm())  # it is not small by itself


@pytest.mark.parametrize("view", ["stored", "teacher"])
def test_what_is_removed_does_not_depend_on_the_temperature(linear: Path, tmp_path: Path, view: str) -> None:
    """Two rows of one image add up to y - p* only where both are at temperature 1."""
    warm, plain = (
        adapted_config(
            linear, tmp_path / name, task=0, change=REMOVE, model=None, settings=("train.batch_size=4000", *settings)
        )
        for name, settings in (("plain", ()), ("warm", ("prior.temperature=2.0", f"prior.view={view}")))
    )
    with reopened(linear) as (state, _):
        old = {name: value.double() for name, value in wholes(state.engine.gather()).items()}
    removed = []
    for number, scale in enumerate((1.0, 3.0)):
        weights = {name: scale * value for name, value in old.items()}
        removed.append(gradient_of_removed(warm, weights, old, tmp_path / f"warm-{number}"))
    torch.testing.assert_close(removed[0], gradient_of_removed(plain, old, old, tmp_path / "plain-at-1"))
    torch.testing.assert_close(removed[0], removed[1])  # independent of the weights
    assert float(removed[0].norm()) > 0


def gradient_of_removed(config: RunConfig, weights: dict[str, Tensor], old: dict[str, Tensor], folder: Path) -> Tensor:
    """By the logits [n, C] of the images to be removed, of all their rows: summed over an image's rows."""
    state, world = begun(config, folder)
    task, memory, model = adaptation_task(config, world.stream), state.prior.memory, state.engine.module.double()
    plan = plan_task(config, world.stream, task, memory)

    def teacher(pixels: Tensor) -> Tensor:
        model.load_state_dict(old)
        with torch.no_grad():
            logits: Tensor = model(pixels.double())
        return logits.float()

    composer = Composer.build(config, world.stream, task, memory, teacher=teacher, device=state.engine.device)
    (part,) = split(plan.batch(0), world.comm, accumulate=1)
    (images,) = world.stream.load([composer.request(part)])
    rows = composer.rows(part, images)
    model.load_state_dict(weights)
    logits = model(rows.pixels.double()).detach().requires_grad_()
    (found,) = torch.autograd.grad(weighted_nats(logits, rows).sum(), logits)
    assert composer.removed is not None
    slot = torch.from_numpy(part.batch.slot[part.rows])
    order = slot.argsort()
    gone: Tensor = found[order][composer.removed[slot[order]]]
    return gone


def test_adding_is_exact_too(images: Path, tmp_path: Path) -> None:
    folder = source(tmp_path / "run", {**LINEAR, **shards(images, tmp_path / "cache")})
    change = {"kind": "add", "data": [str(images / "shards" / "more")]}
    test_the_gradient_is_that_of_retraining_up_to_what_the_run_left_undone(folder, tmp_path, change)


# ---------------------------------------------------------------- several tasks


def test_an_added_image_competes_in_the_head_of_its_class(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpccl.report.write.report_run", lambda folder: None)  # plots take longer than all else
    parts = [{"path": str(images / "shards" / "base"), "tasks": 2}]
    settings = {"stream": {"kind": "shards", "parts": parts}, "train": {"epochs": 1, "head": "own"}}
    folder = source(tmp_path / "run", {**shards(images, tmp_path / "cache"), **settings})
    change = {"kind": "add", "data": [str(images / "shards" / "more")]}
    config = adapted_config(folder, tmp_path / "out", task=1, change=change, model=None, settings=())
    state, world = begun(config, tmp_path / "out")
    task, memory = adaptation_task(config, world.stream), state.prior.memory
    composer = Composer.build(config, world.stream, task, memory, teacher=None, device=state.engine.device)
    assert len(world.stream.added) == len(composer.samples) == 400
    target, head = composer.hard_targets(torch.from_numpy(composer.samples))
    np.testing.assert_array_equal(target.argmax(dim=1), world.stream.labels("train")[-400:])
    assert head.sum(dim=1).tolist() == [5] * 400
    assert bool(head[torch.arange(400), target.argmax(dim=1)].all())


def test_what_is_removed_of_tasks_that_share_a_class_is_removed_of_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpccl.report.write.report_run", lambda folder: None)
    stream = {"kind": "digits", "tasks": 2, "scenario": {"kind": "rotated", "degrees": 90, "angles": "even"}}
    folder = source(tmp_path / "run", {"stream": stream, "train": {"epochs": 1}})
    config = adapted_config(folder, tmp_path / "out", task=1, change=REMOVE, model=None, settings=())
    state, world = begun(config, tmp_path / "out")
    memory, (first, second) = state.prior.memory, world.stream.tasks
    gone = memory.sample[memory.label == 3]
    assert gone.unique().tolist() == np.flatnonzero(world.stream.labels("train") == 3).tolist()
    assert len(gone.unique()) == len(gone)
    assert memory.task.tolist() == (memory.sample >= first.samples("train").stop).long().tolist()
    assert sum(gone >= second.samples("train").start) == len(gone) / 2


# ---------------------------------------------------------------- ranks, resuming


def on_ranks(comm: Comm, folder: str, run_folder: str, change: dict[str, Any], engine: tuple[str, ...]) -> Result:
    """An adaptation, and the weights at its end."""
    out = Path(folder) / f"size-{comm.size}"
    settings = ("train.epochs=4", "optim.name=momentum", "optim.lr=0.02", "optim.weight_decay=0", *engine)
    config, _ = both(Path(run_folder), out, change, *settings)
    assert learn(config, comm) == "done"
    comm.barrier()
    with reopened(out) as (state, _):
        return {"weights": wholes(state.engine.gather())}


@pytest.mark.slow
@pytest.mark.parametrize("change", [REMOVE, PRECISION, MODEL], ids=lambda change: change["kind"])
@pytest.mark.parametrize(
    "engine",
    [(), ("engine.kind=fsdp2",), ("engine.kind=deepspeed", "engine.stage=3")],
    ids=["ddp", "fsdp2", "zero-3"],
)
def test_two_processes_adapt_as_one_does(
    digits: Path, tmp_path: Path, engine: tuple[str, ...], change: dict[str, Any]
) -> None:
    one = run_in_world(on_ranks, 1, tmp_path, str(tmp_path), str(digits), change, ())[0]
    for rank in run_in_world(on_ranks, 2, tmp_path, str(tmp_path), str(digits), change, engine):
        for name, value in one["weights"].items():
            assert float((rank["weights"][name] - value).norm()) <= 1e-4 * float(value.norm())


@pytest.mark.parametrize(
    "change", [REMOVE, pytest.param(MODEL, marks=pytest.mark.slow)], ids=lambda change: change["kind"]
)
def test_stopped_and_again_gives_the_same_weights(digits: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    once, _ = both(digits, tmp_path / "once", change, "train.epochs=5")
    again, _ = both(digits, tmp_path / "again", change, "train.epochs=5")
    assert learn(once) == "done"
    assert learn(again, stop=AfterEvent(tmp_path / "again", "task")) == "stopped"
    assert learn(again) == "done"
    assert digest(tmp_path / "once") == digest(tmp_path / "again")
    runs = [event for event in read_events(tmp_path / "again" / "events.jsonl") if event["event"] == "run"]
    assert [bool(event["resumed"]) for event in runs] == [False, True]
    fits = latest(read_events(tmp_path / "again" / "events.jsonl"), "phase", "task", "phase", "part")
    steps = {event["part"] for event in fits if event["phase"] == "fit"}
    assert steps == {0, 5}
    assert runs[0]["steps"] == runs[1]["steps"]
    assert runs[0]["steps"][0] > 5


# ---------------------------------------------------------------- what is refused

FIXED = (
    *("seed", "stream.tasks", "data.test_size", "memory.size", "curvature.damping", "adapt.retrain"),
    *("evaluate.classifier", "prior.replay", "prior.normal.precision", "prior.normal.weight", "prior.quadratic.weight"),
    *("prior.label_weight", "train.head", "train.loss", "train.flip_test", "train.label_smoothing", "train.data"),
    *("train.restart", "train.only_last", "train.head_epochs", "train.first_task_from", "train.weights"),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "remove", "names": ["3", "eleven"]}, "'eleven' .* neither a class nor the id"),
        ({"kind": "remove", "names": ["digits/99999"]}, "'digits/99999' .* ids are like 'digits/"),
        ({"kind": "remove", "names": [str(number) for number in range(10)]}, "all 1438 training examples"),
        ({"kind": "add", "data": ["nowhere"]}, "'nowhere' does not exist; give a folder of shards"),
        ({"kind": "add", "data": ["."]}, "cannot be added to the embedded digits"),
    ],
)
def test_data_that_does_not_fit_is_refused(digits: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config, _ = both(digits, tmp_path / "out", change)
    with pytest.raises(DataError if change["kind"] == "add" else ConfigError, match=message):
        check_adaptation(config)
    assert not (tmp_path / "out").exists()


def test_added_images_of_another_size_or_class_are_refused(images: Path, tmp_path: Path) -> None:
    sections = shards(images, tmp_path / "cache")
    folder = source(tmp_path / "run", {**sections, "train": {"epochs": 1}})
    for name, side, label in (("size", 9, "digit_3"), ("class", 8, "letter_a")):
        path = tmp_path / name / "train" / label / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (side, side)).save(path)
        build(tmp_path / name, tmp_path / "shards" / name, encoding=Lossless(), workers=1)
    for name, message in (("size", "9 x 9 and those of the stream 8 x 8"), ("class", "'letter_a' .* has not learned")):
        change = {"kind": "add", "data": [str(tmp_path / "shards" / name)]}
        with pytest.raises(DataError, match=message):
            check_adaptation(both(folder, tmp_path / "out", change)[0])


def test_a_reference_learns_what_later_tasks_of_its_run_held(tmp_path: Path) -> None:
    later = {"frozen": ["features"], "norms": "running"}
    prepare(merged(SECTIONS, {"train": later}).model_copy(update={"folder": str(tmp_path / "run")}), [])
    adapted, reference = both(tmp_path / "run", tmp_path / "out", REMOVE)
    assert (adapted.train.frozen, adapted.train.norms) == (("features",), "running")
    assert (reference.train.frozen, reference.train.norms) == ((), "batch")


def test_a_run_without_memory_or_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "run", {"memory": {"fraction": 0.0}, "train": {"epochs": 1}})
    with pytest.raises(FolderError, match="kept no examples"):
        check_adaptation(both(folder, tmp_path / "out", REMOVE)[0])
    two = source(tmp_path / "two", {"stream": {"kind": "digits", "tasks": 2}, "train": {"epochs": 1}})
    with pytest.raises(FolderError, match="learned 1 of 2 tasks"):
        check_adaptation(both(two, tmp_path / "out", REMOVE)[0])
    with pytest.raises(FolderError, match="not a run folder"):
        both(tmp_path, tmp_path / "out", REMOVE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(
            (f"{key}=1", f"keeps {key} as in its run; .*: train.epochs, .*, prior.view, data.cache, .*; all of optim")
            for key in FIXED
        ),
        ("train={head: own}", "keeps train as in its run; leave it out. Keys that may be set one by one: train.epochs"),
        ("model.hidden=[3]", "give its kind with --model"),
        ("folder=elsewhere", "folder=elsewhere: --out sets the folder"),
        ("name=other", "name=other: --out sets .* the name"),
    ],
)
def test_settings_that_an_adaptation_cannot_change(tmp_path: Path, setting: str, message: str) -> None:
    """`train.head` and the like would have the network tested otherwise than before, and look like a gain."""
    (tmp_path / "config.yaml").write_text(dump(merged(SECTIONS, {})))
    with pytest.raises(ConfigError, match=message):
        both(tmp_path, tmp_path / "out", REMOVE, setting)


def test_settings_that_an_adaptation_can_change(tmp_path: Path) -> None:
    """As documentation and help name them."""
    (tmp_path / "config.yaml").write_text(dump(merged(SECTIONS, {})))
    settings = ["train.epochs=3", "train.batch_size=9", "train.accumulate=2", "train.clip_norm=2.0", "train.ema=0.5"]
    settings += ["train.frozen=[features]", "train.norms=running", "prior.weight=2.0", "prior.scale_to_task=false"]
    settings += ["prior.temperature=2.0", "prior.view=recorded"]
    settings += ["data.cache=here", "data.shard_cache=here", "data.shard_gib=2.0", "data.retries=3", "data.workers=1"]
    settings += ["data.timeout=9.0"]
    config, _ = both(tmp_path, tmp_path / "out", REMOVE, *settings, "optim=sam", "engine.precision=bf16", "log.every=7")
    assert both(tmp_path, tmp_path / "out", REMOVE, "train.epochs.0=2")[0].train.epochs == (2,)
    assert (config.train.epochs, config.prior.view, config.optim.kind) == ((3,), "recorded", "sam")
    named_there, sections = SETTINGS.split("; all of ")
    assert named_there.split(", ") == [setting.split("=")[0] for setting in settings]
    page = (ROOT / "docs" / "adapt.md").read_text()
    for name in [*named_there.split(", "), *sections.split(";")[0].split(", "), "model"]:
        assert f"`{name}`" in page
    assert SETTINGS.replace(" ", "") in "".join(CliRunner().invoke(app, ["adapt", "--help"]).output.split())


def test_another_prior_takes_the_place_of_weight_decay(tmp_path: Path) -> None:
    """In the reference, too, which else has the run's own optimiser."""
    run = merged({"optim": {"name": "sgd", "weight_decay": 0.1}, "memory": {"size": 5}})
    (tmp_path / "config.yaml").write_text(dump(run))
    with pytest.raises(
        ConfigError, match=r"weight_decay = 0.1 with adapt.precision = 10.0: would pull the weights to 0"
    ):
        both(tmp_path, tmp_path / "out", PRECISION)
    for config in both(tmp_path, tmp_path / "out", PRECISION, "optim.weight_decay=0", "optim.lr=0.5"):
        assert config.optim.model_dump()["weight_decay"] == 0
    assert config.optim.lr != (0.5,)


def test_all_of_another_network_learns(tmp_path: Path) -> None:
    """What was frozen after the first task of a run is what that task had learned."""
    online = {"prior": {"quadratic": {"weight": 1.0, "decay": 0.9}}}
    frozen = merged({"train": {"frozen": ["features"], "norms": "running"}, "memory": {"size": 5}}, online)
    (tmp_path / "config.yaml").write_text(dump(frozen))
    for config in both(tmp_path, tmp_path / "out", MODEL, "model.hidden=[4]"):
        assert (config.train.frozen, config.train.norms) == ((), "batch")
        assert (config.prior.quadratic.weight, config.prior.quadratic.decay) == (0, 1)
    kept, _ = both(tmp_path, tmp_path / "out", PRECISION, "optim.weight_decay=0")
    assert (kept.train.frozen, kept.train.norms) == (("features",), "running")
    assert kept.prior.quadratic.decay == 0.9


def test_an_adaptation_is_not_adapted_again(digits: Path, tmp_path: Path) -> None:
    config, _ = both(digits, tmp_path / "out", PRECISION, "train.epochs=1")
    assert learn(config) == "done"
    with pytest.raises(FolderError, match="is an adaptation of"):
        both(tmp_path / "out", tmp_path / "further", PRECISION)


def test_the_curvature_of_a_run_is_not_that_of_its_adaptation(tmp_path: Path) -> None:
    """It is around the run's weights, which would be tested in the place of the adapted ones."""
    source = merged(
        {"memory": {"size": 5}, "prior": {"quadratic": {"weight": 1.0}}, "stream": {"kind": "digits", "tasks": 2}}
    )
    source = source.model_copy(update={"folder": str(tmp_path / "run")})
    assert learn(source) == "done"
    config, _ = both(tmp_path / "run", tmp_path / "out", REMOVE, "train.epochs=1")
    assert learn(config) == "done"
    wanted: list[Callable[[Path], object]] = [
        evaluate_posterior,
        lambda path: map_memory(path, posterior="checkpoint"),
        lambda path: export(path, tmp_path / "export", curvature=True),
    ]
    for ask in wanted:
        with pytest.raises(ConfigError, match=r"is an adaptation of '.*/run'; its curvature"):
            ask(tmp_path / "out")
    with pytest.raises(ConfigError, match="has no curvature, which --method fisher needs"):
        merge([tmp_path / "out"], tmp_path / "merged", method="fisher")


def test_names_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    assert named("3, 7,3") == ["3", "7"]
    assert (
        named(",".join(f"n{number:08d}" for number in range(500)))[499] == "n00000499"
    )  # no name of a file is as long
    (tmp_path / "ids.txt").write_text("digits/4\n\n digits/5 \n")
    assert named(str(tmp_path / "ids.txt")) == ["digits/4", "digits/5"]
    with pytest.raises(ConfigError, match="names no class"):
        named(" , ")


# ---------------------------------------------------------------- the reference


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """The folder of a run that nobody trained: its configuration is enough to say what its reference is."""
    prepare(merged(SECTIONS, {}).model_copy(update={"folder": str(tmp_path / "run")}), [])
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            {"kind": "remove", "names": ["3"]},
            (),
            r"adapt.names: \['3', '5'\] there, \['3'\] expected\ngive --reference",
        ),
        (PRECISION, (), "adapt.kind: remove there, precision expected\n  adapt.names: .* there, absent expected"),
        ({"kind": "remove", "names": ["5", "3"]}, ("engine.precision=bf16",), "engine.precision: fp32 there, bf16"),
        ({"kind": "remove", "names": ["5", "3"]}, (), "has no checkpoint yet"),  # the very one, if it were trained
    ],
)
def test_a_reference_is_of_the_same_adaptation_and_at_its_end(
    described: Path, tmp_path: Path, change: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    _, made = both(described, tmp_path / "out", {"kind": "remove", "names": ["3", "5"]})
    prepare(made, [])
    _, wanted = both(described, tmp_path / "out", change, *settings)
    with pytest.raises(FolderError, match=message):
        check_reference(wanted)


def test_a_run_an_adaptation_and_the_reference_of_another_run_are_no_reference(described: Path, tmp_path: Path) -> None:
    prepare(merged(SECTIONS, {}).model_copy(update={"folder": str(tmp_path / "twin")}), [])
    adapted, wanted = both(described, tmp_path / "out", REMOVE)
    prepare(adapted, [])
    prepare(both(tmp_path / "twin", tmp_path / "other", REMOVE)[1], [])
    for folder, message in (
        (described, "adapt.kind: none there, remove expected"),
        (tmp_path / "out", "adapt.retrain: False there, True expected"),
        (tmp_path / "other" / "reference", "adapt.source: .* there, .* expected"),
        (tmp_path / "nowhere", "is not a run folder"),
    ):
        with pytest.raises(FolderError, match=f"--reference '{folder}' .*(\n.*)*{message}(.*\n)*.*--reference retrain"):
            check_reference(wanted.model_copy(update={"folder": str(folder)}))


def test_a_reference_of_other_images_is_refused(tmp_path: Path) -> None:
    def built(value: int) -> None:
        for where in ("train", "test"):
            for label in range(2):
                for number in range(4):
                    path = tmp_path / "images" / where / f"class_{label}" / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (value, 99 * label, number)).save(path)
        build(tmp_path / "images", tmp_path / "shards", encoding=Lossless(), workers=1)

    built(1)
    sections = {"stream": {"kind": "shards", "parts": [{"path": str(tmp_path / "shards")}]}, "train": {"epochs": 1}}
    sections["data"] = {"cache": str(tmp_path / "cache"), "storage": "decoded"}
    prepare(merged(SECTIONS, sections).model_copy(update={"folder": str(tmp_path / "run")}), [])
    change = {"kind": "remove", "names": ["class_1"]}
    reference = both(tmp_path / "run", tmp_path / "out", change)[1]
    assert learn(reference) == "done"
    check_reference(reference)
    shutil.rmtree(tmp_path / "shards")
    built(2)
    with pytest.raises(FolderError, match="the data changed since --reference"):
        check_reference(reference)


# ---------------------------------------------------------------- the command


def refused(*words: str) -> str:
    """What `hpccl adapt` says against a command."""
    result = CliRunner().invoke(app, ["adapt", *words])
    assert isinstance(result.exception, HpcclError), result.output
    return str(result.exception)


def test_a_folder_that_is_no_reference_is_refused_before_anything_is_trained(digits: Path, tmp_path: Path) -> None:
    words = [str(digits), "--remove", "3", "--out", str(tmp_path / "out"), "train.epochs=1", "--reference"]
    assert "adapt.kind: none there, remove expected" in refused(*words, str(digits))
    assert "is not a run folder" in refused(*words, str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_kept(digits: Path, tmp_path: Path) -> None:
    """The adaptation's and the reference's, before anything is trained. No advice is to delete it."""
    words = [str(digits), "--remove", "3", "train.epochs=1", "--reference", "retrain", "--out"]
    assert refused(*words, str(digits)).endswith("is the run that is adapted, which stays as it is; give another --out")
    for folder in (tmp_path / "used", tmp_path / "out" / "reference"):
        used = prepare(merged(SECTIONS, {}).model_copy(update={"folder": str(folder)}), [])
        (used.checkpoints / "task-000-fit-00000005").mkdir()
        message = refused(*words, str(tmp_path / folder.relative_to(tmp_path).parts[0]))
        assert f"'{folder}' holds a run of another configuration" in message
        assert message.endswith("give another --out, or undo the change to continue what is there")
    assert not (tmp_path / "out" / "config.yaml").exists()
    (tmp_path / "used" / "config.yaml").write_text("seed: [")
    assert refused(*words, str(tmp_path / "used")).endswith("give another --out")


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_precision_that_cannot_be(tmp_path: Path, value: str) -> None:
    message = refused("nowhere", "--out", str(tmp_path / "out"), "--prior-precision", value)
    assert message.startswith(f"--prior-precision is {value}; allowed: a finite number >= 0")


@pytest.mark.slow
def test_the_command_is_killed_continued_and_compared(digits: Path, tmp_path: Path) -> None:
    """kill -9 in the adaptation; the same command ends where an undisturbed one does, and writes the comparison."""

    def words(out: str) -> list[str]:
        settings = ["train.epochs=30", "checkpoint.every=5", "log.every=1", "log.quiet=true"]
        return ["adapt", str(digits), "--remove", "3", "--out", str(tmp_path / out), *settings]

    code, output = hpccl(*words("once"), "--reference", "retrain")
    assert code == 0, output
    assert "Retraining took" in output
    process = subprocess.Popen(
        [sys.executable, "-m", "hpccl.cli", *words("again")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for_steps(tmp_path / "again", process, 20)
    kill_tree(process)
    reference = ("--reference", str(tmp_path / "once" / "reference"))
    code, output = hpccl(*words("again"), *reference)
    assert code == 0, output
    assert digest(tmp_path / "once") == digest(tmp_path / "again")
    found = [json.loads((tmp_path / name / "adaptation.json").read_text()) for name in ("once", "again")]
    assert found[0]["adapted"] == found[1]["adapted"]
    assert found[0]["share_of_images"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "none of them given"),
        (["--remove", "3", "--prior-precision", "2"], "--remove, --prior-precision given"),
        (["--remove", "3", "more.yaml"], "'more.yaml' is not key=value"),
    ],
)
def test_options_that_say_nothing_or_two_things(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["adapt", "nowhere", "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
