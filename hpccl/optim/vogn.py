"""VOGN: a Gaussian over weights, with a precision from per-example squared gradients.

    delta~ = tau delta / (rho N),   sigma^2 = tau / (rho N (s + delta~ + gamma)),   w = mu + sigma eps
    g^ = mean of g_i,  h^ = mean of g_i^2 over examples and draws,  g_i = gradient of example i's nats at w
    m <- beta1 m + g^ + delta~ mu
    s <- (1 - beta2) s + beta2 h^         (the first step: s = h^, and w = mu)
    mu <- mu - alpha m / (s + delta~ + gamma)

N: training examples; rho: augmentation; tau: temperature. BatchNorm's parameters: delta~ = 0 and sigma = 0.
Source: Osawa et al. 2019, "Practical deep learning with Bayesian principles", NeurIPS; s decays as in the released code
(by beta2, not tau beta2; equal for tau = 1), so that N rho s / tau + delta is the precision.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from hpccl.config.optim import VognOptim
from hpccl.optim.perturbing import Draw, Sampling

__all__ = ["Vogn"]


@final
class Vogn(Sampling):
    """See the module. State: momentum m and curvature s, 8 bytes per weight.

    A group of parameters with `prior` False is neither perturbed nor decayed.
    """

    def __init__(self, parameters: Any, config: VognOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0], "prior": True}, passes=config.samples)
        self._config = config
        self._squares: dict[Tensor, Tensor] = {}

    @property
    def _size(self) -> float:
        """N times the augmentation factor."""
        return self.num_train * self._config.augmentation

    @property
    def _decay(self) -> float:
        """Delta~."""
        return self._config.temperature * self._config.prior_precision / self._size

    def add_squares(self, tensor: Tensor, squares: Tensor) -> None:
        """Add the squared gradients of one pass, a mean over the step's examples on all ranks."""
        share = squares / self.passes
        self._squares[tensor] = self._squares[tensor].add_(share) if tensor in self._squares else share

    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """See Sampling."""
        kept = self.state[tensor]
        if "curvature" not in kept or not kept.get("drawn", True):
            return ()
        regular = kept["curvature"] + (self._decay + self._config.damping)
        return (draw(tensor, number).mul_(regular.mul_(self._size / self._config.temperature).rsqrt_()),)

    def _multiplied(self, tensor: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        del self._displacements[tensor]
        return ()

    def forget(self) -> None:
        """See Perturbing."""
        super().forget()
        self._squares.clear()

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        config = self._config
        decay = self._decay if settings["prior"] else 0.0
        momentum = self.kept(tensors, "momentum", torch.zeros_like)
        torch._foreach_mul_(momentum, config.momentum)
        torch._foreach_add_(momentum, gradients)
        torch._foreach_add_(momentum, tensors, alpha=decay)
        for tensor in tensors:
            squares, kept = self._squares.pop(tensor, None), self.state[tensor]
            kept["drawn"] = settings["prior"]  # set here, because ZeRO's groups have no tensors at other times
            if squares is not None and "curvature" in kept:
                kept["curvature"].lerp_(squares, config.curvature_rate)
            elif squares is not None:
                kept["curvature"] = squares
        curvature = self.kept(tensors, "curvature", torch.zeros_like)
        regular = torch._foreach_add(curvature, decay + config.damping)
        torch._foreach_addcdiv_(tensors, momentum, regular, value=-settings["lr"])
