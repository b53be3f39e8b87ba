"""A Precision made of one Kronecker-factored block per layer and a diagonal for everything else, spread over ranks.

Each rank holds the blocks (or the parts of large blocks) that it owns, and the diagonal of all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hpccl.config.curvature import TasksConfig
from hpccl.curvature.blocks import WHOLE, Block, Layout, Part
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.protocols import Piece, Precision, Shards, Totals, Weights
from hpccl.curvature.sweep import listed
from hpccl.curvature.tasks import norms, summed
from hpccl.dist.comm import Comm
from hpccl.dist.placement import pieces
from hpccl.dist.spread import Place, placed_whole
from hpccl.errors import CheckpointError, CoverageError

__all__ = ["Kronecker", "layout_parts"]


@final
@dataclass(frozen=True)
class Kronecker:
    """A block-diagonal Precision.

    blocks: this rank's blocks
    rest: diagonal of the parameters that are in no block
    num_examples: sum of the weights of the examples
    tasks: how it is summed with another task's
    layouts: layouts of all ranks' blocks, in the order of the model
    divisible: whether large blocks are cut into parts on several ranks
    keep_trace: below 1, factors are truncated to leading eigenvectors that keep this share of a layer's trace
    """

    blocks: tuple[Block, ...]
    rest: Diagonal
    num_examples: float
    tasks: TasksConfig
    layouts: tuple[Layout, ...]
    divisible: bool = True
    keep_trace: float = 1.0

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        shards: Shards,
        comm: Comm,
        place: Place = placed_whole,
        like: Weights = MappingProxyType({}),
    ) -> Kronecker:
        """Rebuild it from `state_dict` and all ranks' `shard_dict`, spread over the ranks of `comm`. Not collective.

        like: weights in the network's current memory layout, which blocks take so that later curvature can be added;
            layers that it lacks keep the layout in which they were measured.

        Raises:
            CheckpointError: the state is damaged.
        """
        try:
            measured = [Layout.from_state_dict(layout) for layout in state["layouts"]]
            tasks = TypeAdapter(TasksConfig).validate_python(state["tasks"])
            rest = Diagonal.from_state_dict(state["rest"], place)
            num_examples, keep_trace = float(state["num_examples"]), float(state["keep_trace"])
            divisible = bool(state["divisible"])
        except (KeyError, TypeError, ValidationError) as error:
            raise CheckpointError(f"the Kronecker curvature in the checkpoint is damaged: {error}") from error
        layouts = [layout.as_lies(like.get(layout.weight)) for layout in measured]
        parts = layout_parts(layouts, comm, divisible=divisible)
        mine = {layout.name: [part for rank, part in ranks if rank == comm.rank] for layout, ranks in parts}
        saved = shards(lambda name: bool(mine.get(name)))
        blocks: list[Block] = []
        for before, layout in zip(measured, layouts, strict=True):
            if mine[layout.name]:
                if layout.name not in saved:
                    raise CheckpointError(
                        f"the checkpoint has no curvature of layer '{layout.name}': a file is missing"
                    )
                whole = Block.joined([Block.from_state_dict(before, part) for part in saved[layout.name]])
                blocks += [whole.reordered(layout).cut(part) for part in mine[layout.name]]
        return cls(tuple(blocks), rest, num_examples, tasks, tuple(layouts), divisible, keep_trace)

    def pieces(self, comm: Comm, like: Weights) -> list[Piece]:
        """Return this rank's pieces of the product; see Precision.pieces."""
        covered = {name for layout in self.layouts for name in layout.names}
        bare = like.keys() - covered - self.rest.leaves.keys()
        if bare:
            raise CoverageError(
                f"no curvature of parameter(s) {listed(sorted(bare))}; they were not trained when it was measured"
            )
        rest = {name: like[name] for name in self.rest.leaves if name in like}
        return [piece for block in self.blocks for piece in _block_pieces(block)] + self.rest.pieces(comm, rest)

    def plus(self, other: Precision, comm: Comm) -> Kronecker:
        """Return the sum as `tasks` defines it; collective. Curvature of no examples adds nothing, whatever its layers.

        Raises:
            CoverageError: `other` is of another kind or over other weights.
            DivergedError: a factor is not finite.
            WorldError: any of these on another rank.
        """
        if not isinstance(other, Kronecker):
            raise CoverageError(f"cannot add {type(other).__name__} to a Kronecker curvature; both must be of one kind")
        if other.num_examples == 0:
            return self
        if self.num_examples == 0:
            return other
        mine = [(block.layout, block.part) for block in self.blocks]
        if mine != [(block.layout, block.part) for block in other.blocks]:
            raise CoverageError("cannot add curvatures of different layers, or placed on ranks differently")
        blocks = summed(
            self.blocks,
            other.blocks,
            self.tasks,
            comm,
            one_pull=sum(map(_pull_cost, self.layouts)),
            keep_trace=self.keep_trace,
        )
        return replace(
            self,
            blocks=tuple(blocks),
            rest=self.rest.plus(other.rest, comm),
            num_examples=self.num_examples + other.num_examples,
        )

    def times(self, scale: float) -> Kronecker:
        """Return it scaled by `scale` >= 0."""
        assert scale >= 0, "a precision stays positive semi-definite"
        return replace(self, blocks=tuple(block.times(scale) for block in self.blocks), rest=self.rest.times(scale))

    def rounded(self) -> Kronecker:
        """Return it with factors in bf16; the diagonal of the rest is unchanged."""
        return replace(self, blocks=tuple(block.to(torch.bfloat16) for block in self.blocks))

    def totals(self, comm: Comm) -> Totals:
        """See Precision.totals; collective."""
        own = sum(block.num_bytes for block in self.blocks)
        terms = max((len(block.terms) for block in self.blocks), default=1)
        error = 0.0
        if comm.any(any(block.lost > 0 for block in self.blocks)):
            sizes = zip(self.blocks, norms(self.blocks, comm), strict=True)
            error = max((block.lost / size for block, size in sizes if block.lost > 0), default=0.0)
        mine = torch.tensor([sum(block.trace() for block in self.blocks), own, terms, error], dtype=torch.float64)
        everyone = comm.gather(mine[None].to(comm.device)).cpu()
        rest = self.rest.totals(comm)
        return Totals(
            trace=float(everyone[:, 0].sum()) + rest.trace,
            num_bytes=int(everyone[:, 1].sum()) + rest.num_bytes,
            rank_bytes=int(everyone[:, 1].max()) + rest.rank_bytes,
            terms=int(everyone[:, 2].max()),
            error=float(everyone[:, 3].max()),
        )

    def to(self, device: torch.device) -> Kronecker:
        """Return it on a device."""
        return replace(self, blocks=tuple(block.to(device) for block in self.blocks), rest=self.rest.to(device))

    def state_dict(self) -> dict[str, Any]:
        """The state that all ranks hold."""
        return {
            "kind": "kronecker",
            "layouts": [layout.state_dict() for layout in self.layouts],
            "divisible": self.divisible,
            "keep_trace": self.keep_trace,
            "num_examples": self.num_examples,
            "tasks": self.tasks.model_dump(mode="json"),
            "rest": self.rest.state_dict(),
        }

    def shard_dict(self) -> dict[str, Any]:
        """The state that this rank alone holds: its blocks or parts, by layer name."""
        found: dict[str, Any] = {}
        for block in self.blocks:
            found.setdefault(block.layout.name, []).append(block.state_dict())
        return found


def layout_parts(
    layouts: Sequence[Layout], comm: Comm, *, divisible: bool
) -> list[tuple[Layout, list[tuple[int, Part]]]]:
    """Return, for each layer in order, the (rank, part) pairs that share it: a pure function of shapes and world size.

    The cost of a layer is that of one product B D A, 2 o d (o + d) per group. divisible: layers that alone cost more
    than a rank's fair share are cut; eigenbases and low-rank factors cannot be.
    """
    shapes = {layout.name: layout.shape for layout in layouts}
    costs = {layout.name: _pull_cost(layout) for layout in layouts}
    most = {name: min(comm.size, max(o, d)) if divisible else 1 for name, (_, o, d) in shapes.items()}
    placed = pieces(costs, comm.size, most=most)
    return [
        (layout, [(rank, Part.of(layout.shape, k, len(ranks))) for k, rank in enumerate(ranks)])
        for layout in layouts
        for ranks in (placed[layout.name],)
    ]


def _pull_cost(layout: Layout) -> float:
    """Multiplications and additions of B D A."""
    groups, outputs, inputs = layout.shape
    return float(2 * groups * outputs * inputs * (outputs + inputs))


def _block_pieces(block: Block) -> list[Piece]:
    layout, part = block.layout, block.part

    def to_weight(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        difference = layout.difference(weights, anchor)
        total, matrix = _room(layout, target)
        own = part.of_product(matrix)
        # The last matrix product accumulates into the gradient, which saves a pass over memory and a buffer.
        if part == WHOLE:
            torch.add(target, layout.weight_of(difference), alpha=scale * damping, out=total)
        else:
            total.copy_(target)
            own.add_(part.of_product(difference)[..., : own.shape[2]], alpha=scale * damping)
        block.add_matvec_(own, difference, scale=scale)
        return total

    def to_bias(target: Tensor, weights: Weights, anchor: Weights, scale: float, damping: float) -> Tensor:
        difference = layout.difference(weights, anchor)
        rows = part.range if part.axis == "output" else slice(None)
        column = block.bias_column(difference).add_(difference[:, rows, -1], alpha=damping)
        whole = torch.zeros_like(difference[..., -1])
        whole[:, rows] = column
        return torch.add(target, whole.flatten(), alpha=scale)

    found = [Piece(layout.weight, layout.names, to_weight)]
    if layout.bias is not None and (part.axis != "input" or part.stop == layout.shape[2]):
        found.append(Piece(layout.bias, layout.names, to_bias))
    return found


def _room(layout: Layout, target: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate a gradient, laid out like `target` if possible, and its view as a matrix [g, o, d without bias]."""
    total = torch.empty_like(target)
    matrix = layout.matrix_of(total)
    if matrix is None:
        groups, outputs, _ = layout.shape
        matrix = target.new_empty(groups, outputs, target[0].numel())
        total = layout.weight_of(matrix)
    return total, matrix
