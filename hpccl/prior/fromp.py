"""Functional regularisation of memorable past (FROMP): predictions on memory stay, coupled by a kernel.

    R(w) = weight sum_s sum_c 1/2 d' K_sc^-1 d,    d = m_sc(w) - m_sc(w_old)                     nats in total
    dR/dw = weight sum_s sum_c J_sc(w)' K_sc^-1 d

m_sc [b] are the probabilities of class c for the memory of past task s, K_sc their kernel under the Laplace posterior
of the old weights, or 1. K^-1 d is a constant in the gradient, so that of the sum of (K^-1 d) m is the same: one
backward pass, no Jacobian. K is kept as its Cholesky factor.

Where blocks are smaller than a task's memory, K is taken as block-diagonal, a step has one block of each task, in turn,
and R of the step is times the number of blocks: the mean over a round of them is the R of all blocks.

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

_ATTEMPTS = 12  # powers of ten of the jitter


@dataclass(frozen=True)
class Block:
    """Examples of one past task that are coupled.

    slots: [b] int64, positions in the memory
    classes: [K] int64, the classes that compete, by number in the stream
    old: [b, K] float64, the old network's probabilities of them
    root: [K, b, b] float64, lower Cholesky factors of the kernels; None: kernel 1
    """

    slots: Tensor
    classes: Tensor
    old: Tensor
    root: Tensor | None

    def pull(self, now: Tensor) -> Tensor:
        """[b, K] float64: K^-1 (now - old), class by class, of probabilities [b, K]."""
        change = now.double() - self.old
        if self.root is None:
            return change
        return torch.cholesky_solve(change.T[:, :, None], self.root)[:, :, 0].T

    def to(self, device: torch.device) -> Block:
        """The same with its numbers on a device; slots and classes stay on the CPU."""
        return replace(self, old=self.old.to(device), root=None if self.root is None else self.root.to(device))


@dataclass(frozen=True)
class Fromp:
    """R(w).

    weight: of it
    tasks: the blocks of each past task that has a memory
    precision: F, the curvature of all past tasks; None where no kernel is made of it
    """

    weight: float
    tasks: tuple[tuple[Block, ...], ...]
    precision: Precision | None = None

    def at(self, step: int) -> list[tuple[Block, int]]:
        """The block of each past task that a step recalls, and the number of blocks that it stands for."""
        return [(blocks[step % len(blocks)], len(blocks)) for blocks in self.tasks]

    def to(self, device: torch.device) -> Fromp:
        """The same on a device."""
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
        """For a checkpoint; what ranks hold alone by `precision.shard_dict`."""
        return {
            "weight": self.weight,
            "tasks": [[dict(vars(block)) for block in blocks] for blocks in self.tasks],
            "precision": None if self.precision is None else self.precision.state_dict(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], shards: Shards, comm: Comm, place: Place, like: Weights
    ) -> Fromp:
        """The inverse; see Prior.from_state_dict."""
        precision = state["precision"]
        return cls(
            weight=state["weight"],
            tasks=tuple(tuple(Block(**block) for block in blocks) for blocks in state["tasks"]),
            precision=None if precision is None else precision_from_state(precision, shards, comm, place, like),
        )


def probabilities(logits: Tensor, columns: Tensor) -> Tensor:
    """[r, K] softmax of the logits [r, C] of classes `columns` [r, K]; 0 where a column is -1."""
    named = columns >= 0
    return logits.gather(1, columns.clamp(min=0)).masked_fill(~named, -torch.inf).softmax(dim=1)


def cholesky(kernel: Tensor, jitter: float) -> tuple[Tensor, float]:
    """Lower factors of kernels [K, b, b] + jitter 1, and the jitter: ten times as much until rounding allows it.

    Raises:
        DivergedError: none does, so the kernel is no covariance.
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
    """A list cut into the fewest parts of at most `size`, which differ by at most one; one part for None."""
    count = 1 if size is None else -(-len(order) // size)
    return [list(order[len(order) * k // count : len(order) * (k + 1) // count]) for k in range(count)]
