"""Gradients of the past, summed over batches: parameters of any shape, with influence or without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm
from hpccl.dist.spread import Slab, Span
from hpccl.prior.reconstruct import local_parts, summed_gradients


class Scaled(nn.Module):
    """With a number as a parameter, as timm's NFNets have, and one that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.idle = nn.Parameter(torch.ones(4))

    def forward(self, pixels: Tensor) -> Tensor:
        scaled: Tensor = self.linear(pixels) * self.gain
        return scaled


def test_every_parameter_has_its_gradient() -> None:
    """Against autograd, for the sums of two terms over two batches."""
    torch.manual_seed(0)
    net = Scaled()
    batches = [torch.randn(4, 3), torch.randn(2, 3)]

    def losses(logits: Tensor) -> list[Tensor]:
        return [logits.sum(), logits.square().sum()]

    found = summed_gradients(net, [(pixels, losses) for pixels in batches], Comm.solo(), num_terms=2)
    for number in range(2):
        total = sum(losses(net(pixels))[number] for pixels in batches)
        assert isinstance(total, Tensor)
        wanted = torch.autograd.grad(total, [net.linear.weight, net.linear.bias, net.gain])
        for name, value in zip(("linear.weight", "linear.bias", "gain"), wanted, strict=True):
            torch.testing.assert_close(found[number][name], value)
        assert torch.equal(found[number]["idle"], torch.zeros(4))


def test_parts_have_the_shape_in_which_gradients_come() -> None:
    parts = local_parts(
        {
            "whole": torch.tensor(2.0),
            "rows": Slab(torch.arange(4.0), Span((3, 2), 2, 6)),
            "none": Slab(torch.zeros(0), Span((0, 2), 0, 0)),
        }
    )
    assert {name: tuple(part.shape) for name, part in parts.items()} == {"whole": (), "rows": (2, 2), "none": (0, 2)}
