"""Normal numbers that are a function of a key and of an element's place, whichever rank or tensor has the element.

Elements 4 j to 4 j + 3 of a parameter share the 64 bits of number j of the sequence SplitMix64(key), which is
mix(key + (j + 1) gamma); key is a hash of the parameter's name and of the words that a draw is a function of. Elements
4 j and 4 j + 1 have its low 32 bits, 4 j + 2 and 4 j + 3 its high ones. By Box and Muller, with u = (their low 16 bits
+ 1/2) / 2^16, v = (their high 16 bits, signed) / 2^16 and r = sqrt(-2 log u), the two are

    z_even = r cos(2 pi v),   z_odd = r sin(2 pi v)

Sixteen bits are enough for weights: no |z| is above 4.86, which one in a million would be.
No generator has a state: a draw does not depend on what was drawn before, on shards, on ranks or on the device (but for
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
_EACH = 4  # numbers from 64 bits
_CHUNK = 1 << 15  # 64 bits at a time on a CPU: what is written stays in its cache


@dataclass(frozen=True)
class Run:
    """Where a tensor of the optimiser's has elements of a parameter.

    name: of the parameter
    start: its first element there, in row-major order
    numel: how many
    first: the place of that element in the flattened tensor
    """

    name: str
    start: int
    numel: int
    first: int = 0


def key_of(words: Sequence[int], name: str) -> int:
    """64 bits for a parameter, signed as torch has them."""
    text = "/".join([*map(str, words), name])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def normal(numel: int, runs: Sequence[Run], words: Sequence[int], device: torch.device) -> Tensor:
    """[numel] fp32 numbers of N(0, 1) for a flattened tensor; 0 where no run is."""
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
    """[4 (last - first)] from numbers `first` to `last` - 1 of a sequence."""
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
    """SplitMix64's output function; `spare` is overwritten."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        state.bitwise_xor_(_shifted(state, shift, spare)).mul_(_signed(factor))
    state.bitwise_xor_(_shifted(state, _SHIFTS[2], spare))


def _shifted(state: Tensor, by: int, spare: Tensor) -> Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return torch.bitwise_right_shift(state, by, out=spare).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Modulo 2^64, as torch has it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
