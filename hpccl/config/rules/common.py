"""Questions that several rules ask."""

from __future__ import annotations

from typing import TypeVar

from hpccl.config.base import Section
from hpccl.config.memory import MemoryConfig

__all__ = ["budgets", "differs"]

SomeSection = TypeVar("SomeSection", bound=Section)


def budgets(memory: MemoryConfig) -> list[str]:
    """The keys above 0 that set how many examples are kept."""
    return [f"memory.{key}" for key in ("size", "total", "fraction") if getattr(memory, key) > 0]


def differs(one: SomeSection, other: SomeSection, key: str) -> bool:
    """Whether two sections of the same class have different values of `key`."""
    return bool(getattr(one, key) != getattr(other, key))
