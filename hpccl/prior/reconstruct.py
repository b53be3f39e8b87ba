"""How well the prior reconstructs the gradient of the past.

At weights w, with past tasks s < t:

    true:       sum_s sum_{i in D_s} grad CE(y_i, f_w(x_i))
    soft:       sum_{i in M, soft}    tau_i grad CE(q_i, f_w(x_i) / T)
    replay:     sum_{i in M, replay}  tau_i grad CE(y_i, f_w(x_i))
    quadratic:  weight (F + damping) (w - a)
    total:      soft + replay + quadratic

all in nats, evaluation mode, evaluation view. Reported per term: cosine with the true gradient and relative error
|term - true| / |true|. (Daxberger et al. 2023; Khan and Swaroop 2021.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm
from hpccl.engine.protocols import trainable

__all__ = ["Losses", "compare_gradients", "summed_gradients"]

Losses: TypeAlias = Callable[[Tensor], Sequence[Tensor]]


def summed_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Losses]], comm: Comm, *, num_terms: int
) -> list[dict[str, Tensor]]:
    """Gradients of `num_terms` sums of nats over all ranks' batches, one dict by parameter name a term.

    batches: this rank's (pixels [n, ...], function from logits [n, C] to `num_terms` scalars in nats). Evaluation mode.
    """
    was_training = model.training
    model.eval()
    parameters = trainable(model)
    sums = [{name: torch.zeros_like(value) for name, value in parameters.items()} for _ in range(num_terms)]
    for pixels, losses in batches:
        terms = losses(model(pixels).float())
        for number, nats in enumerate(terms):
            last = number + 1 == num_terms
            gradients = torch.autograd.grad(nats, list(parameters.values()), retain_graph=not last)
            torch._foreach_add_(list(sums[number].values()), gradients)
    comm.sum_([value for total in sums for value in total.values()])
    model.train(was_training)
    return sums


def compare_gradients(
    true: Mapping[str, Tensor], terms: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """{term: {cosine, relative_error, norm}} against the true gradient, over all parameters together."""
    reference = _flat(true)
    size = float(reference.norm())
    found = {}
    for name, gradient in terms.items():
        vector = _flat(gradient, like=true)
        norm = float(vector.norm())
        product = norm * size
        found[name] = {
            "cosine": float(vector @ reference) / product if product > 0 else 0.0,
            "relative_error": float((vector - reference).norm()) / size if size > 0 else float("inf"),
            "norm": norm,
        }
    return found


def _flat(weights: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Tensor:
    return torch.cat([weights[name].double().reshape(-1) for name in (like or weights)])
