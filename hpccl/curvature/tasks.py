"""Sum the curvatures of several tasks, layer by layer, in one of four ways.

    list:     sum_t B_t (x) A_t, exactly, while it fits; then the two closest terms of each layer are merged into their
              nearest Kronecker product, as long as the error of all merges of a layer stays within the tolerance
    pooled:   (sum_t B_t) (x) (sum_t n_t A_t / sum_t n_t)    online Laplace; includes cross terms of different tasks
    nearest:  the nearest Kronecker product of the sum so far and the new task
    refit:    the eigenbasis of the nearest pair, with the exact diagonal of the sum in it

Ranks that hold parts of a layer exchange only inner products of factors, which add up over parts.
Sources: Van Loan and Pitsianis 1993 (nearest products); Ritter et al. 2018 and Daxberger et al. 2021 (online Laplace);
George et al. 2018 (EKFAC).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import assert_never

import torch
from torch import Tensor

from hpccl.config.curvature import ListedTasks, NearestTasks, PooledTasks, RefitTasks, TasksConfig
from hpccl.curvature.blocks import WHOLE, Block, Term
from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.kron import merge
from hpccl.kron.pair import Pair

__all__ = ["norms", "summed"]

_MERGE = "merge its layers' curvature"  # a step of dist.agree
Grams = tuple[Tensor, Tensor]  # inner products of the input factors and of the gradient factors, [g, T, T] each


def summed(
    olds: Sequence[Block],
    news: Sequence[Block],
    tasks: TasksConfig,
    comm: Comm,
    *,
    one_pull: float,
    keep_trace: float = 1.0,
) -> list[Block]:
    """Return the sum of each old block and its new one; collective.

    one_pull: operations of the exact product with one task's curvature
    keep_trace: share of its trace that a merged term keeps when factors are of low rank; other terms are unchanged

    Raises:
        DivergedError: a factor is not finite.
        WorldError: a factor of another rank is not finite.
    """
    joined = [
        replace(old, terms=(*old.terms, *new.terms), counts=(*old.counts, *new.counts), lost=old.lost + new.lost)
        for old, new in zip(olds, news, strict=True)
    ]
    match tasks:
        case ListedTasks():
            return _within_budget(joined, tasks, comm, most_flops=tasks.max_cost * one_pull, keep_trace=keep_trace)
        case PooledTasks() | NearestTasks():
            merged = _pooled if isinstance(tasks, PooledTasks) else _nearest
            pairs = list(zip(joined, _grams(joined, comm), strict=True))
            return all_or_none(comm, lambda: [merged(block, grams, keep_trace) for block, grams in pairs], _MERGE)
        case RefitTasks():
            return all_or_none(comm, lambda: [_refitted(block) for block in joined], _MERGE)
        case _:
            assert_never(tasks)


def norms(blocks: Sequence[Block], comm: Comm) -> list[float]:
    """Return the Frobenius norm of each whole layer, also of those that are cut; collective."""
    listed = [block for block in blocks if all(isinstance(term, Pair) for term in block.terms)]
    grams = {id(block): gram for block, gram in zip(listed, _grams(listed, comm), strict=True)}
    return [merge.sum_norm(*grams[id(block)]) if id(block) in grams else block.norm() for block in blocks]


def _pooled(block: Block, gram: Grams, keep_trace: float) -> Block:
    pairs = _pairs(block)
    weights = merge.pooled_weights(pairs, block.counts)
    single = _single(block, merge.combine(pairs, *weights), merge.combination_error(*gram, *weights))
    return single.truncated(keep_trace)


def _nearest(block: Block, gram: Grams, keep_trace: float) -> Block:
    return _merged(block, gram, range(len(block.terms)), keep_trace)


def _refitted(block: Block) -> Block:
    term = merge.refit(block.terms)
    return _single(block, term, merge.distance(block.terms, term))


def _single(block: Block, term: Term, error: float) -> Block:
    return replace(block, terms=(term,), counts=(sum(block.counts),), lost=block.lost + error)


def _within_budget(
    blocks: list[Block], tasks: ListedTasks, comm: Comm, *, most_flops: float, keep_trace: float
) -> list[Block]:
    """Merge one pair of terms in every layer whose tolerance allows it, until all layers fit, or none allows it."""
    while _over_budget(blocks, tasks.max_gib * 2**30, most_flops, comm):
        grams = _grams(blocks, comm)
        merged = all_or_none(comm, partial(_all_closest_merged, blocks, grams, tasks.tolerance, keep_trace), _MERGE)
        if not comm.any(any(after is not before for after, before in zip(merged, blocks, strict=True))):
            break
        blocks = merged
    return blocks


def _over_budget(blocks: Sequence[Block], most_bytes: float, most_flops: float, comm: Comm) -> bool:
    totals = torch.tensor(
        [sum(map(_share_of_bytes, blocks)), sum(block.flops for block in blocks)],
        dtype=torch.float64,
        device=comm.device,
    )
    comm.sum_([totals])
    num_bytes, flops = totals.tolist()
    return bool(num_bytes > most_bytes or flops > most_flops)


def _share_of_bytes(block: Block) -> float:
    """Bytes held, with this part's share of a factor that all parts hold: independent of the number of ranks."""
    if block.part == WHOLE:
        return float(block.num_bytes)
    cut, other = (0, 1) if block.part.axis == "input" else (1, 0)
    held = [(pair.a.num_bytes, pair.b.num_bytes) for pair in _pairs(block)]
    return sum(pair[cut] + pair[other] * _fraction(block) for pair in held)


def _fraction(block: Block) -> float:
    """This part's share of the axis that is cut."""
    _, outputs, inputs = block.layout.shape
    return (block.part.stop - block.part.start) / (inputs if block.part.axis == "input" else outputs)


def _grams(blocks: Sequence[Block], comm: Comm) -> list[Grams]:
    """Gram matrices of whole layers, identical on all ranks that hold a part of a layer, so that they decide alike.

    Those of a cut factor are summed over the parts. Those of the other factor, which may differ by rounding, are
    averaged over the parts.
    """
    local = [merge.gram(_pairs(block)) for block in blocks]
    message = [torch.zeros(2, dtype=torch.float64)]  # never empty
    for block, (inputs, gradients) in zip(blocks, local, strict=True):
        if block.part != WHOLE:
            share = _fraction(block)
            shared = (inputs, gradients * share) if block.part.axis == "input" else (inputs * share, gradients)
            numbers = torch.stack(shared).double().cpu().flatten()
            message += [torch.tensor([_number(block), len(numbers)], dtype=torch.float64), numbers]
    totals = _added(comm.gather(torch.cat(message).to(comm.device)).cpu())
    return [
        gram if block.part == WHOLE else _completed(gram, totals[_number(block)])
        for block, gram in zip(blocks, local, strict=True)
    ]


def _added(messages: Tensor) -> dict[int, Tensor]:
    """Sum the numbers of a flat message of (layer, length, numbers...) records by layer."""
    totals: dict[int, Tensor] = {}
    position = 0
    while position < len(messages):
        number, length = (int(value) for value in messages[position : position + 2])
        numbers = messages[position + 2 : position + 2 + length]
        totals[number] = totals[number] + numbers if number in totals else numbers
        position += 2 + length
    return totals


def _completed(gram: Grams, total: Tensor) -> Grams:
    inputs, gradients = total.view(2, *gram[0].shape).to(gram[0])
    return inputs, gradients


def _number(block: Block) -> int:
    """A hash of the layer's name that a float64 message holds exactly."""
    return 1 + zlib.crc32(block.layout.name.encode())


def _pairs(block: Block) -> list[Pair]:
    pairs = [term for term in block.terms if isinstance(term, Pair)]
    assert len(pairs) == len(block.terms), "eigenbases are summed by refitting"
    return pairs


def _all_closest_merged(
    blocks: Sequence[Block], grams: Sequence[Grams], tolerance: float, keep_trace: float
) -> list[Block]:
    return [_closest_merged(block, gram, tolerance, keep_trace) for block, gram in zip(blocks, grams, strict=True)]


def _closest_merged(block: Block, gram: Grams, tolerance: float, keep_trace: float) -> Block:
    """Merge the two closest terms; keep the block if it has only one, the error is too large, or no bytes are saved."""
    if len(block.terms) < 2:
        return block
    one, other, error = merge.closest(*gram)
    if block.lost + error > tolerance * float(merge.sum_norm(*gram)):
        return block
    merged = _merged(block, gram, (one, other), keep_trace)
    return merged if merged.num_bytes < block.num_bytes else block


def _merged(block: Block, gram: Grams, chosen: Sequence[int], keep_trace: float) -> Block:
    """The block with the chosen terms replaced by their nearest Kronecker product, in the first one's place."""
    index = torch.tensor(list(chosen), device=gram[0].device)
    inputs, gradients = (kind[:, index][:, :, index] for kind in gram)
    pairs = _pairs(block)
    nearest = merge.combine([pairs[t] for t in chosen], *merge.nearest_weights(inputs, gradients))
    # Only the merged term is truncated: the others already are, and would be decomposed again.
    single = _single(block, nearest, float(merge.merge_error(*gram, list(chosen)))).truncated(keep_trace)
    kept = [t for t in range(len(pairs)) if t not in chosen[1:]]
    terms = tuple(single.terms[0] if t == chosen[0] else pairs[t] for t in kept)
    counts = tuple(sum(block.counts[c] for c in chosen) if t == chosen[0] else block.counts[t] for t in kept)
    return replace(single, terms=terms, counts=counts)
