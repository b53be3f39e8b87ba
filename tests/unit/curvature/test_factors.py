"""Kronecker factors against sums over examples, positions and classes in float64, and against curvlinops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.compat import import_timm
from hpccl.curvature import factors, layers, moments
from hpccl.curvature.columns import Fisher, output_columns
from hpccl.curvature.diagonal import DiagonalEstimator
from hpccl.curvature.factors import EigenPass, KroneckerPass, Measured
from hpccl.curvature.moments import Sharing
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.errors import CoverageError, DataError, DivergedError
from tests.unit.curvature.oracle import NUM_CLASSES, build, examples, true_diagonal

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a library of curvlinops scripts its functions on import
    from curvlinops import FisherType, KFACLinearOperator

EVERY_CLASS = tuple(range(NUM_CLASSES))
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25])


# ---------------------------------------------------------------- the slow truth


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each layer in the last forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = (arguments[0].detach(), out)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """[g, positions, d] of one example, bias last."""
    if isinstance(module, nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, list(module._reversed_padding_repeated_twice), mode=mode)
        patches = functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [f, c kh kw, positions]
        rows = patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    bias = any(name == "bias" and value.requires_grad for name, value in module.named_parameters())
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if bias else rows


def gradients_of(module: nn.Module, grad: Tensor) -> Tensor:
    """[g, positions, o] of one example."""
    if isinstance(module, nn.Conv2d):
        grad = grad.unflatten(1, (module.groups, -1))
        return grad.permute(1, 0, 3, 4, 2).flatten(1, 3)
    return grad.reshape(1, -1, grad.shape[-1])


def directions(model: nn.Module, one: Examples, fisher: str, seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """[c, C] directions over the logits of one example, and signs: sum of sign * v v' is its matrix."""
    classes = one.head.nonzero().flatten()
    logits = model(one.pixels).detach()[0]
    p = torch.zeros_like(logits)
    p[classes] = logits[classes].softmax(0)
    if fisher == "empirical":
        return (p - functional.one_hot(one.labels[0], len(p)).to(p))[None], torch.ones(1, dtype=p.dtype)
    if fisher == "mc":
        columns = output_columns(logits[None], one, "mc", samples=samples, seed=seed)[:, 0]
        return columns / one.weight.sqrt().to(p), torch.ones(len(columns), dtype=p.dtype)
    return torch.cat([torch.diag(p.sqrt()), p[None]]), torch.cat([torch.ones_like(p), -torch.ones(1, dtype=p.dtype)])


def layer_terms(
    model: nn.Module, data: Examples, names: list[str], fisher: str, *, seed: int = 0, samples: int = 1
) -> Iterator[tuple[float, str, Tensor, Tensor, Tensor]]:
    """(weight, layer, inputs [g, S, d], gradients [c, g, S, o], signs [c]) of each example."""
    model = model.eval()
    for number in range(len(data)):
        one = data.select(slice(number, number + 1))
        if float(one.weight) == 0:
            continue
        rows, signs = directions(model, one, fisher, seed, samples)
        with recorded(model, names) as seen:
            logits = model(one.pixels)
        outs = [seen[name][1] for name in names]
        grads = [torch.autograd.grad(logits[0], outs, row, retain_graph=True) for row in rows]
        for place, name in enumerate(names):
            module = model.get_submodule(name)
            by_column = torch.stack([gradients_of(module, grad[place]) for grad in grads])
            yield float(one.weight), name, inputs_of(module, seen[name][0]), by_column, signs


def true_factors(
    model: nn.Module, data: Examples, names: list[str], fisher: str, sharing: str = "expand", **draws: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of A and B by layer."""
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, name, rows, grads, signs in layer_terms(model, data, names, fisher, **draws):
        if sharing == "reduce":
            rows, grads = rows.mean(1, keepdim=True), grads.sum(2, keepdim=True)  # noqa: PLW2901 (as in the equation)
        a = weight * rows.mT @ rows / rows.shape[1]
        b = weight * torch.einsum("c,cgso,cgsp->gop", signs, grads, grads)
        before = total.get(name, (0, 0))
        total[name] = (before[0] + a, before[1] + b)
    return total


def true_eigen(
    model: nn.Module, data: Examples, bases: dict[str, tuple[Tensor, Tensor]], fisher: str
) -> dict[str, Tensor]:
    """Squares of rotated per-example gradients by layer, [g, o, d]."""
    total: dict[str, Tensor] = {}
    for weight, name, rows, grads, signs in layer_terms(model, data, list(bases), fisher):
        qa, qb = (basis.double() for basis in bases[name])
        rotated = qb.mT @ torch.einsum("cgso,gsd->cgod", grads, rows) @ qa
        total[name] = total.get(name, torch.zeros(())) + weight * torch.einsum("c,cgod->god", signs, rotated.square())
    return total


def measure(model: nn.Module, data: Examples, fisher: Fisher = "ggn", *, batch: int = 100, **settings: Any) -> Measured:
    parts = [data.select(slice(first, first + batch)) for first in range(0, len(data), batch)]
    return KroneckerPass(fisher, **settings).run(model, parts, Comm.solo())


def assert_close(found: Tensor, truth: Tensor, *, rtol: float = 1e-5, what: str = "") -> None:
    assert found.dtype == torch.float32
    scale = float(truth.abs().max())
    torch.testing.assert_close(
        found.double(), truth.double(), rtol=0, atol=rtol * scale + 1e-30, msg=lambda m: what + m
    )


def assert_true(
    found: Measured, model: nn.Module, data: Examples, fisher: str, sharing: str = "expand", *, rtol: float = 1e-5
) -> None:
    truth = true_factors(model, data, list(found.blocks), fisher, sharing)
    for name, block in found.blocks.items():
        assert_close(block.a, truth[name][0], rtol=rtol, what=f"A of {name}: ")
        assert_close(block.b, truth[name][1], rtol=rtol, what=f"B of {name}: ")
        assert torch.equal(block.a, block.a.mT)
        assert torch.equal(block.b, block.b.mT)


def assert_covered(found: Measured, model: nn.Module) -> None:
    """Every trainable parameter once."""
    names = [name for block in found.blocks.values() for name in (block.weight, block.bias) if name is not None]
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert sorted([*names, *found.squares]) == sorted(trainable)


# ---------------------------------------------------------------- networks


def threes(channels: int = 16) -> nn.Module:
    """3x3 convolutions over maps of several sizes, down to one pixel."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding="same"),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Flatten(),
        nn.LazyLinear(NUM_CLASSES),
    )


def threes_on(height: int, width: int, count: int = 5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    pixels = torch.randn(count, 2, height, width, dtype=torch.float64)
    net = threes().double()
    net(pixels)
    return net, pixels


GEOMETRIES: dict[str, dict[str, Any]] = {
    "stem": {"kernel_size": 7, "stride": 2, "padding": 3},
    "point": {"kernel_size": 1},
    "point-stride": {"kernel_size": 1, "stride": 2, "bias": False},
    "point-padded": {"kernel_size": 1, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
    "same-dilated": {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 5, "padding": "same", "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16, "stride": 2},
    "five": {"kernel_size": 5, "padding": 2},
}


def conv_net(**geometry: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    pixels = torch.randn(5, 3, 8, 7)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Conv2d(16, 16, **geometry), nn.Flatten(), nn.LazyLinear(NUM_CLASSES)
    )
    net(pixels)
    return net.double(), pixels.double()


# ---------------------------------------------------------------- the truth


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "convs", "norms", "windows", "vit", "convnext", "swin"])
def test_equals_sums_over_examples(name: str, fisher: Fisher, sharing: Sharing) -> None:
    model, pixels = build(name, 5)
    data = examples(pixels, weight=WEIGHT)
    found = measure(model, data, fisher, sharing=sharing)
    assert_true(found, model, data, fisher, sharing)
    assert_covered(found, model)
    assert float(found.count) == float(WEIGHT.sum())
    if fisher == "empirical":
        truth = true_diagonal(model, data, fisher)
        for parameter, value in found.squares.items():
            assert_close(value, truth[parameter], what=parameter)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry: str, last: bool, sharing: Sharing) -> None:
    model, pixels = conv_net(**GEOMETRIES[geometry])
    data = examples(pixels.contiguous(memory_format=torch.channels_last) if last else pixels, weight=WEIGHT)
    assert_true(measure(model, data, "empirical", sharing=sharing), model, data, "empirical", sharing)


@pytest.mark.parametrize("size", [(9, 8), (4, 4), (4, 6), (2, 3), (3, 9), (1, 5), (2, 1)])
def test_three_by_three_without_patches(size: tuple[int, int]) -> None:
    model, pixels = threes_on(*size)
    data = examples(pixels, weight=WEIGHT)
    found = measure(model, data, "empirical")
    assert_true(found, model, data, "empirical", rtol=2e-6)


def test_three_by_three_uses_no_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = threes_on(9, 8)
    asked: list[int] = []
    original = layers.patches

    def watched(module: nn.Conv2d, x: Tensor) -> Tensor:
        asked.append(module.in_channels)
        return original(module, x)

    monkeypatch.setattr(moments, "patches", watched)
    measure(model, examples(pixels))
    assert set(asked) == {2}


def test_small_blocks_and_few_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = build("convs", 5)
    data = examples(pixels)
    monkeypatch.setattr(moments, "_BLOCK", {"cpu": 3})
    monkeypatch.setattr(moments, "_LARGE_BLOCK", 5)
    monkeypatch.setattr(moments, "_rows_at_a_time", lambda module, x: 2)
    monkeypatch.setattr(factors, "_fitting", lambda graph_bytes, batch: 2)
    assert_true(measure(model, data), model, data, "ggn")


@pytest.mark.parametrize("fisher", ["ggn", "mc", "empirical"])
def test_batches_do_not_matter(fisher: Fisher) -> None:
    model, pixels = build("convs", 9)
    data = examples(pixels)
    whole = measure(model, data, fisher, samples=3)
    for batch in (1, 2, 4):
        parts = measure(model, data, fisher, samples=3, batch=batch)
        for name, block in whole.blocks.items():
            assert_close(parts.blocks[name].a, block.a, what=name)
            assert_close(parts.blocks[name].b, block.b, what=name)
        assert float(parts.count) == 9


def test_draws_belong_to_the_sample() -> None:
    model, pixels = build("mlp", 8)
    data = examples(pixels)
    one = measure(model, data, "mc", seed=3).blocks["3"].b
    assert_close(measure(model, data.select(torch.arange(7, -1, -1)), "mc", seed=3).blocks["3"].b, one)
    assert not torch.equal(measure(model, data, "mc", seed=4).blocks["3"].b, one)


def test_weight_zero_is_absence() -> None:
    model, pixels = build("convs", 5)
    spoilt = pixels.clone()
    spoilt[3:] = torch.nan
    weighted = examples(spoilt, weight=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    found, truth = measure(model, weighted), measure(model, examples(pixels).select(slice(0, 3)))
    for name, block in truth.blocks.items():
        assert torch.equal(found.blocks[name].a, block.a)
        assert torch.equal(found.blocks[name].b, block.b)
    assert float(found.count) == 3


def test_channels_that_never_fire() -> None:
    model, pixels = threes_on(9, 8)
    with torch.no_grad():
        model.get_parameter("0.weight")[:3] = 0
        model.get_parameter("0.bias")[:3] = 0
    found = measure(model, examples(pixels)).blocks["2"].a.unflatten(2, (16, 9)).unflatten(1, (16, 9))[0]
    assert not found[:3].any()
    assert found[3:, :, 3:].any()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_for_deep_linear_networks(sharing: Sharing) -> None:
    """K-FAC is the GGN where no position or example is treated differently (Bernacchia et al. 2018): squared error."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, NUM_CLASSES)).double()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(1e-3)  # nearly even probabilities: the same Hessian for each example
        model.get_parameter("2.bias").zero_()
    pixels = torch.randn(8, 4, dtype=torch.float64)
    data = examples(pixels, classes=EVERY_CLASS)
    found = measure(model, data, sharing=sharing)
    h = torch.eye(NUM_CLASSES, dtype=torch.float64) / NUM_CLASSES - 1 / NUM_CLASSES**2
    for name, block in found.blocks.items():
        parameters = [model.get_parameter(full) for full in (block.weight, block.bias) if full is not None]
        dense: Tensor = torch.zeros(())
        for image in pixels:
            rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in model(image[None])[0]]
            flat = [torch.cat([row[0], *[bias[:, None] for bias in row[1:]]], dim=1).flatten() for row in rows]
            jacobian = torch.stack(flat)
            dense = dense + jacobian.T @ h @ jacobian
        product = torch.kron(block.b[0].double(), block.a[0].double() / len(data))
        assert float((product - dense).norm() / dense.norm()) < 1e-3, name


# ---------------------------------------------------------------- another opinion


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "threes", "vit"])
def test_curvlinops(name: str, fisher: Fisher, sharing: Sharing) -> None:
    model, pixels = threes_on(9, 8) if name == "threes" else build(name, 5)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)  # it refuses norms and free parameters
    data = examples(pixels, classes=EVERY_CLASS)
    operator = KFACLinearOperator(
        model.eval(),
        nn.CrossEntropyLoss(),
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        [(data.pixels, data.labels)],
        fisher_type=FisherType.TYPE2 if fisher == "ggn" else FisherType.EMPIRICAL,
        kfac_approx=sharing,
        check_deterministic=False,
        num_data=len(data),
        num_per_example_loss_terms=1,
        separate_weight_and_bias=False,
    )
    operator.compute_kronecker_factors()
    found = measure(model, data, fisher, sharing=sharing)
    assert len(found.blocks) == len(operator._input_covariances) > 1
    for layer, block in found.blocks.items():
        assert_close(block.a[0] / len(data), operator._input_covariances[layer], what=f"A of {layer}: ")
        assert_close(block.b[0] / len(data), operator._gradient_covariances[layer], what=f"B of {layer}: ")


# ---------------------------------------------------------------- coverage


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet10t", "mobilenetv3_small_050"])
def test_every_parameter_of_timm_models_once(name: str) -> None:
    import_timm()
    import timm

    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=NUM_CLASSES, **settings)
    found = measure(model, examples(torch.randn(3, 3, 32, 32)), "empirical")
    assert_covered(found, model)
    known = [
        full
        for full, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad
    ]
    assert sorted(found.blocks) == sorted(known)
    for layer, block in found.blocks.items():
        module = model.get_submodule(layer)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        weight = model.get_parameter(block.weight)
        assert block.b.shape == (groups, len(weight) // groups, len(weight) // groups)
        assert block.a.shape[1] == weight[0].numel() + (block.bias is not None)


def test_what_hooks_cannot_measure_gets_the_diagonal() -> None:
    for name, outside in {
        "shared": {"twice.weight", "twice.bias", "wrapped.weight", "wrapped.bias"},
        "tied": {"first.weight", "first.bias", "second.bias"} - {"first.bias", "second.bias"},
        "standard": {"0.weight", "0.bias"},
    }.items():
        model, pixels = build(name, 4)
        data = examples(pixels)
        found = measure(model, data)
        assert_covered(found, model)
        assert outside <= set(found.squares), name
        truth = true_diagonal(model, data, "ggn")
        for parameter, value in found.squares.items():
            assert_close(value, truth[parameter], what=parameter)


def test_layers_that_are_listed_get_the_diagonal() -> None:
    model, pixels = build("vit", 4)
    data = examples(pixels)
    found = measure(model, data, diagonal=("blocks.*.attn.*", "head"))
    assert_covered(found, model)
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.bias", "head.weight"} <= set(found.squares)
    truth = DiagonalEstimator().estimate(model, [data], Comm.solo())
    for name, value in found.squares.items():
        assert_close(value, truth.values[name].double(), what=name)


def test_frozen_parameters_are_left_out() -> None:
    model, pixels = build("convs", 3)
    model.get_submodule("0").requires_grad_(False)
    model.get_parameter("2.bias").requires_grad_(False)
    model.get_parameter("5.weight").requires_grad_(False)
    data = examples(pixels)
    found = measure(model, data)
    assert_covered(found, model)
    assert found.blocks["2"].bias is None
    assert "5.bias" in found.squares
    assert_true(found, model, data, "ggn")


def test_the_last_layer_alone() -> None:
    model, pixels = build("convs", 3)
    model.requires_grad_(False)
    model.get_submodule("10").requires_grad_(True)
    found = measure(model, examples(pixels))
    assert list(found.blocks) == ["10"]
    assert_true(found, model, examples(pixels), "ggn")


def test_no_examples_is_no_curvature() -> None:
    model, _ = build("mlp", 1)
    found = KroneckerPass().run(model, [], Comm.solo())
    assert float(found.count) == 0
    assert not any(bool(value.any()) for value in found.squares.values())


# ---------------------------------------------------------------- EKFAC


def orthogonal(found: Measured) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.linalg.eigh(block.a)[1], torch.linalg.eigh(block.b)[1]) for name, block in found.blocks.items()
    }


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "convs", "windows", "vit", "convnext"])
def test_eigen_diagonal_equals_rotated_gradients(name: str, fisher: Fisher) -> None:
    model, pixels = build(name, 5)
    data = examples(pixels, weight=WEIGHT)
    bases = orthogonal(measure(model, data, fisher))
    found = EigenPass(KroneckerPass(fisher)).run(
        model, [data.select(slice(0, 2)), data.select(slice(2, 5))], Comm.solo(), bases
    )
    truth = true_eigen(model, data, bases, fisher)
    assert found.keys() == bases.keys()
    for layer, value in found.items():
        assert_close(value, truth[layer], what=layer)


def test_eigen_diagonal_without_rotation_is_the_diagonal() -> None:
    model, pixels = threes_on(9, 8)
    data = examples(pixels)
    bases = {
        name: (torch.eye(block.a.shape[1])[None], torch.eye(block.b.shape[1])[None])
        for name, block in measure(model, data).blocks.items()
    }
    truth = DiagonalEstimator().estimate(model, [data], Comm.solo()).values
    for layer, value in EigenPass(KroneckerPass("ggn")).run(model, [data], Comm.solo(), bases).items():
        weight = truth[f"{layer}.weight"]
        assert_close(value[0, :, : weight[0].numel()], weight.flatten(1), what=layer)


def test_eigen_diagonal_rotates_before_or_after(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.Flatten(), nn.Linear(20 * 6, NUM_CLASSES))
    many = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(80, NUM_CLASSES))
    asked: list[int] = []
    original = layers._outer_squares

    def watched(grad: Tensor, x: Tensor) -> Tensor:
        asked.append(grad.shape[-1])
        return original(grad, x)

    for model, positions, before in ((wide, 6, True), (many, 40, False)):
        torch.manual_seed(0)
        data = examples(torch.randn(5, positions, 3, dtype=torch.float64))
        model.double()
        bases = orthogonal(measure(model, data))
        monkeypatch.setattr(layers, "_outer_squares", watched)
        asked.clear()
        found = EigenPass(KroneckerPass("ggn")).run(model, [data], Comm.solo(), bases)
        assert (positions in asked) == before
        truth = true_eigen(model, data, bases, "ggn")
        for layer, value in found.items():
            assert_close(value, truth[layer], what=layer)


# ---------------------------------------------------------------- precision and neighbours


def test_half_precision_passes_keep_single_precision_sums() -> None:
    model, pixels = build("vit", 5, dtype=torch.float32)
    data = examples(pixels)
    whole, half = measure(model, data), measure(model, data, precision="bf16")
    for name, block in whole.blocks.items():
        assert half.blocks[name].a.dtype == half.blocks[name].b.dtype == torch.float32
        assert float((half.blocks[name].a - block.a).norm() / block.a.norm()) < 0.05, name
        assert 1e-5 < float((half.blocks[name].b - block.b).norm() / block.b.norm()) < 0.05, name
    assert whole.squares.keys() == half.squares.keys()
    for name, value in whole.squares.items():
        assert float((half.squares[name] - value).norm()) < 0.1 * float(value.norm()) + 1e-12, name


def test_weights_are_not_rounded_to_half_precision() -> None:
    model, pixels = build("vit", 5, dtype=torch.float32)
    once = measure(model, examples(pixels), precision="bf16")
    thrice = measure(model, examples(pixels, weight=torch.full((5,), 3.0)), precision="bf16")
    for name, block in once.blocks.items():
        assert_close(thrice.blocks[name].a, 3 * block.a.double(), rtol=1e-6, what=name)


def test_single_precision_equals_double() -> None:
    model, pixels = build("convs", 5)
    truth = measure(model, examples(pixels))
    single, single_pixels = build("convs", 5, dtype=torch.float32)
    for name, block in measure(single, examples(single_pixels)).blocks.items():
        assert_close(block.a, truth.blocks[name].a.double(), rtol=1e-4)
        assert_close(block.b, truth.blocks[name].b.double(), rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model, pixels = build("norms", 6, dtype=torch.float32)
    model.train()
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = measure(model, examples(pixels))
    EigenPass(KroneckerPass()).run(model, [examples(pixels)], Comm.solo(), orthogonal(found))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


# ---------------------------------------------------------------- errors


def test_a_factor_that_is_too_large_is_named() -> None:
    model, pixels = build("mlp", 3)
    message = (
        r"layer '1' needs a factor of 19 x 19 \(0\.00 GiB\), above curvature\.max_factor=12; .*curvature\.diagonal"
    )
    with pytest.raises(CoverageError, match=message):
        measure(model, examples(pixels), max_factor=12)
    assert set(measure(model, examples(pixels), max_factor=12, diagonal=("1",)).blocks) == {"3"}


def test_a_pattern_without_layer_is_refused() -> None:
    model, pixels = build("mlp", 3)
    with pytest.raises(CoverageError, match=r"curvature\.diagonal='fc\*' matches no linear map or convolution.*: 1, 3"):
        measure(model, examples(pixels), diagonal=("fc*",))


def test_short_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(factors, "InputMoment", full)
    model, pixels = build("mlp", 3)
    with pytest.raises(CoverageError, match=r"no memory for the factors of layer '1' \(9 x 9 and 19 x 19"):
        measure(model, examples(pixels))


def test_labels_and_numbers_are_checked() -> None:
    model, pixels = build("norms", 6)
    data = examples(pixels)
    data.labels[1] = 0
    with pytest.raises(DataError, match="sample 101 has class 0"):
        measure(model, data)
    with torch.no_grad():
        model.get_parameter("4.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"layer '4' \(Conv2d\) is not finite for samples 100"):
        measure(model, examples(pixels))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    class Cusp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=0).sqrt()  # infinite slope at 0, times 0

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Cusp(), nn.Linear(4, NUM_CLASSES))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.eye(4))
        model.get_parameter("1.bias").zero_()
    pixels = torch.rand(6, 4) + 0.1
    pixels[5, 2] = 0.0
    with pytest.raises(DivergedError, match="gradient of layer '1' is not finite for samples 105"):
        measure(model, examples(pixels))


def test_an_overflow_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, NUM_CLASSES))
    with torch.no_grad():
        model.get_parameter("1.weight").zero_()
    with pytest.raises(DivergedError, match=r"'1\.weight' overflow fp32"):
        measure(model, examples(torch.full((3, 4), 1e25)))
