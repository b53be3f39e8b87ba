"""IVON: a Gaussian over weights with a diagonal covariance, learned at the cost of Adam.

    q = N(m, 1 / (lambda (h + delta)))
    draw     theta = m + n,  n = eps / sqrt(lambda (h + delta)),  eps ~ N(0, 1);  g^ = grad of the mean loss at theta
    momentum g <- beta1 g + (1 - beta1) g^
    Hessian  h^ = lambda (h + delta) n g^
             h <- beta2 h + (1 - beta2) h^ + (1 - beta2)^2 (h - h^)^2 / (2 (h + delta))
    weights  m <- m - alpha' clip((g / (1 - beta1^t) + delta m) / (h + delta), xi),  alpha' = alpha (h0 + delta)

m: the weights; h: nats per squared weight, per example; lambda: examples; delta: prior precision per example. The third
term keeps h + delta > 0. Source: Shen et al. 2024, "Variational learning is effective for large deep networks", ICML.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from hpccl.config.optim import IvonOptim
from hpccl.optim.perturbing import Draw, Sampling, in_cache

__all__ = ["Ivon"]


@final
class Ivon(Sampling):
    """See the module. State: momentum g and curvature h, 8 bytes per weight, and the number of steps t."""

    def __init__(self, parameters: Any, config: IvonOptim) -> None:
        super().__init__(parameters, {"lr": config.lr[0]}, passes=config.samples)
        self._config = config

    @property
    def _size(self) -> float:
        """Lambda."""
        given = self._config.effective_size
        return float(self.num_train) if given is None else given

    def _curvature(self, tensors: list[Tensor]) -> list[Tensor]:
        first = self._config.initial_curvature
        return self.kept(tensors, "curvature", lambda tensor: torch.full_like(tensor, first))

    def displace(self, tensor: Tensor, draw: Draw, number: int) -> tuple[Tensor, ...]:
        """See Sampling."""
        (curvature,) = self._curvature([tensor])
        drawn = draw(tensor, number)
        for (noise,), (learned,) in in_cache([drawn], [curvature]):
            noise.mul_(torch.add(learned, self._config.weight_decay).mul_(self._size).rsqrt_())
        return (drawn,)

    def update(self, tensors: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> None:
        """See Perturbing."""
        products = self.products(tensors)
        momentum = self.kept(tensors, "momentum", torch.zeros_like)
        curvature = self._curvature(tensors)
        for tensor in tensors:
            self.state[tensor]["step"] = self.state[tensor].get("step", 0) + 1
        share = 1 - self._config.momentum ** self.state[tensors[0]]["step"]
        if products is None:
            for pieces in in_cache(tensors, gradients, momentum, curvature):
                self._move(*pieces, share=share, rate=settings["lr"])
            return
        learned = [part for (part,) in products]
        for w, g, m, h, product in in_cache(tensors, gradients, momentum, curvature, learned):
            self._learn(h, product)
            self._move(w, g, m, h, share=share, rate=settings["lr"])

    def _move(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        momentum: list[Tensor],
        curvature: list[Tensor],
        *,
        share: float,
        rate: float,
    ) -> None:
        """Update the momentum, then the weights with the current curvature; share: 1 - beta1^t."""
        config, decay = self._config, self._config.weight_decay
        torch._foreach_lerp_(momentum, gradients, 1 - config.momentum)
        change = torch._foreach_mul(weights, decay)
        torch._foreach_add_(change, momentum, alpha=1 / share)
        torch._foreach_div_(change, torch._foreach_add(curvature, decay))
        if config.clip is not None:
            torch._foreach_clamp_max_(change, config.clip)
            torch._foreach_clamp_min_(change, -config.clip)
        scale = config.initial_curvature + decay if config.rescale_lr else 1.0
        torch._foreach_add_(weights, change, alpha=-rate * scale)

    def _learn(self, curvature: list[Tensor], products: list[Tensor]) -> None:
        """Add (1 - beta2) u + (1 - beta2)^2 u^2 / (2 (h + delta)) to h, u = h^ - h; `products` are overwritten."""
        rate = 1 - self._config.curvature_decay
        regular = torch._foreach_add(curvature, self._config.weight_decay)
        torch._foreach_mul_(products, regular)
        torch._foreach_mul_(products, rate * self._size)
        torch._foreach_add_(products, curvature, alpha=-rate)  # (1 - beta2) u
        torch._foreach_add_(curvature, products)
        torch._foreach_mul_(products, products)
        torch._foreach_addcdiv_(curvature, products, regular, value=0.5)
