"""Kronecker factors as sums over examples, positions and classes in float64, and networks to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.curvature.columns import Fisher, output_columns
from hpccl.curvature.factors import KroneckerPass, Measured
from hpccl.curvature.protocols import Examples
from hpccl.dist.comm import Comm
from tests.unit.curvature.oracle import NUM_CLASSES

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25])


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each layer in the last forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = (arguments[0].detach(), out)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """[g, positions, d] of one example, bias last."""
    if isinstance(module, nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, list(module._reversed_padding_repeated_twice), mode=mode)
        patches = functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [f, c kh kw, positions]
        rows = patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    bias = any(name == "bias" and value.requires_grad for name, value in module.named_parameters())
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if bias else rows


def gradients_of(module: nn.Module, grad: Tensor) -> Tensor:
    """[g, positions, o] of one example."""
    if isinstance(module, nn.Conv2d):
        grad = grad.unflatten(1, (module.groups, -1))
        return grad.permute(1, 0, 3, 4, 2).flatten(1, 3)
    return grad.reshape(1, -1, grad.shape[-1])


def directions(model: nn.Module, one: Examples, fisher: str, seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """[c, C] directions over the logits of one example, and signs: sum of sign * v v' is its matrix."""
    classes = one.head.nonzero().flatten()
    logits = model(one.pixels).detach()[0]
    p = torch.zeros_like(logits)
    p[classes] = logits[classes].softmax(0)
    if fisher == "empirical":
        return (p - functional.one_hot(one.labels[0], len(p)).to(p))[None], torch.ones(1, dtype=p.dtype)
    if fisher == "mc":
        columns = output_columns(logits[None], one, "mc", samples=samples, seed=seed)[:, 0]
        return columns / one.weight.sqrt().to(p), torch.ones(len(columns), dtype=p.dtype)
    return torch.cat([torch.diag(p.sqrt()), p[None]]), torch.cat([torch.ones_like(p), -torch.ones(1, dtype=p.dtype)])


def layer_terms(
    model: nn.Module, data: Examples, names: list[str], fisher: str, *, seed: int = 0, samples: int = 1
) -> Iterator[tuple[float, str, Tensor, Tensor, Tensor]]:
    """(weight, layer, inputs [g, S, d], gradients [c, g, S, o], signs [c]) of each example."""
    model = model.eval()
    for number in range(len(data)):
        one = data.select(slice(number, number + 1))
        if float(one.weight) == 0:
            continue
        rows, signs = directions(model, one, fisher, seed, samples)
        with recorded(model, names) as seen:
            logits = model(one.pixels)
        outs = [seen[name][1] for name in names]
        grads = [torch.autograd.grad(logits[0], outs, row, retain_graph=True) for row in rows]
        for place, name in enumerate(names):
            module = model.get_submodule(name)
            by_column = torch.stack([gradients_of(module, grad[place]) for grad in grads])
            yield float(one.weight), name, inputs_of(module, seen[name][0]), by_column, signs


def true_factors(
    model: nn.Module, data: Examples, names: list[str], fisher: str, sharing: str = "expand", **draws: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of A and B by layer."""
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, name, rows, grads, signs in layer_terms(model, data, names, fisher, **draws):
        if sharing == "reduce":
            rows, grads = rows.mean(1, keepdim=True), grads.sum(2, keepdim=True)  # noqa: PLW2901 (as in the equation)
        a = weight * rows.mT @ rows / rows.shape[1]
        b = weight * torch.einsum("c,cgso,cgsp->gop", signs, grads, grads)
        before = total.get(name, (0, 0))
        total[name] = (before[0] + a, before[1] + b)
    return total


def true_eigen(
    model: nn.Module, data: Examples, bases: dict[str, tuple[Tensor, Tensor]], fisher: str
) -> dict[str, Tensor]:
    """Squares of rotated per-example gradients by layer, [g, o, d]."""
    total: dict[str, Tensor] = {}
    for weight, name, rows, grads, signs in layer_terms(model, data, list(bases), fisher):
        qa, qb = (basis.double() for basis in bases[name])
        rotated = qb.mT @ torch.einsum("cgso,gsd->cgod", grads, rows) @ qa
        total[name] = total.get(name, torch.zeros(())) + weight * torch.einsum("c,cgod->god", signs, rotated.square())
    return total


def measure(model: nn.Module, data: Examples, fisher: Fisher = "ggn", *, batch: int = 100, **settings: Any) -> Measured:
    parts = [data.select(slice(first, first + batch)) for first in range(0, len(data), batch)]
    return KroneckerPass(fisher, **settings).run(model, parts, Comm.solo())


def assert_close(found: Tensor, truth: Tensor, *, rtol: float = 1e-5, what: str = "") -> None:
    assert found.dtype == torch.float32
    scale = float(truth.abs().max())
    torch.testing.assert_close(
        found.double(), truth.double(), rtol=0, atol=rtol * scale + 1e-30, msg=lambda m: what + m
    )


def assert_true(
    found: Measured, model: nn.Module, data: Examples, fisher: str, sharing: str = "expand", *, rtol: float = 1e-5
) -> None:
    truth = true_factors(model, data, list(found.blocks), fisher, sharing)
    for name, block in found.blocks.items():
        assert_close(block.a, truth[name][0], rtol=rtol, what=f"A of {name}: ")
        assert_close(block.b, truth[name][1], rtol=rtol, what=f"B of {name}: ")
        assert torch.equal(block.a, block.a.mT)
        assert torch.equal(block.b, block.b.mT)


def assert_covered(found: Measured, model: nn.Module) -> None:
    """Every trainable parameter once."""
    names = [name for block in found.blocks.values() for name in (block.weight, block.bias) if name is not None]
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert sorted([*names, *found.squares]) == sorted(trainable)


# ---------------------------------------------------------------- networks


def threes(channels: int = 16) -> nn.Module:
    """3x3 convolutions over maps of several sizes, down to one pixel."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding="same"),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Flatten(),
        nn.LazyLinear(NUM_CLASSES),
    )


def threes_on(height: int, width: int, count: int = 5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    pixels = torch.randn(count, 2, height, width, dtype=torch.float64)
    net = threes().double()
    net(pixels)
    return net, pixels
