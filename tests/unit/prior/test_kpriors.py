"""K-priors: soft labels of all examples and the pull of the weights give the gradient of the past, exactly, in GLMs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hpccl.config.run import RunConfig
from hpccl.data.rows import SOFT, Rows
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Slab, Span
from hpccl.engine.ddp import DdpEngine
from hpccl.models.small import mlp
from hpccl.prior.fromp import Block
from hpccl.prior.normal import NormalPrior
from hpccl.train.loss import weighted_nats
from hpccl.train.removal import less

SOLO = Comm.solo()
# The data of the published checks: five inputs with a constant, binary and real labels, delta = 1.
X = torch.tensor([[1, 0], [1, 1], [1, 2], [1, -1], [1, -2]], dtype=torch.float64)
BINARY = torch.tensor([0, 1, 1, 1, 0])
REAL = torch.tensor([0.5, 1.0, 2.5, -0.5, -1.0], dtype=torch.float64)
MAP = torch.tensor([0.24374838, 0.61742138], dtype=torch.float64)
THETA = torch.tensor([0.3, -0.2], dtype=torch.float64)


def binary(theta: Tensor, inputs: Tensor = X) -> Tensor:
    """[n, 2] logits (0, x'theta): logistic regression as a softmax of two classes."""
    return torch.stack([torch.zeros(len(inputs), dtype=inputs.dtype), inputs @ theta], dim=1)


def hard(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes).double()


def rows(target: Tensor) -> Rows:
    """One row an image, of weight 1."""
    count = len(target)
    return Rows(
        pixels=torch.zeros(count, 1, 1, 1),
        noise=torch.zeros(count, dtype=torch.int64),
        image=torch.arange(count),
        target=target,
        weight=torch.ones(count, dtype=torch.float64),
        head=torch.ones_like(target, dtype=torch.bool),
        temperature=torch.ones(count),
        term=torch.full((count,), SOFT),
    )


def gradient(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    at = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def nats(logits: Callable[[Tensor], Tensor], said: Rows) -> Callable[[Tensor], Tensor]:
    return lambda theta: weighted_nats(logits(theta), said).sum()


def newton(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    theta = start.clone()
    for _ in range(50):
        hessian = torch.autograd.functional.hessian(loss, theta)
        theta = theta - torch.linalg.solve(hessian, gradient(loss, theta).reshape(-1)).reshape(theta.shape)
    return theta


def ridge(theta: Tensor, delta: float = 1.0) -> Tensor:
    return delta / 2 * theta.square().sum()


@pytest.fixture
def exact_map() -> Tensor:
    """The minimum to the last digit, of which MAP has eight."""
    found = newton(lambda theta: nats(binary, rows(hard(BINARY, 2)))(theta) + ridge(theta), torch.zeros(2).double())
    torch.testing.assert_close(found, MAP, atol=1e-8, rtol=0)
    return found


def test_logistic_regression_with_full_memory_is_exact_and_golden(exact_map: Tensor) -> None:
    full = gradient(nats(binary, rows(hard(BINARY, 2))), THETA) + THETA
    soft = gradient(nats(binary, rows(binary(exact_map).softmax(1))), THETA)
    prior = NormalPrior(1.0, 1.0, {"theta": exact_map})
    found = soft + prior.force(THETA, exact_map)
    torch.testing.assert_close(found, full, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, torch.tensor([0.16508962, -2.68381406], dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_part_of_memory_errs_by_the_examples_that_are_not_in_it(exact_map: Tensor) -> None:
    few = X[[1, 2]]
    soft = gradient(nats(lambda t: binary(t, few), rows(binary(exact_map, few).softmax(1))), THETA)
    found = soft + NormalPrior(1.0, 1.0).force(THETA, exact_map)
    torch.testing.assert_close(found, torch.tensor([-0.46101306, -1.67402493], dtype=torch.float64), atol=1e-8, rtol=0)
    full = torch.tensor([0.16508962, -2.68381406], dtype=torch.float64)
    torch.testing.assert_close(
        full - found, torch.tensor([0.62610268, -1.00978913], dtype=torch.float64), atol=2e-8, rtol=0
    )


def test_removing_an_example_gives_the_gradient_of_the_others(exact_map: Tensor) -> None:
    taken = torch.arange(5) == 1
    target = hard(BINARY, 2)
    said = less(rows(binary(exact_map).softmax(1)), taken, target, target > -1)
    found = gradient(nats(binary, said), THETA) + NormalPrior(1.0, 1.0).force(THETA, exact_map)
    others = ~taken
    alone = gradient(nats(lambda t: binary(t, X[others]), rows(target[others])), THETA) + THETA
    torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, torch.tensor([0.64011043, -2.20879325], dtype=torch.float64), atol=1e-8, rtol=0)


def test_another_prior_precision_is_golden(exact_map: Tensor) -> None:
    soft = gradient(nats(binary, rows(binary(exact_map).softmax(1))), THETA)
    found = soft + NormalPrior(2.0, 1.0).force(THETA, exact_map)
    full = gradient(nats(binary, rows(hard(BINARY, 2))), THETA) + 2 * THETA
    torch.testing.assert_close(found, full, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, torch.tensor([0.46508962, -2.88381406], dtype=torch.float64), atol=1e-8, rtol=0)


def test_the_minimum_with_new_data_is_that_of_all_data(exact_map: Tensor) -> None:
    inputs = torch.tensor([[1.0, 0.5], [1.0, -3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    new = nats(lambda t: binary(t, inputs), rows(hard(labels, 2)))
    soft = nats(binary, rows(binary(exact_map).softmax(1)))
    old = nats(binary, rows(hard(BINARY, 2)))
    adapted = newton(lambda t: new(t) + soft(t) + ridge(t - exact_map), exact_map)
    joint = newton(lambda t: new(t) + old(t) + ridge(t), torch.zeros(2).double())
    torch.testing.assert_close(adapted, joint, atol=1e-10, rtol=0)


def test_softmax_regression_with_full_memory_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (30,), generator=generator)

    def logits(theta: Tensor) -> Tensor:
        return inputs @ theta

    past = nats(logits, rows(hard(labels, 5)))
    old = newton(lambda t: past(t.view(4, 5)) + ridge(t, 0.7), torch.zeros(20).double()).view(4, 5)
    for _ in range(3):
        theta = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        soft = gradient(nats(logits, rows(logits(old).softmax(1))), theta)
        found = soft + NormalPrior(0.7, 0.7).force(theta, old)
        torch.testing.assert_close(found, gradient(past, theta) + 0.7 * theta, atol=1e-10, rtol=0)


@pytest.mark.parametrize("memory", ["all", "eigenvectors"])
def test_linear_regression_is_exact_also_with_as_many_memories_as_weights(memory: str) -> None:
    """The divergence of predictions of a Gaussian loss is that of the kernel 1: pull = f - f*."""
    hessian = X.T @ X + torch.eye(2).double()
    old = torch.linalg.solve(hessian, X.T @ REAL)
    values, vectors = torch.linalg.eigh(X.T @ X)
    kept = X if memory == "all" else (vectors * values.sqrt()).T
    block = Block(torch.arange(len(kept)), torch.tensor([0]), (kept @ old)[:, None], None)
    found = kept.T @ block.pull((kept @ THETA)[:, None])[:, 0] + NormalPrior(1.0, 1.0).force(THETA, old)
    torch.testing.assert_close(found, X.T @ (X @ THETA - REAL) + THETA, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, torch.tensor([-0.7, -10.7], dtype=torch.float64), atol=1e-10, rtol=0)


# ---------------------------------------------------------------- in a run


def test_force_is_the_gradient_of_the_value() -> None:
    generator = torch.Generator().manual_seed(1)
    anchor, weights = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    for prior in (NormalPrior(0.3), NormalPrior(0.3, 0.3, {"a": anchor}), NormalPrior(0.9, 0.3, {"a": anchor})):
        force = prior.force(weights, None if prior.anchor is None else anchor)
        step = 1e-5
        for position in range(6):
            moved = torch.zeros(6, dtype=torch.float64)
            moved[position] = step
            rise = prior.value({"a": weights + moved}, SOLO) - prior.value({"a": weights - moved}, SOLO)
            assert rise / (2 * step) == pytest.approx(float(force[position]), rel=1e-6)
    assert NormalPrior(0.3, 0.3, {"a": anchor}).value({"a": anchor}, SOLO) == pytest.approx(0, abs=1e-12)


def test_the_value_of_weights_in_parts_is_that_of_the_whole() -> None:
    whole, anchor = torch.arange(6.0).view(3, 2), torch.ones(3, 2)
    expected = NormalPrior(2.0, 1.0, {"a": anchor}).value({"a": whole}, SOLO)
    total = 0.0
    for start, stop in ((0, 2), (2, 6)):
        span = Span((3, 2), start, stop)
        parts = [Slab(value.reshape(-1)[start:stop], span) for value in (whole, anchor)]
        total += NormalPrior(2.0, 1.0, {"a": parts[1]}).value({"a": parts[0]}, SOLO)
    assert total == pytest.approx(expected)


def test_attached_it_enters_the_gradient_once_divided_by_the_examples() -> None:
    config = RunConfig.model_validate(
        {"optim": {"name": "momentum", "lr": 1.0, "schedule": "constant", "momentum": 0.0}}
    )
    engine = DdpEngine(mlp((1, 2, 2), 2, hidden=[3]), config, SOLO)
    before = {name: value.clone() for name, value in engine.gather().items() if isinstance(value, Tensor)}
    anchor = {name: value + 1 for name, value in before.items()}
    detach = NormalPrior(3.0, 2.0, anchor).attach(engine, SOLO, num_train=50)
    engine.start(num_steps=1, task=0)
    for number in range(2):  # two micro-batches
        logits = engine.forward(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), last=number == 1)
        engine.backward(0 * logits.sum())
    engine.step()
    detach()
    for name, after in engine.gather().items():
        assert isinstance(after, Tensor)
        torch.testing.assert_close(before[name] - after, (3 * before[name] - 2 * anchor[name]) / 50)
