from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from hpccl.curvature import coverage, pullback
from hpccl.curvature.capture import captured, measuring
from hpccl.curvature.coverage import plan
from hpccl.curvature.layers import acts_as_known, pieces
from hpccl.curvature.pullback import mapped_squares, stream_gradients
from hpccl.curvature.sweep import Sweep, fastest_layout, fit_examples, in_parts, listed
from hpccl.errors import DataError
from tests.unit.curvature.oracle import NUM_CLASSES, StandardConv, build, examples

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mlp", "convs", "wrapped", "windows", "vit", "convnext"])
def test_streamed_gradients_are_those_of_autograd(name: str) -> None:
    model, pixels = build(name, 3)
    with measuring(model, CPU):
        layers = plan(model, pixels).layers
        with captured(model, layers) as calls:
            logits = model(pixels)
    edges = {layer: call.edge for layer, (call,) in calls.items() if call.edge is not None}
    columns = torch.randn(2, *logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    truth = [torch.autograd.grad(logits, list(edges.values()), column, retain_graph=True) for column in columns]
    seen: dict[str, list[Tensor]] = {layer: [] for layer in edges}
    stream_gradients(edges, logits, columns, lambda layer, grad: seen[layer].append(grad.clone()))
    for place, layer in enumerate(edges):
        assert len(seen[layer]) == 2
        for column in range(2):
            assert torch.equal(seen[layer][column], truth[column][place]), layer
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_gone_once_they_were_visited() -> None:
    """No more than a few at a time are alive, whatever the depth."""
    depth, alive, most = 12, 0, 0
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)])
    with captured(model, [f"{number}.0" for number in range(depth)]) as calls:
        out = model(torch.randn(4, 8))
    edges = {layer: call.edge for layer, (call,) in calls.items() if call.edge is not None}

    class Watch:
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def visit(layer: str, grad: Tensor) -> None:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        grad.watch = Watch()  # type: ignore[attr-defined]

    stream_gradients(edges, out, torch.ones(1, *out.shape), visit)
    assert alive == 0
    assert most <= 3


def test_branches_that_join_late_are_visited() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.left(x) * self.right(x))
            return out

    model = Branches()
    with captured(model, ["left", "right", "last"]) as calls:
        out = model(torch.randn(2, 4))
    edges = {layer: call.edge for layer, (call,) in calls.items() if call.edge is not None}
    seen: list[str] = []
    stream_gradients(edges, out, torch.ones(1, *out.shape), lambda layer, grad: seen.append(layer))
    assert sorted(seen) == ["last", "left", "right"]
    seen.clear()
    leaf = torch.randn(2, 4, requires_grad=True)
    both = {"leaf": get_gradient_edge(leaf), "out": get_gradient_edge(leaf.exp())}
    stream_gradients(both, leaf.exp().sum(1, keepdim=True), torch.ones(1, 2, 1), lambda name, grad: seen.append(name))
    assert "leaf" in seen


def test_what_counts_for_nothing_is_left_out() -> None:
    model, pixels = build("mlp", 6)
    data = examples(pixels, weight=torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.0]))
    parts = [data.select(slice(0, 3)), data.select(slice(3, 6))]
    (found,) = fit_examples(model, parts)
    assert found.sample.tolist() == [100, 102]
    data.labels[1] = 0  # of weight 0
    assert len(list(fit_examples(model, [data]))) == 1
    data.labels[2] = 0
    with pytest.raises(DataError, match="sample 102 has class 0"):
        list(fit_examples(model, [data]))


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [3, 3, 4]), (4, 4, [4]), (3, 1, [1, 1, 1]), (5, 9, [5])])
def test_parts(count: int, size: int, sizes: list[int]) -> None:
    data = examples(torch.randn(count, 2))
    parts = list(in_parts(data, size))
    assert sorted(len(part) for part in parts) == sizes
    assert torch.equal(torch.cat([part.sample for part in parts]), data.sample)


def test_a_model_that_flattens_by_view_keeps_its_layout() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 3, 3), nn.Linear(12, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.last(y.view(len(x), -1))
            return out

    pixels = torch.randn(3, 2, 4, 4)
    two = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 3))
    assert fastest_layout(nn.Sequential(two[0], Flat()), pixels) == torch.contiguous_format
    assert fastest_layout(nn.Sequential(two, nn.Flatten()), pixels) == torch.channels_last
    assert fastest_layout(nn.Conv2d(2, 3, 3), pixels) == torch.contiguous_format
    assert fastest_layout(nn.Linear(4, 4), torch.randn(3, 4)) == torch.contiguous_format

    class Strides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.as_strided((2, 4), (12, 1)).clone()  # other numbers in another layout

    assert fastest_layout(nn.Sequential(two, Strides()), pixels) == torch.contiguous_format


def test_free_parameters_of_a_vit_need_no_pass_of_their_own() -> None:
    model, pixels = build("vit", 4)
    with measuring(model, CPU):
        assert set(plan(model, pixels).widened) == {"cls_token", "pos_embed"}
    model, pixels = build("swin", 4)
    with measuring(model, CPU):
        assert plan(model, pixels).widened == ()


@pytest.mark.parametrize(("device", "least", "most"), [("cpu", 1, 1), ("meta", 16, 32)])
def test_a_gpu_maps_many_images_at_a_time(device: str, least: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as its passes over the layers hold, here of a ConvNeXt-T at 224 px; `meta` stands for a GPU."""
    lengths: list[int] = []

    def recorded(*arguments: Any, **options: Any) -> Iterator[tuple[slice, slice]]:
        for some, group in pieces(*arguments, **options):
            lengths.append(some.stop - some.start)
            yield some, group

    monkeypatch.setattr(pullback, "pieces", recorded)
    model = nn.Linear(3, NUM_CLASSES, device=device)
    pixels, columns = torch.zeros(32, 3, device=device), torch.zeros(1, 32, NUM_CLASSES, device=device)
    mapped_squares(model, ["weight"], pixels, columns, graph_bytes=118_000_000)
    assert least <= lengths[0] <= most


def test_subclasses_are_judged_by_what_they_compute() -> None:
    class Renamed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    class Padding(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            pad = (-x.shape[-1]) % 4
            out: Tensor = super().forward(nn.functional.pad(x, [0, pad, 0, 0]))
            return out

    class Asking(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    assert acts_as_known(Renamed(3, 2))
    assert acts_as_known(nn.Conv2d(3, 2, 1))
    for module in (Padding(3, 2, 3), Asking(3, 2), StandardConv(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(2, 3, 2)):
        assert not acts_as_known(module)


def test_names_are_listed_briefly() -> None:
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"
    assert listed(["a", "b"]) == "a, b"


def test_columns_per_example() -> None:
    data = examples(torch.randn(2, 3))
    assert [Sweep(fisher, 5, 0).num_columns(data) for fisher in ("ggn", "mc", "empirical")] == [3, 5, 1]


class Rounded(nn.Module):
    """An activation whose input is rounded up in a batch of one image and down in larger ones, as sums may be."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + (1e-9 if len(x) == 1 else -1e-9)).relu()


@pytest.mark.parametrize(("probes", "layers"), [(1, {"3"}), (3, {"1", "3"})])
def test_rounding_at_one_pair_of_images_does_not_decide_how_a_layer_is_measured(
    probes: int, layers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single probe it would: half of the activations are zero up to rounding there, and nowhere else."""
    monkeypatch.setattr(coverage, "_PROBES", probes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4, bias=False), Rounded(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model.get_parameter("1.weight")[:2] = torch.tensor([1.0, -1.0])
    pixels = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 1, 2).clone()
    with measuring(model, pixels.device):
        assert set(plan(model, pixels).layers) == layers
