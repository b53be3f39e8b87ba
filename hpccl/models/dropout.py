"""Dropout whose noise depends on the example, not on the process.

A mask is a hash of (the example's key, the layer, the position in the layer). It is the same on every rank, in every
batch and in any order, so results do not depend on the number of processes and resuming needs no generator state. One
32-bit hash serves four values, so the drop rate is rounded to a multiple of 1/256.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["KeyedDropout", "replace_dropout", "set_noise"]

# Two rounds of xor-shift-multiply with constants below 2**31 (int32 arithmetic wraps); found by C. Wellons'
# "prospecting for hash functions", lowbias32.
_MULTIPLY_1, _MULTIPLY_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


class KeyedDropout(nn.Module):
    """Dropout with one key per example: call `set_noise(model, keys)` before a training forward pass.

    whole: drop all values of an example or none (stochastic depth)
    """

    def __init__(self, rate: float, layer: int = 0, *, whole: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.whole = whole
        self.layer = layer
        self.keys: Tensor | None = None

    @property
    def p(self) -> float:
        """The rate under nn.Dropout's name, which timm's fused attention reads; it draws from torch's generator."""
        return self.rate

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rate={self.rate}" + (", whole" if self.whole else "")

    def forward(self, values: Tensor) -> Tensor:
        """Drop values [n, ...] and scale the others so that the expectation stays the same."""
        threshold = round(self.rate * 256)
        if not self.training or threshold == 0:
            return values
        if self.keys is None or len(self.keys) != len(values):
            raise RuntimeError(
                "KeyedDropout: call set_noise(model, keys) with one key per example before a training pass"
            )
        if threshold == 256:
            return values * 0.0
        keep = _bytes(self.keys, self.layer, 1 if self.whole else values[0].numel()) >= threshold
        if self.whole:
            return values * keep.to(values.dtype).mul_(256 / (256 - threshold)).view(-1, *[1] * (values.dim() - 1))
        # One order of elements for every memory layout, as the layout is a matter of speed and may change on resuming.
        mask = keep.to(values.dtype).mul_(256 / (256 - threshold)).view(values.shape)
        if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
            mask = mask.contiguous(memory_format=torch.channels_last)
        return values * mask


def _bytes(keys: Tensor, layer: int, count: int) -> Tensor:
    """Hash keys [n] int64 to uniform bytes [n, count] uint8."""
    words = -(-count // 4)
    folded = (keys ^ (keys >> 32)).to(torch.int32) + layer * 0x3C6EF372
    state = torch.arange(words, dtype=torch.int32, device=keys.device) * 0x1E3779B1 + folded[:, None]
    state ^= (state >> 16) & 0xFFFF
    state *= _MULTIPLY_1
    state ^= (state >> 15) & 0x1FFFF
    state *= _MULTIPLY_2
    state ^= (state >> 16) & 0xFFFF
    return state.view(torch.uint8).view(len(keys), 4 * words)[:, :count]


def set_noise(model: nn.Module, keys: Tensor) -> None:
    """Give every KeyedDropout of the model the keys [n] (int64) of the next batch."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.keys = keys


def replace_dropout(model: nn.Module) -> None:
    """Replace every nn.Dropout and timm DropPath in the model by a keyed one (functional dropout cannot be replaced).

    Layers of rate 0 stay. timm's fused attention calls functional dropout, so it is switched off where its rate is > 0.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout or type(child).__name__ == "DropPath"
    ]
    for layer, (parent, name, child) in enumerate(found):
        rate = child.p if isinstance(child, nn.Dropout) else float(child.drop_prob or 0)  # type: ignore[arg-type]
        if rate > 0:
            setattr(parent, name, KeyedDropout(rate, layer, whole=not isinstance(child, nn.Dropout)))
            if isinstance(child, nn.Dropout) and hasattr(parent, "fused_attn"):
                setattr(parent, "fused_attn", False)  # noqa: B010  (to mypy an attribute of a module is a tensor)
