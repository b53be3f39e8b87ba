from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import DiagonalCurvature
from hpccl.curvature import layers
from hpccl.curvature.build import build_estimator, precision_from_state
from hpccl.curvature.capture import captured, measuring
from hpccl.curvature.columns import Fisher
from hpccl.curvature.coverage import plan
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, CoverageError, DataError, DivergedError, HpcclError
from tests.unit.curvature.oracle import HEAD, NETS, NUM_CLASSES, build, cusp, examples, overflowing, true_diagonal

ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


def estimate(
    model: nn.Module, data: Examples, fisher: Fisher = "ggn", *, batch: int = 100, samples: int = 1, seed: int = 0
) -> Diagonal:
    parts = [data.select(slice(first, first + batch)) for first in range(0, len(data), batch)]
    return DiagonalEstimator(fisher, samples, seed).estimate(model, parts, Comm.solo())


def product(diagonal: Diagonal, delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal times `delta`, by its pieces."""
    zeros = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in delta.items()}
    pieces = diagonal.pieces(Comm.solo(), delta)
    return {piece.name: piece.add(zeros[piece.name], delta, zeros, 1.0, 0.0) for piece in pieces}


def assert_equal(found: dict[str, Tensor] | object, truth: dict[str, Tensor], *, rtol: float = 1e-5) -> None:
    assert isinstance(found, dict)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value.double(), rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_equals_one_example_at_a_time(name: str, fisher: Fisher) -> None:
    model, pixels = build(name, 5)
    data = examples(pixels, weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25]))
    assert_equal(estimate(model, data, fisher).values, true_diagonal(model, data, fisher))


@pytest.mark.parametrize("name", ["convs", "norms", "vit"])
def test_fp32_equals_float64(name: str) -> None:
    model, pixels = build(name, 5)
    truth = true_diagonal(model, examples(pixels), "ggn")
    single, single_pixels = build(name, 5, dtype=torch.float32)
    assert_equal(estimate(single, examples(single_pixels)).values, truth, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "through_model"),
    [
        ("mlp", set()),
        ("convs", set()),
        ("norms", set()),
        ("standard", set()),
        ("windows", set()),
        ("attention", {"attention." + name for name in ATTENTION}),
        ("swin", {f"layers.0.blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)}),
        ("tied", {"first.weight"}),
        ("shared", {"twice.weight", "twice.bias", "wrapped.weight", "wrapped.bias"}),
        ("wrapped", {"wrapped.weight", "wrapped.bias", "scale"}),
        ("vit", {"cls_token", "pos_embed"}),
    ],
)
def test_the_slow_route_is_taken_only_where_it_must(name: str, through_model: set[str]) -> None:
    model, pixels = build(name, 4)
    with measuring(model, torch.device("cpu")):
        coverage = plan(model, pixels)
    assert set(coverage.mapped) == through_model
    assert not coverage.looped


def test_what_vmap_refuses_goes_example_by_example() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.last = nn.Linear(4, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1) * self.scale
            out: Tensor = self.last(x * (2.0 if float(x.detach().sum()) > 0 else -1.0))
            return out

    torch.manual_seed(0)
    model, data = Branching(), examples(torch.randn(3, 4))
    with measuring(model, torch.device("cpu")):
        coverage = plan(model, data.pixels)
    assert (coverage.mapped, coverage.looped) == ((), ("scale",))
    assert_equal(estimate(model, data).values, true_diagonal(model, data, "ggn"), rtol=1e-4)


def test_free_parameters_of_a_vit_share_the_pass_of_its_layers() -> None:
    model, pixels = build("vit", 5)
    data = examples(pixels, weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25]))
    with measuring(model, torch.device("cpu")):
        coverage = plan(model, pixels)
    assert set(coverage.widened) == set(coverage.mapped) == {"cls_token", "pos_embed"}
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, arguments: passes.append(len(arguments[0])))
    found = DiagonalEstimator("ggn", known=coverage).estimate(model, [data], Comm.solo())
    hook.remove()
    assert passes == [5]
    assert_equal(found.values, true_diagonal(model, data, "ggn"))


def test_channels_last_changes_nothing() -> None:
    model, pixels = build("convs", 4)
    plain = estimate(model, examples(pixels))
    last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_equal(estimate(last, examples(pixels.to(memory_format=torch.channels_last))).values, dict(plain.values))


@pytest.mark.parametrize("name", ["convs", "windows", "vit"])
@pytest.mark.parametrize("by_pairs", [False, True])
def test_both_ways_to_sum_over_positions(name: str, by_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_by_pairs", lambda *sizes: by_pairs)
    model, pixels = build(name, 4)
    assert_equal(estimate(model, examples(pixels)).values, true_diagonal(model, examples(pixels), "ggn"))


def test_pairs_of_positions_are_chosen_where_maps_are_small() -> None:
    assert layers._by_pairs(9, 512, 4608, 4)
    assert layers._by_pairs(9, 256, 2304, 16)
    assert not layers._by_pairs(9, 64, 576, 169)
    assert not layers._by_pairs(9, 192, 192, 17)


def test_memory_bounds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = build("vit", 6)
    whole = estimate(model, examples(pixels))
    calls: list[int] = []
    original = DiagonalEstimator._part

    def tight(self: DiagonalEstimator, coverage: object, data: Examples) -> tuple[int, int]:
        calls.append(len(data))
        original(self, coverage, data)  # type: ignore[arg-type]
        return 4, 2

    monkeypatch.setattr(DiagonalEstimator, "_part", tight)
    assert_equal(estimate(model, examples(pixels)).values, dict(whole.values))
    assert calls == [6, 3, 3]  # of the batch, and of the two parts that it is cut into


@pytest.mark.parametrize("fisher", ["ggn", "mc", "empirical"])
def test_batches_do_not_matter(fisher: Fisher) -> None:
    model, pixels = build("convs", 9)
    whole = estimate(model, examples(pixels), fisher, samples=3)
    for batch in (1, 2, 4):
        assert_equal(estimate(model, examples(pixels), fisher, batch=batch, samples=3).values, dict(whole.values))
    assert whole.num_examples == 9


def test_order_does_not_matter_to_drawn_labels() -> None:
    model, pixels = build("mlp", 8)
    data = examples(pixels)
    turned = data.select(torch.arange(7, -1, -1))
    assert_equal(estimate(model, turned, "mc").values, dict(estimate(model, data, "mc").values))
    other = estimate(model, data, "mc", seed=1)
    assert not torch.equal(other.values["1.weight"], estimate(model, data, "mc").values["1.weight"])


def test_many_drawn_labels_approach_the_exact_matrix() -> None:
    model, pixels = build("mlp", 6)
    exact, drawn = estimate(model, examples(pixels)), estimate(model, examples(pixels), "mc", samples=20_000)
    for name, value in exact.values.items():
        error = float((drawn.values[name] - value).norm() / value.norm())
        assert error < 0.02, name


def test_empirical_is_the_squared_gradient_of_own_head_cross_entropy() -> None:
    model, pixels = build("mlp", 6)
    data = examples(pixels)
    truth = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for image, label in zip(data.pixels, data.labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None])[:, list(HEAD)], torch.tensor([HEAD.index(int(label))]))
        for (name, _), grad in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            truth[name] += grad.square()
    assert_equal(estimate(model, data, "empirical").values, truth)


@pytest.mark.parametrize("fisher", ["ggn", "mc", "empirical"])
def test_other_heads_have_no_curvature(fisher: Fisher) -> None:
    model, pixels = build("mlp", 6)
    values = estimate(model, examples(pixels), fisher).values
    others = [number for number in range(NUM_CLASSES) if number not in HEAD]
    assert not values["3.weight"][others].any()
    assert not values["3.bias"][others].any()
    assert values["3.bias"][list(HEAD)].all()


def test_a_head_of_one_class_has_no_curvature() -> None:
    model, pixels = build("mlp", 3)
    assert estimate(model, examples(pixels, classes=(2,))).totals(Comm.solo()).trace == 0


def test_weight_zero_is_absence() -> None:
    model, pixels = build("convs", 6)
    data = examples(pixels)
    spoilt = pixels.clone()
    spoilt[3:] = torch.nan
    weighted = examples(spoilt, weight=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    found, truth = estimate(model, weighted), estimate(model, data.select(slice(0, 3)))
    assert_equal(found.values, dict(truth.values))
    assert found.num_examples == 3


def test_weight_is_linear_and_two_passes_add() -> None:
    model, pixels = build("convs", 4)
    once, thrice = estimate(model, examples(pixels)), estimate(model, examples(pixels, weight=torch.full((4,), 3.0)))
    assert_equal(thrice.values, dict(once.times(3).values))
    assert_equal(once.plus(once.times(2), Comm.solo()).values, dict(thrice.values))


def test_no_examples_is_no_curvature() -> None:
    model, _ = build("mlp", 1)
    empty = DiagonalEstimator().estimate(model, [], Comm.solo())
    assert empty.totals(Comm.solo()).trace == 0
    assert empty.values.keys() == dict(model.named_parameters()).keys()


def test_frozen_parameters_are_left_out() -> None:
    model, pixels = build("convs", 3)
    truth = true_diagonal(model, examples(pixels), "ggn")
    model.get_submodule("0").requires_grad_(False)
    model.get_parameter("2.bias").requires_grad_(False)
    del truth["0.weight"], truth["0.bias"], truth["2.bias"]
    assert_equal(estimate(model, examples(pixels)).values, truth)


def test_the_model_is_left_as_it_was() -> None:
    model, pixels = build("norms", 6, dtype=torch.float32)
    model.train()
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precision, attention = torch.get_float32_matmul_precision(), torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimate(model, examples(pixels))
    plain = estimate(model, examples(pixels))
    assert_equal(found.values, dict(plain.values), rtol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.mha.get_fastpath_enabled() == attention


def test_training_goes_on_untouched() -> None:
    def step(model: nn.Module, pixels: Tensor) -> Tensor:
        nn.functional.cross_entropy(model(pixels), torch.zeros(len(pixels), dtype=torch.int64)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    model, pixels = build("convnext", 4)
    other, _ = build("convnext", 4)
    estimate(model, examples(pixels))
    assert torch.equal(step(model.train(), pixels), step(other.train(), pixels))


def test_hooks_are_removed_after_an_error() -> None:
    class Stumble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("on purpose")

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, NUM_CLASSES), Stumble()).train()
    with pytest.raises(KeyError), measuring(model, torch.device("cpu")), captured(model, ["1"]):
        model(torch.zeros(2, 4))
    assert not model.get_submodule("1")._forward_hooks
    assert all(module.training for module in model.modules())


def test_large_values_stay_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, NUM_CLASSES))
    data = examples(1e4 * torch.randn(50, 4))
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(1e-5)
    found = estimate(model, data)
    assert float(found.values["1.weight"].max()) > 1e6
    assert torch.isfinite(product(found, {"1.weight": torch.ones(NUM_CLASSES, 4)})["1.weight"]).all()


# ---------------------------------------------------------------- errors


def test_a_parameter_without_influence_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, NUM_CLASSES)
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x.flatten(1))
            return out

    model = Idle()
    with pytest.raises(CoverageError, match=r"'idle\.bias', 'idle\.weight'.*requires_grad=False"):
        estimate(model, examples(torch.randn(3, 4)))
    model.idle.requires_grad_(False)
    assert set(estimate(model, examples(torch.randn(3, 4))).values) == {"used.weight", "used.bias"}


def test_a_batch_norm_of_the_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, NUM_CLASSES))
    with pytest.raises(CoverageError, match=r"layer '1' \(BatchNorm1d\) has no running statistics"):
        estimate(model, examples(torch.randn(3, 4)))


def test_half_precision_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, NUM_CLASSES)).bfloat16()
    with pytest.raises(CoverageError, match=r"'0\.weight' is torch\.bfloat16"):
        estimate(model, examples(torch.randn(3, 4)))


def test_a_label_outside_the_head_is_refused() -> None:
    model, pixels = build("mlp", 3)
    data = examples(pixels)
    data.labels[1] = 0
    with pytest.raises(DataError, match=r"sample 101 has class 0, which is not in its task's head \[1, 2, 4, 5\]"):
        estimate(model, data, "empirical")


def test_pixels_that_are_not_finite_are_named() -> None:
    model, pixels = build("mlp", 6)
    pixels[4, 0, 0, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"non-finite values in the pixels for samples 104;"):
        estimate(model, examples(pixels))


def test_the_layer_that_diverged_is_named() -> None:
    model, pixels = build("norms", 6)
    with torch.no_grad():
        model.get_parameter("4.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"values in layer '4' \(Conv2d\) for samples 100, 101, 102, 103, 104"):
        estimate(model, examples(pixels))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, pixels = cusp()
    with pytest.raises(DivergedError, match="non-finite values in the gradient of layer '1' for samples 105"):
        estimate(model, examples(pixels))


def test_an_overflow_is_named() -> None:
    model, pixels = overflowing()
    with pytest.raises(DivergedError, match=r"'1\.weight' overflow fp32"):
        estimate(model, examples(pixels))


# ---------------------------------------------------------------- algebra and state


@pytest.fixture
def diagonal() -> Diagonal:
    return Diagonal({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}, num_examples=5)


def test_the_product_is_the_gradient_of_the_quadratic(diagonal: Diagonal) -> None:
    delta = {"a": torch.tensor([1.0, -2.0], requires_grad=True), "b": torch.tensor([[0.5]], requires_grad=True)}
    quadratic = sum((0.5 * diagonal.values[name] * value.square()).sum() for name, value in delta.items())
    assert isinstance(quadratic, Tensor)
    quadratic.backward()
    for name, value in product(diagonal, {name: value.detach() for name, value in delta.items()}).items():
        grad = delta[name].grad
        assert grad is not None
        assert torch.equal(value, grad)
    assert product(diagonal, {"b": torch.ones(1, 1, dtype=torch.bfloat16)})["b"].dtype == torch.float32


def test_algebra(diagonal: Diagonal) -> None:
    doubled = diagonal.plus(diagonal, Comm.solo())
    assert torch.equal(doubled.values["a"], torch.tensor([2.0, 4.0]))
    assert doubled.num_examples == 10
    assert diagonal.times(0.5).totals(Comm.solo()).trace == 3.0
    assert diagonal.totals(Comm.solo()).trace == 6.0
    assert diagonal.num_bytes == 12
    assert diagonal.to(torch.device("cpu")).totals(Comm.solo()).trace == 6.0


def no_shards(_: object) -> dict[str, list[dict[str, object]]]:
    return {}


def test_state_round_trip(diagonal: Diagonal) -> None:
    again = precision_from_state(diagonal.state_dict(), no_shards, Comm.solo())
    assert isinstance(again, Diagonal)
    assert again.num_examples == 5
    assert all(torch.equal(again.values[name], value) for name, value in diagonal.values.items())


def test_mistakes_in_algebra_and_state(diagonal: Diagonal) -> None:
    with pytest.raises(CoverageError, match=r"'c' has no curvature; measured: a, b"):
        diagonal.pieces(Comm.solo(), {"c": torch.ones(1)})
    with pytest.raises(CoverageError, match="only one of them has b"):
        diagonal.plus(Diagonal({"a": torch.ones(2)}), Comm.solo())
    for state in ({"kind": "cubic"}, {}, {"kind": "diagonal"}, {"kind": "diagonal", "values": {"a": 1.0}}):
        with pytest.raises(CheckpointError):
            precision_from_state(state, no_shards, Comm.solo())
    assert issubclass(CheckpointError, HpcclError)


def test_build() -> None:
    assert build_estimator(DiagonalCurvature(fisher="mc", samples=4), seed=7) == DiagonalEstimator("mc", 4, 7)


def test_nothing_of_a_pass_stays_in_memory() -> None:
    """A forward graph was once kept by every estimate."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Sigmoid(), torch.nn.Linear(64, 4))
    examples = Examples(
        pixels=torch.randn(32, 64),
        labels=torch.arange(32) % 4,
        head=torch.ones(4, dtype=torch.bool),
        sample=torch.arange(32),
        weight=torch.ones(32),
    )

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    estimator = DiagonalEstimator("mc", 1, 0)
    estimator.estimate(model, [examples], Comm.solo())
    before = live()
    for _ in range(3):
        estimator.estimate(model, [examples], Comm.solo())
    assert live() == before


def test_a_first_batch_of_one_example_is_planned_like_any_other() -> None:
    """Rows of one image could be grouped in any way."""
    model, pixels = build("windows-first", 3)
    data = examples(pixels)
    expected = DiagonalEstimator().estimate(model, [data], Comm.solo()).values
    found = DiagonalEstimator().estimate(model, [data.select(slice(0, 1)), data.select(slice(1, 3))], Comm.solo())
    for name, value in expected.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))
