"""SAM and bSAM: take the gradient at the worst weights nearby, so that minima are flat.

SAM, over SGD with heavy-ball momentum (Foret et al. 2021, "Sharpness-aware minimization", ICLR):

    e = rho g / |g|,  g = grad of the mean loss at w,  g^ at w + e
    m <- beta1 m + g^ + delta w,   w <- w - alpha m

bSAM, q = N(w, 1 / (N s)) (Möllenhoff and Khan 2023, "SAM as an optimal relaxation of Bayes", ICLR):

    g at w + n / sqrt(N s), n ~ N(0, 1),  e = rho g / s,  g^ at w + e
    m <- beta1 m + (1 - beta1) (g^ + delta w),   w <- w - alpha m / s                     (the old s)
    s <- beta2 s + (1 - beta2) (sqrt(s) |g| + gamma + delta)

with delta the prior precision / N (SAM: the weight decay); N is multiplied by `augmentation`. g is the gradient of the
whole batch over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from hpccl.config.optim import BsamOptim, SamOptim
from hpccl.optim.perturbing import Draw, Norm, Perturbing

__all__ = ["Bsam", "Sam"]


@final
class Sam(Perturbing):
    """See the module. State: momentum m, 4 bytes per weight."""

    passes = 2

    def __init__(self, parameters: Any, config: SamOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0]})
        self._config = config
        self._steps: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def trial(self, number: int, tensors: Sequence[Tensor], draw: Draw) -> list[Tensor] | None:
        """See Perturbing."""
        if number == 0:
            return None
        return [tensor + self._steps.pop(tensor) if tensor in self._steps else tensor for tensor in tensors]

    @torch.no_grad()
    def note(self, number: int, tensors: Sequence[Tensor], norm: Norm) -> None:
        """See Perturbing."""
        if number == 0:
            held = [tensor for tensor in tensors if tensor.grad is not None]
            gradients = [tensor.grad for tensor in held if tensor.grad is not None]
            length = norm(gradients)
            scale = self._config.radius / (length + torch.finfo(length.dtype).tiny)
            self._steps = {
                tensor: gradient * scale.to(gradient) for tensor, gradient in zip(held, gradients, strict=True)
            }

    def forget(self) -> None:
        """See Perturbing."""
        self._steps.clear()

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        momentum = self.kept(tensors, "momentum", torch.zeros_like)
        torch._foreach_mul_(momentum, self._config.momentum)
        torch._foreach_add_(momentum, gradients)
        torch._foreach_add_(momentum, tensors, alpha=self._config.weight_decay)
        torch._foreach_add_(tensors, momentum, alpha=-settings["lr"])


@final
class Bsam(Perturbing):
    """See the module. State: momentum m and curvature s, 8 bytes per weight."""

    passes = 2

    def __init__(self, parameters: Any, config: BsamOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0]})
        self._config = config
        self._first: dict[Tensor, Tensor] = {}

    @property
    def _size(self) -> float:
        """N times the augmentation factor."""
        return self.num_train * self._config.augmentation

    def _curvature(self, tensors: list[Tensor]) -> list[Tensor]:
        first = self._config.initial_curvature
        return self.kept(tensors, "curvature", lambda tensor: torch.full_like(tensor, first))

    @torch.no_grad()
    def trial(self, number: int, tensors: Sequence[Tensor], draw: Draw) -> list[Tensor] | None:
        """See Perturbing."""
        curvatures = self._curvature(list(tensors))
        if number == 0:
            pairs = zip(tensors, curvatures, strict=True)
            return [tensor + draw(tensor, 0).div_((self._size * s).sqrt_()) for tensor, s in pairs]
        radius = self._config.radius
        return [
            torch.addcdiv(tensor, self._first[tensor], s, value=radius) if tensor in self._first else tensor
            for tensor, s in zip(tensors, curvatures, strict=True)
        ]

    @torch.no_grad()
    def note(self, number: int, tensors: Sequence[Tensor], norm: Norm) -> None:
        """See Perturbing."""
        if number == 0:
            self._first = {tensor: tensor.grad.clone() for tensor in tensors if tensor.grad is not None}

    def forget(self) -> None:
        """See Perturbing."""
        self._first.clear()

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        config = self._config
        decay = config.prior_precision / self._size
        momentum = self.kept(tensors, "momentum", torch.zeros_like)
        curvature = self._curvature(tensors)
        torch._foreach_mul_(momentum, config.momentum)
        torch._foreach_add_(momentum, gradients, alpha=1 - config.momentum)
        torch._foreach_add_(momentum, tensors, alpha=(1 - config.momentum) * decay)
        torch._foreach_addcdiv_(tensors, momentum, curvature, value=-settings["lr"])
        if not all(tensor in self._first for tensor in tensors):
            return
        found = torch._foreach_abs([self._first.pop(tensor) for tensor in tensors])
        torch._foreach_mul_(found, torch._foreach_sqrt(curvature))
        torch._foreach_add_(found, config.damping + decay)
        torch._foreach_lerp_(curvature, found, 1 - config.curvature_decay)
