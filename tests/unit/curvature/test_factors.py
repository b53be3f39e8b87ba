"""Kronecker factors against sums over examples, positions and classes in float64, and against curvlinops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.compat import import_timm
from hpccl.curvature import factors, layers
from hpccl.curvature.columns import Fisher
from hpccl.curvature.diagonal import DiagonalEstimator
from hpccl.curvature.factors import EigenPass, KroneckerPass, Measured
from hpccl.curvature.layers import Rotation
from hpccl.curvature.moments import Sharing
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError, CoverageError, DataError, DivergedError
from tests.unit.curvature.factor_oracle import (
    WEIGHT,
    assert_close,
    assert_covered,
    assert_true,
    measure,
    threes_on,
    true_eigen,
)
from tests.unit.curvature.oracle import NUM_CLASSES, build, cusp, examples, overflowing, true_diagonal

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a library of curvlinops scripts its functions on import
    from curvlinops import FisherType, KFACLinearOperator

EVERY_CLASS = tuple(range(NUM_CLASSES))


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

    def watched(grad: Tensor, x: Tensor, power: layers.Power = 2) -> Tensor:
        asked.append(grad.shape[-1])
        return original(grad, x, power)

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


def test_rotated_inputs_that_are_kept_give_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3).double()
    x, grad = torch.randn(5, 4, 6, 6).double(), torch.randn(5, 6, 4, 4).double()
    basis = tuple(torch.linalg.qr(torch.randn(1, size, size).double()).Q for size in (37, 6))
    kept, anew = (Rotation.of(module, x, basis, 5, columns=50, room=room) for room in (5 * 37 * 16, 5 * 37 * 16 - 1))
    assert kept.kept is not None
    assert anew.kept is None
    torch.testing.assert_close(kept.squares(grad), anew.squares(grad))


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
    with pytest.raises(ConfigError, match=r"curvature\.diagonal='fc\*' matches no linear map or convolution.*: 1, 3"):
        measure(model, examples(pixels), diagonal=("fc*",))


def test_short_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(factors, "InputMoment", full)
    model, pixels = build("mlp", 3)
    with pytest.raises(CoverageError, match=r"out of memory for the factors of layer '1' \(9 x 9 and 19 x 19"):
        measure(model, examples(pixels))


def test_labels_and_numbers_are_checked() -> None:
    model, pixels = build("norms", 6)
    data = examples(pixels)
    data.labels[1] = 0
    with pytest.raises(DataError, match="sample 101 has class 0"):
        measure(model, data)
    with torch.no_grad():
        model.get_parameter("4.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"non-finite values in layer '4' \(Conv2d\) for samples 100"):
        measure(model, examples(pixels))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, pixels = cusp()
    with pytest.raises(DivergedError, match="non-finite values in the gradient of layer '1' for samples 105"):
        measure(model, examples(pixels))


def test_an_overflow_is_named() -> None:
    model, pixels = overflowing()
    with pytest.raises(DivergedError, match=r"'1\.weight' overflow fp32"):
        measure(model, examples(pixels))
