"""Functional regularisation of memorable past (FROMP): keep predictions on memory, coupled by a kernel.

    R(w) = weight sum_s sum_c 1/2 d' K_sc^-1 d,    d = m_sc(w) - m_sc(w_old)                     nats in total
    dR/dw = weight sum_s sum_c J_sc(w)' K_sc^-1 d

m_sc [b] are the probabilities of class c for the memory of past task s, K_sc their kernel under the Laplace posterior
of the old weights, or the identity. With K^-1 d held constant, the sum of (K^-1 d) m has the same gradient: one
backward pass, no Jacobian. K is kept as its Cholesky factor.

If blocks are smaller than a task's memory, K is taken as block-diagonal. A step then uses one block of each task, in
turn, and multiplies its R by the number of blocks, so that the mean over a round is the R of all blocks.

Source: Pan et al. 2020, "Continual deep learning by functional regularisation of memorable past", NeurIPS, eq. 8 and
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpccl.curvature.build import precision_from_state
from hpccl.curvature.protocols import Precision, Shards, Weights
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Place
from hpccl.errors import DivergedError

__all__ = ["Block", "Fromp", "cholesky", "equal_blocks", "probabilities"]

_ATTEMPTS = 12  # powers of ten by which the jitter grows, at most


@dataclass(frozen=True)
class Block:
    """Coupled examples of one past task.

    slots: [b] int64, positions in the memory
    classes: [K] int64, the classes that compete, by number in the stream
    old: [b, K] float64, the old network's probabilities of these classes
    root: [K, b, b] float64, lower Cholesky factors of the kernels; None: the identity
    """

    slots: Tensor
    classes: Tensor
    old: Tensor
    root: Tensor | None

    def pull(self, now: Tensor) -> Tensor:
        """Return K^-1 (now - old), class by class, [b, K] float64, for probabilities `now` [b, K]."""
        change = now.double() - self.old
        if self.root is None:
            return change
        return torch.cholesky_solve(change.T[:, :, None], self.root)[:, :, 0].T

    def to(self, device: torch.device) -> Block:
        """Return it with its numbers on a device; slots and classes stay on the CPU."""
        return replace(self, old=self.old.to(device), root=None if self.root is None else self.root.to(device))


@dataclass(frozen=True)
class Fromp:
    """The regulariser R(w).

    weight: factor of R
    tasks: the blocks of each past task that has a memory
    precision: F, the curvature of all past tasks; None if no kernel is made from it
    """

    weight: float
    tasks: tuple[tuple[Block, ...], ...]
    precision: Precision | None = None

    def at(self, step: int) -> list[tuple[Block, int]]:
        """Return the block of each past task that a step uses, and the number of blocks that it represents."""
        return [(blocks[step % len(blocks)], len(blocks)) for blocks in self.tasks]

    def to(self, device: torch.device) -> Fromp:
        """Return it on a device."""
        return replace(
            self,
            tasks=tuple(tuple(block.to(device) for block in blocks) for blocks in self.tasks),
            precision=None if self.precision is None else self.precision.to(device),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks, which are equal on all ranks."""
        blocks = [block for task in self.tasks for block in task]
        tensors = [tensor for block in blocks for tensor in vars(block).values() if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint that all ranks hold; `precision.shard_dict` has the rest."""
        return {
            "weight": self.weight,
            "tasks": [[dict(vars(block)) for block in blocks] for blocks in self.tasks],
            "precision": None if self.precision is None else self.precision.state_dict(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], shards: Shards, comm: Comm, place: Place, like: Weights
    ) -> Fromp:
        """The inverse of `state_dict`; see Prior.from_state_dict."""
        precision = state["precision"]
        return cls(
            weight=state["weight"],
            tasks=tuple(tuple(Block(**block) for block in blocks) for blocks in state["tasks"]),
            precision=None if precision is None else precision_from_state(precision, shards, comm, place, like),
        )


def probabilities(logits: Tensor, columns: Tensor) -> Tensor:
    """Return the softmax [r, K] of logits [r, C] over the classes `columns` [r, K]; 0 where a column is -1."""
    named = columns >= 0
    return logits.gather(1, columns.clamp(min=0)).masked_fill(~named, -torch.inf).softmax(dim=1)


def cholesky(kernel: Tensor, jitter: float) -> tuple[Tensor, float]:
    """Return lower Cholesky factors of kernels [K, b, b] + jitter I, and the jitter, raised tenfold until one succeeds.

    Raises:
        DivergedError: none succeeds, so the kernel is not a covariance.
    """
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    used = jitter
    for _ in range(_ATTEMPTS):
        root, failed = torch.linalg.cholesky_ex(kernel + used * eye)
        if not bool(failed.any()):
            return root, used
        used *= 10
    raise DivergedError(
        f"the kernel of predictions is not positive definite, even with {used:g} on its diagonal; the network has "
        "diverged: lower optim.lr, set train.clip_norm, or raise prior.fromp.precision, in another folder=..."
    )


def equal_blocks(order: Sequence[int], size: int | None) -> list[list[int]]:
    """Cut a list into the fewest parts of at most `size`, whose lengths differ by at most one; one part for None."""
    count = 1 if size is None else -(-len(order) // size)
    return [list(order[len(order) * k // count : len(order) * (k + 1) // count]) for k in range(count)]
