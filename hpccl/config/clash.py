"""Keys of a configuration whose values contradict each other."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Clash", "ClashError"]


@dataclass(frozen=True)
class Clash:
    """keys: the wrong key, then those that it clashes with; problem: why, and what to do."""

    keys: tuple[str, ...]
    problem: str


class ClashError(ValueError):
    """Carries clashes through pydantic, which turns a ValueError into a ValidationError."""

    def __init__(self, found: tuple[Clash, ...]) -> None:
        super().__init__("; ".join(f"{clash.keys[0]}: {clash.problem}" for clash in found))
        self.found = found
