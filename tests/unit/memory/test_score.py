"""Scores against brute force in float64: definitions, the dense last-layer Laplace posterior, autograd."""

import math

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import KroneckerCurvature
from hpccl.curvature.build import build_estimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.memory.score import (
    Projection,
    Residuals,
    TopLayer,
    error,
    gini,
    leverage,
    output_curvature,
    residual,
    sensitivity,
    signs,
    step_size,
)

NUMBER, CLASSES, INPUTS = 30, 4, 5


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs x with the 1, a last layer, logits, labels; float64."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(NUMBER, INPUTS, generator=random, dtype=torch.float64)
    x[:, -1] = 1
    weights = torch.randn(CLASSES, INPUTS, generator=random, dtype=torch.float64)
    labels = torch.randint(CLASSES, (NUMBER,), generator=random)
    return x, weights, x @ weights.T, labels


def jacobian(x: Tensor) -> Tensor:
    """[K, K d] of the logits by the last layer's weights, row by row."""
    return torch.kron(torch.eye(CLASSES, dtype=x.dtype), x[None])


def hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def posterior_of(x: Tensor, logits: Tensor, delta: float) -> TopLayer:
    return TopLayer.of(x.T @ x / len(x), output_curvature(logits), prior_precision=delta)


def covariance_of(layer: TopLayer, x: Tensor) -> Tensor:
    """[n, K, K] of each example's logits."""
    return (layer.output_basis * layer.spread(x)[:, None, :]) @ layer.output_basis.T


def test_scores_of_the_output_are_their_definitions() -> None:
    _, _, logits, labels = problem()
    for row in range(NUMBER):
        p = logits[row].softmax(0)
        e = p.clone()
        e[labels[row]] -= 1
        assert float(gini(logits)[row]) == pytest.approx(float(hessian(logits[row]).trace()))
        assert float(gini(logits)[row]) == pytest.approx(1 - float(p.square().sum()))
        assert float(error(logits, labels)[row]) == pytest.approx(-math.log(float(p[labels[row]])))
        assert float(residual(logits, labels)[row]) == pytest.approx(float(e.square().sum()))


@pytest.mark.parametrize("delta", [0.01, 3.0])
def test_variance_is_that_of_the_dense_kronecker_block(delta: float) -> None:
    x, _, logits, labels = problem()
    layer = posterior_of(x, logits, delta)
    total = sum((hessian(row) for row in logits), torch.zeros(CLASSES, CLASSES, dtype=torch.float64))
    precision = torch.kron(total, x.T @ x / NUMBER) + delta * torch.eye(CLASSES * INPUTS, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    for row in range(NUMBER):
        v = jacobian(x[row]) @ covariance @ jacobian(x[row]).T
        lam = hessian(logits[row])
        e = logits[row].softmax(0)
        e[labels[row]] -= 1
        torch.testing.assert_close(covariance_of(layer, x[row : row + 1])[0], v)
        assert float(leverage(logits, x, layer)[row]) == pytest.approx(float((lam @ v).trace()))
        moved = (lam.diagonal() * v.diagonal() * e).abs().sum()  # Nickl et al. 2023, eq. 13, its diagonal
        assert float(sensitivity(logits, x, labels, layer)[row]) == pytest.approx(float(moved))


def test_leverage_is_that_of_the_exact_laplace_where_the_block_is_a_product() -> None:
    """All examples with one Lambda: the curvature is a Kronecker product; leverages sum to the effective weights."""
    x, _, logits, _ = problem()
    same = logits[:1].expand(NUMBER, CLASSES)
    delta = 0.3
    layer = posterior_of(x, same, delta)
    exact = sum(
        (jacobian(row).T @ hessian(same[0]) @ jacobian(row) for row in x),
        torch.zeros(CLASSES * INPUTS, CLASSES * INPUTS, dtype=torch.float64),
    )
    eye = torch.eye(CLASSES * INPUTS, dtype=torch.float64)
    covariance = torch.linalg.inv(exact + delta * eye)
    expected = [float((hessian(same[0]) @ jacobian(row) @ covariance @ jacobian(row).T).trace()) for row in x]
    found = leverage(same, x, layer)
    assert found.tolist() == pytest.approx(expected)
    assert float(found.sum()) == pytest.approx(float((covariance @ exact).trace()))


def test_leverage_is_close_to_the_exact_laplace_of_any_last_layer() -> None:
    """The product is an approximation: examples are ordered alike, which is what a selector uses."""
    x, _, logits, _ = problem()
    delta = 1.0
    exact = sum(
        (jacobian(row).T @ hessian(out) @ jacobian(row) for row, out in zip(x, logits, strict=True)),
        delta * torch.eye(CLASSES * INPUTS, dtype=torch.float64),
    )
    covariance = torch.linalg.inv(exact)
    expected = torch.stack(
        [
            (hessian(out) @ jacobian(row) @ covariance @ jacobian(row).T).trace()
            for row, out in zip(x, logits, strict=True)
        ]
    )
    found = leverage(logits, x, posterior_of(x, logits, delta))
    ranks = torch.stack([found.argsort().argsort(), expected.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_variance_is_that_of_the_network_posterior_of_its_head() -> None:
    """hpccl.curvature.posterior of a network that is one linear layer, whose Kronecker factors it measures itself."""
    x, weights, logits, labels = problem()
    model = nn.Linear(INPUTS - 1, CLASSES)
    with torch.no_grad():
        model.weight.copy_(weights[:, :-1])
        model.bias.copy_(weights[:, -1])
    examples = Examples(
        pixels=x[:, :-1].float(),
        labels=labels,
        head=torch.ones(CLASSES, dtype=torch.bool),
        sample=torch.arange(NUMBER),
        weight=torch.ones(NUMBER),
    )
    estimator = build_estimator(KroneckerCurvature(fisher="ggn"), 0)
    precision = estimator.estimate(model, [examples], Comm.solo())
    mean = {name: value.detach() for name, value in model.named_parameters()}
    posterior = Posterior.of(precision, mean, prior_precision=0.7)
    expected = posterior.logit_variance(model, x[:, :-1].float())
    found = covariance_of(posterior_of(x, logits, 0.7), x)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("true_share", [1.0, 0.25, 0.0])
def test_residuals_are_gradients_of_the_moved_layer(true_share: float) -> None:
    """By autograd, the nats at every probe; by the dense matrix, a quadratic with the exact curvature."""
    x, weights, logits, labels = problem()
    made = Residuals.around(
        num_classes=CLASSES,
        inputs=INPUTS,
        probes=2,
        size=0.2,
        words=(1,),
        true_share=true_share,
    )
    found = made(logits, x, labels).view(NUMBER, 3, CLASSES)
    curved = made.first_order(logits, x).view(NUMBER, 3, CLASSES)
    for row in range(NUMBER):
        target = true_share * torch.eye(CLASSES)[labels[row]] + (1 - true_share) * logits[row].double().softmax(0)
        for number, step in enumerate([torch.zeros(CLASSES, INPUTS), *made.steps]):
            layer = (weights + step.double()).requires_grad_()
            nats = torch.nn.functional.cross_entropy((layer @ x[row])[None], target[None])
            (gradient,) = torch.autograd.grad(nats, layer)
            fisher = jacobian(x[row]).T @ hessian(logits[row]) @ jacobian(x[row])
            expected = (fisher @ step.double().flatten()).view(CLASSES, INPUTS)
            for ours, theirs in ((found, gradient), (curved, expected)):
                outer = torch.outer(ours[row, number].double(), x[row])
                torch.testing.assert_close(outer, theirs, rtol=1e-4, atol=1e-6)


def test_few_numbers_are_not_projected_and_many_keep_their_inner_products() -> None:
    x, _, logits, labels = problem()
    residuals = Residuals(torch.zeros(0), true_share=1.0)(logits, x, labels)
    exact = Projection.of(outputs=CLASSES, inputs=INPUTS, size=20, words=(2,))(residuals, x)
    assert exact.shape == (NUMBER, 20)
    products = exact @ exact.T
    means = []
    for seed in range(60):
        some = Projection.of(outputs=CLASSES, inputs=INPUTS, size=19, words=(seed,))(residuals, x)
        assert some.shape == (NUMBER, 19)
        means.append(some @ some.T)
    error_of_mean = (torch.stack(means).mean(0) - products).norm() / products.norm()
    assert float(error_of_mean) < 0.15


def test_signs_are_fair_and_depend_on_words_alone() -> None:
    found = signs(100_001, 3, 4)
    assert set(found.tolist()) == {-1.0, 1.0}
    assert abs(float(found.mean())) < 0.02
    assert torch.equal(found[:500], signs(500, 3, 4))
    assert not torch.equal(found[:500], signs(500, 3, 5))


def test_a_step_changes_logits_by_about_its_radius() -> None:
    x, _, _, _ = problem()
    size = step_size(float(x.square().sum(1).mean()), 2.0)
    steps = signs(200 * INPUTS, 0).view(200, INPUTS).double() * size
    assert 1.2 < float((x @ steps.T).std()) < 3.3
