"""Forgetting on purpose: which examples are removed, and the rows that undo what was learned from them.

Without the removed examples k in R, the gradient of the past is

    sum_i J_i' (p_i - y_i) - sum_k J_k' (p_k - y_k)

With soft labels, the old predictions p*, for the labels of the first sum, an example in R contributes the difference
of its soft and its true row, J_k' (p_k - p*_k) - J_k' (p_k - y_k) = J_k' (y_k - p*_k): two rows of one image, with
weights 1 and -1. Where a quadratic already contains the soft row, the weights are 0 and -1.

Source: Khan and Swaroop 2021, "Knowledge-adaptation priors", NeurIPS, section 4 (remove data).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.adaptation import RemoveData
from hpccl.config.run import RunConfig
from hpccl.data.protocols import Stream
from hpccl.data.rows import CROSS_ENTROPY, REPLAY, Rows
from hpccl.errors import ConfigError
from hpccl.memory.store import Memory

__all__ = ["less", "removed_samples", "removed_slots"]

Ints = npt.NDArray[np.int64]


def removed_samples(adapt: RemoveData, stream: Stream) -> Ints:
    """Return the positions [n], ascending, of the training examples to be forgotten, named by class or id.

    Raises:
        ConfigError: a name is neither a class nor an id, or nothing would be left.
    """
    classes = {name: number for number, name in enumerate(stream.class_names)}
    labels, ids = stream.labels("train"), [name for name in adapt.names if name not in classes]
    found = np.isin(labels, [classes[name] for name in adapt.names if name in classes])
    if ids:
        found[_positions(ids, stream)] = True
    if bool(found.all()):
        raise ConfigError(f"--remove names all {len(labels)} training examples; at least one must remain")
    return np.flatnonzero(found).astype(np.int64)


def _positions(ids: list[str], stream: Stream) -> list[int]:
    names = stream.sample_names("train", np.arange(len(stream.labels("train"))))
    position = {name: number for number, name in enumerate(names)}
    unknown = [name for name in ids if name not in position]
    if unknown:
        raise ConfigError(
            f"--remove '{unknown[0]}' ({len(unknown)} such names) is neither a class nor the id of a training example; "
            f"classes: {', '.join(stream.class_names[:10])}{', ...' if len(stream.class_names) > 10 else ''}; "
            f"ids are like '{names[0]}'"
        )
    return [position[name] for name in ids]


def removed_slots(config: RunConfig, stream: Stream, memory: Memory) -> Tensor | None:
    """Return a mask [M] of the memory's examples that are to be forgotten; None if this run forgets nothing."""
    if not isinstance(config.adapt, RemoveData) or config.adapt.retrain:
        return None
    return torch.from_numpy(np.isin(memory.sample.numpy(), removed_samples(config.adapt, stream)))


def less(rows: Rows, taken: Tensor, target: Tensor, head: Tensor) -> Rows:
    """Append, for each image where `taken` [n] is True, a row of its true label with weight -1.

    target, head: [n, C] of the images' true labels
    """
    image = taken.nonzero().squeeze(1)
    weight = rows.weight.new_full((len(image),), -1.0)
    return rows.appended(
        image, target[image], head[image], weight=weight, temperature=1.0, term=REPLAY, kind=CROSS_ENTROPY
    )
