"""The improved variational online Newton rule for a diagonal Gaussian, in units of the summed loss.

    L(theta) = N (mean loss) + delta |theta|^2 / 2,  q = N(m, 1 / s)
    theta = m + e,  e ~ N(0, 1 / s),  g = grad L(theta)
    h = g s e                                       (the reparametrised estimate of the Hessian's diagonal)
    s <- (1 - rho) s + rho h + rho^2 (h - s)^2 / (2 s)
    m <- m - alpha g / s                            (the new s)

With u = rho (h / s - 1), s becomes s (1 + u + u^2 / 2) >= s / 2: it stays positive, and h = s is its fixed point. The
prior's part of g and h is taken in expectation. Source: Lin, Schmidt and Khan 2020, "Handling the positive-definite
constraint in the Bayesian learning rule", ICML: their update of a precision, for a diagonal one.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from hpccl.config.optim import SobaOptim
from hpccl.optim.perturbing import Draw, Sampling

__all__ = ["Soba"]


@final
class Soba(Sampling):
    """See the module. State: curvature s, 4 bytes per weight."""

    def __init__(self, parameters: Any, config: SobaOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0]}, passes=config.samples)
        self._config = config

    def _curvature(self, tensors: list[Tensor]) -> list[Tensor]:
        first = self._config.initial_curvature * self.num_train
        return self.kept(tensors, "curvature", lambda tensor: torch.full_like(tensor, first))

    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """See Sampling."""
        (curvature,) = self._curvature([tensor])
        return (draw(tensor, number).mul_(curvature.rsqrt()),)

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        config = self._config
        products = self.products(tensors)
        curvature = self._curvature(tensors)
        if products is not None:
            self._learn(curvature, [product for (product,) in products])
        change = torch._foreach_mul(gradients, float(self.num_train))
        torch._foreach_add_(change, tensors, alpha=config.prior_precision)
        torch._foreach_addcdiv_(tensors, change, curvature, value=-settings["lr"])

    def _learn(self, curvature: list[Tensor], products: list[Tensor]) -> None:
        """Multiply s by 1 + u + u^2 / 2, u = rho (h / s - 1), h / s = N e g + delta / s; `products` are overwritten."""
        torch._foreach_mul_(products, float(self.num_train))
        torch._foreach_add_(products, -1.0)
        prior = torch._foreach_reciprocal(curvature)
        torch._foreach_add_(products, prior, alpha=self._config.prior_precision)
        torch._foreach_mul_(products, self._config.curvature_rate)
        squares = torch._foreach_mul(products, products)
        torch._foreach_add_(products, squares, alpha=0.5)
        torch._foreach_add_(products, 1.0)
        torch._foreach_mul_(curvature, products)
