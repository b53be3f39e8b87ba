"""Normal numbers that are a function of a key and of an element's place, whichever rank or tensor has the element.

Elements 2 j and 2 j + 1 of a parameter share the 64 bits of number j of the sequence SplitMix64(key), which is
mix(key + (j + 1) gamma); key is a hash of the parameter's name and of the words that a draw is a function of. By Box
and Muller, with u = (high 32 bits + 1/2) / 2^32, v = low 32 bits / 2^32 and r = sqrt(-2 log u), they are

    z_2j = r cos(2 pi v),   z_2j+1 = r sin(2 pi v)

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
_CHUNK = 1 << 15  # pairs at a time on a CPU: what is written stays in its cache


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
    pairs = [(run.start // 2, -(-(run.start + run.numel) // 2)) for run in runs]
    total = sum(last - first for first, last in pairs)
    state = torch.empty(total, dtype=torch.int64, device=device)
    at = 0
    for run, (first, last) in zip(runs, pairs, strict=True):
        part = state[at : at + last - first]
        torch.arange(first + 1, last + 1, out=part)
        part.mul_(_signed(_GAMMA)).add_(key_of(words, run.name))
        at += last - first
    drawn = _normals(state)
    if len(runs) == 1 and runs[0].numel == numel:
        offset = runs[0].start % 2
        return drawn[offset : offset + numel]
    found = torch.zeros(numel, device=device)
    at = 0
    for run, (first, last) in zip(runs, pairs, strict=True):
        begin = 2 * at + run.start - 2 * first
        found[run.first : run.first + run.numel] = drawn[begin : begin + run.numel]
        at += last - first
    return found


def _normals(state: Tensor) -> Tensor:
    """[2 n] from the n states of pairs, which are overwritten."""
    found = torch.empty(len(state), 2, device=state.device)
    size = _CHUNK if state.device.type == "cpu" else max(len(state), 1)
    for part, out in zip(state.split(size), found.split(size), strict=True):
        _mix_(part)
        radius = _shifted(part, 32).to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = part.bitwise_and_(0xFFFFFFFF).to(torch.float32).mul_(2.0**-32 * 2 * math.pi)
        torch.mul(radius, angle.cos(), out=out[:, 0])
        torch.mul(radius, angle.sin_(), out=out[:, 1])
    return found.view(-1)


def _mix_(state: Tensor) -> None:
    """SplitMix64's output function."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        state.bitwise_xor_(_shifted(state, shift)).mul_(_signed(factor))
    state.bitwise_xor_(_shifted(state, _SHIFTS[2]))


def _shifted(state: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return torch.bitwise_right_shift(state, by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
