"""Bias correction of the newest classes' logits (BiC: Wu et al. 2019, eq. 4 and 5).

    q_c = z_c for old classes,   q_c = alpha z_c + beta for the newest task's
    (alpha, beta) = argmin  mean_i CE(y_i, q_i) + penalty / 2 beta^2

over examples that no network was trained on. The problem is convex in two numbers and is solved by L-BFGS in float64,
on logits that are computed once. z are logits [n, C], competing classes [C] bool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpccl.errors import DivergedError

__all__ = ["Correction", "corrected", "corrected_nats"]

_ITERATIONS = 500


@dataclass(frozen=True)
class Correction:
    """The correction of one task's classes, valid only for the network at the end of that task.

    task: index; classes: of the task; num: number of examples that it was fitted to
    """

    task: int
    classes: tuple[int, ...]
    alpha: float
    beta: float
    num: int

    @classmethod
    def fitted(
        cls, logits: Tensor, labels: Tensor, *, task: int, classes: Sequence[int], seen: Tensor, penalty: float
    ) -> Correction:
        """Fit it to logits [n, C] and labels [n]; seen: [C] bool, the classes that compete.

        If a multiple of the new logits separates all examples, no finite alpha is optimal; iterations then end when the
        gradient is small.

        Raises:
            DivergedError: a logit is not finite.
        """
        new = _members(classes, logits.shape[1]).to(logits.device)
        values = torch.tensor([1.0, 0.0], dtype=torch.float64, device=logits.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [values], max_iter=_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            nats = corrected_nats(values, logits.double(), labels, new=new, seen=seen, penalty=penalty)
            nats.backward()
            return nats

        solver.step(closure)
        alpha, beta = values.tolist()
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise DivergedError(
                f"the correction of task {task}'s logits is not finite (alpha {alpha}, beta {beta}); the network has "
                "diverged: lower optim.lr, or set train.clip_norm, in another folder=..."
            )
        return cls(task, tuple(classes), alpha, beta, len(labels))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the corrected logits [n, C], in their dtype."""
        new = _members(self.classes, logits.shape[1]).to(logits.device)
        return corrected(logits, new, self.alpha, self.beta)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {**vars(self), "classes": list(self.classes)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Correction:
        """The inverse of `state_dict`."""
        return cls(**{**state, "classes": tuple(state["classes"])})


def corrected(logits: Tensor, new: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """Return logits [n, C] with those of the classes `new` [C] bool scaled and shifted."""
    return torch.where(new, alpha * logits + beta, logits)


def corrected_nats(
    values: Tensor, logits: Tensor, labels: Tensor, *, new: Tensor, seen: Tensor, penalty: float
) -> Tensor:
    """Return the objective at `values` = (alpha, beta), a scalar."""
    q = corrected(logits, new, values[0], values[1]).masked_fill(~seen, -torch.inf)
    return torch.nn.functional.cross_entropy(q, labels) + penalty / 2 * values[1].square()


def _members(classes: Sequence[int], num_classes: int) -> Tensor:
    found = torch.zeros(num_classes, dtype=torch.bool)
    found[list(classes)] = True
    return found
