"""The Laplace posterior, against dense float64 matrices over all weights at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import ListedTasks
from hpccl.curvature.blocks import Block, Layout, Term
from hpccl.curvature.dense import DenseEstimator, DensePrecision
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.jacobians import logit_jacobians
from hpccl.curvature.kfac import EkfacEstimator, KroneckerEstimator
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Estimator, Precision
from hpccl.curvature.spectrum import gathered
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError, CoverageError, DivergedError
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, LowRank
from hpccl.kron.merge import refit
from hpccl.kron.pair import Pair
from tests.unit.curvature.oracle import build, examples, jacobian

SOLO = Comm.solo()
LAYOUTS = (
    Layout("conv", "conv.weight", "conv.bias", (4, 2, 2, 3), channels_last=True),
    Layout("grouped", "grouped.weight", None, (4, 2, 2, 2), groups=2),
    Layout("head", "head.weight", "head.bias", (3, 4)),
)
DELTA, SCALE = 0.3, 0.7


def psd(groups: int, size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    root = torch.randn(groups, size, rank or size, generator=generator, dtype=torch.float64)
    return root @ root.mT / size


def pair(layout: Layout, generator: torch.Generator) -> Pair:
    groups, outputs, inputs = layout.shape
    return Pair(Dense(psd(groups, inputs, generator, rank=3)), Dense(2 * psd(groups, outputs, generator)))


def kronecker(kind: str = "pair") -> Kronecker:
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for layout in LAYOUTS:
        one, other = pair(layout, generator), pair(layout, generator)
        eigen = Eigen.of(one)
        by_kind: dict[str, tuple[Term, ...]] = {
            "pair": (one,),
            "low rank": (one.truncated(1 - 1e-9),),
            "eigen": (replace(eigen, values=torch.rand(layout.shape, generator=generator, dtype=torch.float64)),),
            "several": (one, other),
        }
        blocks.append(Block(layout, by_kind[kind], (5.0,) * len(by_kind[kind])))
    rest = Diagonal({"norm": torch.rand(7, generator=generator, dtype=torch.float64)}, 5.0)
    return Kronecker(tuple(blocks), rest, 5.0, ListedTasks(), LAYOUTS)


def named(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"norm": (7,)}
    for layout in LAYOUTS:
        shapes[layout.weight] = layout.weight_shape
        if layout.bias:
            shapes[layout.bias] = layout.weight_shape[:1]
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    """[W] in the order of the names."""
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def whole(term: Pair | Eigen) -> list[Tensor]:
    """One [o d, o d] a group."""
    if isinstance(term, Pair):
        return [torch.kron(b.double(), a.double()) for a, b in zip(term.a.dense(), term.b.dense(), strict=True)]
    bases = [torch.kron(b.double(), a.double()) for a, b in zip(term.qa, term.qb, strict=True)]
    return [basis * row.double().flatten() @ basis.T for basis, row in zip(bases, term.values, strict=True)]


def dense(precision: Precision, like: Mapping[str, Tensor]) -> Tensor:
    """[W, W] float64, element by element where the layout says, in the order of the names."""
    sizes = {name: like[name].numel() for name in sorted(like)}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    place = {name: starts[name] + torch.arange(size).view(like[name].shape) for name, size in sizes.items()}
    total = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    if isinstance(precision, DensePrecision):
        order = torch.cat([place[name].flatten() for name in precision.shapes])
        total[order[:, None], order] = precision.matrix.double()
        return total
    assert isinstance(precision, (Kronecker, Diagonal))
    for block in precision.blocks if isinstance(precision, Kronecker) else ():
        layout = block.layout
        groups, outputs, _ = layout.shape
        rows = place[layout.weight].reshape(groups, outputs, -1)
        if layout.bias:
            rows = torch.cat([rows, place[layout.bias].view(groups, outputs, 1)], dim=2)
        rows = rows[:, :, layout.order()].flatten(1)
        for term in block.terms:
            for where, matrix in zip(rows, whole(term), strict=True):
                total[where[:, None], where] += matrix
    rest = precision.rest if isinstance(precision, Kronecker) else precision
    for name, values in rest.values.items():
        total[place[name].flatten(), place[name].flatten()] = values.double().flatten()
    return total


def truth(precision: Precision, like: Mapping[str, Tensor], delta: float = DELTA, scale: float = SCALE) -> Tensor:
    matrix = dense(precision, like)
    return scale * matrix + delta * torch.eye(len(matrix), dtype=torch.float64)


def make(kind: str) -> tuple[Precision, Precision]:
    """A precision, and what its posterior is exactly that of."""
    if kind == "diagonal":
        generator = torch.Generator().manual_seed(1)
        values = {name: torch.rand(value.shape, generator=generator).double() for name, value in named(0).items()}
        return Diagonal(values), Diagonal(values)
    if kind == "dense":
        shapes = {name: tuple(value.shape) for name, value in named(0).items()}
        size = sum(value.numel() for value in named(0).values())
        matrix = psd(1, size, torch.Generator().manual_seed(2), rank=9)[0]
        return DensePrecision(matrix, shapes), DensePrecision(matrix, shapes)
    precision = kronecker(kind)
    if kind != "several":
        return precision, precision
    blocks = tuple(replace(block, terms=(refit(block.terms),)) for block in precision.blocks)
    return precision, replace(precision, blocks=blocks)


KINDS = ("pair", "low rank", "eigen", "several", "diagonal", "dense")


@pytest.mark.parametrize("kind", KINDS)
def test_solve_root_and_determinant(kind: str) -> None:
    precision, exact = make(kind)
    posterior = Posterior.of(precision, named(0), scale=SCALE, prior_precision=DELTA)
    matrix, vector = truth(exact, named(0)), named(1)
    solved = flat(posterior.solve(vector))
    torch.testing.assert_close(solved, torch.linalg.solve(matrix, flat(vector)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flat(posterior.root(posterior.root(vector))), solved, rtol=1e-6, atol=1e-7)
    assert posterior.log_determinant() == pytest.approx(float(torch.logdet(matrix)), rel=1e-8)
    assert posterior.num_weights == len(matrix)
    assert {name: value.shape for name, value in posterior.solve(vector).items()} == {
        name: value.shape for name, value in vector.items()
    }


def test_the_root_is_symmetric() -> None:
    posterior = Posterior.of(kronecker(), named(0), prior_precision=DELTA)
    one, other = named(1), named(2)
    left, right = flat(one) @ flat(posterior.root(other)), flat(posterior.root(one)) @ flat(other)
    assert float(left) == pytest.approx(float(right), rel=1e-10)


def test_the_precision_that_the_prior_multiplies_is_the_one_that_is_inverted() -> None:
    """The posterior and the pieces of the penalty read a layout alike, whatever the memory order of its weights."""
    precision, vector = kronecker(), named(3)
    product = {name: torch.zeros_like(value) for name, value in vector.items()}
    zeros = {name: torch.zeros_like(value) for name, value in vector.items()}
    for piece in precision.pieces(SOLO, vector):
        product[piece.name] = piece.add(product[piece.name], vector, zeros, 1.0, DELTA)
    found = Posterior.of(precision, named(0), prior_precision=DELTA).solve(product)
    torch.testing.assert_close(flat(found), flat(vector), rtol=1e-5, atol=1e-6)


def test_float32_curvature() -> None:
    precision = kronecker()
    blocks = []
    for block in precision.blocks:
        (term,) = block.terms
        assert isinstance(term, Pair)
        large = Pair(Dense(term.a.dense().float()), Dense(1e4 * term.b.dense().float()))
        blocks.append(replace(block, terms=(large,)))
    rest = Diagonal({"norm": precision.rest.values["norm"].float()})
    single = replace(precision, blocks=tuple(blocks), rest=rest)
    mean = {name: value.float() for name, value in named(0).items()}
    posterior = Posterior.of(single, mean, prior_precision=1.0)
    matrix = truth(single, mean, 1.0, 1.0)
    vector = {name: value.float() for name, value in named(1).items()}
    solved = posterior.solve(vector)
    assert {value.dtype for value in solved.values()} == {torch.float32}
    expected = torch.linalg.solve(matrix, flat(vector))
    assert float((flat(solved) - expected).norm() / expected.norm()) < 1e-3


# ---------------------------------------------------------------- samples


def test_samples_have_the_covariance() -> None:
    posterior = Posterior.of(kronecker(), named(0), scale=SCALE, prior_precision=DELTA)
    count = 600
    draws = torch.stack([flat(posterior.sample(1, number)) for number in range(count)])
    covariance = torch.linalg.inv(truth(kronecker(), named(0)))
    deviation = (draws.mean(0) - flat(named(0))) / (covariance.diagonal() / count).sqrt()
    assert float(deviation.abs().max()) < 4.5
    # Whitened, the sample covariance is the identity up to sqrt(2 / count) on the diagonal, sqrt(1 / count) off it.
    white = (draws - flat(named(0))) @ torch.linalg.cholesky(truth(kronecker(), named(0)))
    noise = (white.T @ white / count - torch.eye(white.shape[1], dtype=torch.float64)) * math.sqrt(count)
    assert float(noise.abs().max()) < 7
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=0.1)


def test_a_sample_is_a_function_of_seed_number_and_name() -> None:
    posterior = Posterior.of(kronecker(), named(0), prior_precision=DELTA)
    one = posterior.sample(1, 0)
    assert all(torch.equal(value, one[name]) for name, value in posterior.sample(1, 0).items())
    for other in (posterior.sample(1, 1), posterior.sample(2, 0)):
        assert not any(torch.equal(value, one[name]) for name, value in other.items())
    # Without the other layers, and with bases whose signs and order differ, a layer's sample is the same.
    (conv, *_), rest = kronecker().blocks, Diagonal({})
    eigen = Eigen.of(conv.terms[0]) if isinstance(conv.terms[0], Pair) else conv.terms[0]
    turned = Eigen(-eigen.qa.flip(2), eigen.qb, eigen.values.flip(2), eigen.a.flip(1), eigen.b)
    alone = Kronecker((replace(conv, terms=(turned,)),), rest, 5.0, ListedTasks(), LAYOUTS[:1])
    found = Posterior.of(alone, named(0), prior_precision=DELTA).sample(1, 0)
    torch.testing.assert_close(found["conv.weight"], one["conv.weight"], rtol=1e-9, atol=1e-9)


def test_what_has_no_curvature_stays_at_the_mean() -> None:
    mean = {**named(0), "steps": torch.tensor(3), "norm": named(0)["norm"].to(torch.bfloat16)}
    sample = Posterior.of(kronecker(), mean, prior_precision=DELTA).sample(0, 0)
    assert torch.equal(sample["steps"], mean["steps"])
    assert {name: value.dtype for name, value in sample.items()} == {name: v.dtype for name, v in mean.items()}
    assert not torch.equal(sample["norm"], mean["norm"])


# ---------------------------------------------------------------- evidence


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_its_maximum(kind: str) -> None:
    """By dense determinants on a grid."""
    precision, exact = make(kind)
    mean, prior_mean = named(0), {name: 0.5 * value for name, value in named(4).items()}
    posterior = Posterior.of(precision, mean, scale=SCALE, prior_precision=DELTA)
    square = float((flat(mean) - flat(prior_mean)).square().sum())

    def evidence(delta: float) -> float:
        determinant = float(torch.logdet(truth(exact, mean, delta)))
        weights = len(flat(mean))
        return -12.5 - 0.5 * delta * square - 0.5 * (determinant - weights * math.log(delta))

    for delta in (1e-4, 0.2, 30.0):
        at = posterior.with_prior_precision(delta).log_evidence(12.5, prior_mean)
        assert at == pytest.approx(evidence(delta), rel=1e-7)
    best = posterior.best_prior_precision(prior_mean)
    grid = [best * math.exp(step / 5) for step in range(-30, 31)]
    assert max(grid, key=evidence) == pytest.approx(best, rel=1e-9)
    assert evidence(best) > max(evidence(best * 0.999), evidence(best * 1.001))
    at_best = posterior.with_prior_precision(best)
    assert best * square == pytest.approx(at_best.effective_parameters(), rel=1e-8)


@pytest.mark.parametrize(("size", "shrink"), [(1e8, 1.0), (1e-8, 1.0), (1.0, 1e-4), (1.0, 1e4)])
def test_the_maximum_is_found_however_far_away(size: float, shrink: float) -> None:
    mean = {name: value * shrink for name, value in named(0).items()}
    posterior = Posterior.of(kronecker(), mean, scale=size, prior_precision=1.0)
    best = posterior.best_prior_precision()
    found = posterior.with_prior_precision(best)
    assert best * float(flat(mean).square().sum()) == pytest.approx(found.effective_parameters(), rel=1e-7)


def test_a_linear_gaussian_model_has_its_exact_evidence() -> None:
    """Kronecker factors are exact for linear regression, and Laplace's approximation for a normal likelihood."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    padded = torch.cat([inputs, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    optimum = torch.linalg.solve(padded.T @ padded + DELTA * torch.eye(4, dtype=torch.float64), padded.T @ targets)
    layout = Layout("head", "weight", "bias", (1, 3))
    term = Pair(Dense((padded.T @ padded)[None] / 12), Dense(torch.full((1, 1, 1), 12.0, dtype=torch.float64)))
    precision = Kronecker((Block(layout, (term,), (12.0,)),), Diagonal({}), 12.0, ListedTasks(), (layout,))
    mean = {"weight": optimum[:3].T, "bias": optimum[3]}
    posterior = Posterior.of(precision, mean, prior_precision=DELTA)
    nats = 0.5 * float((targets - padded @ optimum).square().sum()) + 6 * math.log(2 * math.pi)
    covariance = torch.eye(12, dtype=torch.float64) + padded @ padded.T / DELTA
    exact = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
    assert posterior.log_evidence(nats) == pytest.approx(float(exact.log_prob(targets[:, 0])), rel=1e-10)
    model = nn.Linear(3, 1).double()
    expected = (padded @ torch.linalg.inv(padded.T @ padded + DELTA * torch.eye(4).double()) * padded).sum(1)
    torch.testing.assert_close(posterior.logit_variance(model, inputs)[:, 0, 0], expected)


def test_without_a_maximum_there_is_an_error() -> None:
    posterior = Posterior.of(kronecker(), named(0), prior_precision=DELTA)
    with pytest.raises(ConfigError, match="the mean is the prior mean"):
        posterior.best_prior_precision(named(0))
    flat_one = Posterior.of(kronecker().times(0.0), named(0), prior_precision=DELTA)
    with pytest.raises(ConfigError, match="the curvature is zero"):
        flat_one.best_prior_precision()


# ---------------------------------------------------------------- networks


def true_variance(model: nn.Module, pixels: Tensor, precision: Precision, delta: float) -> Tensor:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    covariance = torch.linalg.inv(truth(precision, trained, delta, 1.0))
    rows = torch.stack([torch.stack([flat(row) for row in jacobian(model.eval(), image)]) for image in pixels])
    variance: Tensor = rows @ covariance @ rows.mT
    return variance


def mean_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "kronecker") for name in ("mlp", "convs", "norms", "vit", "prelu", "shared", "tied", "windows")]
    + [("convs", "ekfac"), ("norms", "diagonal")],
)
def test_logit_variance(name: str, kind: str) -> None:
    model, pixels = build(name, 3)
    precision = measured(kind, model, pixels)
    posterior = Posterior.of(precision, mean_of(model), prior_precision=0.5)
    expected = true_variance(model, pixels, precision, 0.5)
    model.train()
    found = posterior.logit_variance(model, pixels)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def measured(kind: str, model: nn.Module, pixels: Tensor) -> Precision:
    sweep = KroneckerPass(fisher="ggn")
    estimators: dict[str, Estimator] = {
        "kronecker": KroneckerEstimator(sweep, ListedTasks()),
        "ekfac": EkfacEstimator(sweep),
        "diagonal": DiagonalEstimator(),
    }
    return estimators[kind].estimate(model, [examples(pixels)], SOLO)


def test_logit_variance_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image and a layer at a time."""
    model, pixels = build("norms", 3)
    posterior = Posterior.of(measured("kronecker", model, pixels), mean_of(model), prior_precision=0.5)
    expected = posterior.logit_variance(model, pixels)
    sizes: list[tuple[int, int]] = []

    def watched(model: nn.Module, weights: Any, names: Any, pixels: Tensor, *, mapped: bool) -> dict[str, Tensor]:
        sizes.append((len(names), len(pixels)))
        return logit_jacobians(model, weights, names, pixels, mapped=mapped)

    monkeypatch.setattr("hpccl.curvature.posterior.working_bytes", lambda device: 1)
    monkeypatch.setattr("hpccl.curvature.posterior.logit_jacobians", watched)
    torch.testing.assert_close(posterior.logit_variance(model, pixels), expected, rtol=1e-4, atol=1e-5)
    assert len(sizes) == 3 * len(posterior.spectra)
    assert {images for _, images in sizes} == {1}


def test_the_logits_are_linearised_at_the_mean() -> None:
    model, pixels = build("norms", 3)
    precision = measured("kronecker", model, pixels)
    posterior = Posterior.of(precision, mean_of(model), prior_precision=0.1)
    expected = posterior.logit_variance(model, pixels)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.abs() + 1)
    torch.testing.assert_close(posterior.logit_variance(model, pixels), expected)


def test_samples_spread_the_logits_as_the_variance_says() -> None:
    """With little variance the network is linear."""
    model, pixels = build("mlp", 2)
    precision = measured("kronecker", model, pixels)
    posterior = Posterior.of(precision, mean_of(model), prior_precision=1e6)
    variance = posterior.logit_variance(model, pixels)
    with torch.no_grad():
        draws = [torch.func.functional_call(model, posterior.sample(0, number), (pixels,)) for number in range(800)]
    spread = torch.stack(draws).var(0)
    torch.testing.assert_close(spread, variance.diagonal(dim1=1, dim2=2), rtol=0.25, atol=0)


def test_one_layer_and_one_example_need_no_approximation() -> None:
    """F = Lambda (x) a a': the Kronecker posterior is the dense one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 7))
    data = examples(torch.randn(1, 1, 2, 2))
    kron = KroneckerEstimator(KroneckerPass(fisher="ggn"), ListedTasks()).estimate(model, [data], SOLO)
    exact = DenseEstimator().estimate(model, [data], SOLO)
    one, other = (Posterior.of(each, mean_of(model), prior_precision=0.2) for each in (kron, exact))
    assert one.log_determinant() == pytest.approx(other.log_determinant(), rel=1e-5)
    assert one.best_prior_precision() == pytest.approx(other.best_prior_precision(), rel=1e-4)
    images = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(
        one.logit_variance(model, images), other.logit_variance(model, images), rtol=1e-4, atol=1e-4
    )
    for name, value in one.sample(3, 4).items():
        torch.testing.assert_close(value, other.sample(3, 4)[name], rtol=1e-4, atol=1e-5)


def test_no_images_and_diverged_images() -> None:
    model, pixels = build("mlp", 3)
    precision = measured("kronecker", model, pixels)
    posterior = Posterior.of(precision, mean_of(model), prior_precision=0.1)
    assert posterior.logit_variance(model, pixels[:0]).shape == (0, 7, 7)
    pixels[1] = torch.nan
    with pytest.raises(DivergedError, match="image 1 of 3"):
        posterior.logit_variance(model, pixels)


# ---------------------------------------------------------------- errors and ranks


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_prior_precision_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError, match="prior_precision="):
        Posterior.of(kronecker(), named(0), prior_precision=value)
    with pytest.raises(ConfigError, match="prior_precision="):
        Posterior.of(kronecker(), named(0), prior_precision=1.0).with_prior_precision(value)
    if value != 0:
        with pytest.raises(ConfigError, match="scale="):
            Posterior.of(kronecker(), named(0), prior_precision=1.0, scale=value)


def test_names_and_shapes_must_fit() -> None:
    fewer = {name: value for name, value in named(0).items() if name != "conv.bias"}
    with pytest.raises(CoverageError, match=r"the mean lacks 1 weights .*conv\.bias"):
        Posterior.of(kronecker(), fewer, prior_precision=1.0)
    with pytest.raises(CoverageError, match=r"'norm' has shape \(1,\) in the mean, but \(7,\)"):
        Posterior.of(kronecker(), {**named(0), "norm": torch.zeros(1)}, prior_precision=1.0)
    posterior = Posterior.of(kronecker(), named(0), prior_precision=1.0)
    with pytest.raises(CoverageError, match="the vector lacks"):
        posterior.solve(fewer)
    with pytest.raises(CoverageError, match="parameter 'other' has no curvature"):
        posterior.root({**named(0), "other": torch.zeros(2)})
    with pytest.raises(CoverageError, match="the prior mean lacks"):
        posterior.log_evidence(0.0, fewer)
    with pytest.raises(CoverageError, match="trainable parameter 'bias' has no curvature"):
        posterior.logit_variance(nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_share_of_the_layers_is_refused() -> None:
    share = replace(kronecker(), blocks=kronecker().blocks[:1])
    with pytest.raises(CoverageError, match=r"no curvature of layer 'grouped'.*pass the comm"):
        Posterior.of(share, named(0), prior_precision=1.0)
    with pytest.raises(CoverageError, match="no curvature of layer 'grouped'"):
        gathered(share, SOLO)


def test_other_factors_of_low_rank() -> None:
    """Vectors that are not orthonormal are no eigenvectors."""
    generator = torch.Generator().manual_seed(7)
    layout = LAYOUTS[2]
    vectors = torch.randn(1, 5, 2, generator=generator, dtype=torch.float64)
    term = Pair(LowRank(vectors, torch.ones(1, 2, dtype=torch.float64)), Dense(psd(1, 3, generator)))
    precision = Kronecker((Block(layout, (term,), (1.0,)),), Diagonal({}), 1.0, ListedTasks(), (layout,))
    mean = {name: named(0)[name] for name in layout.names}
    posterior = Posterior.of(precision, mean, prior_precision=DELTA)
    expected = torch.linalg.solve(truth(precision, mean, DELTA, 1.0), flat(mean))
    torch.testing.assert_close(flat(posterior.solve(mean)), expected)
