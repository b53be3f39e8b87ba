"""Sums of examples' squared gradients on their way from a pass to VOGN."""

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
    """Of one pass: whole, or of a parameter that is spread this rank's elements, which are then those of all ranks."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._held: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Of a pass that was for nothing."""
        self._held.clear()

    def add(self, squares: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
        """A layer's, of this rank's examples; collective where the layer is spread."""
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
        """The means over examples, of all ranks, of squares of their nats' gradients; nothing stays here.

        An example's share of the loss is its nats / num_rows, times the world size (see BaseEngine.backward).
        """
        self._comm.sum_([self._held[name] for name in sorted(self._held) if name not in spans])
        for tensor, places in runs.items():
            found = self._within(tensor, places, spans)
            if found is not None:
                optimiser.add_squares(tensor, found * (num_rows / self._comm.size**2))
        self._held.clear()

    def _within(self, tensor: Tensor, places: Sequence[Run], spans: Mapping[str, Span]) -> Tensor | None:
        """Those of what is in a tensor of the optimiser's, in its shape; None if there are none."""
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
