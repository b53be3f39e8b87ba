"""Blocks of layers among named weights: products, parts, sums over tasks and files, against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.config.curvature import ListedTasks, NearestTasks, PooledTasks, RefitTasks, TasksConfig
from hpccl.curvature.blocks import WHOLE, Block, Layout, Part
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker, layout_parts
from hpccl.curvature.protocols import Piece
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, CoverageError
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense, LowRank
from hpccl.kron.pair import Pair

SOLO = Comm.solo()
LAYOUTS = (
    Layout("conv", "conv.weight", "conv.bias", (6, 2, 3, 3), channels_last=True),
    Layout("grouped", "grouped.weight", None, (6, 2, 3, 3), groups=3),
    Layout("head", "head.weight", "head.bias", (5, 4)),
)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layout in LAYOUTS:
        weight = torch.randn(layout.weight_shape, generator=generator)
        if layout.channels_last:
            weight = weight.to(memory_format=torch.channels_last)
        found[layout.weight] = weight
        if layout.bias:
            found[layout.bias] = torch.randn(layout.weight_shape[0], generator=generator)
    return {**found, "norm": torch.randn(7, generator=generator)}


def psd(groups: int, size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    root = torch.randn(groups, size, rank or size, generator=generator)
    return root @ root.mT / size


def precision(seed: int, tasks: TasksConfig | None = None, *, scale: float = 1.0) -> Kronecker:
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for layout in LAYOUTS:
        groups, outputs, inputs = layout.shape
        pair = Pair(Dense(psd(groups, inputs, generator)), Dense(scale * psd(groups, outputs, generator)))
        blocks.append(Block(layout, (pair,), (10.0,)))
    rest = Diagonal({"norm": torch.rand(7, generator=generator)}, 10.0)
    return Kronecker(tuple(blocks), rest, 10.0, tasks or ListedTasks(), LAYOUTS)


def dense(block: Block) -> Tensor:
    """[g, o * d, o * d] float64, acting on rows of the block's matrix."""
    total = torch.zeros(())
    for term in block.terms:
        if isinstance(term, Pair):
            matrices = [torch.kron(b.double(), a.double()) for a, b in zip(term.a.dense(), term.b.dense(), strict=True)]
        else:
            bases = [torch.kron(b.double(), a.double()) for a, b in zip(term.qa, term.qb, strict=True)]
            values = term.values.double().flatten(1)
            matrices = [base * row @ base.T for base, row in zip(bases, values, strict=True)]
        total = total + torch.stack(matrices)
    return total


def product(pieces: Sequence[Piece], delta: Mapping[str, Tensor], damping: float = 0.0) -> dict[str, Tensor]:
    zero = {name: torch.zeros_like(value) for name, value in delta.items()}
    total = {name: torch.zeros_like(value) for name, value in delta.items()}
    for piece in pieces:
        total[piece.name] = piece.add(total[piece.name], delta, zero, 1.0, damping)
    return total


def matrix(layout: Layout, named: Mapping[str, Tensor]) -> Tensor:
    """[g, o, d] in the layout's own order of inputs, by plain indexing."""
    groups, outputs, _ = layout.shape
    flat = named[layout.weight].reshape(groups, outputs, -1)
    if layout.bias:
        flat = torch.cat([flat, named[layout.bias].reshape(groups, outputs, 1)], dim=2)
    return flat[:, :, layout.order()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_round_trip(layout: Layout) -> None:
    named, anchor = weights(0), weights(1)
    difference = layout.difference(named, anchor)
    assert torch.equal(difference, matrix(layout, named) - matrix(layout, anchor))
    assert torch.equal(layout.weight_of(difference), named[layout.weight] - anchor[layout.weight])
    if layout.bias:
        assert torch.equal(layout.bias_of(difference), named[layout.bias] - anchor[layout.bias])


def test_pieces_are_the_dense_product() -> None:
    curvature, delta = precision(0), weights(3)
    found = product(curvature.pieces(SOLO, delta), delta, damping=0.5)
    for block in curvature.blocks:
        rows = matrix(block.layout, delta).double()
        expected = (dense(block) @ rows.flatten(1)[..., None]).view_as(rows) + 0.5 * rows
        torch.testing.assert_close(matrix(block.layout, found).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["norm"], (curvature.rest.values["norm"] + 0.5) * delta["norm"])


@pytest.mark.parametrize("kind", ["dense", "low rank", "refit"])
def test_rounded_pieces_are_the_product_but_for_rounding(kind: str) -> None:
    """Matrices in bf16, 8 bits: each product errs by 2^-8 of what it adds up; biases are a matter of their own."""
    curvature = precision(0, RefitTasks()).plus(precision(1), SOLO) if kind == "refit" else precision(0)
    if kind == "low rank":
        curvature = replace(curvature, blocks=tuple(block.truncated(0.9) for block in curvature.blocks))
    delta = weights(3)
    expected = product(curvature.pieces(SOLO, delta), delta, damping=0.5)
    found = product(curvature.rounded().pieces(SOLO, delta), delta, damping=0.5)
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert (error == 0) if name == "norm" else (0 < error < 0.02), name
        assert found[name].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in tensors(curvature)), "what is kept stays as it is"
    assert {value.dtype for value in tensors(curvature.rounded())} == {torch.bfloat16}


def tensors(curvature: Kronecker) -> list[Tensor]:
    """All tensors of the blocks' terms."""
    held: list[Tensor] = []
    for block in curvature.blocks:
        for term in block.terms:
            held += [term.qa, term.qb, term.values] if isinstance(term, Eigen) else [*term.a.chain, *term.b.chain]
    return held


def test_gradients_may_lie_otherwise_in_memory() -> None:
    curvature, delta = precision(0), weights(3)
    expected = product(curvature.pieces(SOLO, delta), delta, damping=0.5)
    turned = {
        name: value.contiguous() if name.startswith("conv") else value.to(memory_format=torch.channels_last)
        for name, value in delta.items()
        if value.dim() == 4
    }
    assert turned["conv.weight"].stride() != delta["conv.weight"].stride()
    zero = {name: torch.zeros_like(value) for name, value in delta.items()}
    for piece in curvature.pieces(SOLO, delta):
        if piece.name in turned:
            gradient = torch.ones_like(turned[piece.name])
            before = gradient.clone()
            found = piece.add(gradient, delta, zero, 1.0, 0.5)
            torch.testing.assert_close(found, 1 + expected[piece.name])
            assert torch.equal(gradient, before)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("wide", [True, False])
def test_parts_add_up_to_the_whole(count: int, wide: bool) -> None:
    """Cut along the inputs, or along the outputs where there are more of them; also between weight and bias."""
    layout = LAYOUTS[0] if wide else Layout("tall", "tall.weight", "tall.bias", (9, 4))
    generator = torch.Generator().manual_seed(0)
    _, outputs, inputs = layout.shape
    pair = Pair(Dense(psd(1, inputs, generator)), Dense(psd(1, outputs, generator)))
    block = Block(layout, (pair, pair.times(2)), (1.0, 1.0))
    delta = {
        layout.weight: torch.randn(layout.weight_shape, generator=generator),
        "norm": torch.ones(1),
        f"{layout.name}.bias": torch.randn(outputs, generator=generator),
    }
    parts = [block.cut(Part.of(layout.shape, number, count)) for number in range(count)]
    assert {part.part.axis for part in parts} == {"input" if wide else "output"}
    rest = Diagonal({"norm": torch.ones(1)})
    whole = Kronecker((block,), rest, 1.0, ListedTasks(), (layout,))
    split = [Kronecker((part,), rest, 1.0, ListedTasks(), (layout,)) for part in parts]
    expected = product(whole.pieces(SOLO, delta)[:-1], delta, damping=0.1)
    found = product([piece for one in split for piece in one.pieces(SOLO, delta)[:-1]], delta, damping=0.1)
    for name in layout.names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert sum(part.trace() for part in parts) == pytest.approx(block.trace())
    joined = Block.joined(list(reversed(parts)))
    assert joined.part == WHOLE
    torch.testing.assert_close(dense(joined), dense(block), rtol=0, atol=0)


def test_every_layer_is_placed_once_and_evenly() -> None:
    layouts = [Layout("large", "large.weight", None, (512, 512, 3, 3))] + [
        Layout(f"small{k}", f"small{k}.weight", None, (64, 64)) for k in range(6)
    ]
    placed = layout_parts(layouts, Comm(0, 4, torch.device("cpu")), divisible=True)
    (_, parts), *rest = placed
    assert [part.axis for _, part in parts] == ["input"] * len(parts)
    assert (parts[0][1].start, parts[-1][1].stop) == (0, 4608)
    assert all(one.stop == other.start for (_, one), (_, other) in pairwise(parts))
    assert len({rank for rank, _ in parts}) == len(parts) == 4
    assert all(parts == [(parts[0][0], WHOLE)] for _, parts in rest)
    whole = layout_parts(layouts, Comm(0, 4, torch.device("cpu")), divisible=False)
    assert all(len(parts) == 1 for _, parts in whole)


def relative(found: Kronecker, exact: Sequence[Kronecker]) -> list[float]:
    """Relative Frobenius error of each layer against the dense sum."""
    errors = []
    for number, block in enumerate(found.blocks):
        truth = torch.stack([dense(one.blocks[number]) for one in exact]).sum(0)
        errors.append(float((dense(block) - truth).norm() / truth.norm()))
    return errors


def total(tasks: TasksConfig, count: int = 4) -> tuple[Kronecker, list[Kronecker]]:
    each = [precision(seed, tasks, scale=1.0 + seed) for seed in range(count)]
    whole = each[0]
    for other in each[1:]:
        whole = whole.plus(other, SOLO)
    return whole, each


def test_the_list_is_exact() -> None:
    whole, each = total(ListedTasks())
    assert all(len(block.terms) == 4 for block in whole.blocks)
    assert max(relative(whole, each)) < 1e-6
    assert whole.totals(SOLO).error == 0
    torch.testing.assert_close(
        whole.rest.values["norm"], sum((one.rest.values["norm"] for one in each), torch.zeros(7))
    )
    assert whole.num_examples == 40


@pytest.mark.parametrize("limit", ["max_gib", "max_cost"])
def test_beyond_the_budget_the_list_merges_within_the_tolerance(limit: str) -> None:
    one = precision(0)
    if limit == "max_gib":
        budget = ListedTasks(max_gib=2.5 * sum(block.num_bytes for block in one.blocks) / 2**30, tolerance=0.9)
    else:
        budget = ListedTasks(max_cost=2.5, tolerance=0.9)
    whole, each = total(budget)
    assert max(len(block.terms) for block in whole.blocks) == 2
    errors = relative(whole, each)
    # The error that is stated is a bound on the true one, and no idle one.
    stated = [block.error() for block in whole.blocks]
    assert all(0 < error <= bound * 1.01 for error, bound in zip(errors, stated, strict=True))
    assert max(stated) < 0.9
    strict, each = total(budget.model_copy(update={"tolerance": 1e-3}))
    assert all(len(block.terms) == 4 for block in strict.blocks)
    assert max(relative(strict, each)) < 1e-6


@pytest.mark.parametrize(("alike", "left"), [(True, 2), (False, 4)])
def test_merged_terms_of_low_rank_stay_so_and_no_merge_is_for_nothing(alike: bool, left: int) -> None:
    """A merge makes whole factors, which are cut again; of terms that share no directions it would save nothing."""
    layout = Layout("head", "head.weight", None, (12, 30))
    each = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(0 if alike else seed)
        pair = Pair(Dense(psd(1, 30, generator, rank=3)), Dense(psd(1, 12, generator, rank=2))).times(1.0 + seed)
        rest = Diagonal({"norm": torch.ones(7)}, 1.0)
        whole = Kronecker((Block(layout, (pair,), (1.0,)),), rest, 1.0, ListedTasks(), (layout,))
        each.append(replace(whole, blocks=(whole.blocks[0].truncated(0.999),), keep_trace=0.999, divisible=False))
    budget = ListedTasks(max_gib=2.5 * each[0].blocks[0].num_bytes / 2**30, tolerance=0.99)
    total = replace(each[0], tasks=budget)
    for other in each[1:]:
        total = total.plus(replace(other, tasks=budget), SOLO)
    (block,) = total.blocks
    assert all(isinstance(term, Pair) and isinstance(term.a, LowRank) for term in block.terms)
    assert len(block.terms) == left


def test_terms_that_are_not_merged_stay_as_they_are() -> None:
    """Also those that no low rank suits: their eigenvectors are not found once more with each task."""
    layouts = LAYOUTS[2:]
    one, other = (replace(precision(s), layouts=layouts, keep_trace=0.99, divisible=False) for s in (0, 1))
    one, other = (replace(whole, blocks=(whole.blocks[2].truncated(0.99),)) for whole in (one, other))
    (block,) = one.plus(other, SOLO).blocks
    assert any(isinstance(term, Pair) and isinstance(term.a, Dense) for term in block.terms)
    assert all(term is own.blocks[0].terms[0] for term, own in zip(block.terms, (one, other), strict=True))


@pytest.mark.parametrize("tasks", [PooledTasks(), NearestTasks(), RefitTasks()], ids=lambda tasks: tasks.kind)
def test_one_term_for_any_number_of_tasks(tasks: TasksConfig) -> None:
    three, _ = total(tasks, 3)
    four, each = total(tasks, 4)
    assert three.totals(SOLO).num_bytes == four.totals(SOLO).num_bytes
    assert all(len(block.terms) == 1 for block in four.blocks)
    norms = [float(torch.stack([dense(one.blocks[k]) for one in each]).sum(0).norm()) for k in range(len(LAYOUTS))]
    for error, block, norm in zip(relative(four, each), four.blocks, norms, strict=True):
        assert error < 1
        assert error * norm <= block.lost * (1 + 1e-5)  # the stated bound holds
    if not isinstance(tasks, PooledTasks):  # pooling has products of different tasks in it
        exact = sum(one.totals(SOLO).trace for one in each)
        assert four.totals(SOLO).trace <= exact * (1 + 1e-5)
    for block in four.blocks:
        assert float(torch.linalg.eigvalsh(dense(block)).min()) > -1e-5 * block.norm()


def test_policies_from_best_to_worst() -> None:
    """List, refit, nearest, pooled: each knows more than the next (of two tasks; nearest is the best of its form)."""
    errors = {}
    for tasks in (ListedTasks(), RefitTasks(), NearestTasks(), PooledTasks()):
        whole, each = total(tasks, 2)
        errors[tasks.kind] = relative(whole, each)
        for number, (error, block) in enumerate(zip(errors[tasks.kind], whole.blocks, strict=True)):
            norm = float(torch.stack([dense(one.blocks[number]) for one in each]).sum(0).norm())
            assert block.lost == pytest.approx(error * norm, rel=1e-4, abs=1e-4 * norm)  # exact for one merge
    for layer in range(len(LAYOUTS)):
        listed, refit, nearest, pooled = (errors[kind][layer] for kind in ("list", "refit", "nearest", "pooled"))
        assert listed < 1e-6 < refit <= nearest * (1 + 1e-6) <= pooled * (1 + 1e-5)


def test_equal_tasks_are_merged_without_error() -> None:
    one = precision(0, NearestTasks())
    both = one.plus(one.times(3.0), SOLO)
    assert max(relative(both, [one.times(4.0)])) < 1e-5
    assert both.totals(SOLO).error < 1e-5


def test_pooled_inputs_weigh_as_much_as_what_is_behind_them() -> None:
    """By hand, A = sum_t n_t A_t / n: of a task decayed to a hundredth, or that stands for ten times its examples."""
    layout = Layout("linear", "linear.weight", None, (2, 2))
    none = Diagonal({}, 1000.0)

    def task(first: float, second: float) -> Kronecker:
        pair = Pair(
            Dense(torch.diag(torch.tensor([first, second], dtype=torch.float32))[None]), Dense(torch.eye(2)[None])
        )
        return Kronecker((Block(layout, (pair,), (1000.0,)),), none, 1000.0, PooledTasks(), (layout,))

    for scaled, other, share in ((0.01, 1.0, 0.01 / 1.01), (1.0, 10.0, 1 / 11)):
        (block,) = task(1, 0).times(scaled).plus(task(0, 1).times(other), SOLO).blocks
        (term,) = block.terms
        assert isinstance(term, Pair)
        torch.testing.assert_close(term.a.dense()[0].diagonal(), torch.tensor([share, 1 - share]))


def test_other_kinds_and_layers_are_refused() -> None:
    one = precision(0)
    with pytest.raises(CoverageError, match="both must be of one kind"):
        one.plus(Diagonal({}), SOLO)
    fewer = Kronecker(one.blocks[:1], one.rest, 1.0, ListedTasks(), LAYOUTS[:1])
    with pytest.raises(CoverageError, match="different layers"):
        one.plus(fewer, SOLO)


def reader(shards: Sequence[Mapping[str, Any]]) -> Any:
    def read(wanted: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for shard in shards:
            for name, states in shard.items():
                if wanted(name):
                    found.setdefault(name, []).extend(states)
        return found

    return read


@pytest.mark.parametrize("tasks", [ListedTasks(), RefitTasks()], ids=lambda tasks: tasks.kind)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_saved_on_one_rank_and_found_on_several(tasks: TasksConfig, size: int) -> None:
    """And back: every rank takes what it owns, and the parts of all ranks are the whole."""
    whole, _ = total(tasks, 2)
    whole = Kronecker(whole.blocks, whole.rest, whole.num_examples, tasks, LAYOUTS, isinstance(tasks, ListedTasks))
    state, shards = whole.state_dict(), [whole.shard_dict()]
    ranks = [Kronecker.from_state_dict(state, reader(shards), Comm(r, size, torch.device("cpu"))) for r in range(size)]
    assert sum(block.trace() for rank in ranks for block in rank.blocks) == pytest.approx(
        sum(block.trace() for block in whole.blocks)
    )
    again = Kronecker.from_state_dict(state, reader([rank.shard_dict() for rank in ranks]), SOLO)
    for one, other in zip(again.blocks, whole.blocks, strict=True):
        assert one.layout == other.layout
        assert type(one.terms[0]) is (Eigen if isinstance(tasks, RefitTasks) else Pair)
        torch.testing.assert_close(dense(one), dense(other), rtol=0, atol=0)


@pytest.mark.parametrize("tasks", [ListedTasks(), RefitTasks()], ids=lambda tasks: tasks.kind)
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("size", [1, 3])
def test_found_by_a_network_that_lies_otherwise_in_memory(tasks: TasksConfig, keep: float, size: int) -> None:
    """Such as one on another engine: the same matrix, over inputs in the order of what will be added."""
    divisible = isinstance(tasks, ListedTasks) and keep == 1
    whole, _ = total(tasks, 2)
    blocks = tuple(block.truncated(keep) for block in whole.blocks)
    whole = Kronecker(blocks, whole.rest, whole.num_examples, tasks, LAYOUTS, divisible, keep)
    like = weights(1)
    like["conv.weight"] = like["conv.weight"].contiguous()
    like["grouped.weight"] = like["grouped.weight"].to(memory_format=torch.channels_last)
    state, shards = whole.state_dict(), [whole.shard_dict()]
    comms = [Comm(rank, size, torch.device("cpu")) for rank in range(size)]
    ranks = [Kronecker.from_state_dict(state, reader(shards), comm, like=like) for comm in comms]
    assert [layout.channels_last for layout in ranks[0].layouts] == [False, True, False]
    again = Kronecker.from_state_dict(ranks[0].state_dict(), reader([rank.shard_dict() for rank in ranks]), SOLO)
    found, expected = (product(one.pieces(SOLO, like), weights(2)) for one in (again, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    new = Kronecker.from_state_dict(state, reader(shards), SOLO, like=like)
    assert again.plus(new, SOLO).num_examples == 2 * whole.num_examples


def test_damaged_states_are_refused() -> None:
    whole = precision(0)
    state = whole.state_dict()
    with pytest.raises(CheckpointError, match="no curvature of layer 'conv': a file is missing"):
        Kronecker.from_state_dict(state, reader([]), SOLO)
    with pytest.raises(CheckpointError, match="damaged"):
        Kronecker.from_state_dict({**state, "tasks": {"kind": "other"}}, reader([]), SOLO)
    shard = whole.shard_dict()
    del shard["conv"][0]["terms"][0]["a"]
    with pytest.raises(CheckpointError, match="layer 'conv' is damaged"):
        Kronecker.from_state_dict(state, reader([shard]), SOLO)
