"""Leaving examples out: the golden cases, refits, and brute force."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.curvature.dense import DenseEstimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from hpccl.memory.perturbation import Variance, _newton, best_prior_precision, perturbed, top_layer_variance
from hpccl.memory.score import TopLayer, leverage, sensitivity

X = torch.tensor([[1.0, 0], [1, 1], [1, 2], [1, -1], [1, -2]], dtype=torch.float64)
Y_REAL = torch.tensor([0.5, 1, 2.5, -0.5, -1], dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 1, 0])
ONE = torch.ones(1, 1, dtype=torch.float64)


def deviation(variance: Tensor, curvature: Tensor, error: Tensor) -> Tensor:
    """v (I - Lambda v)^-1 e; of a group of examples, v is their joint covariance, and Lambda is block diagonal."""
    values, basis = torch.linalg.eigh(variance)
    return _newton(basis * values.clamp_min(0).sqrt()[..., None, :], curvature, error)


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = [value.argsort().argsort().double() for value in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_ridge_leave_one_out_is_exact() -> None:
    """M1: the residual without an example is e / (1 - v). Squares are a last layer of one output, of curvature 1."""
    layer = TopLayer.of(X.T @ X / 5, 5 * ONE, prior_precision=1.0)
    weights = layer.solve((X.T @ Y_REAL)[None])[0]
    assert weights.tolist() == pytest.approx([0.41666667, 0.77272727], abs=1e-8)
    error = X @ weights - Y_REAL
    given = [-0.08333333, 0.18939394, -0.53787879, 0.14393939, -0.12878788]
    assert error.tolist() == pytest.approx(given, abs=1e-8)
    variance = top_layer_variance(X, layer)
    v = variance.marginal()[:, 0]
    assert v.tolist() == pytest.approx([0.16666667, 0.25757576, 0.53030303, 0.25757576, 0.53030303], abs=1e-8)
    moved = deviation(v[:, None, None], ONE, error[:, None])[:, 0]
    torch.testing.assert_close(moved, v / (1 - v) * error)
    expected = [-0.1, 0.25510204, -1.14516129, 0.19387755, -0.27419355]
    assert (error + moved).tolist() == pytest.approx(expected, abs=1e-8)
    first = [-0.09722222, 0.23817723, -0.82311754, 0.18101469, -0.19708448]
    assert (error + variance.times(error[:, None])[:, 0]).tolist() == pytest.approx(first, abs=1e-8)


def test_ridge_without_a_group_is_exact() -> None:
    """M2: rows 1 and 3 together; their covariance counts."""
    inverse = torch.linalg.inv(X.T @ X + torch.eye(2, dtype=torch.float64))
    weights, gone = inverse @ X.T @ Y_REAL, [1, 3]
    rest = [0, 2, 4]
    refit = torch.linalg.solve(X[rest].T @ X[rest] + torch.eye(2, dtype=torch.float64), X[rest].T @ Y_REAL[rest])
    assert (refit - weights).tolist() == pytest.approx([0.08333333, 0.00505051], abs=1e-8)
    joint = X[gone] @ inverse @ X[gone].T
    moved = deviation(joint, torch.eye(2, dtype=torch.float64), X[gone] @ weights - Y_REAL[gone])
    torch.testing.assert_close(moved, X[gone] @ (refit - weights))


def test_logistic_golden_values() -> None:
    """M3: one logit beside a fixed 0."""
    weights = torch.tensor([0.24374838, 0.61742138], dtype=torch.float64)
    v = torch.tensor([0.49026367, 0.88587331, 1.98644375, 0.79961482, 1.81392678], dtype=torch.float64)
    logits = torch.stack([torch.zeros(5, dtype=torch.float64), X @ weights], dim=1)
    found = perturbed(logits, Y, Variance.of(torch.diag_embed(torch.stack([torch.zeros_like(v), v], dim=1))))
    assert found.leverage.tolist() == pytest.approx(
        [0.12076328, 0.18499654, 0.30030657, 0.19308473, 0.35810481], abs=1e-7
    )
    assert found.left_out_newton is not None
    p = torch.where(Y == 1, 1 - found.error, found.error)
    assert p.tolist() == pytest.approx([0.56063717, 0.70290499, 0.81435969, 0.4076538, 0.27069597], abs=1e-8)
    assert float(found.nats.mean()) == pytest.approx(0.51866360, abs=1e-7)
    assert float(found.left_out.mean()) == pytest.approx(0.67736679, abs=1e-7)
    assert float(found.left_out_newton.mean()) == pytest.approx(0.73339541, abs=1e-7)
    assert float(found.left_out_newton.mean()) == pytest.approx(0.73907098, abs=0.01)  # five refits


class Logistic(nn.Module):
    """Logits (0, x'theta), at the mode for a prior precision of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.24374838, 0.61742138], dtype=torch.float64))

    def forward(self, pixels: Tensor) -> Tensor:
        score = pixels @ self.theta
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_logistic_golden_values_from_a_measured_posterior() -> None:
    """M3: v, leverage and the error without an example, of the Laplace posterior of the model itself."""
    model = Logistic()
    everyone = Examples(X, Y, torch.ones(2, dtype=torch.bool), torch.arange(5), torch.ones(5))
    precision = DenseEstimator().estimate(model, [everyone], Comm.solo())
    posterior = Posterior.of(precision, {"theta": model.theta.detach()}, prior_precision=1.0)
    variance = posterior.logit_variance(model, X)
    given = [0.49026367, 0.88587331, 1.98644375, 0.79961482, 1.81392678]
    assert variance[:, 1, 1].tolist() == pytest.approx(given, abs=1e-6)
    found = perturbed(model(X).detach(), Y, Variance.of(variance))
    assert found.leverage.tolist() == pytest.approx(
        [0.12076328, 0.18499654, 0.30030657, 0.19308473, 0.35810481], abs=1e-6
    )
    assert float(found.left_out.mean()) == pytest.approx(0.67736679, abs=1e-6)


class Softmax:
    """Multinomial logistic regression with a normal prior, by Newton steps; rows of a class may be given weight 0."""

    def __init__(self, count: int = 60, classes: int = 4, inputs: int = 3, delta: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(3)
        centers = 1.2 * torch.randn(classes, inputs, generator=generator, dtype=torch.float64)
        self.labels = torch.arange(count) % classes
        noise = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        noise *= 0.5 + 0.5 * self.labels[:, None]  # classes differ in how well they can be told
        self.x = torch.cat([centers[self.labels] + noise, torch.ones(count, 1, dtype=torch.float64)], dim=1)
        self.classes, self.delta = classes, delta

    def probabilities(self, weights: Tensor) -> Tensor:
        return (self.x @ weights.T).softmax(dim=1)

    def precision(self, weights: Tensor, keep: Tensor) -> Tensor:
        p = self.probabilities(weights)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        whole = torch.einsum("n,nkl,ni,nj->kilj", keep, curvature, self.x, self.x).flatten(2).flatten(0, 1)
        return whole + self.delta * torch.eye(len(whole), dtype=torch.float64)

    def fit(self, keep: Tensor | None = None) -> Tensor:
        keep = torch.ones(len(self.x), dtype=torch.float64) if keep is None else keep
        weights = torch.zeros(self.classes, self.x.shape[1], dtype=torch.float64)
        step = weights
        for _ in range(30):
            error = self.probabilities(weights) - functional.one_hot(self.labels, self.classes)
            gradient = (keep[:, None] * error).T @ self.x + self.delta * weights
            step = torch.linalg.solve(self.precision(weights, keep), gradient.flatten())
            weights = weights - step.view_as(weights)
        assert float(step.abs().max()) < 1e-9
        return weights

    def variance(self, weights: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.precision(weights, torch.ones(len(self.x), dtype=torch.float64)))
        inverse = inverse.view(self.classes, self.x.shape[1], self.classes, self.x.shape[1])
        return torch.einsum("kilj,ni,nj->nkl", inverse, self.x, self.x)

    def nats(self, weights: Tensor) -> Tensor:
        return functional.cross_entropy(self.x @ weights.T, self.labels, reduction="none")


@pytest.fixture(scope="module")
def model() -> Softmax:
    return Softmax()


def test_left_out_estimates_true_leave_one_out(model: Softmax) -> None:
    weights = model.fit()
    found = perturbed(model.x @ weights.T, model.labels, Variance.of(model.variance(weights)))
    assert found.left_out_newton is not None
    true, moved = torch.zeros(2, len(model.x), dtype=torch.float64)
    p = model.probabilities(weights)
    for row in range(len(model.x)):
        keep = torch.ones(len(model.x), dtype=torch.float64)
        keep[row] = 0
        refit = model.fit(keep)
        true[row] = model.nats(refit)[row]
        moved[row] = (model.probabilities(refit) - p)[row].abs().sum()
    trained, exact = float(found.nats.mean()), float(true.mean())
    assert exact > trained + 0.05
    assert abs(float(found.left_out_newton.mean()) - exact) < 0.1 * (exact - trained)
    assert abs(float(found.left_out.mean()) - exact) < 0.45 * (exact - trained)
    assert spearman(found.left_out_newton, true) > 0.99
    # How far predictions move, eq. 13, against refits.
    assert spearman(found.sensitivity, moved) > 0.95


def test_the_estimate_is_exact_to_first_order(model: Softmax) -> None:
    """An example that counts a little less: the error falls with the square of how much."""
    weights = model.fit()
    logits = model.x @ weights.T
    error = logits.softmax(dim=1) - functional.one_hot(model.labels, model.classes)
    moved = Variance.of(model.variance(weights)).times(error)
    for row in (0, 7):
        off = []
        for share in (0.1, 0.05):
            keep = torch.ones(len(model.x), dtype=torch.float64)
            keep[row] = 1 - share
            true = (model.x @ model.fit(keep).T)[row] - logits[row]
            off.append(float((true - share * moved[row]).norm()))
        assert off[0] / off[1] == pytest.approx(4, rel=0.15)


def test_classes_in_the_order_of_real_removal() -> None:
    model = Softmax(count=140, classes=7)
    weights = model.fit()
    logits = model.x @ weights.T
    found = perturbed(logits, model.labels, Variance.of(model.variance(weights)))
    error = logits.softmax(dim=1) - functional.one_hot(model.labels, model.classes)
    true, one_by_one, together = [], [], []
    for number in range(7):
        own = model.labels == number
        true.append(float(model.nats(model.fit((~own).double()))[own].mean()))
        one_by_one.append(float(found.left_out[own].mean()))
        left = model.precision(weights, (~own).double())  # of the others, eq. 6
        step = torch.linalg.solve(left, (error[own].T @ model.x[own]).flatten()).view_as(weights)
        together.append(float(model.nats(weights + step)[own].mean()))
    assert spearman(torch.tensor(one_by_one), torch.tensor(true)) > 0.7
    assert spearman(torch.tensor(together), torch.tensor(true)) > 0.85


def test_the_last_layers_variance_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)
    labels = torch.arange(9) % 3
    p = logits.double().softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    layer = TopLayer.of(x.double().T @ x.double() / 9, curvature.sum(0), prior_precision=0.5)
    dense = torch.kron(curvature.sum(0), x.double().T @ x.double() / 9) + 0.5 * torch.eye(12, dtype=torch.float64)
    jacobian = torch.stack([torch.kron(torch.eye(3, dtype=torch.float64), row.double()[None]) for row in x])
    v = jacobian @ torch.linalg.inv(dense) @ jacobian.mT
    found = top_layer_variance(x, layer)
    error = p - functional.one_hot(labels, 3)
    torch.testing.assert_close(found.times(error), (v @ error[:, :, None])[:, :, 0])
    torch.testing.assert_close(found.marginal(), v.diagonal(dim1=1, dim2=2))
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    torch.testing.assert_close(found.apart(), (centre @ v @ centre).diagonal(dim1=1, dim2=2).sum(1) / 2)
    figures, by_dense = perturbed(logits, labels, found), perturbed(logits, labels, Variance.of(v))
    for name, value in figures.columns().items():
        torch.testing.assert_close(by_dense.columns()[name], value, msg=name)
    torch.testing.assert_close(figures.leverage, leverage(logits, x, layer))
    torch.testing.assert_close(figures.sensitivity_diagonal, sensitivity(logits, x, labels, layer))
    moved = (curvature @ v @ error[:, :, None])[:, :, 0]
    torch.testing.assert_close(figures.sensitivity, moved.abs().sum(1))
    newton = (v @ torch.linalg.solve(torch.eye(3) - curvature @ v, error[:, :, None]))[:, :, 0]
    left_out = functional.cross_entropy(logits.double() + newton, labels, reduction="none")
    torch.testing.assert_close(figures.left_out_newton, left_out)
    gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    solved = torch.linalg.solve(dense, gradient.flatten()).view(3, 4)
    torch.testing.assert_close(layer.solve(gradient), solved)


def test_many_classes_need_no_matrix_of_them() -> None:
    logits = torch.zeros(2, 200)
    layer = TopLayer.of(torch.eye(3), torch.eye(200), prior_precision=1.0)
    found = perturbed(logits, torch.tensor([0, 1]), top_layer_variance(torch.ones(2, 3), layer))
    assert found.left_out_newton is None
    assert "left_out_newton" not in found.columns()


def test_prior_precision_of_the_largest_evidence() -> None:
    values = torch.tensor([0.0, 0.5, 3.0, 40.0], dtype=torch.float64)
    delta = best_prior_precision(values, 2.5)
    assert delta * 2.5 == pytest.approx(float((values / (values + delta)).sum()))
    assert best_prior_precision(values, 0.0) == 1.0
    assert best_prior_precision(torch.zeros(3), 1.0) == 1.0


def test_a_leverage_above_one_does_no_harm() -> None:
    """An approximate posterior may not contain the example."""
    moved = deviation(torch.tensor([[[4.0]]]).double(), ONE, torch.tensor([[0.5]]).double())
    assert bool(np.isfinite(moved.numpy()).all())
