"""Dual Gaussian processes against exact ones, against optimisation of the bound, and golden numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.checkpoint.tree import read_tree, write_tree
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, ConfigError, DataError, DivergedError
from hpccl.gp import evidence as inner
from hpccl.gp.evidence import bound
from hpccl.gp.inducing import drawn_by_leverage, pivots
from hpccl.gp.kernel import Kernel, Kind
from hpccl.gp.likelihood import Bernoulli, Gaussian, Likelihood, Softmax
from hpccl.gp.posterior import DualPosterior, Duals, own_contribution
from hpccl.gp.state import Settings, State, begin
from hpccl.gp.stream import learn, leverage, typical_distance

SOLO = Comm.solo()
KINDS: tuple[Kind, ...] = ("rbf", "matern52", "linear")
X = torch.tensor([[0.0], [1.0], [2.0], [-1.0], [-2.0]], dtype=torch.float64)
Y = torch.tensor([[0.5], [1.0], [2.5], [-0.5], [-1.0]], dtype=torch.float64)


def stream(state: State, x: Tensor, y: Tensor, parts: Sequence[Sequence[int]], settings: Settings) -> State:
    for rows in parts:
        number = torch.tensor(rows, dtype=torch.int64)
        state = learn(state, x[number], y[number], number, settings=settings, comm=SOLO)
    return state


def posterior_of(state: State) -> DualPosterior:
    assert state.posterior is not None
    return state.posterior


def exact(kernel: Kernel, x: Tensor, y: Tensor, noise: float, at: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, variance and log marginal likelihood of GP regression (Rasmussen and Williams 2006, algorithm 2.1)."""
    matrix = kernel(x, x) + noise * torch.eye(len(x), dtype=torch.float64)
    cross = kernel(x, at)
    mean = cross.T @ torch.linalg.solve(matrix, y)
    variance = kernel(at, at).diagonal() - (cross * torch.linalg.solve(matrix, cross)).sum(0)
    quadratic = (y * torch.linalg.solve(matrix, y)).sum()
    constant = y.shape[1] * (torch.logdet(matrix) + len(x) * math.log(2 * math.pi))
    return mean, variance, float(-0.5 * (quadratic + constant))


# ---------------------------------------------------------------- regression


def test_golden_numbers_of_two_batches() -> None:
    kernel, likelihood = Kernel.of("rbf"), Gaussian.of(0.25)
    state = stream(begin(kernel, likelihood), X, Y, [[0, 1, 2], [3, 4]], Settings(inducing=5))
    mean, variance = state.predict(torch.tensor([[0.5]]))
    assert float(mean) == pytest.approx(0.67921794, abs=1e-7)
    assert float(variance) == pytest.approx(0.1592877, abs=1e-7)
    scores = leverage(posterior_of(state), X, torch.full((5, 1), 4.0, dtype=torch.float64))
    expected = torch.tensor([0.63314, 0.64229, 0.73057, 0.64229, 0.73057], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert float(scores.sum()) == pytest.approx(3.37887, abs=1e-5)
    hat = kernel(X, X) @ torch.linalg.inv(kernel(X, X) + 0.25 * torch.eye(5, dtype=torch.float64))
    assert float(scores.sum()) == pytest.approx(float(hat.trace()), abs=1e-6)


def test_inducing_inputs_in_another_order_change_nothing() -> None:
    state = stream(begin(Kernel.of("rbf"), Gaussian.of(0.25)), X, Y, [[0, 1, 2, 3, 4]], Settings(inducing=5))
    own = posterior_of(state)
    turned, projection = own.moved(own.inducing[[3, 1, 4, 0, 2]])
    at = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    for one, other in zip(own.predict(at), turned.predict(at), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)
    torch.testing.assert_close(projection.sum(0), torch.ones(5).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [0, 3])
def test_regression_by_parts_is_exact_regression(kind: Kind, memory: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(17, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(17, 2, generator=generator, dtype=torch.float64)
    kernel = Kernel.of(kind, lengthscale=1.7, variance=0.8)
    parts = [list(range(6)), list(range(6, 7)), list(range(7, 17))]
    settings = Settings(inducing=17, memory=memory)
    state = stream(begin(kernel, Gaussian.of(0.3, 2)), x, y, parts, settings)
    at = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    mean, variance, evidence = exact(kernel, x, y, 0.3, at)
    found = state.predict(at)
    # Of the linear kernel, three inducing inputs are all that there are.
    assert len(posterior_of(state).inducing) == (3 if kind == "linear" else 17)
    torch.testing.assert_close(found[0], mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], variance[:, None].expand(-1, 2), atol=1e-5, rtol=1e-5)
    assert state.num_seen == 17
    assert (0 if state.memory is None else len(state.memory)) == (3 + 1 + 3 if memory else 0)
    value = bound(posterior_of(state), state.likelihood, x, y, SOLO)
    assert float(value) == pytest.approx(evidence, abs=1e-4)


def test_fewer_inducing_inputs_bound_the_evidence_from_below() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(30, 1, generator=generator, dtype=torch.float64)
    kernel = Kernel.of("rbf")
    _, _, evidence = exact(kernel, x, y, 0.05, x)
    values = []
    for count in (3, 8, 30):
        state = stream(begin(kernel, Gaussian.of(0.05)), x, y, [list(range(30))], Settings(inducing=count))
        values.append(float(bound(posterior_of(state), state.likelihood, x, y, SOLO)))
    assert values[0] < values[1] < values[2] <= evidence + 1e-3
    assert values[2] == pytest.approx(evidence, abs=1e-2)


def test_without_memory_hyperparameters_are_those_of_the_first_task() -> None:
    """The bound of later ones lacks the past's likelihood, and would pull away from it."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 6
    y = torch.sin(2 * x) + 0.2 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    parts = [list(range(20)), list(range(20, 40))]
    start = begin(Kernel.of("rbf", lengthscale=1.5), Gaussian.of(0.5))
    settings = Settings(inducing=20, tune=20)
    first, both = stream(start, x, y, parts[:1], settings), stream(start, x, y, parts, settings)
    kept = stream(start, x, y, parts, Settings(inducing=20, tune=20, memory=5))
    assert float(first.kernel.lengthscale) != 1.5
    assert float(both.kernel.lengthscale) == float(first.kernel.lengthscale)
    assert float(kept.kernel.lengthscale) != float(first.kernel.lengthscale)


def test_hyperparameters_go_to_the_largest_evidence() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(25, 1, generator=generator, dtype=torch.float64) * 6
    y = torch.sin(2 * x) + 0.2 * torch.randn(25, 1, generator=generator, dtype=torch.float64)
    settings = Settings(inducing=25, tune=150, tune_rate=0.1)
    state = begin(Kernel.of("rbf", lengthscale=1.5), Gaussian.of(0.5))
    before = exact(state.kernel, x, y, 0.5, x)[2]
    state = stream(state, x, y, [list(range(25))], settings)
    assert isinstance(state.likelihood, Gaussian)
    found = exact(state.kernel, x, y, float(state.likelihood.noise), x)[2]
    logs = torch.tensor([0.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        optimiser.zero_grad()
        kernel = Kernel("rbf", logs[0].exp(), logs[1].exp())
        matrix = kernel(x, x) + logs[2].exp() * torch.eye(25, dtype=torch.float64)
        value: Tensor = 0.5 * ((y * torch.linalg.solve(matrix, y)).sum() + torch.logdet(matrix))
        value.backward()
        return value

    optimiser = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")
    optimiser.step(closure)
    with torch.no_grad():
        best = exact(Kernel("rbf", logs[0].exp(), logs[1].exp()), x, y, float(logs[2].exp()), x)[2]
    assert before < best - 5
    assert found == pytest.approx(best, abs=0.05)  # inducing inputs are those of the first length scale


# ---------------------------------------------------------------- classification


@pytest.mark.parametrize("likelihood", [Bernoulli(), Softmax(3)])
def test_sites_are_derivatives_of_the_expectation(likelihood: Likelihood) -> None:
    """Bonnet's and Price's theorems, against autograd; a rule of quadrature does not know them."""
    generator = torch.Generator().manual_seed(0)
    shape = (6, likelihood.num_latent)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    variance = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2).requires_grad_()
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    by_mean, by_variance = torch.autograd.grad(likelihood.expected_log(y, mean, variance).sum(), (mean, variance))
    alpha, beta = likelihood.sites(y, mean.detach(), variance.detach())
    tolerance = 1e-6 if isinstance(likelihood, Bernoulli) else 0.02
    torch.testing.assert_close(beta, -2 * by_variance, atol=tolerance, rtol=0)
    torch.testing.assert_close(alpha, by_mean - 2 * by_variance * mean.detach(), atol=tolerance, rtol=0)


def test_expectations_of_the_softmax_are_those_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(4, 5, generator=generator).double(), 2 * torch.rand(4, 5, generator=generator).double()
    draws = mean + variance.sqrt() * torch.randn(100_000, 4, 5, generator=generator, dtype=torch.float64)
    likelihood, y = Softmax(5), torch.tensor([0, 2, 4, 1])
    p = draws.softmax(2)
    torch.testing.assert_close(likelihood.predict(mean, variance), p.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(likelihood.sites(y, mean, variance)[1], (p * (1 - p)).mean(0), atol=0.005, rtol=0)
    expected = draws.log_softmax(2).gather(2, y.expand(100_000, 4)[..., None]).mean(0)[:, 0]
    torch.testing.assert_close(likelihood.expected_log(y, mean, variance), expected, atol=0.02, rtol=0)


def test_the_graph_of_the_evidence_does_not_hold_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 256 n C numbers several times over: a terabyte for a hundred thousand images of 1,000 classes."""
    y = torch.arange(60) % 7
    mean, variance = torch.randn(60, 7, dtype=torch.float64), torch.rand(60, 7, dtype=torch.float64) + 0.1
    inputs = [mean.requires_grad_(), variance.requires_grad_()]
    whole = torch.autograd.grad(Softmax(7).expected_log(y, *inputs).sum(), inputs)
    monkeypatch.setattr("hpccl.gp.likelihood._TOGETHER", mean.numel())  # one point at a time
    held: set[tuple[int, int]] = set()

    def keep(value: Tensor) -> Tensor:
        held.add((value.data_ptr(), value.numel()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        evidence = Softmax(7).expected_log(y, *inputs).sum()
    assert sum(number for _, number in held) < 10 * mean.numel()
    for found, expected in zip(torch.autograd.grad(evidence, inputs), whole, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("what", ["bound", "duals"])
def test_the_graph_of_the_rows_does_not_hold_their_kernel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take several times n C m numbers: terabytes for ImageNet's images, classes and 100 inducing inputs."""
    classes, size = 5, 20
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator, dtype=torch.float64)
    y, inducing = torch.arange(600) % classes, x[:size]
    sites = torch.rand(2, 600, classes, generator=generator, dtype=torch.float64).unbind()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    kernel = Kernel("rbf", scale, torch.tensor(1.0, dtype=torch.float64))

    def value(count: int) -> Tensor:
        if what == "duals":
            return own_contribution(kernel, inducing, x[:count], (sites[0][:count], sites[1][:count])).second.sum()
        posterior = DualPosterior(kernel, inducing, Duals.zeros(classes, size), jitter=1e-3)
        return bound(posterior, Softmax(classes), x[:count], y[:count], SOLO)

    (whole,) = torch.autograd.grad(value(600), scale)
    monkeypatch.setattr("hpccl.gp.posterior._TOGETHER", classes * size * 64)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def holds(count: int) -> int:
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = value(count)
        (slope,) = torch.autograd.grad(found, scale)
        if count == 600:
            torch.testing.assert_close(slope, whole)
        return sum(held.values())

    assert holds(600) - holds(200) < 400 * 8 * classes * size / 3


def optimum(kernel: Kernel, likelihood: Likelihood, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance at x of the q(f) = N(m, L L') with the largest bound, by plain optimisation."""
    prior = kernel(x, x) + 1e-9 * torch.eye(len(x), dtype=torch.float64)
    m = torch.zeros(len(x), 1, dtype=torch.float64, requires_grad=True)
    root = (0.5 * torch.linalg.cholesky(prior)).contiguous().requires_grad_()

    def closure() -> Tensor:
        optimiser.zero_grad()
        lower = root.tril()
        covariance = lower @ lower.T
        fit = likelihood.expected_log(y, m, covariance.diagonal()[:, None]).sum()
        trace = torch.linalg.solve(prior, covariance).diagonal().sum()
        log_ratio = torch.logdet(prior) - 2 * lower.diagonal().abs().log().sum()
        kl = 0.5 * (trace + (m * torch.linalg.solve(prior, m)).sum() - len(x) + log_ratio)
        m.grad, gradient = torch.autograd.grad(kl - fit, (m, root))
        root.grad = gradient.contiguous()
        value: Tensor = (kl - fit).detach()
        return value

    optimiser = torch.optim.LBFGS(
        [m, root], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    optimiser.step(closure)
    lower = root.detach().tril()
    return m.detach(), (lower @ lower.T).diagonal()[:, None]


def test_classification_finds_the_largest_bound_at_once_and_by_parts() -> None:
    """With all of the past in memory, sites go to the same fixed point by parts as all at once."""
    x, y = X * 1.3, torch.tensor([0, 1, 1, 1, 0])
    kernel, likelihood = Kernel.of("rbf", variance=2.0), Bernoulli()
    settings = Settings(inducing=5, steps=60, rate=0.7, memory=5)
    mean, variance = optimum(kernel, likelihood, x, y)
    for parts in ([[0, 1, 2, 3, 4]], [[3, 1], [0], [4, 2]]):
        found = stream(begin(kernel, likelihood), x, y, parts, settings).predict(x)
        torch.testing.assert_close(found[0], mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[1], variance, atol=1e-4, rtol=0)
    without = stream(begin(kernel, likelihood), x, y, [[3, 1], [0], [4, 2]], replace(settings, memory=0)).predict(x)
    error = float((without[0] - mean).abs().max())
    assert 1e-3 < error < 0.5  # forgotten sites are those of when they were seen


def test_softmax_by_parts_with_memory_is_nearer_to_all_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0]], dtype=torch.float64)
    y = torch.arange(4).repeat_interleave(10)
    x = centres[y] + torch.randn(40, 2, generator=generator, dtype=torch.float64)
    parts = [list(range(20)), list(range(20, 40))]
    kernel = Kernel.of("matern52", lengthscale=2.0, variance=4.0)
    errors = {}
    settings = Settings(inducing=20, steps=20)
    target = stream(begin(kernel, Softmax(4)), x, y, [list(range(40))], settings)
    at = centres.mean(0) + 4 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    expected = target.likelihood.predict(*target.predict(at))
    for memory in (0, 8, 20):
        state = stream(begin(kernel, Softmax(4)), x, y, parts, replace(settings, memory=memory))
        p = state.likelihood.predict(*state.predict(at))
        errors[memory] = float((p - expected).abs().mean())
    assert errors[20] < 1e-3 < errors[0], errors
    assert errors[20] < errors[8] < errors[0], errors
    right = target.likelihood.predict(*target.predict(x)).argmax(1) == y
    assert float(right.double().mean()) > 0.85


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("kind", KINDS)
def test_pivots_are_those_of_a_greedy_search(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    kernel = Kernel.of(kind, lengthscale=2.0)
    chosen: list[int] = []
    matrix = kernel(x, x)
    for _ in range(5):
        left = matrix.diagonal().clone()
        if chosen:
            block = matrix[:, chosen]
            left = left - (block * torch.linalg.solve(matrix[chosen][:, chosen], block.T).T).sum(1)
        chosen.append(int((left.round(decimals=10)).argmax()))
    found = pivots(kernel, x, torch.arange(20), 5, SOLO)
    torch.testing.assert_close(found, x[chosen])


def test_rows_that_are_there_already_are_no_pivots() -> None:
    x = torch.tensor([[1.0], [1.0], [2.0], [2.0]], dtype=torch.float64)
    assert pivots(Kernel.of("rbf"), x, torch.arange(4), 4, SOLO)[:, 0].tolist() == [1.0, 2.0]
    assert pivots(Kernel.of("linear"), 0 * x, torch.arange(4), 4, SOLO).shape == (0, 1)


def test_memory_is_drawn_in_proportion_to_leverage() -> None:
    scores, counts = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.zeros(4)
    for seed in range(4000):
        counts[drawn_by_leverage(scores, torch.arange(4), 1, SOLO, seed=seed)] += 1
    torch.testing.assert_close(counts / 4000, scores / 8, atol=0.025, rtol=0)
    assert drawn_by_leverage(scores, torch.arange(4), 9, SOLO, seed=0).tolist() == [0, 1, 3]
    order = torch.tensor([3, 0, 2, 1])
    for seed in range(5):
        one = drawn_by_leverage(scores, torch.arange(4), 2, SOLO, seed=seed)
        assert torch.equal(one, drawn_by_leverage(scores[order], order, 2, SOLO, seed=seed))


def test_a_typical_distance() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 7
    expected = torch.cdist(x, x).square().mean().sqrt()
    assert typical_distance(x, SOLO) == pytest.approx(float(expected))
    assert typical_distance(torch.ones(3, 2), SOLO) == 1.0


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_told() -> None:
    kernel, settings = Kernel.of("rbf"), Settings(inducing=3)
    wrong: list[tuple[Any, str]] = [
        (lambda: Kernel.of("rbf", lengthscale=0.0), "kernel: lengthscale=0.0"),
        (lambda: Gaussian.of(-1.0), "noise variance: noise=-1.0"),
        (lambda: Settings(rate=0.0), r"Gaussian process: rate=0.0; allowed: above 0 and at most 1"),
        (lambda: Settings(inducing=0), "Gaussian process: inducing=0; allowed: at least 1"),
        (lambda: stream(begin(kernel, Softmax(1000)), X, X[:, 0].abs().long(), [[0]], Settings(inducing=1000)), "GiB"),
    ]
    for call, message in wrong:
        with pytest.raises(ConfigError, match=message):
            call()
    bad = X.clone()
    bad[1] = torch.nan
    data: list[tuple[Any, str]] = [
        (lambda: stream(begin(kernel, Gaussian.of(1.0)), bad, Y, [[0, 1]], settings), "row 1 of 2 .* not finite"),
        (lambda: stream(begin(kernel, Softmax(2)), X, torch.tensor([0, 1, 2, 0, 0]), [[1, 2]], settings), "0 to 1"),
        (
            lambda: stream(begin(kernel, Gaussian.of(1.0, 2)), X, Y, [[0]], settings),
            r"finite numbers \[n, 2\]",
        ),
        (lambda: stream(begin(kernel, Gaussian.of(1.0)), X, Y, [[]], settings), "Gaussian process has no examples"),
    ]
    for call, message in data:
        with pytest.raises(DataError, match=message):
            call()
    twice = DualPosterior(kernel, X[[0, 0]], Duals.zeros(1, 2), jitter=1e-18)
    with pytest.raises(DivergedError, match="K of the Gaussian process is not positive definite"):
        twice.predict(X)


def test_the_slope_of_the_bound_is_that_of_differences() -> None:
    """Of classes, with examples in memory and others forgotten."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    settings = Settings(inducing=6, steps=5, memory=4)
    old = stream(begin(Kernel.of("matern52", lengthscale=1.3), Softmax(3)), x, y, [list(range(12))], settings)
    new = stream(old, x, y, [list(range(12, 24))], settings)
    posterior, memory = posterior_of(new), old.memory
    assert memory is not None
    own = slice(12, 24)
    sites = new.likelihood.sites(y[own], *posterior.predict(x[own]))
    past, task = inner.Past(Duals.zeros(3, 6), memory, 12), inner.Task(x[own], y[own], sites)

    def value(logs: list[Tensor]) -> Tensor:
        present, by = inner._at(logs, posterior, new.likelihood)
        duals = own_contribution(present.kernel, present.inducing, x[own], sites)
        duals = duals.plus(own_contribution(present.kernel, present.inducing, memory.x, (memory.alpha, memory.beta)))
        return bound(replace(present, duals=duals), by, x[own], y[own], SOLO, memory=memory, scale=3.0)

    logs = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (0.3, -0.2)]
    slope = inner._slope(logs, *inner._at(logs, posterior, new.likelihood), task, past, comm=SOLO)
    for place in range(2):
        ends = []
        for step in (1e-5, -1e-5):
            moved = [log.detach().clone() for log in logs]
            moved[place] += step
            ends.append(float(value(moved)))
        assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_a_state_is_saved_and_read(tmp_path: Path) -> None:
    settings = Settings(inducing=4, memory=2)
    states = [
        begin(Kernel.of("rbf"), Bernoulli()),
        stream(begin(Kernel.of("rbf"), Gaussian.of(0.2)), X, Y, [[0, 1, 2]], settings),
        stream(begin(Kernel.of("linear"), Softmax(3)), X, X[:, 0].abs().long(), [[0, 1], [2]], settings),
    ]
    for number, state in enumerate(states):
        write_tree(tmp_path, state.state_dict(), header={}, stem=str(number))
        again = State.from_state_dict(read_tree(tmp_path, stem=str(number))[1])
        for one, other in zip(state.predict(X), again.predict(X), strict=True):
            assert torch.equal(one, other)
        assert type(again.likelihood) is type(state.likelihood)
        more = stream(again, X, Y if number == 1 else torch.tensor([0, 1, 1, 0, 1]), [[3, 4]], settings)
        assert more.num_seen == state.num_seen + 2
    with pytest.raises(CheckpointError, match="state of a Gaussian process is damaged"):
        State.from_state_dict({"kernel": {}})


def test_steps_that_are_too_long_are_taken_back() -> None:
    """With a wide prior, whole steps of the sites overshoot; the objective must not fall."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    y = (x[:, 0] > 0).long()
    kernel, likelihood = Kernel.of("linear", variance=400.0), Softmax(2)
    state, values = begin(kernel, likelihood), [-math.inf]
    for steps in (1, 2, 4, 8, 16):
        settings = Settings(inducing=2, steps=steps, rate=1.0)
        state = stream(begin(kernel, likelihood), x, y, [list(range(12))], settings)
        values.append(float(bound(posterior_of(state), likelihood, x, y, SOLO)))
        assert values[-1] > values[-2] - 1e-6
    assert values[1] < values[-1] - 1 < 0
    assert likelihood.predict(*state.predict(x)).argmax(1).tolist() == y.tolist()


def test_new_classes_have_had_no_say() -> None:
    x, y = X, torch.tensor([0, 1, 1, 0, 0])
    state = stream(begin(Kernel.of("rbf"), Softmax(2)), x, y, [[0, 1, 2]], Settings(inducing=3, memory=2))
    wide = state.widened(4)
    for old, new in zip(state.predict(x), wide.predict(x), strict=True):
        torch.testing.assert_close(new[:, :2], old)
    mean, variance = wide.predict(x)
    assert bool((mean[:, 2:] == 0).all())
    torch.testing.assert_close(variance[:, 2:], torch.ones(5, 2, dtype=torch.float64))
    more = stream(wide, x, torch.tensor([0, 0, 0, 3, 2]), [[3, 4]], Settings(inducing=5, memory=1))
    assert more.memory is not None
    assert more.memory.alpha.shape == (3, 4)
    with pytest.raises(ConfigError, match="Gaussian process with 1 classes; allowed: at least as many as before"):
        state.widened(1)


def test_tasks_far_from_each_other_are_learned_by_a_smooth_kernel() -> None:
    """Old inducing inputs hardly tell the function at new ones: the projection is large, and must not break Lambda2."""
    x = torch.linspace(-2, 2, 40)[:, None]
    y = torch.sin(3 * x)
    parts = [list(range(start, start + 10)) for start in range(0, 40, 10)]
    kernel = Kernel.of("rbf", lengthscale=0.5)
    state = stream(begin(kernel, Gaussian.of(0.01)), x, y, parts, Settings(inducing=30, memory=5))
    mean, variance, _ = exact(kernel, x.double(), y.double(), 0.01, x.double())
    found = state.predict(x)
    torch.testing.assert_close(found[0], mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1][:, 0], variance, atol=1e-3, rtol=0)
