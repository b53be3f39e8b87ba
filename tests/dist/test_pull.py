"""The quadratic in a step on several ranks: the gradient of a penalty in the loss, and not a byte more sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpccl.config.curvature import ListedTasks
from hpccl.config.run import RunConfig
from hpccl.curvature.dense import DenseEstimator, DensePrecision
from hpccl.curvature.diagonal import Diagonal, DiagonalEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.kfac import EkfacEstimator, KroneckerEstimator
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Estimator, Examples, Precision
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.ddp import DdpEngine
from hpccl.kron.eigen import Eigen
from hpccl.prior.quadratic import Products, Quadratic
from tests.dist.world import Result, run_in_world
from tests.unit.curvature.oracle import NUM_CLASSES, examples

ROWS, STEPS, NUM_TRAIN = 11, 4, 40
RATE, CLIP, WEIGHT, DAMPING = 0.05, 3.0, 2.0, 0.3
KFAC = KroneckerPass(fisher="mc", samples=2, seed=5)
ESTIMATORS: dict[str, Estimator] = {
    "kronecker": KroneckerEstimator(KFAC, ListedTasks()),
    "low rank": KroneckerEstimator(KFAC, ListedTasks(), keep_trace=0.8),
    "ekfac": EkfacEstimator(KFAC),
    "dense": DenseEstimator("ggn"),
    "diagonal": DiagonalEstimator("ggn"),
}
SETTINGS = [(kind, "newest") for kind in ESTIMATORS] + [("kronecker", "each"), ("dense", "each")]
ROUNDED = ("kronecker", "low rank", "ekfac")


def net() -> nn.Module:
    """The last layer is dear enough to be cut into parts."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


def engine(comm: Comm, precision: str = "fp32") -> DdpEngine:
    config = RunConfig.model_validate(
        {
            "train": {"clip_norm": CLIP},
            "optim": {"name": "momentum", "lr": RATE, "momentum": 0.0, "schedule": "constant"},
            "engine": {"kind": "ddp", "precision": precision, "channels_last": True},
        }
    )
    made = DdpEngine(net(), config, comm)
    made.start(num_steps=STEPS, task=0)
    return made


def moved(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


def batch(seed: int) -> Examples:
    return examples(torch.randn(ROWS, 2, 6, 6, generator=torch.Generator().manual_seed(seed)))


def shares(data: Examples, comm: Comm) -> list[Examples]:
    mine = comm.share(len(data))
    return [data.select(slice(mine.start, mine.stop))]


def nats(logits: Tensor, rows: Examples) -> Tensor:
    return nn.functional.cross_entropy(logits, rows.labels, reduction="sum") / ROWS


def two_tasks(kind: str, made: DdpEngine, comm: Comm) -> tuple[list[Precision], list[dict[str, Tensor]]]:
    """The curvatures of two tasks, each at its own weights, and those weights."""
    precisions, anchors = [], []
    for task in range(2):
        made.put(moved(wholes(made.gather()), task))
        anchors.append(wholes(made.gather()))
        precisions.append(ESTIMATORS[kind].estimate(made.module, shares(batch(10 + task), comm), comm))
    made.put(moved(wholes(made.gather()), 5))
    return precisions, anchors


def quadratic(precisions: list[Precision], anchors: list[dict[str, Tensor]], which: str, comm: Comm) -> Quadratic:
    first = Quadratic(precisions[0], anchors[0], WEIGHT, DAMPING)
    return first.plus(precisions[1], anchors[1], comm, own_anchors=anchors[0] if which == "each" else ())


def trained(kind: str, which: str, comm: Comm, *, products: Products = "fp32") -> Result:
    """Weights after some steps, of two micro-batches each."""
    made = engine(comm)
    made_of = replace(quadratic(*two_tasks(kind, made, comm), which, comm), products=products)
    detach = made_of.attach(made, comm, num_train=NUM_TRAIN)
    for step in range(STEPS):
        data = batch(step)
        for part in (slice(0, 5), slice(5, ROWS)):
            (rows,) = shares(data.select(part), comm)
            made.backward(nats(made.forward(rows.pixels, rows.sample, last=part.stop == ROWS), rows))
        made.step()
    detach()
    return wholes(made.gather())


def nothing() -> None:
    """Removes no hook."""


def gradients(comm: Comm) -> Result:
    """Under bf16 autocast with a curvature of a million: (with the quadratic, without it)."""
    made = engine(comm, "bf16")
    (precision, _), (anchor, _) = two_tasks("kronecker", made, comm)
    large = precision.times(1e6 / precision.totals(comm).trace)
    found = {}
    for name in ("with", "without"):
        remove = nothing
        if name == "with":
            remove = Quadratic(large, anchor, WEIGHT, DAMPING).attach(made, comm, num_train=NUM_TRAIN)
        (rows,) = shares(batch(0), comm)
        made.backward(nats(made.forward(rows.pixels, rows.sample), rows))
        remove()
        parameters = dict(made.module.named_parameters())
        found[name] = {key: value.grad.clone() for key, value in parameters.items() if value.grad is not None}
        for value in parameters.values():
            value.grad = None if value.grad is None else value.grad.zero_()
    return found


def traffic(comm: Comm) -> Result:
    """Bytes that a step sends, and collectives that it makes: (with the quadratic, without it)."""
    made = engine(comm)
    buckets: list[int] = []

    def averaged(bucket: Any) -> Any:
        buckets.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer().div_(comm.size), async_op=True).get_future().then(lambda f: f.value()[0])

    assert isinstance(made._wrapped, DistributedDataParallel)
    made._wrapped.register_comm_hook(None, lambda _, bucket: averaged(bucket))
    precisions, anchors = two_tasks("kronecker", made, comm)
    (rows,) = shares(batch(0), comm)
    made.backward(nats(made.forward(rows.pixels, rows.sample), rows))  # DDP finds its buckets
    made.step()
    found: Result = {}
    for name in ("without", "with"):
        remove = nothing
        if name == "with":
            remove = quadratic(precisions, anchors, "each", comm).attach(made, comm, num_train=NUM_TRAIN)
        buckets.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            made.backward(nats(made.forward(rows.pixels, rows.sample), rows))
            made.step()
        remove()
        calls = sorted(event.name for event in profile.events() or () if event.name.startswith("c10d::"))
        found[name] = {"bytes": list(buckets), "calls": calls}
    return found


def everything(comm: Comm) -> Result:
    found: Result = {f"{kind}, {which}": trained(kind, which, comm) for kind, which in SETTINGS}
    found |= {f"{kind}, rounded": trained(kind, "newest", comm, products="bf16") for kind in ROUNDED}
    found["bf16"] = gradients(comm)
    if comm.size > 1:
        found["traffic"] = traffic(comm)
    return found


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_in_world(everything, request.param, tmp_path_factory.mktemp("ranks"))


# ---------------------------------------------------------------- the truth, in one process and float64


def parts(names: Mapping[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """(name, first, end) of each parameter among all numbers."""
    first = 0
    for name, value in names.items():
        yield name, first, first + value.numel()
        first += value.numel()


def matrix(precision: Precision, parameters: Mapping[str, Tensor]) -> Tensor:
    """[P, P] float64 over the parameters in their order."""
    places = {name: torch.arange(first, end) for name, first, end in parts(parameters)}
    size = sum(value.numel() for value in parameters.values())
    total = torch.zeros(size, size, dtype=torch.float64)
    if isinstance(precision, DensePrecision):
        order = torch.cat([places[name] for name in precision.shapes])
        total[order[:, None], order] = precision.matrix.double()
        return total
    rest = precision
    if isinstance(precision, Kronecker):
        for block in precision.blocks:
            groups, outputs, _ = block.layout.shape
            rows = places[block.layout.weight].view(groups, outputs, -1)
            if block.layout.bias:
                rows = torch.cat([rows, places[block.layout.bias].view(groups, outputs, 1)], 2)
            for term in block.terms:
                for group, where in enumerate(rows[:, :, block.layout.order()].flatten(1)):
                    if isinstance(term, Eigen):
                        basis = torch.kron(term.qb[group].double(), term.qa[group].double())
                        values = basis * term.values[group].double().flatten() @ basis.T
                    else:
                        values = torch.kron(term.b.dense()[group].double(), term.a.dense()[group].double())
                    total[where[:, None], where] += values
        rest = precision.rest
    assert isinstance(rest, Diagonal)
    for name, diagonal in rest.values.items():
        total[places[name], places[name]] += diagonal.double().flatten()
    return total


def flat(weights: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().contiguous().flatten() for name in names])


@cache
def penalised(kind: str, which: str) -> dict[str, Tensor]:
    """Plain gradient descent on the whole batch, with the penalty in the loss."""
    solo = Comm.solo()
    made = engine(solo)
    precisions, anchors = two_tasks(kind, made, solo)
    module = made.module
    parameters = dict(module.named_parameters())
    if which == "newest":
        precisions, anchors = [quadratic(precisions, anchors, which, solo).precision], anchors[1:]
    matrices = [matrix(precision, parameters) for precision in precisions]
    places = [flat(anchor, parameters) for anchor in anchors]
    module.train()
    for step in range(STEPS):
        data = batch(step)
        weights = flat(parameters, parameters)
        penalty = 0.5 * DAMPING * (weights - places[-1]).square().sum()
        for m, place in zip(matrices, places, strict=True):
            penalty = penalty + 0.5 * (weights - place) @ m @ (weights - place)
        loss = nats(module(data.pixels), data) + WEIGHT / NUM_TRAIN * penalty
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        norm = float(torch.cat([value.flatten() for value in gradient]).norm())
        with torch.no_grad():
            for value, change in zip(parameters.values(), gradient, strict=True):
                value.sub_(change, alpha=RATE * min(1.0, CLIP / norm))
    return {name: value.detach().clone() for name, value in parameters.items()}


@pytest.mark.parametrize(("kind", "which"), SETTINGS)
def test_steps_equal_those_with_the_penalty_in_the_loss(ranks: list[Result], kind: str, which: str) -> None:
    expected = penalised(kind, which)
    for rank in ranks:
        found = rank[f"{kind}, {which}"]
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 2e-6 * float(value.norm()), name
            assert torch.equal(found[name], ranks[0][f"{kind}, {which}"][name])


@pytest.mark.parametrize("kind", ROUNDED)
def test_products_in_bf16_are_close_and_equal_on_all_ranks(ranks: list[Result], kind: str) -> None:
    expected = penalised(kind, "newest")
    start = {name: value.detach() for name, value in net().named_parameters()}
    rounded = 0.0
    for rank in ranks:
        found = rank[f"{kind}, rounded"]
        for name, value in expected.items():
            error = float((found[name] - value).norm()) / float((value - start[name]).norm())
            assert error <= 2**-7, name
            rounded = max(rounded, error)
            assert torch.equal(found[name], ranks[0][f"{kind}, rounded"][name])
    assert rounded > 1e-5, "they are in bf16 indeed"


def test_a_large_curvature_is_exact_in_bf16(ranks: list[Result]) -> None:
    """The difference from the anchor, its product and its sum over ranks are fp32, whatever the forward pass is."""
    solo = Comm.solo()
    made = engine(solo, "bf16")
    (precision, _), (anchor, _) = two_tasks("kronecker", made, solo)
    parameters = {name: value.detach() for name, value in made.module.named_parameters()}
    large = matrix(precision.times(1e6 / precision.totals(solo).trace), parameters)
    delta = flat(parameters, parameters) - flat(anchor, parameters)
    pull = WEIGHT / NUM_TRAIN * (large @ delta + DAMPING * delta)
    for rank in ranks:
        found = flat(rank["bf16"]["with"], parameters) - flat(rank["bf16"]["without"], parameters)
        assert bool(found.isfinite().all())
        for name, first, end in parts(parameters):
            error = float((found - pull)[first:end].norm() / pull[first:end].norm())
            assert error < 3e-6, name


def test_the_pull_sends_nothing(ranks: list[Result]) -> None:
    if len(ranks) == 1:
        pytest.skip("one process sends nothing")
    for rank in ranks:
        found = rank["traffic"]
        assert sum(found["without"]["bytes"]) == 4 * sum(value.numel() for value in net().parameters())
        assert found["with"] == found["without"]
        assert len(found["with"]["calls"]) == len(found["with"]["bytes"]) > 0
