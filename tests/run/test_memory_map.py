"""`hpccl memory map` on whole runs of digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.cli import app
from hpccl.config.curvature import MasCurvature
from hpccl.config.load import dump
from hpccl.config.optim import IvonOptim
from hpccl.data.rows import Request
from hpccl.dist.spread import wholes
from hpccl.errors import ConfigError, CoverageError, FolderError
from hpccl.optim.posterior import _unlearned_ivon, curvature_key, variance
from hpccl.report.memory_map import MemoryMap, summary, write_memory_map
from hpccl.tools.evaluate_run import evaluate_run, reopened
from hpccl.tools.memory_map import last_layer
from hpccl.tools.memory_map.all_weights import by_all_weights
from hpccl.tools.memory_map.build import map_memory
from hpccl.tools.memory_map.found import Group
from hpccl.tools.memory_map.tables import _test_results
from hpccl.tools.uncertainty import evaluate_posterior
from hpccl.train.evaluate import evaluate_all
from hpccl.train.score import looks
from tests.run.command import events, finish, start, trained
from tests.run.method import learn, make_world, merged

SETTINGS = ("stream.tasks=2", "train.epochs=4", "memory.size=20", "prior.scale_to_task=true", "cluster.threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run") / "one", *SETTINGS)


@pytest.fixture(scope="module")
def found(run: Path) -> MemoryMap:
    return map_memory(run)


def test_the_page_has_pictures_and_plots(found: MemoryMap, tmp_path: Path) -> None:
    page = write_memory_map(found, tmp_path).read_text()
    assert page.count("data:image/png;base64,") >= 2 * 10  # two of every class, and those in the plot
    assert page.count("<svg") == 5
    assert "prefers-color-scheme: dark" in page
    assert "http-equiv" not in page
    assert 'src="http' not in page
    for name in ("error_variance", "error_leverage", "left_out", "classes", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    lines = (tmp_path / "memory_map.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found.table["sample"]) == 1 + 1438
    assert lines[0].startswith("name,class,sample,task,label,in_memory,error,nats,variance,leverage,sensitivity")
    content = json.loads((tmp_path / "memory_map.json").read_text())
    assert content["num_seen"] == 1438
    assert len(content["most_sensitive"]) == 20


def test_figures_of_examples_by_brute_force(run: Path, found: MemoryMap) -> None:
    """The second task's last layer as a dense matrix."""
    with reopened(run) as (state, world):
        task = world.stream.tasks[1]
        samples = np.arange(task.samples("train").start, task.samples("train").stop)
        seen = list(looks(samples, list(task.classes), state, world, inputs=True))
        kept = set(state.prior.memory.sample.tolist())
    logits, x = (torch.cat([getattr(look, name) for look in seen]).double() for name in ("logits", "x"))
    p = logits.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    f = torch.kron(curvature.sum(0), x.T @ x / len(x))
    inverse = torch.linalg.inv(f + found.prior_precision * torch.eye(len(f), dtype=torch.float64))
    inverse = inverse.view(p.shape[1], x.shape[1], p.shape[1], x.shape[1])
    v = torch.einsum("kilj,ni,nj->nkl", inverse, x, x)
    here = found.table["task"] == 1
    assert found.table["sample"][here].tolist() == samples.tolist()
    assert {int(sample) for sample in found.table["sample"][found.table["in_memory"]]} == kept
    expected = torch.einsum("nkl,nlk->n", curvature, v)
    torch.testing.assert_close(torch.from_numpy(found.table["leverage"][here]), expected, rtol=1e-4, atol=1e-7)
    labels = torch.from_numpy(found.table["label"][here] - min(task.classes))
    error = p - torch.nn.functional.one_hot(labels, p.shape[1])
    torch.testing.assert_close(
        torch.from_numpy(found.table["error"][here]), 1 - p.gather(1, labels[:, None])[:, 0], rtol=1e-4, atol=1e-7
    )
    moved = torch.einsum("nkl,nlm,nm->nk", curvature, v, error)
    torch.testing.assert_close(
        torch.from_numpy(found.table["sensitivity"][here]), moved.abs().sum(1), rtol=1e-3, atol=1e-7
    )


def test_estimates_stand_beside_the_measured_test_nll(run: Path, found: MemoryMap) -> None:
    newest = found.tasks[1]
    measured = evaluate_run(run)["tasks"][1]["task_incremental"]["nll"]
    assert newest["test_nats"] == pytest.approx(measured)
    assert newest["train_nats"] < newest["left_out"] < newest["left_out_newton"]
    assert newest["left_out_newton"] == pytest.approx(measured, rel=0.1)


def test_the_measured_test_nll_is_that_of_the_plain_network(run: Path) -> None:
    """As that of the other columns, also where a run is tested on mirror images."""
    with reopened(run) as (state, world):
        train = world.config.train.model_copy(update={"flip_test": True})
        mirrored = replace(world, config=world.config.model_copy(update={"train": train}))
        with_mirror_images = evaluate_all(state, mirrored, last=1)
        found = _test_results(state, mirrored)
    for with_mirrors, one, plain in zip(with_mirror_images, found, state.results, strict=True):
        nll = plain["task_incremental"]["nll"]
        assert one["task_incremental"]["nll"] == pytest.approx(nll)
        assert with_mirrors["task_incremental"]["nll"] != pytest.approx(nll)


def test_the_memory_over_tasks(run: Path, found: MemoryMap) -> None:
    assert [row["per_task"] for row in found.memory] == [[20], [20, 20]]
    assert [(row["smallest_class"], row["largest_class"]) for row in found.memory] == [(4, 4), (4, 4)]
    written = [event["agreement"] for event in events(run, "memory")]
    assert [row["agreement"] for row in found.memory] == [pytest.approx(each) for each in written]
    assert found.memory[1]["chance"] == pytest.approx(40 / 1438)


def test_a_class_is_missed(found: MemoryMap) -> None:
    for row in found.classes:
        if row["task"] == 1:
            assert row["nats"] < row["left_out"] < row["removed"]


def test_a_class_is_removed_by_the_precision_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the dense system of the last layer's weights, for three classes and four inputs."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    logits = torch.randn(30, 3, generator=generator)
    torch.cat([logits, x], dim=1).numpy().tofile(tmp_path / "rows")
    spool = last_layer._Spool([5, 7, 9], np.arange(30), labels.numpy(), tmp_path / "rows", scale=2.0)
    found = spool.scored(spool.factors(), 0.5).removed
    x, logits = x.double(), logits.double()
    p = logits.softmax(dim=1)
    for number in range(3):
        own = labels == number
        moment = x[~own].T @ x[~own] / int((~own).sum())
        curvature = sum((torch.diag(row) - torch.outer(row, row) for row in p[~own]), torch.zeros(3, 3).double())
        precision = torch.kron(2.0 * curvature, moment) + 0.5 * torch.eye(12).double()
        error = p[own] - torch.nn.functional.one_hot(labels[own], 3)
        step = torch.linalg.solve(precision, (2.0 * error.T @ x[own]).reshape(-1)).view(3, 4)
        loss = torch.nn.functional.cross_entropy(logits[own] + x[own] @ step.T, labels[own])
        assert found[[5, 7, 9][number]] == pytest.approx(float(loss), rel=1e-5)
    monkeypatch.setattr(last_layer, "_DECOMPOSED", 0)
    assert spool.scored(spool.factors(), 0.5).removed == {}, "rather no figure than one of another precision"


@pytest.mark.parametrize(
    ("posterior", "fraction"),
    [("kronecker", 0.5), ("ekfac", 0.5), ("diagonal", 0.5), ("dense", 0.05), ("checkpoint", None)],
)
def test_all_weights(run: Path, found: MemoryMap, posterior: Any, fraction: float | None) -> None:
    few = map_memory(run, posterior=posterior, examples=60, fraction=fraction)
    assert len(few.table["sample"]) == 60
    here = np.isin(found.table["sample"], few.table["sample"])
    np.testing.assert_allclose(few.table["error"], found.table["error"][here], rtol=1e-3, atol=1e-5)
    assert bool((few.table["leverage"] > 0).all())
    assert bool(np.isfinite(few.table["left_out_newton"]).all())
    assert all(row["removed"] is None for row in few.classes)


def test_the_posterior_knows_tasks_of_which_nothing_is_mapped(tmp_path: Path) -> None:
    """With own heads, five of all examples are of some of five tasks only; all of them were learned."""
    config = merged({"train": {"epochs": 1}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 5)
    world.save(state, Mark.at(4, "done", 9))
    (tmp_path / "config.yaml").write_text(dump(config))
    few = map_memory(tmp_path, posterior="diagonal", examples=3)
    assert len(few.table["sample"]) == 3
    assert len({int(task) for task in few.table["task"]}) < 5
    assert few.num_seen == 1438
    last = map_memory(tmp_path, posterior="last_layer", examples=3)
    assert len(last.table["sample"]) == 3


LEARNED: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "timm", "name": "adamw", "lr": 5e-3},
    "ivon": {"kind": "ivon", "lr": 0.5, "initial_curvature": 0.1, "curvature_decay": 0.999, "weight_decay": 1e-2},
    "vogn": {"kind": "vogn", "lr": 1e-2, "prior_precision": 3.0, "damping": 0.1},
}


@pytest.mark.parametrize("name", [*LEARNED])
def test_the_posterior_that_an_optimiser_learned(tmp_path: Path, name: str) -> None:
    """`variance` of its state, through Jacobians by autograd; then its prior precision is what it says itself.

    Of IVON without what is left of its initial curvature, which no image said, and in the mean over steps.
    """
    sections = {"curvature": {"kind": "optimizer"}, "prior": {"quadratic": {"weight": 1.0}}}
    config = merged({"optim": LEARNED[name], "model": {"kind": "mlp", "hidden": [8]}}, sections)
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    steps = state.mark.step
    world.save(state, Mark.at(0, "done", 9))
    (tmp_path / "config.yaml").write_text(dump(config))
    num_train, module = len(world.stream.tasks[0].samples("train")), state.engine.module
    key = curvature_key(config.optim)
    assert key is not None
    kept = wholes(state.engine.moments({key: "it"})["it"])
    variances = {
        parameter: variance(config.optim, {key: value}, num_train=num_train, prior_precision=2.0)
        for parameter, value in kept.items()
    }
    if isinstance(config.optim, IvonOptim):
        left = _unlearned_ivon(config.optim, steps)
        assert left > 0.01
        learned = 1 - config.optim.curvature_decay**steps
        variances = {
            parameter: variance(config.optim, {key: (value - left).clamp(min=0) / learned}, num_train=num_train)
            for parameter, value in kept.items()
        }
    delta = {"adamw": 2.0, "ivon": num_train * 1e-2, "vogn": 3.0 + num_train * 0.1}[name]
    found = map_memory(tmp_path, posterior="checkpoint", examples=12, prior_precision=delta)
    request = Request(found.table["sample"], np.zeros(12, dtype=np.uint64))
    (images,) = world.stream.load(iter([request]), "train")
    classes = list(world.stream.tasks[0].classes)
    for row, image in enumerate(images.pixels):
        logits = module.eval()(image[None])[0, classes]
        v = torch.zeros(len(classes), len(classes))
        rows = [torch.autograd.grad(each, list(module.parameters()), retain_graph=True) for each in logits]
        for number, (parameter, _) in enumerate(module.named_parameters()):
            jacobian = torch.stack([each[number].flatten() for each in rows])
            spread = variances[parameter]
            assert spread is not None
            v += jacobian * spread.flatten() @ jacobian.T
        p = logits.detach().softmax(0)
        expected = float(((p.diag() - p.outer(p)) * v).sum())
        assert found.table["leverage"][row] == pytest.approx(expected, rel=1e-3)
    predicted = evaluate_posterior(tmp_path, samples=2, examples=30, prior_precision=delta)
    assert len(predicted.table["sample"]) == 30
    assert bool((predicted.table["posterior_own_confidence"] != predicted.table["mean_own_confidence"]).any())


def test_a_checkpoint_without_a_posterior_says_why(run: Path) -> None:
    with reopened(run) as (state, world):
        group = Group(world.stream.tasks[1], np.arange(3), np.arange(3), 3)
        state.mark = Mark.at(1, "fit", 3)
        with pytest.raises(FolderError, match="has not finished task 1, whose curvature"):
            by_all_weights("checkpoint", [group], state, world, None)
        state.mark = Mark.at(1, "done", 3)
        mas = world.config.model_copy(update={"curvature": MasCurvature()})
        with pytest.raises(ConfigError, match=r"curvature\.kind=mas, an importance"):
            by_all_weights("checkpoint", [group], state, replace(world, config=mas), None)
        state.prior = replace(state.prior, quadratic=None)
        with pytest.raises(FolderError, match="has no curvature in checkpoint"):
            by_all_weights("checkpoint", [group], state, world, None)


@pytest.mark.slow
def test_two_processes_give_the_same_map(found: MemoryMap, tmp_path: Path) -> None:
    code, said = finish(start(tmp_path / "two", *SETTINGS, "cluster.nproc=2"))
    assert code == 0, said
    other = map_memory(tmp_path / "two")
    for name in ("sample", "task", "label", "in_memory"):
        assert np.array_equal(found.table[name], other.table[name])
    for name in ("error", "variance", "leverage", "sensitivity", "left_out"):
        np.testing.assert_allclose(other.table[name], found.table[name], rtol=2e-2, atol=1e-4, err_msg=name)


def test_classes_in_turn_lose_what_all_at_once_lose(
    run: Path, found: MemoryMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpccl.tools.memory_map.last_layer._GRADIENTS", 3 * 5 * 17)  # of 5 classes, three and two
    assert summary(map_memory(run)) == summary(found)


def test_an_earlier_task_and_the_command(run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["memory", "map", str(run), "--task", "0", "--out", str(tmp_path / "map")])
    assert said.exit_code == 0, said.output
    assert said.output.strip() == str(tmp_path / "map" / "memory_map.html")
    first = map_memory(run, task=0)
    assert set(first.table["task"].tolist()) == {0}
    told = CliRunner().invoke(
        app, ["memory", "map", str(run), "--examples", "50", "--json", "--out", str(tmp_path / "few")]
    )
    assert json.loads(told.output) == json.loads(json.dumps(summary(map_memory(run, examples=50))))


def test_what_cannot_be_mapped_says_why(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FolderError, match="is not a run folder"):
        map_memory(tmp_path)
    with pytest.raises(FolderError, match="has no checkpoint of task 7; tasks with checkpoints: "):
        map_memory(run, task=7)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(FolderError, match="has no checkpoint yet"):
        map_memory(tmp_path)
    with pytest.raises(ConfigError, match="--examples 0; allowed: at least 1"):
        map_memory(run, examples=0)
    with pytest.raises(ConfigError, match=r"--fraction 0\.5: --posterior last_layer measures no curvature"):
        map_memory(run, fraction=0.5)
    blurry = trained(tmp_path / "blurry", "stream.tasks=2", "stream.scenario.kind=blurry", "train.epochs=1")
    with pytest.raises(ConfigError, match="tasks of this run share some; use --posterior kronecker"):
        map_memory(blurry)
    wide = trained(
        tmp_path / "wide", "stream.tasks=1", "train.epochs=1", "model.hidden=[200]", "curvature.kind=diagonal"
    )
    with pytest.raises(CoverageError, match=r"--posterior dense: .* or use --posterior diagonal or last_layer"):
        map_memory(wide, posterior="dense")
    monkeypatch.setattr("hpccl.train.variance._LARGEST", 10_000)
    with pytest.raises(ConfigError, match=r"too large for --posterior kronecker.*use --posterior last_layer"):
        map_memory(run, posterior="kronecker")
