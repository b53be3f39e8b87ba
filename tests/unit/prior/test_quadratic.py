"""The quadratic: zero at its anchor, exact on a toy, in fp32 whatever the forward pass is in."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import DenseCurvature, DiagonalCurvature
from hpccl.config.run import RunConfig
from hpccl.curvature.build import build_estimator
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.protocols import Examples, Precision
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, Slab, Stored, wholes
from hpccl.engine.ddp import DdpEngine
from hpccl.models.small import mlp
from hpccl.prior.quadratic import Quadratic

SOLO = Comm.solo()


def diagonal(values: dict[str, Tensor]) -> Diagonal:
    return Diagonal.from_state_dict({"kind": "diagonal", "values": values, "num_examples": 1.0})


def toy(weight: float = 3.0, damping: float = 0.5) -> Quadratic:
    anchor = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}
    return Quadratic(diagonal({"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([[5.0]])}), anchor, weight, damping)


def as_they_are(values: Mapping[str, Tensor | Slab | Stored]) -> Leaves:
    """What an engine that spreads nothing makes of whole tensors."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_nothing_at_the_anchor() -> None:
    quadratic = toy()
    assert all(not bool(force.any()) for force in wholes(quadratic.force(quadratic.anchor, SOLO)).values())
    assert quadratic.value(quadratic.anchor, SOLO) == 0


def test_force_is_weight_times_curvature_times_distance() -> None:
    quadratic = toy()
    weights = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[3.0]])}
    force = quadratic.force(weights, SOLO)
    torch.testing.assert_close(force["a"], torch.tensor([3 * 2.5 * 1, 3 * 0.5 * 2]))
    torch.testing.assert_close(force["b"], torch.tensor([[3 * 5.5 * -1.0]]))
    assert quadratic.value(weights, SOLO) == pytest.approx(3 / 2 * (2.5 * 1 + 0.5 * 4 + 5.5 * 1))


def test_force_is_the_gradient_of_the_value() -> None:
    quadratic = toy()
    weights = {"a": torch.tensor([0.3, -1.0]), "b": torch.tensor([[0.1]])}
    step = 1e-2
    for name, value in weights.items():
        direction = torch.ones_like(value) * step
        higher = quadratic.value({**weights, name: value + direction}, SOLO)
        lower = quadratic.value({**weights, name: value - direction}, SOLO)
        assert (higher - lower) / 2 == pytest.approx(
            float((wholes(quadratic.force(weights, SOLO))[name] * direction).sum()), rel=1e-3
        )


def test_curvatures_add_up_and_the_anchor_moves() -> None:
    quadratic = toy()
    moved = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    both = quadratic.plus(quadratic.precision, moved, SOLO)
    weights = {"a": torch.ones(2), "b": torch.ones(1, 1)}
    torch.testing.assert_close(both.force(weights, SOLO)["a"], torch.tensor([3 * 4.5, 3 * 0.5]))
    assert not bool(wholes(both.force(moved, SOLO))["a"].any())


def test_each_task_may_keep_its_own_anchor() -> None:
    """F_1 (w - a_1) + F_2 (w - a_2) without keeping a_1: also after a third task."""
    first, moved = toy(weight=1.0, damping=0.0), {"a": torch.tensor([0.5, -1.0]), "b": torch.tensor([[2.0]])}
    second = diagonal({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[0.5]])})
    both = first.plus(second, moved, SOLO, own_anchors=["a", "b"])
    weights = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[3.0]])}
    anchor = wholes(first.anchor)
    expected = {
        name: first.precision.values[name] * (weights[name] - anchor[name])  # type: ignore[attr-defined]
        + second.values[name] * (weights[name] - moved[name])
        for name in weights
    }
    for name, force in both.force(weights, SOLO).items():
        torch.testing.assert_close(force, expected[name])
    last = {"a": torch.zeros(2), "b": torch.ones(1, 1)}
    third = both.plus(second.times(0.0), last, SOLO, own_anchors=["a", "b"])
    for name, force in third.force(weights, SOLO).items():
        torch.testing.assert_close(force, expected[name])
    saved = replace(third, products="bf16").state_dict()
    again = Quadratic.from_state_dict(saved, last, lambda wanted: {}, SOLO, place=as_they_are, like={})
    assert again.value(weights, SOLO) == pytest.approx(third.value(weights, SOLO))
    assert again.products == again.plus(second, last, SOLO).products == "bf16"


def attached(precision: str, curvature: float, accumulate: int = 1) -> tuple[Tensor, Tensor, float]:
    """(gradient with the quadratic, gradient without, its scale) of one parameter."""
    config = RunConfig.model_validate(
        {
            "optim": {"name": "momentum", "lr": 1.0, "momentum": 0.0, "schedule": "constant"},
            "engine": {"kind": "ddp", "precision": precision},
        }
    )
    torch.manual_seed(0)
    engine = DdpEngine(mlp((1, 4, 4), 5, hidden=(8,)), config, Comm.solo())
    engine.start(num_steps=3, task=0)
    anchor = {name: value.detach() - 1 for name, value in engine.module.named_parameters()}
    values = {name: torch.full_like(value, curvature) for name, value in anchor.items()}
    gradients = []
    for quadratic in (Quadratic(diagonal(values), anchor, 2.0, 0.0), None):
        before = wholes(engine.gather())["1.weight"]
        detach = quadratic.attach(engine, Comm.solo(), num_train=100) if quadratic else lambda: None
        pixels = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        for number in range(accumulate):
            logits = engine.forward(pixels, torch.arange(6), last=number + 1 == accumulate)
            engine.backward(logits.logsumexp(1).mean() / accumulate)
        detach()
        parameter = dict(engine.module.named_parameters())["1.weight"]
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
        parameter.grad.zero_()
        assert torch.equal(wholes(engine.gather())["1.weight"], before)
    return gradients[0], gradients[1], 2.0 / 100 * curvature


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attached_force_enters_once_in_fp32(precision: str, accumulate: int) -> None:
    """A curvature of 1e6 and a distance of 1 stay finite and exact also when the forward pass is bf16."""
    with_quadratic, without, force = attached(precision, 1e6, accumulate)
    torch.testing.assert_close(with_quadratic, without + force, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(with_quadratic).all())


def test_decay_forgets_the_curvature_of_earlier_tasks() -> None:
    """Online EWC: .9 * .5 + .2 = .65 (Schwarz et al. 2018)."""
    anchor = {"a": torch.tensor([1.0])}
    first = Quadratic(diagonal({"a": torch.tensor([0.5])}), anchor, weight=1.0, damping=0.0)
    later = first.plus(diagonal({"a": torch.tensor([0.2])}), {"a": torch.tensor([3.0])}, SOLO, decay=0.9)
    force = wholes(later.force({"a": torch.tensor([4.0])}, SOLO))["a"]
    torch.testing.assert_close(force, torch.tensor([0.65]))


X = torch.tensor([[1, 0], [1, 1], [1, 2], [1, -1], [1, -2]], dtype=torch.float64)
Y = torch.tensor([0.5, 1.0, 2.5, -0.5, -1.0], dtype=torch.float64)


class Even(nn.Module):
    """Logits (0, x'theta) at theta = 0: the curvature of the two classes' cross-entropy is 1/4 sum x x'."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, pixels: Tensor) -> Tensor:
        score = pixels @ self.theta
        return torch.stack([torch.zeros_like(score), score], dim=1)


def of_squares(config: DenseCurvature | DiagonalCurvature, x: Tensor) -> Precision:
    """The curvature of 1/2 |x theta - y|^2, sum x x' or its diagonal: four times that of `Even`."""
    count = len(x)
    fours = torch.full((count,), 4.0)
    part = Examples(x, torch.zeros(count, dtype=torch.int64), torch.ones(2).bool(), torch.arange(count), fours)
    return build_estimator(config, 0).estimate(Even(), [part], SOLO)


def regression(x: Tensor, y: Tensor, prior: Quadratic) -> Tensor:
    """The minimum of 1/2 |x theta - y|^2 + prior: one Newton step, columns of the Hessian by unit vectors."""

    def slope(theta: Tensor) -> Tensor:
        return x.T @ (x @ theta - y) + wholes(prior.force({"theta": theta}, SOLO))["theta"]

    zero = torch.zeros(2, dtype=torch.float64)
    hessian = torch.stack([slope(unit) - slope(zero) for unit in torch.eye(2, dtype=torch.float64)], dim=1)
    found: Tensor = torch.linalg.solve(hessian, -slope(zero))
    return found


@pytest.mark.parametrize(
    ("config", "end"),
    [(DenseCurvature(), [0.41666667, 0.77272727]), (DiagonalCurvature(), [0.40350877, 0.77368421])],
    ids=["dense", "diagonal"],
)
def test_two_regressions_one_after_the_other(config: DenseCurvature | DiagonalCurvature, end: list[float]) -> None:
    """E1: rows 0 to 2, then 3 and 4, delta = 1: the whole curvature ends at the ridge regression on all; EWC beside."""
    nothing = of_squares(config, X[:3]).times(0.0)
    prior = Quadratic(nothing, {"theta": torch.zeros(2)}, weight=1.0, damping=1.0)
    joint = regression(X, Y, prior)
    assert joint.tolist() == pytest.approx([0.41666667, 0.77272727], abs=1e-8)
    first = regression(X[:3], Y[:3], prior)
    after = prior.plus(of_squares(config, X[:3]), {"theta": first.float()}, SOLO)
    assert regression(X[3:], Y[3:], after).tolist() == pytest.approx(end, abs=2e-7)


def test_decay_with_own_anchors_is_the_decayed_sum_of_quadratics() -> None:
    gamma, curvatures = 0.5, [torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([1.0])]
    anchors = [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([4.0])]
    quadratic = Quadratic(diagonal({"a": curvatures[0]}), {"a": anchors[0]}, weight=2.0, damping=0.0)
    for curvature, anchor in zip(curvatures[1:], anchors[1:], strict=True):
        quadratic = quadratic.plus(diagonal({"a": curvature}), {"a": anchor}, SOLO, own_anchors=["a"], decay=gamma)
    w = torch.tensor([5.0])
    terms = [gamma**age * f * (w - a) for age, f, a in zip((2, 1, 0), curvatures, anchors, strict=True)]
    torch.testing.assert_close(wholes(quadratic.force({"a": w}, SOLO))["a"], 2.0 * sum(terms, torch.zeros(1)))
