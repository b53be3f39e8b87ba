"""Order of examples: a function of counters, complete, unbiased, the same for any reader."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.data.order import BatchPlan, mix, permutation


def plan(**changes: object) -> BatchPlan:
    settings: dict[str, object] = {
        "num_new": 100, "num_memory": 30, "batch_size": 16, "epochs": 2, "seed": 3, "task": 1,
    }  # fmt: skip
    return BatchPlan(**{**settings, **changes})  # type: ignore[arg-type]


def test_mix_is_splitmix64() -> None:
    # The first outputs of the reference SplitMix64 generator with seed 0 (Vigna's splitmix64.c).
    state = np.uint64(0)
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert int(mix(0, 0)) != int(mix(0))
    assert state == 0


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_mix_does_not_collide_on_neighbours(seed: int, start: int) -> None:
    words = mix(seed, np.arange(start, start + 256))
    assert len(np.unique(words)) == 256


@given(st.integers(0, 300), st.integers(0, 10**6))
def test_permutation_holds_every_number_once(count: int, seed: int) -> None:
    assert np.array_equal(np.sort(permutation(count, seed)), np.arange(count))


def test_permutations_of_different_epochs_are_unrelated() -> None:
    first, second = permutation(1000, 0, 1), permutation(1000, 0, 2)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize(("window", "groups"), [(0, None), (2, np.repeat(np.arange(10), 10))])
def test_natural_visits_every_example_once_an_epoch(window: int, groups: np.ndarray | None) -> None:
    natural = plan(window=window, groups=groups)
    assert natural.steps_per_epoch == 9  # ceil(130 / 16)
    for epoch in range(2):
        batches = [natural.batch(epoch * 9 + step) for step in range(9)]
        new = np.concatenate([batch.new for batch in batches])
        slot = np.concatenate([batch.slot for batch in batches])
        assert np.array_equal(np.sort(new[new >= 0]), np.arange(100))
        assert np.array_equal(np.sort(slot[slot >= 0]), np.arange(30))
        assert np.array_equal(new >= 0, slot < 0)
        assert {(batch.weight_new, batch.weight_memory) for batch in batches} == {(1.0, 1.0)}


def test_batches_of_a_window_have_the_classes_of_the_task() -> None:
    """A shard has one class, so a window of whole shards would be a window of few classes."""
    shards = np.repeat(np.arange(50), 640)
    windowed, free = (
        plan(num_new=32000, num_memory=0, batch_size=200, epochs=1, window=window, groups=shards) for window in (10, 0)
    )
    found, expected = (
        [len(np.unique(shards[each.batch(step).new])) for step in range(each.num_steps)] for each in (windowed, free)
    )
    assert min(found) > 0.8 * min(expected)
    assert np.mean(found) > 0.9 * np.mean(expected)


def test_window_touches_few_runs_of_neighbours() -> None:
    """Five windows of ten steps: each reads its own fifth of the pieces of 32 neighbours, wholly."""
    shards = np.repeat(np.arange(50), 640)
    windowed = plan(num_new=32000, num_memory=0, batch_size=640, window=10, groups=shards)
    for first in range(0, windowed.num_steps, 10):
        order = np.concatenate([windowed.batch(first + step).new for step in range(10)])
        pieces, counts = np.unique(order // 32, return_counts=True)
        assert len(pieces) == 200
        assert (counts == 32).all()
        assert len(np.unique(order[:32] // 32)) > 20  # within a window, images are shuffled


def test_a_run_ends_with_its_shard() -> None:
    shards = np.repeat([4, 7, 9], [20, 3, 32])
    windowed = plan(num_new=55, num_memory=0, batch_size=1, window=1, groups=shards)
    order = np.concatenate([windowed.batch(step).new for step in range(55)])
    assert np.array_equal(np.sort(order), np.arange(55))
    assert np.count_nonzero(np.diff(shards[order])) == 2  # three runs, each a window of its own


def test_stratified_has_fixed_quotas_and_visits_new_data_once() -> None:
    stratified = plan(share=0.25)
    batches = [stratified.batch(step) for step in range(stratified.steps_per_epoch)]
    assert [int((batch.slot >= 0).sum()) for batch in batches] == [4] * len(batches)
    assert {len(batch) for batch in batches} == {15, 16}  # 100 new rows in 9 steps
    new = np.concatenate([batch.new[batch.new >= 0] for batch in batches])
    assert np.array_equal(np.sort(new), np.arange(100))


def test_stratified_visits_memory_evenly_over_cycles() -> None:
    stratified = plan(share=0.5, num_memory=12, epochs=6)
    slots = np.concatenate([stratified.batch(step).slot for step in range(stratified.num_steps)])
    counts = np.bincount(slots[slots >= 0], minlength=12)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("share", [None, 0.25, 0.5, 0.9])
def test_weights_keep_the_expected_objective(share: float | None) -> None:
    """Averaged over an epoch, a step's weighted mean is the mean over the union, whatever the quotas."""
    composed = plan(share=share, num_new=96, num_memory=24, batch_size=8, epochs=24)
    rng = np.random.default_rng(0)
    nats_new, nats_memory = rng.random(96), rng.random(24)
    estimates = []
    for step in range(composed.num_steps):
        batch = composed.batch(step)
        is_new = batch.new >= 0
        total = batch.weight_new * nats_new[batch.new[is_new]].sum()
        total += batch.weight_memory * nats_memory[batch.slot[~is_new]].sum()
        estimates.append(total / len(batch))
    exact = (nats_new.sum() + nats_memory.sum()) / 120
    # Whole epochs and whole memory cycles: exact, but for what a cut-off memory cycle leaves over.
    assert np.mean(estimates) == pytest.approx(exact, rel=2e-3)


def test_noise_and_views_differ_between_steps_and_rows() -> None:
    natural = plan()
    views = np.concatenate([natural.batch(step).view for step in range(natural.num_steps)])
    assert len(np.unique(views)) == len(views)
    assert (views != 0).all()


@pytest.mark.parametrize("share", [None, 0.4])
def test_number_of_rows_is_that_of_the_batches(share: float | None) -> None:
    made = plan(share=share)
    assert made.num_rows(3, 14) == sum(len(made.batch(step)) for step in range(3, 14))


def test_stratified_rows_are_mixed() -> None:
    """Each half of a batch, such as a rank's, has rows of both kinds."""
    stratified = plan(share=0.5, batch_size=32, epochs=4)
    for step in range(stratified.num_steps):
        new = stratified.batch(step).new
        for half in (new[: len(new) // 2], new[len(new) // 2 :]):
            assert (half >= 0).any()
            assert (half < 0).any()
