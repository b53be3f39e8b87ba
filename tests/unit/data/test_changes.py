from __future__ import annotations

import numpy as np
import pytest

from hpccl.data.changes import Changes, Permuted, Rotated, angles


def images(num: int, *, side: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, side, side, channels), dtype=np.uint8)


def test_a_permuted_image_has_the_same_pixels_in_one_order_a_task() -> None:
    given = images(4)
    found = Changes(Permuted(seed=3))(given, np.array([1, 1, 2, 0]))
    np.testing.assert_array_equal(found[3], given[3])  # the first task is as stored
    flat, changed = given.reshape(4, 25, 3), found.reshape(4, 25, 3)
    orders = []
    for number in range(3):
        order = [int(np.flatnonzero((flat[number] == pixel).all(axis=1))[0]) for pixel in changed[number]]
        assert sorted(order) == list(range(25))  # whole pixels move: all channels together
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    other = Changes(Permuted(seed=4))(given[:1], np.array([1]))
    assert (other != found[:1]).any()


def test_the_change_of_an_image_does_not_depend_on_its_batch() -> None:
    given, tasks = images(6), np.array([2, 0, 1, 2, 1, 0])
    for kind in (Permuted(seed=0), Rotated((0.0, 30.0, 75.0))):
        together = Changes(kind)(given, tasks)
        single = [Changes(kind)(given[[n]], tasks[[n]])[0] for n in range(6)]
        np.testing.assert_array_equal(together, np.stack(single))


@pytest.mark.parametrize("channels", [1, 3])
def test_quarter_turns_are_exact(channels: int) -> None:
    given = images(2, channels=channels)
    found = Changes(Rotated((0.0, 90.0, 180.0)))(given, np.array([1, 2]))
    np.testing.assert_array_equal(found[0], np.rot90(given[0]))
    np.testing.assert_array_equal(found[1], np.rot90(given[1], 2))


def test_an_angle_turns_against_the_clock_and_fills_with_black() -> None:
    line = np.zeros((1, 21, 21, 1), dtype=np.uint8)
    line[0, 10, 10:] = 255  # from the middle to the right
    (turned,) = Changes(Rotated((0.0, 45.0)))(line, np.array([1]))
    assert turned[5, 15, 0] > 100  # up and to the right
    assert turned[15, 15, 0] == 0
    full = np.full((1, 21, 21, 1), 255, dtype=np.uint8)
    assert Changes(Rotated((0.0, 45.0)))(full, np.array([1]))[0, 0, 0, 0] == 0


def test_angles_are_drawn_below_degrees_or_spaced_evenly() -> None:
    assert angles(4, degrees=180.0, drawn=False, seed=0) == (0.0, 45.0, 90.0, 135.0)
    many = np.array(angles(2001, degrees=90.0, drawn=True, seed=1))
    assert many[0] == 0
    assert many.min() >= 0
    assert many.max() < 90
    assert many.mean() == pytest.approx(45, abs=2)  # 4 standard errors are 2.3
    assert angles(5, degrees=90.0, drawn=True, seed=1) == tuple(many[:5])
    assert angles(5, degrees=90.0, drawn=True, seed=2) != tuple(many[:5])
