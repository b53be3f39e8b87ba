"""Second moments of a layer's inputs and of its output gradients, summed over examples in fp32.

For example n with weight w_n, positions s = 1 .. S, inputs a_ns (a patch in a convolution; with a 1 at the end for a
bias) and output gradients g_ns that carry sqrt(w_n),

    expand   A = sum_n w_n / S sum_s a_ns a_ns'              B = sum_n sum_s g_ns g_ns'
    reduce   A = sum_n w_n abar_n abar_n', abar_n = mean_s   B = sum_n gsum_n gsum_n', gsum_n = sum_s g_ns

Only the lower triangle is computed, in blocks of rows. A convolution with stride 1 needs no patches: correlations.py.

Legend: n examples, f rows of the layer's batch dim per example (windows), g groups, o outputs and d inputs of a group.
Source: Grosse and Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML;
Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural network architectures", NeurIPS.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from hpccl.curvature.correlations import Correlations, correlates
from hpccl.curvature.layers import output_size, padded, patches
from hpccl.engine.sharded import computes_on
from hpccl.kron.pack import mirrored_

__all__ = ["GradientMoment", "InputMoment", "Sharing", "block_shape"]

Sharing = Literal["expand", "reduce"]

_BLOCK = {"cpu": 128}  # rows of a triangle that are computed at a time (measured on AVX-512 cores)
_LARGE_BLOCK = 1024  # the same elsewhere, where a small product does not fill the device


def block_shape(module: nn.Module, *, bias: bool) -> tuple[int, int, int]:
    """Return (g, o, d) of a linear map or a convolution; d includes the bias."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    weight = module.get_parameter("weight")
    return groups, weight.shape[0] // groups, prod(weight.shape[1:]) + bias


class InputMoment:
    """Accumulates A of one layer."""

    def __init__(self, module: nn.Module, *, bias: bool, sharing: Sharing) -> None:
        self._module, self._sharing = module, sharing
        groups, _, size = block_shape(module, bias=False)
        self._new = partial(torch.zeros, dtype=torch.float32, device=computes_on(module.get_parameter("weight")))
        self._bias = self._new(groups, size + 1) if bias else None  # the last row of A
        self._patches: Tensor | None = None  # [g, d, d] without bias, patches as (kh, kw, channel)
        self._pixels: Correlations | None = None
        if isinstance(module, nn.Conv2d) and sharing == "expand" and correlates(module):
            self._pixels = Correlations(module, self._new)
        else:
            self._patches = self._new(groups, size, size)

    def add_(self, x: Tensor, n: int, root: Tensor | None) -> None:
        """Add a batch.

        Args:
            x: [n*f, ...], the layer's input.
            n: examples.
            root: [n] square roots of their weights; None if all are 1.
        """
        rows, x = len(x) // n, x.float()
        if root is not None:
            x = x * root.float().repeat_interleave(rows).view(-1, *[1] * (x.dim() - 1))
        scale = 1 / (rows * num_positions(self._module, x))
        means: Tensor | None = None
        if self._bias is not None or self._sharing == "reduce":
            means = _position_sums(self._module, x).unflatten(0, (n, rows)).sum(1) * scale  # [n, g, d]
        if self._bias is not None and means is not None:
            self._bias[:, :-1] += means.sum(0) if root is None else torch.tensordot(root.float(), means, 1)
            self._bias[:, -1] += n if root is None else root.double().square().sum().float()
        if self._sharing == "reduce" and means is not None:
            self._add_rows(means.transpose(0, 1), 1.0)
        elif self._pixels is not None and self._pixels.fits(x):
            self._pixels.add_(x, scale)
        else:
            for part in x.split(_rows_at_a_time(self._module, x)):
                self._add_rows(_patch_rows(self._module, part), scale)

    def trace(self) -> Tensor:
        """The trace, []; not finite if anything that was added is not."""
        found = [] if self._patches is None else [self._patches.diagonal(dim1=1, dim2=2).sum()]
        return torch.stack(found + ([] if self._pixels is None else [self._pixels.trace()])).sum()

    def matrix(self) -> Tensor:
        """Return A [g, d, d], inputs in the order of the weight; the accumulator is used up."""
        weight = [] if self._patches is None else [_by_channel(mirrored_(self._patches), self._module)]
        weight += [] if self._pixels is None else [self._pixels.matrix()[None]]
        self._patches = self._pixels = None
        whole = weight[0] if len(weight) == 1 else weight[0].add_(weight[1])
        if self._bias is None:
            return whole
        column = _by_channel(self._bias[:, :-1, None], self._module)
        row = torch.cat([column.mT, self._bias[:, None, -1:]], dim=2)
        return torch.cat([torch.cat([whole, column], dim=2), row], dim=1)

    def _add_rows(self, rows: Tensor, scale: float) -> None:
        """Add rows [g, m, d]."""
        if self._patches is None:
            self._patches = self._new(len(rows), rows.shape[2], rows.shape[2])
        add_gram_(self._patches, rows, scale)


class GradientMoment:
    """Accumulates B of one layer."""

    def __init__(self, module: nn.Module, *, sharing: Sharing) -> None:
        self._sharing = sharing
        self._image = isinstance(module, nn.Conv2d)
        groups, outputs, _ = block_shape(module, bias=False)
        device = computes_on(module.get_parameter("weight"))
        self._total = torch.zeros(groups, outputs, outputs, dtype=torch.float32, device=device)

    def add_(self, grad: Tensor, n: int) -> None:
        """Add the gradients [n*f, ...] of the layer's output in a batch of n examples, for one column."""
        groups, outputs, _ = self._total.shape
        grad = (grad.movedim(1, -1) if self._image else grad).float()
        if self._sharing == "reduce":
            grad = grad.reshape(n, -1, groups * outputs).sum(1)
        add_gram_(self._total, grad.reshape(-1, groups, outputs).transpose(0, 1), 1.0)

    def trace(self) -> Tensor:
        """The trace, []; not finite if anything that was added is not."""
        return self._total.diagonal(dim1=1, dim2=2).sum()

    def matrix(self) -> Tensor:
        """Return B [g, o, o]; the accumulator is used up."""
        return mirrored_(self._total)


def add_gram_(total: Tensor, rows: Tensor, scale: float) -> None:
    """Add scale * rows' rows for `rows` [g, m, k] to the lower triangle of `total` [g, k, k]."""
    block = _BLOCK.get(total.device.type, _LARGE_BLOCK)
    for first in range(0, total.shape[1], block):
        some, until = slice(first, first + block), slice(0, first + block)
        if len(total) == 1:
            total[0, some, until].addmm_(rows[0, :, some].T, rows[0, :, until], alpha=scale)
        else:
            total[:, some, until].baddbmm_(rows[:, :, some].mT, rows[:, :, until], alpha=scale)


def num_positions(module: nn.Module, x: Tensor) -> int:
    """Return the number of positions in one row of the batch dim of `x`."""
    if not isinstance(module, nn.Conv2d):
        return prod(x.shape[1:-1])
    return prod(output_size(module, x))


def _by_channel(matrix: Tensor, module: nn.Module) -> Tensor:
    """Reorder patches from (kh, kw, channel) to the weight's order, in one or both dims of `matrix` [g, d, d or 1]."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1):
        return matrix
    taps = prod(module.kernel_size)
    turned: Tensor = matrix.unflatten(1, (taps, -1)).transpose(1, 2)  # [g, channel, tap, ...]
    if matrix.shape[2] == 1:
        return turned.reshape(matrix.shape)
    turned = turned.unflatten(3, (taps, -1)).transpose(3, 4)
    return turned.reshape(matrix.shape)


def _rows_at_a_time(module: nn.Module, x: Tensor) -> int:
    """Return the number of rows of the batch dim whose patches stay small."""
    if not isinstance(module, nn.Conv2d):
        return len(x)
    budget = 1 << 25 if x.device.type == "cpu" else 1 << 30
    return max(1, budget // (4 * num_positions(module, x) * module.in_channels * prod(module.kernel_size)))


def _patch_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs as rows [g, m, d], with patches as (kh, kw, channel)."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    if module.kernel_size == (1, 1) and module.padding in ((0, 0), "same", "valid"):
        down, right = module.stride
        view = x[:, :, None, None, ::down, ::right]
    else:
        view = patches(module, x)
    view = view.unflatten(1, (module.groups, -1)).permute(1, 0, 5, 6, 3, 4, 2)
    rows: Tensor = view.reshape(module.groups, -1, prod(module.weight.shape[1:]))
    return rows


def _position_sums(module: nn.Module, x: Tensor) -> Tensor:
    """Return sums over positions [rows, g, d], with patches as (kh, kw, channel)."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1]).sum(1, keepdim=True)
    height, width = output_size(module, x)
    image = padded(module, x)
    down = range(0, module.kernel_size[0] * module.dilation[0], module.dilation[0])
    right = range(0, module.kernel_size[1] * module.dilation[1], module.dilation[1])
    rows = [image[:, :, top : top + (height - 1) * module.stride[0] + 1 : module.stride[0]].sum(2) for top in down]
    strip = torch.stack(rows, dim=1)  # [rows, kh, channels, w]
    ends = [strip[..., left : left + (width - 1) * module.stride[1] + 1 : module.stride[1]].sum(-1) for left in right]
    sums: Tensor = torch.stack(ends, dim=2).unflatten(3, (module.groups, -1))  # [rows, kh, kw, g, channels/g]
    return sums.permute(0, 3, 1, 2, 4).flatten(2)
