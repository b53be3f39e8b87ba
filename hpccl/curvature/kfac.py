"""Measure Kronecker-factored curvature: local sums in one pass over the data, then one exchange between ranks.

K-FAC: for a layer with inputs a and output gradients g, F = sum_n J_n' Lambda_n J_n ~ B (x) A (Martens and Grosse 2015;
Grosse and Martens 2016 for convolutions; Eschenhagen et al. 2023 for expand and reduce). EKFAC: the eigenbasis of
B (x) A, with the exact diagonal in it (George et al. 2018).

Nothing is exchanged during the pass. At its end the sums of each layer go to the rank that owns it, packed into
triangles and fused into few messages; no other rank keeps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from hpccl.config.curvature import RefitTasks, TasksConfig
from hpccl.curvature.blocks import Block, Layout, Part, is_channels_last
from hpccl.curvature.diagonal import summed_diagonal
from hpccl.curvature.factors import EigenPass, KroneckerPass, Measured
from hpccl.curvature.kronecker import Kronecker, layout_parts
from hpccl.curvature.protocols import Examples
from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.dist.grouping import filled
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense
from hpccl.kron.pack import pack, packed_size, unpack
from hpccl.kron.pair import Pair

__all__ = ["EkfacEstimator", "KroneckerEstimator"]

_MESSAGE = 1 << 23  # elements of a message, unless one layer alone has more

Placed = list[tuple[Layout, list[tuple[int, Part]]]]


@final
@dataclass(frozen=True)
class KroneckerEstimator:
    """Measures one Kronecker product per layer.

    sweep: the pass over the data
    tasks: how the curvatures of tasks are summed later
    keep_trace: below 1, factors are truncated to leading eigenvectors that keep this share of a layer's trace
    """

    sweep: KroneckerPass
    tasks: TasksConfig
    keep_trace: float = 1.0

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        self.sweep.check(model)

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Kronecker:
        """See Estimator.estimate.

        Raises:
            CoverageError, DataError, DivergedError, WorldError: see KroneckerPass.run.
        """
        # Eigenvectors need whole factors.
        divisible = self.keep_trace == 1 and not isinstance(self.tasks, RefitTasks)
        whole, _ = _measured(self.sweep, model, batches, comm, self.tasks, divisible=divisible)
        truncated = all_or_none(
            comm, lambda: tuple(block.truncated(self.keep_trace) for block in whole.blocks), "truncate its factors"
        )
        return replace(whole, blocks=truncated, keep_trace=self.keep_trace)


@final
@dataclass(frozen=True)
class EkfacEstimator:
    """Measures the diagonal in each layer's Kronecker eigenbasis, in a second pass.

    sweep: see KroneckerEstimator
    """

    sweep: KroneckerPass

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        self.sweep.check(model)

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Kronecker:
        """See Estimator.estimate; iterates `batches` twice, and meanwhile holds all bases on every rank.

        Raises:
            CoverageError, DataError, DivergedError, WorldError: see KroneckerPass.run.
        """
        whole, placed = _measured(self.sweep, model, batches, comm, RefitTasks(), divisible=False)
        blocks = {block.layout.name: block for block in whole.blocks}
        eigen = all_or_none(comm, lambda: _eigen(blocks), "decompose its factors")
        bases = _everyone(eigen, placed, comm)
        values = EigenPass(self.sweep).run(model, batches, comm, bases)
        found: list[Block] = []
        for layout, ((owner, _),) in placed:
            comm.reduce_(values[layout.name], owner=owner)
            if owner == comm.rank:
                term = replace(eigen[layout.name], values=values[layout.name])
                found.append(replace(blocks[layout.name], terms=(term,)))
        return replace(whole, blocks=tuple(found))


def _measured(
    sweep: KroneckerPass,
    model: nn.Module,
    batches: Iterable[Examples],
    comm: Comm,
    tasks: TasksConfig,
    *,
    divisible: bool,
) -> tuple[Kronecker, Placed]:
    """Measure one Kronecker product per layer, spread over ranks; also return where each layer or part is."""
    measured = sweep.run(model, batches, comm)
    layouts = _layouts(model, measured)
    placed = layout_parts(layouts, comm, divisible=divisible)
    blocks = tuple(_reduced(measured, placed, comm))
    count = float(measured.count)
    rest = summed_diagonal(model, measured.squares, count, comm)
    return Kronecker(blocks, rest, count, tasks, tuple(layouts), divisible), placed


def _eigen(blocks: Mapping[str, Block]) -> dict[str, Eigen]:
    return {name: Eigen.of(pair) for name, block in blocks.items() for pair in block.terms if isinstance(pair, Pair)}


def _layouts(model: nn.Module, measured: Measured) -> list[Layout]:
    """Layouts of the measured layers, in the order of the model, which is the same on all ranks."""
    found = []
    for name, module in model.named_modules():
        if name not in measured.blocks:
            continue
        sums = measured.blocks[name]
        weight = model.get_parameter(sums.weight)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        found.append(Layout(name, sums.weight, sums.bias, tuple(weight.shape), groups, is_channels_last(weight)))
    return found


def _reduced(measured: Measured, placed: Placed, comm: Comm) -> list[Block]:
    """Reduce all ranks' sums to this rank's blocks, freeing sums as they are sent; the count is summed in place."""
    comm.sum_([measured.count])
    waiting = Counter(layout.name for layout, ranks in placed for _ in ranks)
    found: dict[str, list[Block]] = {}
    for rank in range(comm.size):
        for message in _messages(placed, rank):
            flat = torch.cat([_packed(measured, layout, part) for layout, part in message])
            waiting.subtract(layout.name for layout, _ in message)
            for name in {layout.name for layout, _ in message if not waiting[layout.name]}:
                del measured.blocks[name]
            comm.reduce_(flat, owner=rank)
            if comm.rank == rank:
                sizes = [_size(layout, part) for layout, part in message]
                for (layout, part), numbers in zip(message, flat.split(sizes), strict=True):
                    found.setdefault(layout.name, []).append(_block(layout, part, numbers, float(measured.count)))
    return [block for layout, _ in placed for block in found.get(layout.name, [])]


def _messages(placed: Placed, rank: int) -> Iterator[list[tuple[Layout, Part]]]:
    """Yield the layers and parts that go to a rank, grouped into messages."""
    own = [(layout, part) for layout, ranks in placed for owner, part in ranks if owner == rank]
    return filled(own, lambda each: _size(*each), _MESSAGE)


def _packed(measured: Measured, layout: Layout, part: Part) -> Tensor:
    """Flatten a layer's sums: symmetric factors as triangles, cut ones as they are.

    Inputs are permuted to the memory order of the layer's weight.
    """
    sums = measured.blocks[layout.name]
    a = sums.a
    if layout.channels_last:
        order = layout.order().to(a.device)
        a = a[:, order][:, :, order]
    inputs = a[:, :, part.range].flatten() if part.axis == "input" else pack(a)
    gradients = sums.b[:, part.range].flatten() if part.axis == "output" else pack(sums.b)
    return torch.cat([inputs, gradients])


def _sizes(layout: Layout, part: Part) -> tuple[int, int]:
    groups, outputs, inputs = layout.shape
    width = part.stop - part.start
    return (
        groups * inputs * width if part.axis == "input" else packed_size(groups, inputs),
        groups * outputs * width if part.axis == "output" else packed_size(groups, outputs),
    )


def _size(layout: Layout, part: Part) -> int:
    return sum(_sizes(layout, part))


def _block(layout: Layout, part: Part, numbers: Tensor, count: float) -> Block:
    groups, outputs, inputs = layout.shape
    first, second = numbers.split(_sizes(layout, part))
    a = first.view(groups, inputs, -1).clone() if part.axis == "input" else unpack(first, groups, inputs)
    b = second.view(groups, -1, outputs).clone() if part.axis == "output" else unpack(second, groups, outputs)
    return Block(layout, (Pair(Dense(a / max(count, 1e-30)), Dense(b)),), (count,), part=part)


def _everyone(eigen: Mapping[str, Eigen], placed: Placed, comm: Comm) -> dict[str, tuple[Tensor, Tensor]]:
    """Broadcast every layer's bases to every rank, with inputs in the order (channel, kh, kw)."""
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for layout, ((owner, _),) in placed:
        groups, outputs, inputs = layout.shape
        if owner == comm.rank:
            qa = torch.empty_like(eigen[layout.name].qa)
            qa[:, layout.order().to(qa.device)] = eigen[layout.name].qa
            pair = (qa, eigen[layout.name].qb.contiguous())
        else:
            pair = (
                torch.empty(groups, inputs, inputs, device=comm.device),
                torch.empty(groups, outputs, outputs, device=comm.device),
            )
        comm.broadcast_(pair, source=owner)
        bases[layout.name] = pair
    return bases
