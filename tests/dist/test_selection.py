"""What is chosen does not depend on the number of processes: the same samples, order and weights to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.errors import DivergedError
from hpccl.memory.by_class import by_class
from hpccl.memory.greedy import herding, k_center, matching
from hpccl.memory.select import Candidates, Choice, scored, uniform
from hpccl.memory.topk import Shortlist, largest
from tests.dist.world import Result, run_in_world

NUMBER = 311


def candidates(balanced: bool, keep: int = 60) -> Candidates:
    labels = np.sort(np.random.default_rng(3).choice(5, size=NUMBER, p=[0.4, 0.3, 0.2, 0.08, 0.02]) * 2)
    labels = labels[np.random.default_rng(4).permutation(NUMBER)]
    return Candidates(np.arange(NUMBER) + 1000, labels, keep, balanced, (7, 101, 2))


def result(choice: Choice) -> Result:
    return {name: torch.from_numpy(value) for name, value in vars(choice).items()}


def top(comm: Comm, ties: bool) -> Result:
    random = np.random.default_rng(0)
    score = random.normal(size=5000).round(1 if ties else 15)
    group, sample, quotas = random.integers(0, 6, size=5000), random.permutation(5000), np.array([5, 0, 70, 1, 9, 2000])
    share = comm.share(5000)
    part = slice(share.start, share.stop)
    found = largest(score[part], sample[part], group[part], quotas, words=(1,), comm=comm, chunk=333)
    order = np.lexsort((-score, group))
    exact = [sample[order][group[order] == each][:quota] for each, quota in enumerate(quotas)]
    if not ties:
        np.testing.assert_array_equal(found.sample, np.concatenate(exact))
    held = Shortlist(quotas, words=(1,), slack=10)
    for start in range(part.start, part.stop, 97):
        some = slice(start, min(start + 97, part.stop))
        held.add(score[some], sample[some], group[some])
    np.testing.assert_array_equal(held.finish(comm).sample, found.sample)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in vars(found).items()}


def by_score(comm: Comm, balanced: bool, sampled: bool) -> Result:
    given = candidates(balanced)
    score = np.random.default_rng(5).gamma(0.3, size=NUMBER)
    score[17] = -np.inf
    share = comm.share(NUMBER)
    part = slice(share.start, share.stop)
    return result(scored(score[part], given.samples[part], given, comm, sampled=sampled))


def greedy(comm: Comm, balanced: bool, name: str) -> Result:
    given = candidates(balanced)
    rows = torch.randn(NUMBER, 8, generator=torch.Generator().manual_seed(1)) + 0.2
    valid = np.arange(NUMBER) != 200
    share = comm.share(NUMBER)
    part = slice(share.start, share.stop)

    def pick(vectors: Any, keep: int) -> Any:
        if name == "matching":
            return matching(vectors, keep, ridge=0.01)
        order = herding(vectors, keep) if name == "herding" else k_center(vectors, keep)
        return order, np.full(keep, len(vectors) / max(keep, 1))

    return result(by_class(rows[part], given.samples[part], valid[part], given=given, comm=comm, pick=pick))


def exchanged(comm: Comm) -> Result:
    """Rank r sends (10 r + d) rows of value r to rank d, modulo."""
    counts = [(comm.rank + 2 * target) % 3 for target in range(comm.size)]
    rows = torch.full((sum(counts), 2), float(comm.rank), dtype=torch.float64)
    rows[:, 1] = torch.repeat_interleave(torch.arange(comm.size), torch.tensor(counts)).double()
    came = comm.exchange(rows, counts)
    expected = [(source + 2 * comm.rank) % 3 for source in range(comm.size)]
    assert came[:, 0].tolist() == [float(source) for source, count in enumerate(expected) for _ in range(count)]
    assert bool((came[:, 1] == comm.rank).all())
    return {}


def same_everywhere(function: Any, folder: Path, *arguments: Any) -> Result:
    one = run_in_world(function, 1, folder, *arguments)[0]
    for size in (2, 4):
        for rank in run_in_world(function, size, folder, *arguments):
            for name, value in one.items():
                assert torch.equal(rank[name], value), f"{name} with {size} processes"
    return one


def test_rows_arrive_in_rank_order(tmp_path: Path) -> None:
    for size in (1, 2, 4):
        run_in_world(exchanged, size, tmp_path)


@pytest.mark.parametrize("ties", [False, True])
def test_top_k(tmp_path: Path, ties: bool) -> None:
    found = same_everywhere(top, tmp_path, ties)
    assert np.bincount(found["group"].numpy(), minlength=6).tolist()[:5] == [5, 0, 70, 1, 9]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_by_score(tmp_path: Path, balanced: bool, sampled: bool) -> None:
    found = same_everywhere(by_score, tmp_path, balanced, sampled)
    given = candidates(balanced)
    assert sorted(found["order"].tolist()) == list(range(60))
    if balanced:  # as are all beginnings of the order
        for keep in (10, 25, 60):
            counts = np.bincount(given.group(found["sample"][found["order"] < keep].numpy()), minlength=5)
            possible = np.minimum(given.counts, counts.max())
            assert (np.abs(counts - possible) <= 1).all()
    if not sampled:
        assert found["weight"].tolist() == [1.0] * 60


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("name", ["herding", "k_center", "matching"])
def test_by_class(tmp_path: Path, balanced: bool, name: str) -> None:
    found = same_everywhere(greedy, tmp_path, balanced, name)
    given = candidates(balanced)
    counts = np.bincount(given.group(found["sample"].numpy()), minlength=5)
    assert counts.tolist() == given.quotas().tolist()
    if not balanced:
        np.testing.assert_allclose(counts, given.counts * 60 / NUMBER, atol=0.75)
    total = float(found["weight"].sum())
    assert total == pytest.approx(60, rel=0.25)


def test_an_image_that_is_not_there_comes_last(tmp_path: Path) -> None:
    given = candidates(True)
    found = greedy(Comm.solo(), True, "herding")
    assert 1200 not in found["sample"].tolist() or given.counts[given.group(np.array([1200]))[0]] <= 12


def test_uniform_is_todays_choice() -> None:
    given = candidates(True)
    choice = uniform(given)
    assert sorted(choice.order.tolist()) == list(range(60))
    smaller = uniform(Candidates(given.samples, given.labels, 23, True, given.words))
    assert choice.sample[choice.order < 23].tolist() == smaller.sample.tolist()


def test_what_is_not_finite_is_refused() -> None:
    given = candidates(True)
    rows = torch.zeros(NUMBER, 2)
    rows[9] = torch.inf
    with pytest.raises(DivergedError, match="sample 1009 is not finite"):
        by_class(
            rows,
            given.samples,
            np.ones(NUMBER, bool),
            given=given,
            comm=Comm.solo(),
            pick=lambda _, keep: (np.arange(keep), np.ones(keep)),
        )
