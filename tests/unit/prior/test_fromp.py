"""FROMP: golden numbers, the kernel against the dense one, one backward pass against Jacobians."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import DenseCurvature, DiagonalCurvature, KroneckerCurvature, PassCurvature
from hpccl.curvature import kernel as curvature_kernel
from hpccl.curvature.build import build_estimator
from hpccl.curvature.kernel import probability_kernel
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Examples, Precision
from hpccl.curvature.spectrum import DiagonalSpectrum
from hpccl.dist.comm import Comm
from hpccl.errors import DivergedError
from hpccl.prior.fromp import Block, Fromp, cholesky, equal_blocks, probabilities
from hpccl.prior.quadratic import Quadratic
from hpccl.train.loss import row_nats

SOLO = Comm.solo()
X = torch.tensor([[1, 0], [1, 1], [1, 2], [1, -1], [1, -2]], dtype=torch.float64)
BINARY = torch.tensor([0, 1, 1, 1, 0], dtype=torch.float64)


class Logistic(nn.Module):
    """Logits (0, x'theta)."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, pixels: Tensor) -> Tensor:
        score = pixels.flatten(1) @ self.theta
        return torch.stack([torch.zeros_like(score), score], dim=1)


def posterior(values: Tensor, theta: Tensor, delta: float) -> Posterior:
    """Of a float64 diagonal over one parameter."""
    spectrum = DiagonalSpectrum("theta", values)
    return Posterior({"theta": theta}, {"theta": tuple(theta.shape)}, (spectrum,), 1.0, delta, SOLO)


def test_golden_numbers() -> None:
    """The published ones for one sigmoid output, which is the second of two classes."""
    old, delta = Logistic([0.2, 0.5]), 1e-3
    p = torch.sigmoid(X @ old.theta.detach())
    fisher = (X.square() * (p * (1 - p))[:, None]).sum(0)
    torch.testing.assert_close(fisher, torch.tensor([1.10549189, 2.03338773], dtype=torch.float64), atol=1e-8, rtol=0)
    kept = X[[0, 1]]
    kernel = probability_kernel(posterior(fisher, old.theta.detach(), delta), old, kept, [0, 1])
    root, used = cholesky(kernel, 1e-5)
    assert used == 1e-5
    golden = torch.tensor([[0.05537819, 0.04959603], [0.04959603, 0.06859848]], dtype=torch.float64)
    for number in range(2):  # the other class's is the same
        torch.testing.assert_close(root[number] @ root[number].T, golden, atol=1e-8, rtol=0)
    before = old(kept).detach().softmax(1)
    torch.testing.assert_close(
        before[:, 1], torch.tensor([0.549834, 0.66818777], dtype=torch.float64), atol=1e-8, rtol=0
    )
    block = Block(torch.arange(2), torch.tensor([0, 1]), before, root)
    now = Logistic([0.3, 0.4])
    m = now(kept).softmax(1)
    pull = block.pull(m.detach())
    (one,) = torch.autograd.grad((pull[:, 1] * m[:, 1]).sum(), now.theta, retain_graph=True)
    torch.testing.assert_close(one, torch.tensor([0.1060976, -0.20207505], dtype=torch.float64), atol=1e-7, rtol=0)
    (both,) = torch.autograd.grad((pull * m).sum(), now.theta)
    torch.testing.assert_close(both, 2 * one)
    target = torch.stack([1 - BINARY, BINARY], dim=1)
    (mean,) = torch.autograd.grad(row_nats(now(X), target, torch.ones(5, 2).bool()).mean(), now.theta)
    torch.testing.assert_close(mean, torch.tensor([-0.03090962, -0.21227883], dtype=torch.float64), atol=1e-8, rtol=0)
    total = mean / 10 + one
    torch.testing.assert_close(total, torch.tensor([0.10300664, -0.22330293], dtype=torch.float64), atol=1e-7, rtol=0)


def test_golden_numbers_to_first_order() -> None:
    """F2: near the old weights, two memories of two weights pull as Sigma^-1 (w - w_old) does."""
    old, delta, limit = Logistic([0.2, 0.5]), 1e-3, [0.11064919, -0.20343877]
    everyone = Examples(X, BINARY.long(), torch.ones(2, dtype=torch.bool), torch.arange(5), torch.ones(5))
    fisher = build_estimator(DiagonalCurvature(fisher="ggn"), 0).estimate(old, [everyone], SOLO)
    quadratic = Quadratic(fisher, {"theta": old.theta.detach()}, weight=1.0, damping=delta)
    force = quadratic.force({"theta": torch.tensor([0.3, 0.4], dtype=torch.float64)}, SOLO)["theta"]
    assert isinstance(force, Tensor)
    assert force.tolist() == pytest.approx(limit, abs=1e-6)

    kept = X[[0, 1]]
    mean = {"theta": old.theta.detach()}
    kernel = probability_kernel(Posterior.of(fisher, mean, prior_precision=delta), old, kept, [0, 1])
    block = Block(torch.arange(2), torch.tensor([0, 1]), old(kept).detach().softmax(1), cholesky(kernel, 0.0)[0])
    off = []
    for step in (1e-2, 1e-3):
        now = Logistic([0.2 + 0.1 * step, 0.5 - 0.1 * step])
        m = now(kept).softmax(1)
        (pull,) = torch.autograd.grad((block.pull(m.detach())[:, 1] * m[:, 1]).sum(), now.theta)
        off.append(float((pull / step - torch.tensor(limit, dtype=torch.float64)).norm()))
    assert off[1] < 1e-4
    assert off[0] / off[1] == pytest.approx(10, rel=0.1)  # the error is of first order in the step


def test_as_many_independent_memories_as_weights_are_the_quadratic() -> None:
    """Identity link, no jitter: 1/2 d' K^-1 d = 1/2 (w - w_old)' Sigma^-1 (w - w_old), whatever Sigma."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    spread = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    sigma = spread @ spread.T + torch.eye(4).double()
    old, now = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    root = torch.linalg.cholesky(inputs @ sigma @ inputs.T)[None]
    block = Block(torch.arange(4), torch.tensor([0]), (inputs @ old)[:, None], root)
    found = inputs.T @ block.pull((inputs @ now)[:, None])[:, 0]
    torch.testing.assert_close(found, torch.linalg.solve(sigma, now - old), atol=1e-8, rtol=1e-8)


def small() -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
    network.double()
    return network


def flat_jacobian(model: nn.Module, pixels: Tensor, head: list[int]) -> Tensor:
    """[n, K, W] of the probabilities, by autograd, one at a time."""
    rows = []
    for image in pixels.split(1):
        for probability in model(image)[:, head].softmax(1)[0]:
            grads = torch.autograd.grad(probability, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    found: Tensor = torch.stack(rows).unflatten(0, (len(pixels), len(head)))
    return found


def dense(precision: Precision, model: nn.Module, delta: float) -> Tensor:
    """[W, W] F + delta 1, from its products with unit vectors: the way that a quadratic takes."""
    shapes = {name: value.shape for name, value in model.named_parameters()}
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    quadratic = Quadratic(precision, zero, 1.0, delta)
    columns = []
    for name, shape in shapes.items():
        for position in range(math.prod(shape)):
            unit = {**zero, name: zero[name].clone()}
            unit[name].view(-1)[position] = 1
            force = quadratic.force(unit, SOLO)
            columns.append(torch.cat([force[other].reshape(-1) for other in shapes]))  # type: ignore[union-attr]
    return torch.stack(columns).double()


@pytest.mark.parametrize(
    "config",
    [DiagonalCurvature(), DenseCurvature(), KroneckerCurvature(fisher="ggn")],
    ids=["diagonal", "dense", "Kronecker"],
)
def test_the_kernel_is_the_dense_one(config: PassCurvature) -> None:
    model, delta, head = small(), 0.3, [0, 2, 3]
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(12, 1, 5, 1, generator=generator, dtype=torch.float64)
    competing = torch.zeros(5, dtype=torch.bool)
    competing[head] = True
    labels = torch.tensor(head)[torch.randint(0, 3, (12,), generator=generator)]
    examples = Examples(pixels.float(), labels, competing, torch.arange(12), torch.ones(12))
    precision = build_estimator(config, 0).estimate(model.float(), [examples], SOLO)
    model = small()
    mean = {name: value.detach() for name, value in model.named_parameters()}
    found = probability_kernel(Posterior.of(precision, mean, prior_precision=delta), model, pixels[:6], head)
    jacobian = flat_jacobian(model, pixels[:6], head)
    covariance = torch.linalg.inv(dense(precision, model, delta))
    expected = torch.einsum("icw,wv,jcv->cij", jacobian, covariance, jacobian)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("budget", "passes"), [(1 << 28, 1), (8 * 4 * 3 * 40, 21)])
def test_layers_share_the_passes_of_their_jacobians(budget: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal has a spectrum for every parameter; whether torch maps the network is asked once.

    With room for 40 weights: parameters of 36 and 4, of 4 and 4, of 144 (class by class), and of 4, 4, 4, 20 and 5.
    """
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 5)).double().eval()
    pixels, head, delta = torch.randn(4, 1, 5, 5, dtype=torch.float64), [0, 2, 3], 0.3
    values = {name: torch.rand(parameter.shape).double() for name, parameter in model.named_parameters()}
    spectra = tuple(DiagonalSpectrum(name, value) for name, value in values.items())
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    mean = {name: value.detach() for name, value in model.state_dict().items()}
    asked = Counter[str]()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(curvature_kernel, name)

        def call(*arguments: Any, **options: Any) -> Any:
            asked[name] += 1
            return original(*arguments, **options)

        return call

    for name in ("logit_jacobians", "maps"):
        monkeypatch.setattr(curvature_kernel, name, counted(name))
    monkeypatch.setattr(curvature_kernel, "working_bytes", lambda device: budget)
    found = probability_kernel(Posterior(mean, shapes, spectra, 1.0, delta, SOLO), model, pixels, head)
    assert asked == {"maps": 1, "logit_jacobians": passes}
    jacobian = flat_jacobian(model, pixels, head)
    variance = 1 / (torch.cat([value.flatten() for value in values.values()]) + delta)
    torch.testing.assert_close(found, torch.einsum("icw,w,jcw->cij", jacobian, variance, jacobian), rtol=1e-9, atol=0)


def test_one_backward_pass_is_the_sum_over_jacobians() -> None:
    model, head = small(), [1, 2, 4]
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(6, 1, 5, 1, generator=generator, dtype=torch.float64)
    half = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    kernel = half @ half.mT
    old = torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(1)
    block = Block(torch.arange(6), torch.tensor(head), old, cholesky(kernel, 1e-3)[0])
    columns = torch.tensor(head).expand(6, -1)
    now = probabilities(model(pixels), columns)
    grads = torch.autograd.grad((block.pull(now.detach()) * now).sum(), list(model.parameters()))
    jacobian = flat_jacobian(model, pixels, head)
    change = (now - old).detach()
    inverse = torch.linalg.inv(kernel + 1e-3 * torch.eye(6).double())
    expected = torch.einsum("icw,cij,jc->w", jacobian, inverse, change)
    torch.testing.assert_close(torch.cat([grad.reshape(-1) for grad in grads]), expected, rtol=1e-9, atol=1e-12)

    def value() -> float:
        found = probabilities(model(pixels), columns).detach() - old
        return 0.5 * float(torch.einsum("ic,cij,jc->", found, inverse, found))

    def moved(step: float) -> float:
        parameter = next(model.parameters())
        with torch.no_grad():
            parameter[0, 0] += step
            found = value()
            parameter[0, 0] -= step
        return found

    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(float(expected[0]), rel=1e-5)


def test_probabilities_leave_out_what_is_beyond_a_head() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    found = probabilities(logits, torch.tensor([[0, 2, -1]]))
    torch.testing.assert_close(found[0, :2], torch.tensor([1.0, 3.0]).softmax(0))
    assert float(found[0, 2]) == 0


def test_the_jitter_grows_until_rounding_allows_it() -> None:
    flat = torch.ones(1, 4, 4, dtype=torch.float64)
    flat[0, 0, 0] -= 1e-4  # not positive semi-definite, as rounding makes it
    root, used = cholesky(flat, 1e-6)
    assert used > 1e-5
    torch.testing.assert_close(root @ root.mT, flat + used * torch.eye(4).double())


def test_a_kernel_that_is_no_covariance_is_an_error() -> None:
    with pytest.raises(DivergedError, match="not positive definite"):
        cholesky(torch.full((1, 2, 2), math.nan, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize(("size", "lengths"), [(None, [7]), (7, [7]), (3, [2, 2, 3]), (1, [1] * 7)])
def test_blocks_differ_by_at_most_one(size: int | None, lengths: list[int]) -> None:
    parts = equal_blocks(list(range(7)), size)
    assert [len(part) for part in parts] == lengths
    assert [each for part in parts for each in part] == list(range(7))


def test_blocks_in_turn_add_up_to_all_of_them() -> None:
    """The mean over a round, each times the number of blocks, is the sum over blocks."""
    generator = torch.Generator().manual_seed(8)
    old, now = (torch.rand(7, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    blocks = tuple(Block(torch.tensor(part), torch.arange(2), old[part], None) for part in equal_blocks(range(7), 3))
    fromp = Fromp(1.0, (blocks, blocks[:2]))
    total = torch.zeros(7, 2, dtype=torch.float64)
    for step in range(3):
        (block, stands_for), _ = fromp.at(step)
        total[block.slots] += stands_for * block.pull(now[block.slots]) / 3
    torch.testing.assert_close(total, now - old)
    assert [stands_for for _, stands_for in fromp.at(5)] == [3, 2]


def test_state_comes_back() -> None:
    root = torch.eye(2, dtype=torch.float64).expand(2, -1, -1).contiguous()
    fromp = Fromp(2.0, ((Block(torch.tensor([3, 1]), torch.tensor([0, 4]), torch.rand(2, 2).double(), root),),))
    none: Callable[..., dict[str, object]] = lambda wanted: {}  # noqa: E731
    again = Fromp.from_state_dict(fromp.state_dict(), none, SOLO, dict, {})  # type: ignore[arg-type]
    assert again.weight == 2
    for name, value in vars(fromp.tasks[0][0]).items():
        assert torch.equal(getattr(again.tasks[0][0], name), value)
    assert again.num_bytes == fromp.num_bytes == 16 + 16 + 32 + 64
