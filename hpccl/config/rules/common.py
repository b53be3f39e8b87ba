"""What several rules ask."""

from __future__ import annotations

from hpccl.config.memory import MemoryConfig
from hpccl.config.prior import PriorConfig

__all__ = ["budgets", "differs"]


def budgets(memory: MemoryConfig) -> list[str]:
    """The keys that say how much is kept."""
    return [f"memory.{key}" for key in ("size", "total", "fraction") if getattr(memory, key) > 0]


def differs(one: PriorConfig, other: PriorConfig, key: str) -> bool:
    """Whether two priors say different things of `key`."""
    return bool(getattr(one, key) != getattr(other, key))
