"""Merged weights against the minimum of the sum of quadratics, found with whole matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.curvature import merging
from hpccl.curvature.blocks import Block, Layout
from hpccl.curvature.merging import BlockCurve, Curve, DenseCurve, DiagonalCurve, Model, arithmetic, average, matched
from hpccl.errors import ConfigError, DivergedError
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, LowRank
from hpccl.kron.pair import Pair

TINY = 1e-14  # a damping that changes nothing


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The quadratics of Daheim et al.'s setting with golden numbers: curvatures, centres, beginning, weights.
H0, H1, H2 = (
    torch.tensor(rows, dtype=torch.float64)
    for rows in ([[2, 0.3], [0.3, 1]], [[1, 0.2], [0.2, 3]], [[4, -0.5], [-0.5, 1]])
)
C1, C2, BEGIN = numbers(1, -1), numbers(-2, 0.5), numbers(0.1, 0.2)
SCALES = (0.7, 1.3)
ENDS = [torch.linalg.solve(H0 + h, H0 @ BEGIN + h @ c) for h, c in ((H1, C1), (H2, C2))]


def as_layer(matrix: Tensor) -> Curve:
    """One output without bias, so that B is a number and A all of the matrix."""
    return BlockCurve(
        Layout("layer", "w", None, (1, 2)), (Pair(Dense(matrix[None]), Dense(torch.ones(1, 1, 1).double())),)
    )


def as_matrix(matrix: Tensor) -> Curve:
    return DenseCurve({"w": (1, 2)}, matrix)


@pytest.mark.parametrize("curve", [as_layer, as_matrix])
def test_golden_quadratics_are_merged_exactly(curve: Any) -> None:
    base = Model(1.0, {"w": BEGIN.view(1, 2)}, [curve(H0)])
    models = [
        Model(scale, {"w": end.view(1, 2)}, [curve(h)]) for scale, end, h in zip(SCALES, ENDS, (H1, H2), strict=True)
    ]
    torch.testing.assert_close(ENDS[0], numbers(0.47021277, -0.7012766), atol=1e-8, rtol=0)
    torch.testing.assert_close(ENDS[1], numbers(-1.30719064, 0.73428094), atol=1e-8, rtol=0)
    merged = matched("layer", base, models, damping=TINY).weights["w"].flatten()
    torch.testing.assert_close(merged, numbers(-1.25405938, -0.00985283), atol=1e-8, rtol=0)
    target = torch.linalg.solve(H0 + 0.7 * H1 + 1.3 * H2, H0 @ BEGIN + 0.7 * H1 @ C1 + 1.3 * H2 @ C2)
    torch.testing.assert_close(merged, target, atol=1e-12, rtol=0)
    simple = arithmetic(base.weights, models).weights["w"].flatten()
    torch.testing.assert_close(simple, numbers(-1.47019889, 0.2636716), atol=1e-8, rtol=0)
    fisher = matched("layer", None, [Model(1.0, m.weights, m.curves) for m in models], damping=TINY)
    expected = torch.linalg.solve(H1 + H2, H1 @ ENDS[0] + H2 @ ENDS[1])
    torch.testing.assert_close(fisher.weights["w"].flatten(), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(expected, numbers(-1.06732072, -0.2355268), atol=1e-8, rtol=0)
    torch.testing.assert_close(average(models).weights["w"].flatten(), 0.35 * ENDS[0] + 0.65 * ENDS[1])


# ---------------------------------------------------------------- random curvature of every kind


def spd(generator: torch.Generator, groups: int, size: int, rank: int | None = None) -> Tensor:
    root = torch.randn(groups, size, rank or size + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / size


def pair(generator: torch.Generator, layout: Layout, rank: int | None = None) -> Pair:
    groups, outputs, inputs = layout.shape
    return Pair(Dense(spd(generator, groups, inputs, rank)), Dense(spd(generator, groups, outputs, rank)))


def curves(kind: str, generator: torch.Generator, layout: Layout) -> list[Curve]:
    groups, outputs, inputs = layout.shape
    match kind:
        case "pair":
            return [BlockCurve(layout, (pair(generator, layout),))]
        case "terms":
            return [BlockCurve(layout, (pair(generator, layout), pair(generator, layout, 3)))]
        case "low rank":
            values, vectors = torch.linalg.eigh(spd(generator, groups, inputs, 2))
            low = LowRank(vectors[..., -2:], values[..., -2:])
            return [BlockCurve(layout, (Pair(low, Dense(spd(generator, groups, outputs))),))]
        case "eigen":
            eigen = Eigen.of(pair(generator, layout))
            noise = torch.rand(eigen.values.shape, generator=generator, dtype=torch.float64)
            return [BlockCurve(layout, (Eigen(eigen.qa, eigen.qb, eigen.values * noise, eigen.a, eigen.b),))]
        case "diagonal":
            found = {
                layout.weight: layout.weight_shape,
                **({layout.bias: layout.weight_shape[:1]} if layout.bias else {}),
            }
            return [
                DiagonalCurve(name, torch.rand(shape, generator=generator, dtype=torch.float64))
                for name, shape in found.items()
            ]
        case _:
            return []


def dense(own: Sequence[Curve], shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """The matrix of the products, column by column."""
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows = []
    for unit in torch.eye(size, dtype=torch.float64):
        parts = unit.split([torch.Size(shape).numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        total = {name: torch.zeros_like(value) for name, value in named.items()}
        for curve in own:
            for name, value in curve.product(named).items():
                total[name] += value
        rows.append(torch.cat([total[name].flatten() for name in shapes]))
    return torch.stack(rows)


LAYOUTS = {
    "linear": Layout("l", "w", "b", (9, 7)),
    "large": Layout("l", "w", "b", (28, 30)),
    "convolution": Layout("l", "w", "b", (8, 3, 2, 2), groups=2),
    "channels last": Layout("l", "w", "b", (16, 6, 3, 3), channels_last=True),
}
KINDS = [
    ("pair", "pair", "pair"),
    ("terms", "eigen", "pair"),
    ("low rank", "none", "terms"),
    ("diagonal", "pair", "diagonal"),
    ("diagonal", "diagonal", "none"),
]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kinds", KINDS)
def test_any_mixture_of_curvatures_is_solved(name: str, kinds: tuple[str, str, str]) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    shapes = {"w": layout.weight_shape, "b": layout.weight_shape[:1]}
    models = []
    for number, kind in enumerate(kinds):
        weights = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
        models.append(Model((1.0, 0.4, 2.0)[number], weights, curves(kind, generator, layout)))
    base, *others = models
    found = matched("l", base, others, damping=0.05)
    begin = torch.cat([value.flatten() for value in base.weights.values()])
    prior = dense(base.curves, shapes) + 0.05 * torch.eye(len(begin), dtype=torch.float64)
    total, right = prior.clone(), torch.zeros_like(begin)
    for model in others:
        own = dense(model.curves, shapes)
        total += model.scale * own
        right += model.scale * (prior + own) @ (torch.cat([v.flatten() for v in model.weights.values()]) - begin)
    expected = begin + torch.linalg.solve(total, right)
    torch.testing.assert_close(torch.cat([found.weights[k].flatten() for k in shapes]), expected, atol=1e-6, rtol=1e-6)
    assert (found.steps > 0) == (name in ("large", "channels last"))


@pytest.mark.parametrize("scales", [(0.3, 0.7), (0.1, 0.2, 0.4)])
def test_networks_that_did_not_move_stay(scales: tuple[float, ...]) -> None:
    """Sums of their weights round, which conjugate gradients would take for a system without a right side."""
    layout, generator = LAYOUTS["large"], torch.Generator().manual_seed(0)
    shapes = {"w": layout.weight_shape, "b": layout.weight_shape[:1]}
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    models = [Model(scale, weights, curves("pair", generator, layout)) for scale in scales]
    found = matched("l", Model(1.0, weights, curves("pair", generator, layout)), models, damping=1e-8)
    assert found.steps == 0
    for name, value in weights.items():
        assert torch.equal(found.weights[name], value)


def test_a_layout_of_another_order_is_another_matrix_of_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    first, last = (Layout("l", "w", None, (16, 6, 3, 3), channels_last=flag) for flag in (False, True))
    order = last.order()  # of the matrix's inputs
    plain = pair(generator, first)
    assert isinstance(plain.a, Dense)
    turned = Pair(Dense(plain.a.matrix[:, order[:, None], order]), plain.b)
    weights = [{"w": torch.randn(16, 6, 3, 3, generator=generator, dtype=torch.float64)} for _ in range(3)]
    results = []
    for other in (BlockCurve(first, (plain,)), BlockCurve(last, (turned,))):
        base = Model(1.0, weights[0], [BlockCurve(first, (plain,))])
        models = [Model(1.0, weights[1], [BlockCurve(first, (plain,))]), Model(0.5, weights[2], [other])]
        results.append(matched("l", base, models, damping=0.1).weights["w"])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_proportional_curvature_scales_task_arithmetic() -> None:
    """H_t = c H0: task arithmetic times (1 + c) / (1 + c sum a)."""
    base = Model(1.0, {"w": BEGIN.view(1, 2)}, [as_matrix(H0)])
    models = [Model(a, {"w": end.view(1, 2)}, [as_matrix(3 * H0)]) for a, end in zip(SCALES, ENDS, strict=True)]
    moved = matched("l", base, models, damping=TINY).weights["w"] - base.weights["w"]
    simple = arithmetic(base.weights, models).weights["w"] - base.weights["w"]
    torch.testing.assert_close(moved, simple * (1 + 3) / (1 + 3 * sum(SCALES)))


# ---------------------------------------------------------------- regression and removal


def regression(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (12, 7, 9)]
    return inputs, [torch.randn(len(x), 3, generator=generator, dtype=torch.float64) for x in inputs]


def fitted(inputs: Sequence[Tensor], targets: Sequence[Tensor], begin: Tensor, delta: float) -> Tensor:
    """argmin of 1/2 sum |x W' - y|^2 + delta / 2 |W - begin|^2, [outputs, inputs]."""
    x, y = torch.cat(list(inputs)), torch.cat(list(targets))
    hessian = x.T @ x + delta * torch.eye(x.shape[1], dtype=torch.float64)
    found: Tensor = torch.linalg.solve(hessian, x.T @ y + delta * begin.T).T
    return found


def curve_of(x: Tensor) -> Curve:
    """n I (x) X'X / n."""
    layout = Layout("l", "w", None, (3, 4))
    return BlockCurve.of(
        Block(layout, (Pair(Dense((x.T @ x / len(x))[None]), Dense(len(x) * torch.eye(3).double()[None])),), (len(x),))
    )


@pytest.mark.parametrize("limit", [768, 0])
def test_regressions_on_parts_become_the_regression_on_all(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no matrix is made and conjugate gradients solve it."""
    monkeypatch.setattr(merging, "_DENSE", limit)
    inputs, targets = regression(0)
    delta, begin = 0.3, torch.full((3, 4), 0.2, dtype=torch.float64)
    base = Model(1.0, {"w": begin}, [])
    models = [
        Model(1.0, {"w": fitted([x], [y], begin, delta)}, [curve_of(x)]) for x, y in zip(inputs, targets, strict=True)
    ]
    joint = fitted(inputs, targets, begin, delta)
    torch.testing.assert_close(matched("l", base, models, damping=delta).weights["w"], joint, atol=1e-8, rtol=0)
    whole = Model(1.0, {"w": joint}, [curve for model in models for curve in model.curves])
    removed = matched("l", base, [whole, Model(-1.0, models[1].weights, models[1].curves)], damping=delta)
    expected = fitted([inputs[0], inputs[2]], [targets[0], targets[2]], begin, delta)
    torch.testing.assert_close(removed.weights["w"], expected, atol=1e-8, rtol=0)
    with pytest.raises(ConfigError, match=r"merged precision of 'l' is not positive .*eigenvalue of about -"):
        matched("l", base, [models[0], Model(-3.0, models[1].weights, models[1].curves)], damping=delta)


def test_a_diagonal_that_is_not_positive_is_named() -> None:
    one, two = torch.rand(5) + 1, torch.rand(5) + 1
    weights = {"norm.weight": torch.zeros(5)}
    base = Model(1.0, weights, [DiagonalCurve("norm.weight", one)])
    with pytest.raises(ConfigError, match=r"'norm.weight' is not positive"):
        matched("norm.weight", base, [Model(-5.0, weights, [DiagonalCurve("norm.weight", two)])], damping=0.1)


def test_parts_of_a_large_diagonal_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    draw = [torch.rand(3, 11, generator=generator) for _ in range(6)]
    base = Model(1.0, {"w": draw[0]}, [DiagonalCurve("w", draw[1])])
    models = [
        Model(a, {"w": draw[2 + 2 * k]}, [DiagonalCurve("w", draw[3 + 2 * k])]) for k, a in enumerate((1.0, -0.2))
    ]
    expected = draw[0].double() + sum(
        m.scale * (draw[1].double() + 0.5 + draw[3 + 2 * k].double()) * (draw[2 + 2 * k].double() - draw[0].double())
        for k, m in enumerate(models)
    ) / (draw[1].double() + 0.5 + draw[3].double() - 0.2 * draw[5].double())
    for chunk in (1 << 20, 4):
        monkeypatch.setattr(merging, "_CHUNK", chunk)
        torch.testing.assert_close(matched("w", base, models, damping=0.5).weights["w"], expected)


def test_what_is_not_finite_is_named() -> None:
    weights = {"w": torch.tensor([1.0, torch.nan])}
    with pytest.raises(DivergedError, match="'w' are not finite"):
        matched("w", None, [Model(1.0, weights, [])], damping=1.0)
