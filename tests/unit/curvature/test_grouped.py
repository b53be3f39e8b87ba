"""Importances of mean gradients: against autograd, a group at a time, and the numbers of two-example batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import DiagonalCurvature, MasCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.grouped import GroupedEstimator
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.errors import DataError, DivergedError
from hpccl.prior.quadratic import Quadratic
from hpccl.train.task_pass import TaskPass
from tests.run.method import make_world, merged
from tests.unit.curvature.oracle import build, examples

SOLO = Comm.solo()
Wanted = Literal["empirical", "outputs"]


def groups(data: Examples, size: int) -> list[Examples]:
    return [data.select(slice(first, first + size)) for first in range(0, len(data), size)]


def estimate(model: nn.Module, data: Examples, wanted: Wanted, *, size: int, batch: int = 256) -> Diagonal:
    return GroupedEstimator(wanted, batch).estimate(model, groups(data, size), SOLO)


def truth(model: nn.Module, data: Examples, wanted: Wanted, *, size: int) -> dict[str, Tensor]:
    """Of the weighted mean of what is differentiated, as a training step would take its gradient."""
    model = model.eval()
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    for group in groups(data, size):
        logits = model(group.pixels)[:, data.head]
        if wanted == "outputs":
            each = logits.square().sum(1)
        else:
            label = torch.searchsorted(data.head.nonzero().flatten(), group.labels)
            each = nn.functional.cross_entropy(logits, label, reduction="none")
        number = group.weight.sum()
        mean = (each * group.weight).sum() / number
        grads = torch.autograd.grad(mean, list(named.values()), materialize_grads=True)
        for name, grad in zip(named, grads, strict=True):
            total[name] += number * (2 * grad.abs() if wanted == "outputs" else grad.square())
    return total


def assert_equal(found: Diagonal, expected: dict[str, Tensor]) -> None:
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found.values[name].double(), value.double(), rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("batch", [256, 2])
@pytest.mark.parametrize("wanted", ["empirical", "outputs"])
@pytest.mark.parametrize("name", ["mlp", "convs", "norms"])
def test_equals_autograd_on_each_group(name: str, wanted: Wanted, batch: int) -> None:
    """The last group is smaller; a group in parts is one group."""
    model, pixels = build(name, 7)
    data = examples(pixels, weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 3.0]))
    found = estimate(model, data, wanted, size=3, batch=batch)
    assert_equal(found, truth(model, data, wanted, size=3))
    assert found.num_examples == pytest.approx(float(data.weight.sum()))


@pytest.mark.parametrize("wanted", ["empirical", "outputs"])
def test_groups_of_one_are_exact_per_example(wanted: Wanted) -> None:
    model, pixels = build("convs", 5)
    data = examples(pixels)
    assert_equal(estimate(model, data, wanted, size=1), DiagonalEstimator(wanted).estimate(model, [data], SOLO).values)


def linear(weight: list[list[float]]) -> nn.Module:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
    return model


def two(rows: list[list[float]], labels: list[int]) -> Examples:
    pixels = torch.tensor(rows, dtype=torch.float64)
    return Examples(pixels, torch.tensor(labels), torch.ones(2).bool(), torch.arange(2), torch.ones(2))


def test_numbers_of_mas() -> None:
    """o = W x on (1, 0) and (1, 1): one by one Omega = [[2, 1], [1, 0]], as a batch of two [[0, 1], [1, 0]]."""
    model, data = linear([[1.0, -2.0], [-1.0, 1.0]]), two([[1.0, 0.0], [1.0, 1.0]], [0, 0])
    omega = {size: estimate(model, data, "outputs", size=size).values["weight"] / (2 * 2) for size in (1, 2)}
    torch.testing.assert_close(omega[1], torch.tensor([[2.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(omega[2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_numbers_of_ewc() -> None:
    """o = x / 2, (1, 2) of class 0, (2, -1) of class 1: rows 1.530584, 1.109125; as one group .256385, 1.063469."""
    model, data = linear([[0.5, 0.0], [0.0, 0.5]]), two([[1.0, 2.0], [2.0, -1.0]], [0, 1])
    mean = {size: estimate(model, data, "empirical", size=size).values["weight"] / 2 for size in (1, 2)}
    torch.testing.assert_close(mean[1], torch.tensor([[1.530584, 1.109125]] * 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean[2], torch.tensor([[0.256385, 1.063469]] * 2), rtol=1e-5, atol=1e-6)


def test_numbers_of_the_weighted_label() -> None:
    """o = x / 2, (1, 2) of class 0: p(y) g^2 is .146280, .585121 in both rows."""
    model = linear([[0.5, 0.0], [0.0, 0.5]])
    data = two([[1.0, 2.0], [1.0, 2.0]], [0, 0])
    found = DiagonalEstimator("weighted").estimate(model, [data], SOLO).values["weight"] / 2
    torch.testing.assert_close(found, torch.tensor([[0.146280, 0.585121]] * 2), rtol=1e-5, atol=1e-6)


def test_numbers_of_the_fisher_matrix_and_its_penalty() -> None:
    """o = x / 2, (1, 2) of class 0; all weights moved by .1, lambda = 10: 5 d'Fd (Kirkpatrick et al. 2017)."""
    model = linear([[0.5, 0.0], [0.0, 0.5]])
    data = two([[1.0, 2.0], [1.0, 2.0]], [0, 0]).select(slice(0, 1))
    rows: dict[Literal["ggn", "empirical"], list[float]] = {
        "empirical": [0.387456, 1.549822],
        "ggn": [0.235004, 0.940015],
    }
    for fisher, row in rows.items():
        found = DiagonalEstimator(fisher).estimate(model, [data], SOLO)
        torch.testing.assert_close(found.values["weight"], torch.tensor([row] * 2), rtol=0, atol=1e-6)
    anchor = {"weight": next(model.parameters()).detach()}
    exact = DiagonalEstimator("ggn").estimate(model, [data], SOLO)
    quadratic = Quadratic(exact, anchor, weight=10.0, damping=0.0)
    assert quadratic.value({"weight": anchor["weight"] + 0.1}, SOLO) == pytest.approx(0.117502, abs=1e-6)


def test_what_is_broken_is_named() -> None:
    model, pixels = build("mlp", 4)
    data = examples(pixels)
    with pytest.raises(DataError):
        estimate(model, replace(data, labels=torch.zeros_like(data.labels)), "empirical", size=2)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)
    with pytest.raises(DivergedError, match="not finite"):
        estimate(model, data, "outputs", size=2)


def test_a_configuration_asks_for_groups() -> None:
    diagonal = DiagonalCurvature(fisher="empirical", group=4, batch_size=9)
    assert build_estimator(diagonal, seed=0) == GroupedEstimator("empirical", 9)
    assert build_estimator(MasCurvature(group=4, batch_size=9), seed=0) == GroupedEstimator("outputs", 9)
    assert isinstance(build_estimator(MasCurvature(), seed=0), DiagonalEstimator)


def test_a_pass_is_made_of_whole_groups_of_mixed_classes(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"curvature": {"kind": "mas", "group": 30}}
    _, world = make_world(merged(sections), tmp_path)
    task = world.stream.tasks[0]
    samples = np.arange(task.samples("train").start, task.samples("train").stop)
    seen = list(TaskPass(task, samples, world, 30))
    sizes = [len(group) for group in seen]
    assert sizes[:-1] == [30] * (len(samples) // 30)
    assert sizes[-1] == len(samples) - sum(sizes[:-1])
    assert sorted(torch.cat([group.sample for group in seen]).tolist()) == samples.tolist()
    assert all(len(group.labels.unique()) == len(task.classes) for group in seen[:-1])
