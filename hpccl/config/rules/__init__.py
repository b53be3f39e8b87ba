"""Combinations of settings that contradict each other or would be ignored. Defaults never clash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.rules import adaptation, curvature, machine, memory, methods, stream, training

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["clashes"]

_PARTS = (stream, memory, methods, adaptation, training, curvature, machine)


def clashes(config: RunConfig) -> tuple[Clash, ...]:
    """Every such combination in `config`."""
    return tuple(clash for part in _PARTS for rule in part.RULES for clash in rule(config))
