"""Merge several networks into one: minimise a sum of quadratics, one group of weights at a time.

Networks t started from w0 and minimised l_t(w) + 1/2 (w - w0)' H0 (w - w0), with curvature H_t of l_t at their end w_t.
If l_t is quadratic, grad l_t(w0) = -(H0 + H_t)(w_t - w0), so the minimum of sum_t a_t l_t(w) + 1/2 |w - w0|^2_H0 is

    w = w0 + H^-1 sum_t a_t (H0 + H_t)(w_t - w0),    H = H0 + sum_t a_t H_t.

a_t < 0 removes what network t learned, as long as H is positive definite. Special cases: H_t = 0 is task arithmetic,
w0 + sum_t a_t (w_t - w0); H0 = 0 is Fisher averaging, (sum_t a_t H_t)^-1 sum_t a_t H_t w_t; equal H_t give the mean.

H is a sum of Kronecker products, diagonals or dense matrices plus delta I and has no eigenvectors of product form, so
H x = r is solved in float64 by conjugate gradients, preconditioned with the single term nearest to the positive part of
H, which has such eigenvectors; small groups are solved by Cholesky factorisation, diagonals by division.

Sources: Daheim et al. 2024, "Model merging by uncertainty-based gradient matching", ICLR, eq. 12; Matena and Raffel
2022, "Merging models with Fisher-weighted averaging", NeurIPS; Ilharco et al. 2023, "Editing models with task
arithmetic", ICLR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from hpccl.curvature.blocks import Block, Layout, Term
from hpccl.curvature.dense import split_by_name
from hpccl.curvature.protocols import Weights
from hpccl.errors import ConfigError, DivergedError
from hpccl.kron.eigen import Eigen
from hpccl.kron.merge import eigen_of
from hpccl.kron.pair import Pair
from hpccl.kron.product import chain

__all__ = ["BlockCurve", "Curve", "DenseCurve", "DiagonalCurve", "Model", "Solved", "arithmetic", "average", "matched"]

Floats: TypeAlias = npt.NDArray[np.float64]

_DENSE = 768  # largest number of unknowns for which the matrix is formed and factored
# Residuals relative to the right side, in the norm of the preconditioner's inverse: `_TOLERANCE` is the goal, `_ENOUGH`
# is accepted. Where the curvature is far below its largest value, weights are much less exact than this.
_TOLERANCE, _ENOUGH = 1e-10, 1e-8
_STEPS = 10_000
_CHUNK = 1 << 20  # elements of a diagonal that are converted to float64 at a time


class Curve(Protocol):
    """A positive semi-definite matrix over a few named weights, in float64."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All tensors that make it up."""

    def product(self, weights: Weights) -> dict[str, Tensor]:
        """Return the product with named weights in float64, by name."""


@final
@dataclass(frozen=True)
class BlockCurve:
    """The sum_t B_t (x) A_t of one layer; see curvature.blocks.Block, which must be whole."""

    layout: Layout
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, block: Block) -> BlockCurve:
        """Convert a block to float64."""
        return cls(block.layout, tuple(term.to(torch.float64) for term in block.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """See Curve."""
        return self.layout.names

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See Curve."""
        return [tensor for term in self.terms for tensor in _tensors(term)]

    def product(self, weights: Weights) -> dict[str, Tensor]:
        """See Curve."""
        matrix = self.layout.matrix(weights)
        return self.layout.named(sum((term.matvec(matrix) for term in self.terms), torch.zeros_like(matrix)))


@final
@dataclass(frozen=True)
class DiagonalCurve:
    """A diagonal over one parameter, in its shape and any dtype."""

    name: str
    values: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See Curve."""
        return (self.name,)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See Curve."""
        return [self.values]

    def product(self, weights: Weights) -> dict[str, Tensor]:
        """See Curve."""
        return {self.name: weights[self.name] * self.values}


@final
@dataclass(frozen=True)
class DenseCurve:
    """One matrix [P, P] over several parameters in the order of `shapes`, in any dtype."""

    shapes: Mapping[str, tuple[int, ...]]
    matrix: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See Curve."""
        return tuple(self.shapes)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See Curve."""
        return [self.matrix]

    def product(self, weights: Weights) -> dict[str, Tensor]:
        """See Curve."""
        flat = torch.cat([weights[name].reshape(-1) for name in self.shapes])
        return split_by_name(self.matrix.to(flat) @ flat, self.shapes)


@final
@dataclass(frozen=True)
class Model:
    """One of the networks, restricted to a group of weights.

    scale: a_t
    weights: w_t, by name
    curves: summands of H_t, each over some of the group's weights
    """

    scale: float
    weights: Weights
    curves: Sequence[Curve]


@final
@dataclass(frozen=True)
class Solved:
    """Merged weights in float64 by name, and the number of conjugate-gradient steps that they took."""

    weights: dict[str, Tensor]
    steps: int = 0


def average(models: Sequence[Model]) -> Solved:
    """Return sum_t a_t w_t / sum_t a_t."""
    total = math.fsum(model.scale for model in models)
    return Solved({name: _sum(models, name) / total for name in models[0].weights})


def arithmetic(base: Weights, models: Sequence[Model]) -> Solved:
    """Return w0 + sum_t a_t (w_t - w0)."""
    left = 1 - math.fsum(model.scale for model in models)
    return Solved({name: left * value.double() + _sum(models, name) for name, value in base.items()})


def matched(group: str, base: Model | None, models: Sequence[Model], *, damping: float) -> Solved:
    """Return the merged weights of one group; see the module.

    Args:
        group: its name, for messages.
        base: w0 and H0 without delta; its scale is ignored. None: Fisher averaging, where delta is added to every H_t
            instead.
        models: at least one; without a base all a_t > 0.
        damping: delta > 0.

    Raises:
        ConfigError: H is not positive definite.
        DivergedError: curvature or weights are not finite, or the solver did not converge.
    """
    refuse_infinite(group, models if base is None else [base, *models])
    simple = len(models[0].weights) == 1 and all(
        isinstance(curve, DiagonalCurve) for model in (*models, *([base] if base else [])) for curve in model.curves
    )
    if simple:
        return _elementwise(group, base, models, damping)
    shapes = {name: tuple(value.shape) for name, value in models[0].weights.items()}
    terms = [(model.scale, curve) for model in models for curve in model.curves]
    if base is None:
        system = _System(group, shapes, terms, damping * math.fsum(model.scale for model in models))
        right = system.zeros()
        for model in models:
            own = _System(group, shapes, [(1.0, curve) for curve in model.curves], damping)
            right += model.scale * own.product(system.flat(model.weights))
        found, steps = system.solve(right, system.flat(average(models).weights))
        return Solved(split_by_name(found, shapes), steps)
    prior = [(1.0, curve) for curve in base.curves]
    system = _System(group, shapes, [*prior, *terms], damping)
    begin = system.flat(base.weights)
    right = system.zeros()
    for model in models:
        own = _System(group, shapes, [*prior, *((1.0, curve) for curve in model.curves)], damping)
        right += model.scale * own.product(system.flat(model.weights) - begin)
    moved, steps = system.solve(right, system.flat(arithmetic(base.weights, models).weights) - begin)
    return Solved(split_by_name(begin + moved, shapes), steps)


# ---------------------------------------------------------------- diagonals


def _elementwise(group: str, base: Model | None, models: Sequence[Model], damping: float) -> Solved:
    """Solve by division, a part of the elements at a time."""
    ((name, like),) = models[0].weights.items()
    found = torch.empty(like.numel(), dtype=torch.float64)
    for start in range(0, like.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        extra = damping if base is None else 0.0
        origin = torch.zeros(1, dtype=torch.float64) if base is None else _part(base.weights[name], part)
        prior = torch.zeros(1, dtype=torch.float64) if base is None else _values(base, part) + damping
        total, right = prior.clone(), torch.zeros(1, dtype=torch.float64)
        for model in models:
            own = _values(model, part) + extra
            total = total + model.scale * own
            right = right + model.scale * (prior + own) * (_part(model.weights[name], part) - origin)
        smallest = float(total.min())
        if not smallest > 0:
            raise _not_positive(group, smallest)
        found[part] = origin + right / total
    return Solved({name: found.view(like.shape)})


def _values(model: Model, part: slice) -> Tensor:
    total = torch.zeros(1, dtype=torch.float64)
    for curve in model.curves:
        assert isinstance(curve, DiagonalCurve)
        total = total + _part(curve.values, part)
    return total


def _part(value: Tensor, part: slice) -> Tensor:
    return value.reshape(-1)[part].double()


# ---------------------------------------------------------------- systems of equations


@final
@dataclass(frozen=True)
class _System:
    """H = sum of scale * curve + damping I over the weights of a group."""

    group: str
    shapes: Mapping[str, tuple[int, ...]]
    terms: Sequence[tuple[float, Curve]]
    damping: float

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64)

    def flat(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].reshape(-1).double() for name in self.shapes])

    def product(self, vector: Tensor) -> Tensor:
        """Return H v."""
        named, total = split_by_name(vector, self.shapes), self.damping * vector
        places = split_by_name(total, self.shapes)  # views
        for scale, curve in self.terms:
            for name, value in curve.product(named).items():
                places[name].add_(value, alpha=scale)
        return total

    def solve(self, right: Tensor, guess: Tensor) -> tuple[Tensor, int]:
        """Return H^-1 r and the number of steps, starting from a guess that is exact where the curvature is 0."""
        whole = any(isinstance(curve, DenseCurve) for _, curve in self.terms)
        if whole or self.size <= _DENSE:
            return self._factored(right), 0
        root = self._preconditioner()
        if any(scale < 0 for scale, _ in self.terms):
            self._refuse_indefinite(root)
        if not bool(right.any()):  # no network moved: a residual relative to the right side has no meaning
            return torch.zeros_like(right), 0
        return self._conjugate_gradients(right, guess, root)

    def _factored(self, right: Tensor) -> Tensor:
        matrix = self._matrix()
        matrix = (matrix + matrix.T) / 2
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise _not_positive(self.group, float(torch.linalg.eigvalsh(matrix)[0]))
        return torch.cholesky_solve(right[:, None], factor)[:, 0]

    def _matrix(self) -> Tensor:
        """Form H [size, size]: dense curves are added directly, all others column by column through products."""
        matrix = self.damping * torch.eye(self.size, dtype=torch.float64)
        others = []
        for scale, curve in self.terms:
            if isinstance(curve, DenseCurve) and list(curve.shapes) == list(self.shapes):
                matrix.add_(curve.matrix, alpha=scale)
            else:
                others.append((scale, curve))
        if others:
            rest, unit = replace(self, terms=others, damping=0.0), self.zeros()
            for number in range(self.size):
                unit[number] = 1.0
                matrix[number] += rest.product(unit)
                unit[number] = 0.0
        return matrix

    def _preconditioner(self) -> Callable[[Tensor, float], Tensor]:
        """Return (v, power) -> M^power v, with M near the positive part of H and diagonal in a product of two bases."""
        blocks = [(scale, curve) for scale, curve in self.terms if scale > 0 and isinstance(curve, BlockCurve)]
        if not blocks:
            return lambda vector, _power: vector
        layout = blocks[0][1].layout
        terms = [term.times(scale) for scale, curve in blocks if curve.layout == layout for term in curve.terms]
        eigen = eigen_of(terms)
        values = eigen.values.clamp_min(0) + self.damping + self._mean_diagonal(layout.names)

        def apply(vector: Tensor, power: float) -> Tensor:
            named = split_by_name(vector, self.shapes)
            rotated = chain(eigen.qb.mT, layout.matrix(named), eigen.qa) * values**power
            turned = layout.named(chain(eigen.qb, rotated, eigen.qa.mT))
            return torch.cat([turned[name].reshape(-1) for name in self.shapes])

        return apply if set(layout.names) == set(self.shapes) else lambda vector, _power: vector

    def _mean_diagonal(self, names: Sequence[str]) -> float:
        """Mean element of the sum of the diagonals with positive scale."""
        count = sum(math.prod(self.shapes[name]) for name in names)
        diagonals = [(scale, curve) for scale, curve in self.terms if scale > 0 and isinstance(curve, DiagonalCurve)]
        return sum(scale * float(curve.values.double().sum()) for scale, curve in diagonals) / count

    def _refuse_indefinite(self, root: Callable[[Tensor, float], Tensor]) -> None:
        """Refuse an H that is not positive definite, by the smallest eigenvalue of M^-1/2 H M^-1/2.

        By Sylvester's law of inertia both have equally many negative eigenvalues; the latter has few of them.

        Raises:
            ConfigError: H is not positive definite.
            DivergedError: the smallest eigenvalue was not found.
        """

        def apply(vector: Floats) -> Floats:
            given = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1).copy())
            found: Floats = root(self.product(root(given, -0.5)), -0.5).numpy()
            return found

        operator = LinearOperator((self.size, self.size), matvec=apply, dtype=np.float64)
        begin = np.random.default_rng(0).standard_normal(self.size)
        try:
            smallest = float(eigsh(operator, k=1, which="SA", v0=begin, tol=1e-4, return_eigenvectors=False)[0])
        except ArpackNoConvergence as error:
            raise DivergedError(
                f"the smallest eigenvalue of the merged precision of '{self.group}' was not found; raise "
                "--prior-precision, or set a weight nearer to 0"
            ) from error
        if not smallest > 0:
            raise _not_positive(self.group, smallest)

    def _conjugate_gradients(
        self, right: Tensor, guess: Tensor, root: Callable[[Tensor, float], Tensor]
    ) -> tuple[Tensor, int]:
        """Solve by preconditioned conjugate gradients (Hestenes and Stiefel 1952)."""
        found, residual = guess.clone(), right - self.product(guess)
        solved = root(residual, -1.0)
        direction, size = solved.clone(), float(residual @ solved)
        goal = _TOLERANCE**2 * float(right @ root(right, -1.0))
        for step in range(_STEPS):
            if size <= goal:
                return found, step
            image = self.product(direction)
            curvature = float(direction @ image)
            if not curvature > 0:
                raise _not_positive(self.group, curvature / float(direction @ direction))
            length = size / curvature
            found.add_(direction, alpha=length)
            residual.sub_(image, alpha=length)
            solved = root(residual, -1.0)
            before, size = size, float(residual @ solved)
            direction = solved + direction * (size / before)
        if size <= (_ENOUGH / _TOLERANCE) ** 2 * goal:
            return found, _STEPS
        raise DivergedError(
            f"conjugate gradients for the merged weights of '{self.group}' did not converge in {_STEPS} steps ("
            f"relative residual {math.sqrt(size / goal) * _TOLERANCE:.1e}); raise --prior-precision"
        )


def _not_positive(group: str, smallest: float) -> ConfigError:
    return ConfigError(
        f"the merged precision of '{group}' is not positive definite (it has an eigenvalue of about {smallest:.3g}): a "
        "negative weight removes too much; set it nearer to 0, or raise --prior-precision"
    )


def refuse_infinite(group: str, models: Sequence[Model]) -> None:
    """Raise DivergedError if weights or curvature of a group are not finite."""
    for model in models:
        tensors = [*model.weights.values(), *(tensor for curve in model.curves for tensor in curve.tensors)]
        if not all(bool(tensor.sum().isfinite()) for tensor in tensors):
            raise DivergedError(f"weights or curvature of '{group}' are not finite: a network has diverged")


# ---------------------------------------------------------------- tensors


def _sum(models: Sequence[Model], name: str) -> Tensor:
    """Return sum_t a_t w_t."""
    total = torch.zeros(models[0].weights[name].shape, dtype=torch.float64)
    for model in models:
        total.add_(model.weights[name], alpha=model.scale)
    return total


def _tensors(term: Term) -> list[Tensor]:
    match term:
        case Pair():
            return [tensor for factor in (term.a, term.b) for tensor in vars(factor).values()]
        case Eigen():
            return [term.qa, term.qb, term.values, term.a, term.b]
