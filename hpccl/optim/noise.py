"""Normal numbers that depend only on a key and an element's index, whichever rank or tensor holds the element.

Elements 4 j to 4 j + 3 of a parameter share the 64 bits of number j of the sequence SplitMix64(key), which is
mix(key + (j + 1) gamma); key is a hash of the parameter's name and of the words that identify a draw. Elements 4 j and
4 j + 1 use its low 32 bits, 4 j + 2 and 4 j + 3 its high ones. By the Box-Muller method, with u = (their low 16 bits +
1/2) / 2^16, v = (their high 16 bits, signed) / 2^16 and r = sqrt(-2 log u), the two are

    z_even = r cos(2 pi v),   z_odd = r sin(2 pi v)

Sixteen bits are enough for weights: no |z| is above 4.86, where one in a million should be.
There is no generator state: a draw does not depend on earlier draws, on shards, on ranks or on the device (except for
the rounding of log, sin and cos). Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Run", "key_of", "normal"]

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_EACH = 4  # numbers from each word of 64 bits
_CHUNK = 1 << 15  # words of 64 bits at a time on a CPU, so that the numbers written stay in its cache


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a parameter in one of the optimiser's tensors.

    name: name of the parameter
    start: row-major index of the first element in the parameter
    numel: number of elements
    first: index of the first element in the flattened tensor
    """

    name: str
    start: int
    numel: int
    first: int = 0


def key_of(words: Sequence[int], name: str) -> int:
    """Return the 64-bit key of a parameter, signed as torch's integers are."""
    text = "/".join([*map(str, words), name])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def normal(numel: int, runs: Sequence[Run], words: Sequence[int], device: torch.device) -> Tensor:
    """Draw [numel] fp32 numbers of N(0, 1) for a flattened tensor; 0 outside of all runs."""
    found = None
    for run in runs:
        first, last = run.start // _EACH, -(-(run.start + run.numel) // _EACH)
        drawn = _normals(key_of(words, run.name), first, last, device)
        offset = run.start - _EACH * first
        if run.numel == numel:
            return drawn[offset : offset + numel]
        found = torch.zeros(numel, device=device) if found is None else found
        found[run.first : run.first + run.numel] = drawn[offset : offset + run.numel]
    return torch.zeros(numel, device=device) if found is None else found


def _normals(key: int, first: int, last: int, device: torch.device) -> Tensor:
    """Draw [4 (last - first)] numbers from words `first` to `last` - 1 of the sequence of a key."""
    found = torch.empty(2 * (last - first), 2, device=device)
    size = min(_CHUNK, last - first) if device.type == "cpu" else last - first
    places = torch.arange(1, size + 1, device=device).mul_(_signed(_GAMMA))
    state, spare = torch.empty_like(places), torch.empty_like(places)
    for at in range(first, last, max(size, 1)):
        count = min(size, last - at)
        part = torch.add(places[:count], _signed(key + at * _GAMMA), out=state[:count])
        _mix_(part, spare[:count])
        out = found[2 * (at - first) : 2 * (at - first + count)]
        halves = part.view(torch.int32)  # low bits first, as on every processor that torch runs on
        angle = (halves >> 16).to(torch.float32).mul_(2.0**-16 * 2 * math.pi)
        radius = halves.bitwise_and_(0xFFFF).to(torch.float32).add_(0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
        torch.mul(radius, angle.cos(), out=out[:, 0])
        torch.mul(radius, angle.sin_(), out=out[:, 1])
    return found.view(-1)


def _mix_(state: Tensor, spare: Tensor) -> None:
    """Apply SplitMix64's output function in place; `spare` is overwritten."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        state.bitwise_xor_(_shifted(state, shift, spare)).mul_(_signed(factor))
    state.bitwise_xor_(_shifted(state, _SHIFTS[2], spare))


def _shifted(state: Tensor, by: int, spare: Tensor) -> Tensor:
    """Shift right logically; torch's shift is arithmetic."""
    return torch.bitwise_right_shift(state, by, out=spare).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Reduce modulo 2^64 to a signed integer, as in torch."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
