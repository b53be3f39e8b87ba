"""`hpccl evaluate --posterior` on whole runs of digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.cli import app
from hpccl.config.load import dump
from hpccl.curvature.predictive import probabilities
from hpccl.data.rows import Request
from hpccl.errors import ConfigError, FolderError
from hpccl.report.uncertainty import Uncertainty, summary, write_uncertainty
from hpccl.tools.evaluate_run import evaluate_run, reopened
from hpccl.tools.uncertainty import evaluate_posterior, posterior_of
from tests.run.method import learn, make_world, merged


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of five tasks."""
    return trained(tmp_path_factory.mktemp("run"), {"train": {"epochs": 6, "batch_size": 64, "head": "seen"}})


def trained(folder: Path, *changes: dict[str, Any], tasks: int = 3) -> Path:
    config = merged({"prior": {"quadratic": {"weight": 1.0}}, "model": {"kind": "mlp", "hidden": [12]}}, *changes)
    state, world = make_world(config, folder)
    learn(state, world, tasks)
    world.save(state, Mark.at(tasks - 1, "done", 9))
    (folder / "config.yaml").write_text(dump(config))
    return folder


@pytest.fixture(scope="module", params=["sampled", "probit", "monte_carlo"])
def found(run: Path, request: pytest.FixtureRequest) -> Uncertainty:
    return evaluate_posterior(run, approximation=request.param, samples=16, examples=150)


@pytest.mark.parametrize("scenario", ["classes", "blurry"])
def test_the_mean_is_what_evaluate_says(run: Path, tmp_path: Path, scenario: str) -> None:
    """Also where a class comes with several tasks, and its name alone does not say which others compete."""
    if scenario == "blurry":
        shared = {"stream": {"kind": "digits", "tasks": 5, "scenario": {"kind": "blurry"}}}
        run = trained(tmp_path, shared, {"train": {"epochs": 1, "batch_size": 64}, "curvature": {"kind": "diagonal"}})
    found = summary(evaluate_posterior(run, samples=1, prior_precision=10.0))
    expected = evaluate_run(run)["tasks"][:3]
    for ours, theirs in zip(found["tasks"], expected, strict=True):
        for setting in ("task_incremental", "class_incremental"):
            for figure in ("accuracy", "nll", "ece"):
                assert ours["mean"][setting][figure] == pytest.approx(theirs[setting][figure], rel=1e-5)


def test_figures_of_the_table(found: Uncertainty) -> None:
    said = summary(found)
    json.dumps(said, allow_nan=False)
    assert said["prior_precision_by_evidence"]
    assert 0 < said["effective_parameters"] < said["num_weights"]
    learned = found.table["task"] <= 2
    assert said["num_images"] == learned.sum() < len(learned) == 150
    for which in ("mean", "posterior"):
        figures = said[which]["class_incremental"]
        assert figures["nll"] == pytest.approx(float(found.table[f"{which}_seen_nats"][learned].mean()))
        assert 0 < figures["brier"] < 2
        assert 0.0 <= said["unseen"][which]["auroc_entropy"] <= 1
    # Averaging over weights can only be less certain where it is linear, and is for the others here.
    assert said["posterior"]["class_incremental"]["entropy"] > said["mean"]["class_incremental"]["entropy"]


def test_files(found: Uncertainty, tmp_path: Path) -> None:
    page = write_uncertainty(found, tmp_path).read_text()
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert {"most_certain.png", "least_certain.png", "reliability.svg", "unseen.png", "uncertainty.csv"} <= names
    assert json.loads((tmp_path / "uncertainty.json").read_text()) == summary(found)
    assert len((tmp_path / "uncertainty.csv").read_text().splitlines()) == 151
    order = np.argsort(found.table["posterior_seen_entropy"])
    assert int(found.table["sample"][next(n for n in order if found.table["task"][n] <= 2)]) in found.pictures


def test_sampled_and_linearised_are_what_their_definitions_say(run: Path) -> None:
    """Against loops over weights and over Jacobians of the whole network by autograd."""
    samples, delta = 3, 2.0
    tables = {
        kind: evaluate_posterior(run, approximation=kind, samples=samples, examples=20, prior_precision=delta).table
        for kind in ("sampled", "probit")
    }
    with reopened(run) as (state, world):
        posterior = posterior_of(state, world, delta)
        chosen = tables["probit"]["sample"]
        request = Request(chosen, np.zeros(len(chosen), dtype=np.uint64))
        (images,) = world.stream.load(iter([request]), "test")
        head = torch.zeros(len(chosen), 10, dtype=torch.bool)
        head[:, :6] = True
        module, total = state.engine.module, torch.zeros(len(chosen), 10, dtype=torch.float64)
        with torch.no_grad():
            for number in range(samples):
                logits = torch.func.functional_call(
                    module, posterior.sample(world.config.seed, number), (images.pixels,)
                )
                total += probabilities(logits, head) / samples
        names = sorted(posterior.shapes)
        size = posterior.num_weights
        units = torch.eye(size)
        columns = []
        for unit in units:
            parts = unit.split([torch.Size(posterior.shapes[name]).numel() for name in names])
            named = {n: part.view(posterior.shapes[n]) for n, part in zip(names, parts, strict=True)}
            solved = posterior.solve(named)
            columns.append(torch.cat([solved[name].flatten() for name in names]))
        covariance = torch.stack(columns).double()
        parameters = {name: posterior.mean[name].clone().requires_grad_() for name in names}
        logits = torch.func.functional_call(module, parameters, (images.pixels,))
        spread = torch.zeros(len(chosen), 10, dtype=torch.float64)
        for example in range(len(chosen)):
            for number in range(10):
                grads = torch.autograd.grad(logits[example, number], list(parameters.values()), retain_graph=True)
                row = torch.cat([grad.flatten() for grad in grads]).double()
                spread[example, number] = row @ covariance @ row
    table = tables["sampled"]
    np.testing.assert_allclose(table["posterior_seen_confidence"], total.max(1).values, atol=1e-5)
    scaled = logits.detach().double() / (1 + np.pi / 8 * spread).sqrt()
    expected = probabilities(scaled, head).max(1).values
    np.testing.assert_allclose(tables["probit"]["posterior_seen_confidence"], expected, atol=1e-4)


def test_the_command_and_its_mistakes(run: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(run), "--posterior", "sampled", "--samples", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| class-incremental | predictive distribution" in result.output
    assert "Area under the ROC curve" in result.output
    assert (tmp_path / "out" / "uncertainty.html").is_file()
    for extra, message in (
        (["--examples", "3"], "--examples needs --posterior"),
        (["--samples", "3"], "--samples needs --posterior"),
        (["--posterior", "monte_carlo", "--samples", "0"], "--samples 0; allowed: at least 1"),
        (["--posterior", "probit", "--samples", "9"], "--samples with --posterior probit has no effect"),
        (
            ["--posterior", "probit", "--prior-precision", "-1"],
            "--prior-precision -1; allowed: a finite number above 0",
        ),
        (["--posterior", "probit", "--weights", "x"], "--weights with --posterior"),
    ):
        wrong = CliRunner().invoke(app, ["evaluate", str(run), *extra])
        assert isinstance(wrong.exception, ConfigError)
        assert message in str(wrong.exception)
    bare = trained(tmp_path / "bare", {"prior": {"quadratic": {"weight": 0.0}}, "train": {"epochs": 1}}, tasks=1)
    with pytest.raises(FolderError, match="has no curvature in checkpoint"):
        evaluate_posterior(bare)
    important = trained(tmp_path / "mas", {"curvature": {"kind": "mas"}, "train": {"epochs": 1}}, tasks=1)
    with pytest.raises(ConfigError, match=r"curvature\.kind=mas, an importance"):
        evaluate_posterior(important)
    mirrored = trained(tmp_path / "mirrored", {"train": {"epochs": 1, "flip_test": True}}, tasks=1)
    with pytest.raises(ConfigError, match="use --posterior sampled"):
        evaluate_posterior(mirrored, approximation="probit")
    assert len(evaluate_posterior(mirrored, samples=2).table["sample"]) > 300
