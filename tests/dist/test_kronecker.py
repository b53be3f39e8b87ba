"""Kronecker, EKFAC and dense curvature and sums over tasks: the number of processes is not in the mathematics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.config.curvature import ListedTasks, NearestTasks, PooledTasks, RefitTasks, TasksConfig
from hpccl.curvature.blocks import WHOLE, Block
from hpccl.curvature.build import precision_from_state
from hpccl.curvature.dense import DenseEstimator, DensePrecision
from hpccl.curvature.diagonal import DiagonalEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.kfac import EkfacEstimator, KroneckerEstimator
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Estimator, Examples, Precision
from hpccl.dist.comm import Comm
from hpccl.errors import HpcclError, WorldError
from hpccl.kron.eigen import Eigen
from tests.dist.world import Result, run_in_world
from tests.unit.curvature.oracle import NUM_CLASSES, examples

COUNT = 11  # not a multiple of 2 or 4: ranks have different numbers of batches
BATCH = 2


class Mixed(nn.Module):
    """Grouped and depthwise convolutions, norms, with and without bias; memory in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.norm(self.stem(x)).tanh()))
        out: Tensor = self.last(self.group_norm(x).tanh().flatten(1))
        return out


def wide() -> nn.Module:
    """One layer costs more than a rank's fair share, and has more inputs than outputs."""
    stem = nn.Conv2d(2, 4, 3, padding=1, groups=2)
    return nn.Sequential(stem, nn.Tanh(), nn.Flatten(), nn.Linear(144, 12), nn.Tanh(), nn.Linear(12, NUM_CLASSES))


def tall() -> nn.Module:
    """Two layers do, and one of them has more outputs than inputs."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(2, 90), nn.Tanh(), nn.Linear(90, NUM_CLASSES))


NETS = {"mixed": Mixed, "wide": wide, "tall": tall}


def build(net: str) -> nn.Module:
    torch.manual_seed(3)
    return NETS[net]().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Asking:
    """This rank's share in batches; like a run's, every rank asks the others before each, equally often."""

    data: Examples
    comm: Comm

    def __iter__(self) -> Iterator[Examples]:
        mine = self.comm.share(len(self.data))
        rounds = math.ceil(math.ceil(len(self.data) / self.comm.size) / BATCH)
        for first in range(mine.start, mine.start + rounds * BATCH, BATCH):
            if self.comm.any(False):
                raise WorldError("another rank failed")
            if first < mine.stop:
                yield self.data.select(slice(first, min(first + BATCH, mine.stop)))


def idle() -> Tensor:
    """Weights: the first batches of the first rank, and of the last of four, count for nothing."""
    weight = torch.ones(COUNT)
    weight[[0, 1, 8, 9]] = 0.0
    weight[4] = 0.5
    return weight


KFAC = KroneckerPass(fisher="mc", samples=2, seed=5)
REDUCED = KroneckerPass(fisher="ggn", sharing="reduce")


@dataclass(frozen=True)
class Case:
    estimator: Estimator
    net: str = "mixed"
    count: int = COUNT
    weight: Tensor | None = None


CASES = {
    "kronecker": Case(KroneckerEstimator(KFAC, ListedTasks())),
    "kronecker, reduce": Case(KroneckerEstimator(REDUCED, ListedTasks())),
    "kronecker, low rank": Case(KroneckerEstimator(KFAC, ListedTasks(), keep_trace=0.9)),
    "ekfac": Case(EkfacEstimator(KFAC)),
    # With fewer examples than inputs the basis of what no mean input reaches would be arbitrary.
    "ekfac, reduce": Case(EkfacEstimator(REDUCED), net="wide"),
    "dense": Case(DenseEstimator("ggn")),
    "kronecker, idle": Case(KroneckerEstimator(KFAC, ListedTasks()), weight=idle()),
    "ekfac, idle": Case(EkfacEstimator(KFAC), weight=idle()),
    "dense, idle": Case(DenseEstimator("mc"), weight=idle()),
    "kronecker, fewer": Case(KroneckerEstimator(KFAC, ListedTasks()), count=2),
    "ekfac, fewer": Case(EkfacEstimator(KFAC), count=2),
    "dense, fewer": Case(DenseEstimator("mc"), count=2),
    "kronecker, wide": Case(KroneckerEstimator(KFAC, ListedTasks()), net="wide"),
    "kronecker, tall": Case(KroneckerEstimator(KFAC, ListedTasks()), net="tall"),
    "kronecker, none": Case(KroneckerEstimator(KFAC, ListedTasks()), count=0),
    "ekfac, none": Case(EkfacEstimator(KFAC), count=0),
    "dense, none": Case(DenseEstimator("mc"), count=0),
    "kronecker, all idle": Case(KroneckerEstimator(KFAC, ListedTasks()), weight=torch.zeros(COUNT)),
    "ekfac, all idle": Case(EkfacEstimator(KFAC), weight=torch.zeros(COUNT)),
}
# Room for two and a half of four tasks.
WIDE_BYTES = 4 * (2 * (10**2 + 2**2) + 145**2 + 12**2 + 13**2 + 7**2)
TASKS: dict[str, TasksConfig] = {
    "list": ListedTasks(),
    "list, few bytes": ListedTasks(max_gib=2.5 * WIDE_BYTES / 2**30, tolerance=0.9),
    "list, few operations": ListedTasks(max_cost=2.5, tolerance=0.9),
    "list, strict": ListedTasks(max_gib=1e-9, tolerance=0.3),
    "pooled": PooledTasks(),
    "nearest": NearestTasks(),
    "refit": RefitTasks(),
}
FAILING = ("list, strict", "pooled", "nearest", "refit")  # sums of two terms, of which one is not finite


def told(precision: Precision, comm: Comm) -> Result:
    return {
        "state": precision.state_dict(),
        "shard": precision.shard_dict(),
        "totals": dict(vars(precision.totals(comm))),
    }


def measured(case: Case, comm: Comm) -> Precision:
    data = examples(pixels(case.count), weight=None if case.weight is None else case.weight)
    return case.estimator.estimate(build(case.net), Asking(data, comm), comm)


def diverged(estimator: Estimator, comm: Comm) -> Result:
    """The image in the middle of the last rank's share is not finite."""
    images = pixels(COUNT)
    images[COUNT - 2] = torch.nan
    try:
        estimator.estimate(build("mixed"), Asking(examples(images), comm), comm)
    except HpcclError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none"}


def overflown(how: TasksConfig, comm: Comm) -> Result:
    """One layer, which is on one rank, is beyond fp32 by the time two tasks are summed."""
    one = KroneckerEstimator(KFAC, how, keep_trace=0.9).estimate(build("wide"), Asking(examples(pixels(8)), comm), comm)
    spoilt = tuple(block.times(math.inf) if block.layout.name == "3" else block for block in one.blocks)
    try:
        one.plus(replace(one, blocks=spoilt), comm)
    except HpcclError as error:
        return {"kind": type(error).__name__, "mine": any(block.layout.name == "3" for block in spoilt)}
    return {"kind": "none"}


def sums(comm: Comm) -> Result:
    """Four tasks with other images and other heads each, summed in every way."""
    heads = ((0, 1, 2), (3, 4), (1, 5, 6), (0, 2, 4, 6))

    def tasks(how: TasksConfig) -> list[Kronecker]:
        estimator = KroneckerEstimator(KFAC, how)
        net = build("wide")
        data = [examples(pixels(COUNT + n, seed=n), classes=head) for n, head in enumerate(heads)]
        return [estimator.estimate(net, Asking(one, comm), comm) for one in data]

    listed, refit = tasks(ListedTasks()), tasks(RefitTasks())
    found = {}
    for name, how in TASKS.items():
        whole, *others = [replace(one, tasks=how) for one in (refit if name == "refit" else listed)]
        for other in others:
            whole = whole.plus(other, comm)
        found[name] = told(whole, comm)
    return found


def everything(comm: Comm) -> Result:
    estimators: dict[str, Estimator] = {
        "kronecker": KroneckerEstimator(KFAC, ListedTasks()),
        "ekfac": EkfacEstimator(KFAC),
        "dense": DenseEstimator("mc"),
        "diagonal": DiagonalEstimator(),
    }
    return {
        "cases": {name: told(measured(case, comm), comm) for name, case in CASES.items()},
        "diverged": {name: diverged(estimator, comm) for name, estimator in estimators.items()},
        "overflown": {name: overflown(TASKS[name], comm) for name in FAILING},
        "sums": sums(comm),
    }


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Result:
    (alone,) = run_in_world(everything, 1, tmp_path_factory.mktemp("solo"))
    return alone


@pytest.fixture(scope="module", params=[2, 4])
def worlds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, solo: Result
) -> tuple[Result, list[Result]]:
    """What one process found, and what each of several did."""
    return solo, run_in_world(everything, request.param, tmp_path_factory.mktemp("worlds"))


def joined(ranks: Sequence[Mapping[str, Any]]) -> Precision:
    """What all ranks hold, on one."""

    def read(wanted: Any) -> dict[str, list[Any]]:
        names = {name for rank in ranks for name in rank["shard"] if wanted(name)}
        return {name: [part for rank in ranks for part in rank["shard"].get(name, [])] for name in names}

    return precision_from_state(ranks[0]["state"], read, Comm.solo())


def dense(block: Block) -> Tensor:
    """[g, o * d, o * d] float64."""
    total = torch.zeros(())
    for term in block.terms:
        if isinstance(term, Eigen):
            bases = [torch.kron(b.double(), a.double()) for a, b in zip(term.qa, term.qb, strict=True)]
            rows = term.values.double().flatten(1)
            each = [base * row @ base.T for base, row in zip(bases, rows, strict=True)]
        else:
            each = [torch.kron(b.double(), a.double()) for a, b in zip(term.a.dense(), term.b.dense(), strict=True)]
        total = total + torch.stack(each)
    return total


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def assert_same(found: Precision, expected: Precision, tolerance: float = 1e-5) -> None:
    assert found.num_examples == expected.num_examples
    if isinstance(expected, DensePrecision):
        assert isinstance(found, DensePrecision)
        assert_close(found.matrix, expected.matrix, 1e-5)
        return
    assert isinstance(found, Kronecker)
    assert isinstance(expected, Kronecker)
    assert found.layouts == expected.layouts
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert (ours.layout, ours.part, ours.counts) == (theirs.layout, WHOLE, theirs.counts)
        assert [type(term) for term in ours.terms] == [type(term) for term in theirs.terms]
        assert_close(dense(ours), dense(theirs), tolerance)
        assert ours.lost == pytest.approx(theirs.lost, rel=1e-2, abs=1e-6 * theirs.norm())
    assert found.rest.values.keys() == expected.rest.values.keys()
    for name, value in expected.rest.values.items():
        assert_close(found.rest.values[name], value, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_measured_on_several_ranks(worlds: tuple[Result, list[Result]], name: str) -> None:
    alone, ranks = worlds[0]["cases"][name], [rank["cases"][name] for rank in worlds[1]]
    expected = joined([alone])
    weight = CASES[name].weight
    assert expected.num_examples == (CASES[name].count if weight is None else float(weight.sum()))
    # The diagonal in a basis is less certain than the basis, where eigenvalues are close to each other.
    assert_same(joined(ranks), expected, 1e-4 if name == "ekfac, reduce" else 1e-5)
    for rank in ranks:  # what all hold is equal to the last bit
        assert_equal(rank["state"], ranks[0]["state"])
    trace, size = alone["totals"]["trace"], alone["totals"]["num_bytes"]
    for rank in ranks:
        assert rank["totals"] == ranks[0]["totals"]
        assert rank["totals"]["trace"] == pytest.approx(trace, rel=1e-5)
        assert rank["totals"]["num_bytes"] >= size * 0.99
    assert (trace > 0) == (expected.num_examples > 0)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, (list, tuple)):
        for value, same in zip(one, other, strict=True):
            assert_equal(value, same)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["kronecker", "ekfac", "kronecker, wide", "kronecker, tall"])
def test_every_block_has_one_owner_and_ranks_hold_less(worlds: tuple[Result, list[Result]], name: str) -> None:
    alone, ranks = worlds[0]["cases"][name], [rank["cases"][name] for rank in worlds[1]]
    parts: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        for layer, states in rank["shard"].items():
            parts.setdefault(layer, []).extend(state["part"] for state in states)
    assert parts.keys() == alone["shard"].keys()
    for states in parts.values():
        ordered = sorted(states, key=lambda part: part["start"])
        assert len({part["axis"] for part in ordered}) == 1
        assert all(one["stop"] == other["start"] for one, other in itertools.pairwise(ordered))
        assert len(ordered) == 1 or ordered[0]["axis"] != "whole"
    cut = {states[0]["axis"] for states in parts.values()}
    if name == "kronecker, wide":
        assert "input" in cut
        assert len(parts["3"]) == len(ranks)
    if name == "kronecker, tall" and len(ranks) == 4:
        assert {"input", "output"} <= cut
    if name == "ekfac":
        assert cut == {"whole"}
        assert ranks[0]["totals"]["num_bytes"] == alone["totals"]["num_bytes"]
    assert ranks[0]["totals"]["rank_bytes"] < 0.75 * alone["totals"]["rank_bytes"]


@pytest.mark.parametrize("kind", ["kronecker", "ekfac", "dense", "diagonal"])
def test_a_failure_of_one_rank_ends_all(worlds: tuple[Result, list[Result]], kind: str) -> None:
    """The rank that met it says what it is; no other waits for it."""
    alone, ranks = worlds[0]["diverged"][kind], [rank["diverged"][kind] for rank in worlds[1]]
    assert alone["kind"] == "DivergedError"
    assert [rank["kind"] for rank in ranks] == ["WorldError"] * (len(ranks) - 1) + ["DivergedError"]
    assert "109" in ranks[-1]["message"]
    assert all("another rank" in rank["message"] for rank in ranks[:-1])


@pytest.mark.parametrize("name", FAILING)
def test_a_sum_that_fails_on_one_rank_ends_all(worlds: tuple[Result, list[Result]], name: str) -> None:
    """Also in the middle of a list's merges, between which ranks ask each other."""
    assert worlds[0]["overflown"][name]["kind"] == "DivergedError"
    ranks = [rank["overflown"][name] for rank in worlds[1]]
    assert sorted(rank["kind"] for rank in ranks) == ["DivergedError"] + ["WorldError"] * (len(ranks) - 1)
    assert all(rank["mine"] == (rank["kind"] == "DivergedError") for rank in ranks)


@pytest.mark.parametrize("name", TASKS)
def test_sums_over_tasks(worlds: tuple[Result, list[Result]], name: str) -> None:
    """The same numbers and the same decisions, also for a layer whose parts are on several ranks."""
    alone, ranks = worlds[0]["sums"][name], [rank["sums"][name] for rank in worlds[1]]
    expected = joined([alone])
    assert_same(joined(ranks), expected)
    assert isinstance(expected, Kronecker)
    terms = [len(block.terms) for block in expected.blocks]
    if name == "list, strict":
        assert 1 < max(terms) < 4 or len(set(terms)) > 1, "the tolerance decides, layer by layer"
    else:
        few = {"list": 4, "list, few bytes": 2, "list, few operations": 2}
        assert set(terms) == {few.get(name, 1)}
    for rank in ranks:
        assert rank["totals"]["terms"] == alone["totals"]["terms"] == max(terms)
        assert rank["totals"]["trace"] == pytest.approx(alone["totals"]["trace"], rel=1e-5)
        assert rank["totals"]["error"] == pytest.approx(alone["totals"]["error"], rel=1e-2, abs=1e-6)
    assert (alone["totals"]["error"] > 0) == (name != "list")
    if name != "refit":
        assert any(state["part"]["axis"] != "whole" for rank in ranks for state in rank["shard"].get("3", []))
