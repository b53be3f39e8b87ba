"""Collects sums of per-example squared gradients during a pass, for VOGN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.dist.spread import Span
from hpccl.optim.noise import Run
from hpccl.optim.vogn import Vogn

__all__ = ["Squares"]


@final
class Squares:
    """The sums of one pass: this rank's, whole; of a spread parameter, this rank's elements of the sum over ranks."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._held: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Discard the sums."""
        self._held.clear()

    def add(self, squares: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
        """Add a layer's sums over this rank's examples; collective where the layer is spread."""
        summed = {name: value.contiguous() for name, value in squares.items() if name in spans}
        self._comm.sum_(list(summed.values()))
        for name, value in squares.items():
            own = value
            if (span := spans.get(name)) is not None:
                own = summed[name].view(-1)[span.start : span.stop].clone()
            self._held[name] = self._held[name].add_(own) if name in self._held else own

    def give(
        self, optimiser: Vogn, runs: Mapping[Tensor, Sequence[Run]], spans: Mapping[str, Span], *, num_rows: int
    ) -> None:
        """Hand VOGN the means over all ranks' examples of squared gradients of an example's nats, and clear.

        An example contributes nats / num_rows, times the world size, to the loss (see BaseEngine.backward).
        """
        self._comm.sum_([self._held[name] for name in sorted(self._held) if name not in spans])
        for tensor, places in runs.items():
            found = self._within(tensor, places, spans)
            if found is not None:
                optimiser.add_squares(tensor, found * (num_rows / self._comm.size**2))
        self._held.clear()

    def _within(self, tensor: Tensor, places: Sequence[Run], spans: Mapping[str, Span]) -> Tensor | None:
        """The sums for the elements of one of the optimiser's tensors, in its shape; None if there are none."""
        held = [(run, self._held[run.name]) for run in places if run.name in self._held]
        if not held:
            return None
        if len(held) == 1 and held[0][1].numel() == tensor.numel():
            return held[0][1].view(tensor.shape).to(tensor.device)
        found = torch.zeros(tensor.numel(), device=tensor.device)
        for run, squares in held:
            part = squares if run.name in spans else squares.reshape(-1)[run.start : run.start + run.numel]
            found[run.first : run.first + run.numel] = part.to(tensor.device)
        return found.view(tensor.shape)
