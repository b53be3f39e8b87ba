"""Measure how well the prior reconstructs the gradient of the past.

At weights w, with past tasks s < t:

    true:       sum_s sum_{i in D_s} grad CE(y_i, f_w(x_i))
    soft:       sum_{i in M, soft}    tau_i grad CE(q_i, f_w(x_i) / T)
    replay:     sum_{i in M, replay}  tau_i grad CE(y_i, f_w(x_i))
    quadratic:  weight [(F + damping) (w - a) + c]    (quadratic.py)
    normal:     precision w - pull a                  (normal.py; if there is one: then true has its precision w, too)
    total:      soft + replay + quadratic + normal

all in nats, in evaluation mode, on evaluation views. Reported per term: cosine with the true gradient, relative error
|term - true| / |true|. (Daxberger et al. 2023; Khan and Swaroop 2021.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves
from hpccl.engine.moments import local
from hpccl.engine.protocols import trainable
from hpccl.engine.sharded import free_gathered, is_spread

__all__ = ["Losses", "compare_gradients", "local_parts", "summed_gradients"]

Losses: TypeAlias = Callable[[Tensor], Sequence[Tensor]]


def summed_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Losses]], comm: Comm, *, num_terms: int
) -> list[dict[str, Tensor]]:
    """Return the gradients of `num_terms` sums of nats over all ranks' batches, one dict by parameter name per term.

    For a network in shards, these are this rank's elements; all ranks must then have equally many batches.

    batches: this rank's (pixels [n, ...], function from logits [n, C] to `num_terms` scalars in nats). Evaluation mode.
    """
    was_training, spread = model.training, is_spread(model)
    model.eval()
    free_gathered(model)
    parameters = trainable(model)
    sums = [{name: torch.zeros_like(local(value)) for name, value in parameters.items()} for _ in range(num_terms)]
    for pixels, losses in batches:
        terms = losses(model(pixels).float())
        for number, nats in enumerate(terms):
            more = number + 1 < num_terms
            if spread:
                found = _spread_gradients(parameters, nats, comm, retain_graph=more)
            else:
                # Zeros for a parameter without influence.
                wanted = list(parameters.values())
                found = list(torch.autograd.grad(nats, wanted, retain_graph=more, materialize_grads=True))
            torch._foreach_add_(list(sums[number].values()), found)
    if not spread:
        comm.sum_([value for total in sums for value in total.values()])
    model.train(was_training)
    return sums


def _spread_gradients(
    parameters: Mapping[str, nn.Parameter], nats: Tensor, comm: Comm, *, retain_graph: bool
) -> list[Tensor]:
    """Return this rank's elements of the gradient of all ranks' sum, by the network's own reduction, a mean."""
    (nats * comm.size).backward(retain_graph=retain_graph)
    found = []
    for parameter in parameters.values():
        gradient = parameter.grad
        found.append(torch.zeros_like(local(parameter)) if gradient is None else local(gradient))
        parameter.grad = None
    return found


def local_parts(leaves: Leaves) -> dict[str, Tensor]:
    """Return this rank's part of each leaf, in the shape that gradients of a network in shards have."""
    found = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            found[name] = leaf
        else:
            found[name] = leaf.local.view((-1, *leaf.shape[1:]) if math.prod(leaf.shape) else leaf.shape)
    return found


def compare_gradients(
    true: Mapping[str, Tensor],
    terms: Mapping[str, Mapping[str, Tensor]],
    comm: Comm,
    *,
    spread: bool = False,
    copies: int = 1,
) -> tuple[dict[str, dict[str, float]], float]:
    """Return {term: {cosine, relative_error, norm}} against the true gradient, over all parameters, and its norm.

    spread: each rank has its own elements of all gradients, and `copies` ranks have the same ones
    """
    reference = _flat(true)
    vectors = {name: _flat(gradient, like=true) for name, gradient in terms.items()}
    products = torch.stack(
        [
            reference @ reference,
            *(vector @ other for vector in vectors.values() for other in (vector, reference)),
            *((vector - reference).square().sum() for vector in vectors.values()),
        ]
    )
    if spread:
        comm.sum_([products])
        products /= copies
    first, *rest = products.tolist()
    size = first**0.5
    found = {}
    for number, name in enumerate(vectors):
        square, inner, distance = rest[2 * number], rest[2 * number + 1], rest[2 * len(vectors) + number]
        norm = square**0.5
        found[name] = {
            "cosine": inner / (norm * size) if norm * size > 0 else 0.0,
            "relative_error": distance**0.5 / size if size > 0 else float("inf"),
            "norm": norm,
        }
    return found, size


def _flat(weights: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Tensor:
    return torch.cat([weights[name].double().reshape(-1) for name in (like or weights)])
