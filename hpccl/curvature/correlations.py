"""Second moments of a convolution's patches without forming the patches, for stride 1.

With positions p, pixels x_q and 0 outside of the image, the block of A for taps t and t' is

    A_tt' = sum_p x_(p+t) x_(p+t')' = sum_q x_q x_(q+t'-t)'      over pixels q that tap t sees, q + t' - t in the image,

which depends only on t' - t, except for pixels at the border. So for a 3x3 kernel, 25 differences (13 by symmetry) are
summed instead of 81 pairs of taps (45). In each direction the pixels are cut where some pair of taps with that
difference begins or ends: into a few rows or columns at the border, and all those between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hpccl.curvature.layers import padded
from hpccl.kron.pack import mirrored_

__all__ = ["Correlations", "correlates"]

_NARROW = 16  # channels below which products of single pixels are slower than patches

Key: TypeAlias = tuple[int, int, int, int]  # difference down and right, then number of the piece of rows, of columns


@dataclass(frozen=True)
class Cuts:
    """The cuts of one direction for one difference >= 0: where pairs of taps that far apart begin and end.

    heads: first pixels, ascending
    tails: ends (exclusive), counted from the end of the image, ascending
    taps: for each first tap of a pair, the pieces that it sees
    """

    heads: tuple[int, ...]
    tails: tuple[int, ...]
    taps: tuple[range, ...]

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self.heads) + len(self.tails) - 1

    def bounds(self, size: int) -> list[tuple[int, int]]:
        """Return the first pixel and the end of each piece of an image of that size."""
        return list(pairwise([*self.heads, *(size + tail for tail in self.tails)]))

    @property
    def least(self) -> int:
        """The smallest image size that can be cut this way."""
        return self.heads[-1] - self.tails[0]


@cache
def cuts(taps: int, before: int, after: int) -> tuple[Cuts, ...]:
    """Return the cuts for a kernel of `taps` taps with padding `before` and `after`, one for each difference from 0."""
    found = []
    for apart in range(taps):
        starts = [max(0, tap - before) for tap in range(taps - apart)]
        # Pixels end where the last position's tap is, or where its partner leaves the image.
        stops = [-max(apart, taps - 1 - tap - after) for tap in range(taps - apart)]
        heads, tails = tuple(sorted(set(starts))), tuple(sorted(set(stops)))
        seen = (
            range(heads.index(start), len(heads) + tails.index(stop)) for start, stop in zip(starts, stops, strict=True)
        )
        found.append(Cuts(heads, tails, tuple(seen)))
    return tuple(found)


def correlates(module: nn.Conv2d) -> bool:
    """Whether this method is exact and worthwhile for the layer."""
    dense = (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    return dense and module.kernel_size != (1, 1) and module.in_channels >= _NARROW


class Correlations:
    """Accumulates A of one convolution: sums of x_q x_(q+t)' for each difference t of two taps and piece of pixels.

    new: makes zeros of a shape
    """

    def __init__(self, module: nn.Conv2d, new: Callable[..., Tensor]) -> None:
        self._module, self._channels = module, module.in_channels
        # Padding other than zeros becomes part of the image.
        self._framing = module.padding_mode != "zeros"
        left, right, top, bottom = (0, 0, 0, 0) if self._framing else module._reversed_padding_repeated_twice
        height, width = module.kernel_size
        self._rows, self._columns = cuts(height, top, bottom), cuts(width, left, right)
        keys = tuple(self._keys())
        self._sums = dict(zip(keys, new(len(keys), self._channels, self._channels).unbind(), strict=True))

    def fits(self, x: Tensor) -> bool:
        """Whether images [n, channels, h, w] are large enough to be cut."""
        height, width = x.shape[2:]
        if self._framing:  # as `padded` will make them
            left, right, top, bottom = self._module._reversed_padding_repeated_twice
            height, width = height + top + bottom, width + left + right
        return height >= max(each.least for each in self._rows) and width >= max(each.least for each in self._columns)

    def add_(self, x: Tensor, scale: float) -> None:
        """Add images [n, channels, h, w] that fit."""
        framed = padded(self._module, x) if self._framing else x
        pixels = framed.permute(2, 3, 0, 1).contiguous()  # shifts are slices, and products are long
        height, width = pixels.shape[:2]
        column = cache(lambda number: pixels[:, number].contiguous())
        for (down, right, row, piece), total in self._sums.items():
            first, end = self._rows[down].bounds(height)[row]
            left, until = self._columns[abs(right)].bounds(width)[piece]
            # The upper pixel of a pair is the left one, unless the partner lies to the left.
            one, other = (left, left + right) if right >= 0 else (left - right, left)
            if until - left == 1:
                pairs = [(column(one)[first:end], column(other)[first + down : end + down])]
            else:
                here, there = slice(one, one + until - left), slice(other, other + until - left)
                pairs = [(pixels[top, here], pixels[top + down, there]) for top in range(first, end)]
            for some, others in pairs:
                if some.numel():
                    total.addmm_(some.view(-1, self._channels).T, others.view(-1, self._channels), alpha=scale)

    def trace(self) -> Tensor:
        """The trace, []; not finite if anything that was added is not."""
        return torch.stack([total.diagonal().sum() for total in self._squares()]).sum()

    def matrix(self) -> Tensor:
        """Return A, with channels * kh * kw rows and columns in the order (channel, kh, kw)."""
        taps = list(product(*(range(size) for size in self._module.kernel_size)))
        count, channels = len(taps), self._channels
        for total in self._squares():
            mirrored_(total[None])  # its two triangles may be rounded in different orders
        some = next(iter(self._sums.values()))
        whole = some.new_empty(channels, count, channels, count)
        blocks = some.new_empty(count, channels, channels)
        for number, tap in enumerate(taps):
            for block, partner in zip(blocks, taps, strict=True):
                self._block(block, tap, partner)
            whole[:, number] = blocks.permute(1, 2, 0)
        return whole.view(channels * count, channels * count)

    def _squares(self) -> list[Tensor]:
        """The sums of x_q x_q', which have difference 0."""
        return [total for (down, right, *_), total in self._sums.items() if (down, right) == (0, 0)]

    def _keys(self) -> Iterator[Key]:
        """Yield differences up to sign, each with its pieces."""
        height, width = len(self._rows), len(self._columns)
        for down, right in product(range(height), range(1 - width, width)):
            if (down, right) >= (0, 0):
                pieces = product(range(self._rows[down].pieces), range(self._columns[abs(right)].pieces))
                yield from ((down, right, row, piece) for row, piece in pieces)

    def _block(self, block: Tensor, tap: tuple[int, ...], partner: tuple[int, ...]) -> None:
        """Write the sum of x_(p+tap) x_(p+partner)' over positions p into `block`."""
        down, right = partner[0] - tap[0], partner[1] - tap[1]
        sign = 1 if (down, right) >= (0, 0) else -1
        rows = self._rows[abs(down)].taps[min(tap[0], partner[0])]
        columns = self._columns[abs(right)].taps[min(tap[1], partner[1])]
        block.zero_()
        for row, piece in product(rows, columns):
            total = self._sums[sign * down, sign * right, row, piece]
            block += total if sign == 1 else total.T
