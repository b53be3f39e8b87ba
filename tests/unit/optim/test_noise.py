"""Draws are a function of key and place alone, and are normal."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpccl.optim.noise import Run, key_of, normal

CPU = torch.device("cpu")
WORDS = (3, 1, 4)


def splitmix(key: int, number: int) -> int:
    """Output `number` (from 1) of SplitMix64 with seed `key`, by Python's whole numbers."""
    bits = (1 << 64) - 1
    state = (key + number * 0x9E3779B97F4A7C15) & bits
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
    return state ^ (state >> 31)


def test_the_reference_sequence() -> None:
    """SplitMix64's first outputs for seed 1234567, which other implementations are tested by."""
    assert [splitmix(1234567, number) for number in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_numbers_are_box_and_muller_of_that_sequence() -> None:
    drawn = normal(8, [Run("a.weight", 0, 8)], WORDS, CPU)
    expected = []
    for number in (1, 2):
        bits = splitmix(key_of(WORDS, "a.weight"), number)
        for half in (bits & 0xFFFFFFFF, bits >> 32):
            radius = math.sqrt(-2 * math.log(((half & 0xFFFF) + 0.5) / 2**16))
            angle = 2 * math.pi * (half >> 16) / 2**16
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 5))
def test_a_shard_draws_what_the_whole_draws(start: int, numel: int, padding: int) -> None:
    whole = normal(400, [Run("w", 0, 400)], WORDS, CPU)
    part = normal(numel + padding, [Run("w", start, numel, padding)], WORDS, CPU)
    torch.testing.assert_close(part[padding:], whole[start : start + numel])
    assert not part[:padding].any()


def test_pieces_of_several_parameters_in_one_buffer() -> None:
    runs = [Run("a", 5, 7, 0), Run("b", 0, 0, 7), Run("c", 4, 3, 9)]
    found = normal(14, runs, WORDS, CPU)
    torch.testing.assert_close(found[:7], normal(12, [Run("a", 0, 12)], WORDS, CPU)[5:])
    torch.testing.assert_close(found[9:12], normal(7, [Run("c", 0, 7)], WORDS, CPU)[4:])
    assert not found[[7, 8, 12, 13]].any()


def test_they_are_normal_and_independent() -> None:
    """Of neighbours, of parameters and of steps; the seed is fixed, so the test cannot fail now and then."""
    count = 400_000
    drawn = normal(count, [Run("w", 0, count)], WORDS, CPU).double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / count)
    others = [
        normal(count, [Run("v", 0, count)], WORDS, CPU).double().numpy(),
        normal(count, [Run("w", 0, count)], (3, 1, 5), CPU).double().numpy(),
        np.roll(drawn, 1),
        np.roll(drawn, 2),
        np.roll(drawn, 3),
    ]
    for other in others:
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 4 / math.sqrt(count)
        assert abs(np.corrcoef(drawn**2, other**2)[0, 1]) < 4 / math.sqrt(count)
