"""The Laplace posterior of a network: a normal distribution over its weights, from a Precision.

    N(w; m, P^-1)      P = s F + delta I = Q diag(s values + delta) Q'

    solve              P^-1 v
    root               P^-1/2 v, the symmetric square root: it does not depend on the choice of eigenvectors
    sample             m + P^-1/2 e,  e ~ N(0, I)
    logit_variance     J P^-1 J',  J = d logits / d weights at m
    log evidence       -nats - 1/2 delta |m - m0|^2 - 1/2 (log det P - W log delta)         W weights

Damping is exact: delta is added to the eigenvalues of F, not split between the factors of a Kronecker product. The
eigenvalues are computed once and serve every delta. As a function of log delta the evidence has one maximum, where

    delta |m - m0|^2 = gamma(delta) = sum_i s values_i / (s values_i + delta),

the number of weights that the data determine.

Sources: MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Ritter et al. 2018, "A scalable
Laplace approximation for neural networks", ICLR; Immer et al. 2021, "Scalable marginal likelihood estimation for model
selection in deep learning", ICML.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from hpccl.curvature.capture import measuring, working_bytes
from hpccl.curvature.coverage import footprint, refuse_unfit
from hpccl.curvature.jacobians import logit_jacobians, logits_at, maps
from hpccl.curvature.protocols import Precision, Weights, accumulation_dtype
from hpccl.curvature.spectrum import Spectrum, covered, spectra
from hpccl.curvature.sweep import listed
from hpccl.dist.comm import Comm
from hpccl.dist.grouping import filled
from hpccl.errors import ConfigError, CoverageError, DivergedError

__all__ = ["Posterior"]


@final
@dataclass(frozen=True)
class Posterior:
    """N(mean, (scale F + prior_precision I)^-1) over the weights that a Precision F covers.

    Each rank holds the eigenvectors of its own layers; results combine all ranks and are equal on all of them. So every
    method but `with_prior_precision` is collective.

    mean: by name; may have names without curvature (buffers, frozen weights), which never change
    shapes: shapes of the covered weights, by name
    spectra: this rank's pieces of F
    scale: s
    prior_precision: delta
    comm: the ranks
    """

    mean: Weights
    shapes: Mapping[str, tuple[int, ...]]
    spectra: tuple[Spectrum, ...]
    scale: float
    prior_precision: float
    comm: Comm

    @classmethod
    def of(
        cls,
        precision: Precision,
        mean: Weights,
        *,
        scale: float = 1.0,
        prior_precision: float,
        comm: Comm | None = None,
    ) -> Posterior:
        """Build the posterior of a Precision; collective.

        Exact for one Kronecker product or eigenbasis per layer, for diagonals and dense matrices. A layer with several
        terms has no eigenvectors of product form; it is replaced by their `kron.merge.refit`, which keeps the exact
        diagonal in the basis of their nearest Kronecker product and drops the off-diagonal elements.

        Curvature is fp32: eigenvalues below 1e-7 of a layer's largest are rounding errors, and delta should be larger.

        Args:
            precision: F, as the ranks of `comm` hold it: summed over examples, in nats.
            mean: the weights at which it was measured.
            scale: s, the factor of F; 1 is untempered.
            prior_precision: delta > 0, of an isotropic normal prior.
            comm: the ranks; None: a single one.

        Raises:
            ConfigError: `scale` or `prior_precision` is out of range.
            CoverageError: `mean` lacks a weight that F covers, or this rank lacks a layer of F.
            DivergedError: F is not finite.
            WorldError: any of these on another rank.
        """
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"scale={scale} of the curvature; allowed: a finite number >= 0")
        _check_prior_precision(prior_precision)
        shapes = covered(precision)
        _refuse_absent(shapes, mean, "the mean")
        comm = comm or Comm.solo()
        return cls(dict(mean), shapes, spectra(precision, comm), scale, prior_precision, comm)

    @property
    def num_weights(self) -> int:
        """W, the number of covered weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def with_prior_precision(self, prior_precision: float) -> Posterior:
        """Return the posterior with another delta > 0; costs nothing.

        Raises:
            ConfigError: it is out of range.
        """
        _check_prior_precision(prior_precision)
        return replace(self, prior_precision=prior_precision)

    def solve(self, delta: Weights) -> dict[str, Tensor]:
        """Return (scale F + prior_precision I)^-1 delta; fp32, or fp64 for delta in fp64.

        Raises:
            CoverageError: `delta` does not have exactly the names and shapes that are covered.
        """
        return self._applied(delta, -1.0)

    def root(self, delta: Weights) -> dict[str, Tensor]:
        """Return R delta with R = R' and R R' the covariance; fp32, or fp64 for delta in fp64.

        Raises:
            CoverageError: as in `solve`.
        """
        return self._applied(delta, -0.5)

    def sample(self, seed: int, number: int) -> dict[str, Tensor]:
        """Draw weights from the posterior, with all other tensors of the mean; in the mean's dtypes.

        A function of (seed, number, parameter name) and the posterior, for any number of ranks.
        """
        noise = {name: _noise(seed, number, name, self.mean[name]) for name in self.shapes}
        moved = self.root(noise)
        return {
            name: (value + moved[name].to(value.device)).to(value.dtype) if name in moved else value
            for name, value in self.mean.items()
        }

    def log_determinant(self) -> float:
        """Log determinant of the posterior's precision matrix."""
        return self.num_weights * math.log(self.prior_precision) + self._log_ratio()

    def log_evidence(self, nats: float, prior_mean: Weights | None = None) -> float:
        """Laplace's approximation of the log marginal likelihood, in nats.

        Args:
            nats: negative log likelihood of all data at the mean, whose curvature is F.
            prior_mean: m0 of the normal prior, by name; None: 0.

        Raises:
            CoverageError: `prior_mean` lacks a weight.
        """
        distance = self.prior_precision * self._square_distance(prior_mean)
        return -nats - 0.5 * (distance + self._log_ratio())

    def effective_parameters(self) -> float:
        """Gamma, the number of weights that the data determine rather than the prior: 0 to W."""
        return self._total(lambda values: values / (values + self.prior_precision))

    def best_prior_precision(self, prior_mean: Weights | None = None) -> float:
        """Find the delta with the largest `log_evidence`, to 10 digits; it does not depend on the likelihood term.

        Raises:
            ConfigError: there is none, because the mean is the prior's or the curvature is zero.
            CoverageError: `prior_mean` lacks a weight.
        """
        distance, trace, largest = (
            self._square_distance(prior_mean),
            self._total(lambda values: values),
            self._largest(),
        )
        if distance == 0:
            raise ConfigError("the mean is the prior mean, so the evidence has no maximum in the prior precision")
        if trace == 0:
            raise ConfigError("the curvature is zero, so the evidence has no maximum in the prior precision")

        def slope(log_delta: float) -> tuple[float, float]:
            """Twice the evidence's derivative by log delta, which decreases everywhere, and its own derivative."""
            delta = math.exp(log_delta)
            gamma = self._total(lambda values: values / (values + delta))
            falls = self._total(lambda values: values * delta / (values + delta).square())
            return gamma - delta * distance, -falls - delta * distance

        # trace / (largest + delta) <= gamma <= W bounds the root on both sides.
        ratio = trace / distance
        low = math.log(2 * ratio / (largest + math.hypot(largest, 2 * math.sqrt(ratio))))
        return math.exp(_falling_root(slope, low, math.log(self.num_weights / distance)))

    def logit_variance(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return the covariance [n, C, C] of the logits of the model linearised at the mean, J P^-1 J' for each image.

        Exact. Memory is bounded by taking a part of the images and of the layers at a time, but at least one image and
        layer, whose Jacobian has C times as many numbers as the layer has weights.

        Args:
            model: gives the forward pass, in evaluation mode; the mean replaces its own weights.
            pixels: [n, channels, h, w], the same on all ranks.

        Raises:
            CoverageError: the model's trainable weights are not those that are covered, or its examples are coupled.
            DivergedError: a derivative is not finite.
        """
        refuse_unfit(model)
        like = next(iter(model.parameters()))
        weights, pixels = self._mean_of(model), pixels.to(like)
        with measuring(model, like.device):
            with torch.no_grad():
                num_classes = logits_at(model, weights, pixels[:1]).shape[1]
            total = torch.zeros(len(pixels), num_classes, num_classes, dtype=like.dtype, device=like.device)
            if len(pixels):
                held = footprint(model, pixels[:2])
                row = num_classes * like.element_size()  # bytes of a weight in an image's Jacobian
                for group in filled(
                    self.spectra, lambda each: row * each.values.numel(), working_bytes(like.device) // 4
                ):
                    self._add_variance(total, group, model, weights, pixels=pixels, held=held)
        self.comm.sum_([total])
        bad = ~total.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise DivergedError(
                f"the derivative of the logits is not finite for image {int(bad.nonzero()[0])} of {len(pixels)}; "
                "the model has diverged, or its pixels are not finite"
            )
        return total

    # ------------------------------------------------------------ parts

    def _applied(self, delta: Weights, power: float) -> dict[str, Tensor]:
        """P^power delta."""
        _refuse_absent(self.shapes, delta, "the vector")
        unknown = delta.keys() - self.shapes.keys()
        if unknown:
            raise CoverageError(f"parameter '{min(unknown)}' has no curvature; covered: {listed(self.shapes)}")
        own: dict[str, Tensor] = {}
        for spectrum in self.spectra:
            coefficients = spectrum.coefficients({name: delta[name][None] for name in spectrum.names})[0]
            own |= spectrum.weights(coefficients * self._eigenvalues(spectrum) ** power)
        wide = {name: own[name].to(accumulation_dtype(value.dtype)) for name, value in delta.items() if name in own}
        if self.comm.size > 1:
            for name, value in delta.items():
                if name not in wide:
                    dtype = accumulation_dtype(value.dtype)
                    wide[name] = torch.zeros(value.shape, dtype=dtype, device=self.comm.device)
            self.comm.sum_([wide[name] for name in self.shapes])
        return {name: wide[name] for name in self.shapes}

    def _eigenvalues(self, spectrum: Spectrum) -> Tensor:
        return self.scale * spectrum.values + self.prior_precision

    def _log_ratio(self) -> float:
        """Log determinant of P / delta; without the cancellation of two large numbers."""
        return self._total(lambda values: torch.log1p(values / self.prior_precision))

    def _total(self, function: Callable[[Tensor], Tensor]) -> float:
        """Sum of a function of the eigenvalues of scale F, in float64, over all ranks."""
        mine = sum(float(function(self.scale * spectrum.values.double()).sum()) for spectrum in self.spectra)
        total = torch.tensor([mine], dtype=torch.float64, device=self.comm.device)
        self.comm.sum_([total])
        return float(total)

    def _largest(self) -> float:
        mine = max((self.scale * float(s.values.max()) for s in self.spectra if s.values.numel()), default=0.0)
        return float(self.comm.gather(torch.tensor([mine], dtype=torch.float64, device=self.comm.device)).max())

    def _square_distance(self, prior_mean: Weights | None) -> float:
        """|mean - prior mean|^2 over the covered weights."""
        if prior_mean is not None:
            _refuse_absent(self.shapes, prior_mean, "the prior mean")
        total = 0.0
        for name in self.shapes:
            value = self.mean[name].double()
            total += float((value if prior_mean is None else value - prior_mean[name].to(value)).square().sum())
        return total

    def _mean_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean in the model's dtypes; refuse a model with other trainable weights than are covered."""
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        uncovered = trained - self.shapes.keys()
        if uncovered:
            raise CoverageError(
                f"the model's trainable parameter '{min(uncovered)}' has no curvature, and so no posterior; "
                f"covered: {listed(self.shapes)}; freeze it (requires_grad=False), or measure this model"
            )
        theirs = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        _refuse_absent(self.shapes, theirs, "the model")
        return {name: value.to(theirs[name]) for name, value in self.mean.items() if name in theirs}

    def _add_variance(
        self, total: Tensor, group: list[Spectrum], model: nn.Module, weights: Weights, *, pixels: Tensor, held: int
    ) -> None:
        names = [name for spectrum in group for name in spectrum.names]
        mapped = maps(model, weights, names, pixels)
        num_classes = total.shape[1]
        numel = sum(spectrum.values.numel() for spectrum in group)
        # The Jacobian, its coefficients and one copy of each; and what the backward passes of all logits need.
        each = num_classes * (4 * total.element_size() * numel + held)
        size = max(1, working_bytes(total.device) // max(1, each))
        for images, target in zip(pixels.split(size), total.split(size), strict=True):
            rows = logit_jacobians(model, weights, names, images, mapped=mapped)
            for spectrum in group:
                own = {name: rows.pop(name).flatten(0, 1) for name in spectrum.names}
                coefficients = spectrum.coefficients(own) * self._eigenvalues(spectrum).rsqrt()
                half = coefficients.flatten(1).unflatten(0, (len(images), num_classes))
                target.add_((half @ half.mT).to(target))


def _check_prior_precision(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"prior_precision={value}; allowed: a finite number > 0, as curvature alone determines no posterior "
            "(most of its eigenvalues are 0)"
        )


def _refuse_absent(shapes: Mapping[str, tuple[int, ...]], given: Weights, what: str) -> None:
    absent = [name for name in shapes if name not in given]
    if absent:
        raise CoverageError(f"{what} lacks {len(absent)} weights that the curvature covers: {listed(absent)}")
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            raise CoverageError(
                f"'{name}' has shape {tuple(given[name].shape)} in {what}, but {shape} in the curvature; "
                "both must come from the same model"
            )


def _noise(seed: int, number: int, name: str, like: Tensor) -> Tensor:
    """Draw standard normal numbers in the shape of `like`, on the CPU: the same on every machine and rank."""
    key = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(tuple(like.shape))).to(accumulation_dtype(like.dtype))


def _falling_root(slope: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Find the root of a decreasing function between `low` and `high`: Newton's method, with bisection as safeguard."""
    at = (low + high) / 2
    for _ in range(200):
        value, derivative = slope(at)
        if value > 0:
            low = at
        else:
            high = at
        step = at - value / derivative
        if abs(step - at) < 1e-11:
            return step
        at = step if low < step < high else (low + high) / 2
    return at
