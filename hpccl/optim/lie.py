"""The Lie-group Bayesian learning rule: weights are fixed noise transformed by a group element, which is learned.

With the mean loss l, f the schedule's factor of the learning rate, t = T / (N augmentation), delta the prior precision
/ N and every gradient that of l + delta |theta|^2 / 2 at theta:

    additive        theta = g + xi            M <- beta1 M + (1 - beta1) E[grad],  g <- g - alpha f M
    multiplicative  theta = g+ x+ - g- x-     U+ = E[(g+ x+) grad] - t,  U- = -E[(g- x-) grad] - t
                                              M <- beta1 M + (1 - beta1) U,  g <- g exp(-alpha f M), for + and -
    affine          theta = b + A xi          U = E[A xi grad] - t,  V = E[A grad]
                                              M_U <- beta2 M_U + (1 - beta2) U,  M_V <- beta1 M_V + (1 - beta1) V
                                              b <- b + A M_V (exp(-r M_U) - 1) / M_U,  r = alpha1 f   (the old A)
                                              A <- A exp(-alpha2 f M_U)

xi ~ N(0, sigma0^2), x Rayleigh distributed with scale 1 (E x^2 = 2). Source: Kıral, Möllenhoff and Khan 2023, "The
Lie-group Bayesian learning rule", AISTATS.
"""

from __future__ import annotations

from typing import Any, assert_never, final

import torch
from torch import Tensor

from hpccl.config.base import per_task
from hpccl.config.optim import AdditiveGroup, AffineGroup, LieOptim, MultiplicativeGroup
from hpccl.optim.perturbing import Draw, Sampling

__all__ = ["Lie"]

_SIDES = ("excitation", "inhibition")
_SMALL = 1e-6  # for |u| below it, (exp(-r u) - 1) / u is computed by its series


@final
class Lie(Sampling):
    """See the module. State: 4 bytes per weight (additive), 16 (multiplicative), 12 (affine).

    Between steps the weights are g, g+ - g- or b.
    """

    def __init__(self, parameters: Any, config: LieOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0]}, passes=config.samples)
        self._config = config

    @property
    def _size(self) -> float:
        """N times the augmentation factor."""
        return self.num_train * self._config.augmentation

    @property
    def _decay(self) -> float:
        return self._config.prior_precision / self._size

    @property
    def _heat(self) -> float:
        """The variable t of the module."""
        return self._config.temperature / self._size

    def centre(self, tensor: Tensor) -> Tensor:
        """See Sampling."""
        return torch.zeros_like(tensor) if isinstance(self._config.group, MultiplicativeGroup) else tensor

    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """See Sampling."""
        match self._config.group:
            case AdditiveGroup(noise=noise):
                return (draw(tensor, number).mul_(noise),)
            case AffineGroup(noise=noise):
                (scale,) = self._scale([tensor])
                return (draw(tensor, number).mul_(noise).mul_(scale),)
            case MultiplicativeGroup():
                excited, inhibited = self._sides(tensor)
                return (
                    _rayleigh(tensor, draw, 4 * number).mul_(excited),
                    _rayleigh(tensor, draw, 4 * number + 2).mul_(inhibited).neg_(),
                )
            case _ as never:
                assert_never(never)

    def _multiplied(self, tensor: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return displacements times the gradient, which includes the prior's, at the drawn weights."""
        parts = self._displacements.pop(tensor)
        if isinstance(self._config.group, AdditiveGroup):
            return ()
        total = torch.add(gradient, sum(parts, self.centre(tensor)), alpha=self._decay)
        return tuple(part.mul_(total) for part in parts)

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        rate: float = settings["lr"]
        products = self.products(tensors)
        match self._config.group:
            case AdditiveGroup():
                self._add(tensors, gradients, rate)
            case AffineGroup() as group:
                self._move(tensors, gradients, products, rate, group)
            case MultiplicativeGroup():
                self._multiply(tensors, products, rate)
            case _ as never:
                assert_never(never)

    def _add(self, tensors: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        momentum = self.kept(tensors, "momentum", torch.zeros_like)
        total = torch._foreach_add(gradients, tensors, alpha=self._decay)
        torch._foreach_lerp_(momentum, total, 1 - self._config.momentum)
        torch._foreach_add_(tensors, momentum, alpha=-rate)

    def _move(
        self,
        tensors: list[Tensor],
        gradients: list[Tensor],
        products: list[tuple[Tensor, ...]] | None,
        rate: float,
        group: AffineGroup,
    ) -> None:
        scale = self._scale(tensors)
        shift_momentum = self.kept(tensors, "momentum", torch.zeros_like)
        scale_momentum = self.kept(tensors, "scale_momentum", torch.zeros_like)
        total = torch._foreach_add(gradients, tensors, alpha=self._decay)
        torch._foreach_mul_(total, scale)
        torch._foreach_lerp_(shift_momentum, total, 1 - self._config.momentum)
        if products is not None:
            found = [product for (product,) in products]
            torch._foreach_sub_(found, self._heat)
            torch._foreach_lerp_(scale_momentum, found, 1 - group.scale_momentum)
        for tensor, a, u, v in zip(tensors, scale, scale_momentum, shift_momentum, strict=True):
            tensor.addcmul_(a * v, _slope(u, rate))
        slower = rate * group.scale_lr / per_task(self._config.lr, self.task)
        torch._foreach_mul_(scale, torch._foreach_exp(torch._foreach_mul(scale_momentum, -slower)))

    def _multiply(self, tensors: list[Tensor], products: list[tuple[Tensor, ...]] | None, rate: float) -> None:
        for number, tensor in enumerate(tensors):
            sides = self._sides(tensor)
            for which, side in enumerate(sides):
                (momentum,) = self.kept([tensor], f"momentum_{_SIDES[which]}", torch.zeros_like)
                if products is not None:
                    momentum.lerp_(products[number][which].sub_(self._heat), 1 - self._config.momentum)
                side.mul_(torch.exp(momentum * -rate))
            torch.sub(*sides, out=tensor)

    def _scale(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the variable A of the module, for each tensor."""
        group = self._config.group
        assert isinstance(group, AffineGroup), "only it has a scale"
        first = group.initial_scale
        return self.kept(tensors, "scale", lambda tensor: torch.full_like(tensor, first))

    def _sides(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return g+ and g-; initially the weight's positive and negative part, whose difference is the weight."""
        group = self._config.group
        assert isinstance(group, MultiplicativeGroup), "only it has sides"
        offset = group.offset
        (excited,) = self.kept([tensor], _SIDES[0], lambda value: value.clamp(min=0) + offset)
        (inhibited,) = self.kept([tensor], _SIDES[1], lambda value: (-value).clamp(min=0) + offset)
        return excited, inhibited


def _rayleigh(tensor: Tensor, draw: Draw, number: int) -> Tensor:
    """Draw Rayleigh distributed numbers: lengths of vectors of two standard normals."""
    return torch.hypot(draw(tensor, number), draw(tensor, number + 1))


def _slope(u: Tensor, rate: float) -> Tensor:
    """Return (exp(-r u) - 1) / u; its limit where u is 0."""
    small = u.abs() < _SMALL
    safe = torch.where(small, torch.ones_like(u), u)
    return torch.where(small, u * (rate * rate / 2) - rate, torch.expm1(safe * -rate) / safe)
