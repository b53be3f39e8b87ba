"""Importances of Memory Aware Synapses against one example at a time, and the specification's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import MasCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.prior.quadratic import Quadratic
from tests.unit.curvature.oracle import NETS, build, examples

SOLO = Comm.solo()


def estimate(model: nn.Module, data: Examples, *, batch: int = 100) -> Diagonal:
    parts = [data.select(slice(first, first + batch)) for first in range(0, len(data), batch)]
    found = build_estimator(MasCurvature(), seed=0).estimate(model, parts, SOLO)
    assert isinstance(found, Diagonal)
    return found


def truth(model: nn.Module, data: Examples) -> dict[str, Tensor]:
    """2 sum_i w_i |d |z_i|^2 / dw|, by autograd, an example at a time."""
    model = model.eval()
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    for image, weight in zip(data.pixels, data.weight, strict=True):
        norm = model(image[None])[0, data.head].square().sum()
        grads = torch.autograd.grad(norm, list(named.values()), materialize_grads=True)
        for name, grad in zip(named, grads, strict=True):
            total[name] += 2 * weight * grad.abs()
    return total


def assert_equal(found: Diagonal, expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found.values[name].double(), value.double(), rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("name", NETS)
def test_equals_one_example_at_a_time(name: str) -> None:
    model, pixels = build(name, 5)
    data = examples(pixels, weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25]))
    assert_equal(estimate(model, data), truth(model, data))


@pytest.mark.parametrize("batch", [1, 3])
def test_does_not_depend_on_batches_or_order(batch: int) -> None:
    model, pixels = build("convs", 5)
    data = examples(pixels)
    whole = estimate(model, data).values
    turned = estimate(model, data.select(torch.tensor([4, 2, 0, 3, 1])), batch=batch)
    assert_equal(turned, whole, rtol=1e-5)


def linear(weight: list[list[float]]) -> nn.Module:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
    return model


def two() -> Examples:
    """(1, 0) and (1, 1)."""
    pixels = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    return Examples(pixels, torch.zeros(2, dtype=torch.int64), torch.ones(2).bool(), torch.arange(2), torch.ones(2))


def test_the_specified_numbers() -> None:
    """o = W x: Omega per example [[2, 1], [1, 0]]; penalty .06, gradient [[.4, 0], [-.4, 0]]."""
    model = linear([[1.0, -2.0], [-1.0, 1.0]])
    found = estimate(model, two())
    omega = torch.tensor([[2.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(found.values["weight"], 2 * 2 * omega)  # twice the sum over two examples
    anchor = {"weight": torch.tensor([[1.0, -2.0], [-1.0, 1.0]])}
    moved = {"weight": anchor["weight"] + torch.tensor([[0.1, 0.0], [-0.2, 0.3]])}
    quadratic = Quadratic(found, anchor, weight=1.0, damping=0.0)
    # Beside the mean loss of a task of two examples, lambda means what it does in the paper.
    assert quadratic.value(moved, SOLO) / 2 == pytest.approx(0.06, rel=1e-5)
    force = wholes(quadratic.force(moved, SOLO))["weight"] / 2
    torch.testing.assert_close(force, torch.tensor([[0.4, 0.0], [-0.4, 0.0]]), rtol=1e-5, atol=1e-6)


class Times(nn.Module):
    """A linear map whose outputs are multiplied."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.factor * self.layer(x)
        return out


def test_scaled_outputs_scale_by_the_square() -> None:
    rows = [[1.0, -2.0], [-1.0, 1.0]]
    once, thrice = (estimate(Times(linear(rows), factor), two()).values["layer.weight"] for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice, 9 * once)
    # d |c W x|^2 / d (cW) = 2 c W x x': only c times as much of a weight that is c times as large.
    large = linear([[3 * value for value in row] for row in rows])
    torch.testing.assert_close(estimate(large, two()).values["weight"], 3 * once)


def test_labels_do_not_matter() -> None:
    model, pixels = build("mlp", 5)
    data = examples(pixels)
    other = Examples(data.pixels, data.labels.flip(0), data.head, data.sample, data.weight)
    assert_equal(estimate(model, other), estimate(model, data).values, rtol=1e-7)
