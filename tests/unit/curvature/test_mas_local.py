"""The local variant of Memory Aware Synapses: numbers by hand, layers by plain autograd, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import MasCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.mas_local import LocalMasEstimator
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.errors import CoverageError, DivergedError
from tests.unit.curvature.oracle import build, examples

SOLO = Comm.solo()


def every_class(pixels: Tensor, num_classes: int) -> Examples:
    head = torch.ones(num_classes, dtype=torch.bool)
    return Examples(
        pixels, torch.zeros(len(pixels), dtype=torch.int64), head, torch.arange(len(pixels)), torch.ones(len(pixels))
    )


def assert_equal(found: Diagonal, truth: dict[str, Tensor]) -> None:
    assert found.values.keys() == truth.keys()
    for name, value in truth.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found.values[name].double(), value.double(), rtol=1e-5, atol=1e-5 * scale, msg=name)


def linear(*weights: list[list[float]], relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for rows in weights:
        value = torch.tensor(rows, dtype=torch.float64)
        layer = nn.Linear(value.shape[1], value.shape[0], bias=False, dtype=torch.float64)
        layer.weight.data.copy_(value)
        layers += [layer, nn.ReLU()] if relu else [layer]
    return nn.Sequential(*layers)


def test_the_specified_numbers() -> None:
    """Layer by layer, behind the ReLU; twice the sum over two examples. Of the last layer it is what global is."""
    model = linear([[1, -1], [0.5, 1], [-1, 0.5]], [[1, 0, 1], [-1, 2, 0]], relu=True)
    data = every_class(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 2)
    local = LocalMasEstimator().estimate(model, [data], SOLO)
    torch.testing.assert_close(local.values["1.weight"], 4 * torch.tensor([[2.0, 1.0], [6.5, 7.0], [0.0, 0.0]]))
    torch.testing.assert_close(local.values["3.weight"], 4 * torch.tensor([[1.0, 2.0, 0.0], [3.0, 18.5, 0.0]]))
    whole = build_estimator(MasCurvature(), seed=0).estimate(model, [data], SOLO)
    assert isinstance(whole, Diagonal)
    torch.testing.assert_close(whole.values["1.weight"], 4 * torch.tensor([[4.0, 2.0], [22.0, 26.0], [0.0, 0.0]]))
    torch.testing.assert_close(whole.values["3.weight"], local.values["3.weight"])


def test_the_configuration_asks_for_it() -> None:
    assert build_estimator(MasCurvature(variant="local"), seed=0) == LocalMasEstimator()


def test_batches_and_order_do_not_matter_and_labels_are_unused() -> None:
    model, pixels = build("convs", 7)
    data = examples(pixels, weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 3.0]))
    whole = dict(LocalMasEstimator().estimate(model, [data], SOLO).values)
    for size in (1, 3):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(size))
        mixed = data.select(order)
        mixed = Examples(mixed.pixels, mixed.labels.roll(1), mixed.head, mixed.sample, mixed.weight)
        parts = [mixed.select(slice(first, first + size)) for first in range(0, 7, size)]
        assert_equal(LocalMasEstimator().estimate(model, parts, SOLO), whole)


def test_a_weight_of_two_counts_an_example_twice() -> None:
    model, pixels = build("convs", 2)
    twice = examples(torch.cat([pixels, pixels[:1]]))
    weighted = examples(pixels, weight=torch.tensor([2.0, 1.0]))
    expected = LocalMasEstimator().estimate(model, [twice], SOLO).values
    assert_equal(LocalMasEstimator().estimate(model, [weighted], SOLO), expected)


class Residual(nn.Module):
    """A norm whose output is added to in place: the activation after that is not the layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 3, 3, groups=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.inner, self.inner_norm = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = self.inner_norm(self.inner(x))
        y += x
        out: Tensor = self.last(self.act(y).mean((2, 3)))
        return out


def test_a_layers_output_ends_where_something_else_is_added() -> None:
    torch.manual_seed(1)
    model = Residual().double().eval()
    for norm in (model.norm, model.inner_norm):
        norm.get_buffer("running_var").uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight)
    pixels = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    found = LocalMasEstimator().estimate(model, [examples(pixels)], SOLO)
    truth = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for image in pixels[:, None]:
        entering = model.norm(model.conv(image)).relu().detach()
        between = model.conv(image).detach()
        own = {
            "conv": model.norm(model.conv(image)).relu(),
            "norm": model.norm(between).relu(),
            "inner": model.inner_norm(model.inner(entering)),
            "inner_norm": model.inner_norm(model.inner(entering).detach()),
            "last": model(image),
        }
        for layer, said in own.items():
            named = dict(model.get_submodule(layer).named_parameters(prefix=layer))
            grads = torch.autograd.grad(said.square().sum(), list(named.values()))
            for name, grad in zip(named, grads, strict=True):
                truth[name] += 2 * grad.abs()
    assert_equal(found, truth)


def test_local_refuses_what_has_no_output() -> None:
    model, pixels = build("vit", 2)
    with pytest.raises(CoverageError, match=r"'cls_token'.*variant=global"):
        LocalMasEstimator().estimate(model, [examples(pixels)], SOLO)


def test_no_examples_are_no_importance() -> None:
    model, _ = build("mlp", 1)
    found = LocalMasEstimator().estimate(model, [], SOLO)
    assert not any(bool(value.any()) for value in found.values.values())


def test_a_network_that_has_diverged_is_refused_by_layer() -> None:
    model, pixels = build("mlp", 2)
    name, parameter = next((name, value) for name, value in model.named_parameters() if name.endswith("weight"))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(DivergedError, match=name.rpartition(".")[0]):
        LocalMasEstimator().estimate(model, [examples(pixels)], SOLO)
