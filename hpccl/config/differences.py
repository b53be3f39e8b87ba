"""Nested values as dotted keys, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["ABSENT", "Flat", "differences", "flat"]

Flat: TypeAlias = dict[str, Any]

ABSENT = "absent"  # stands for the value of a key that only the other side has


def flat(value: Any, prefix: str = "") -> Flat:
    """The leaves by dotted key; an empty mapping is a leaf.

    >>> flat({"a": {"b": 1, "c": {}}})
    {'a.b': 1, 'a.c': {}}
    """
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: Flat = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(old: Flat, new: Flat) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of all keys whose values differ, in the order of the keys.

    >>> differences({"a": 1, "b": 2}, {"a": 1, "c": 3})
    [('b', 2, 'absent'), ('c', 'absent', 3)]
    """
    values = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**old, **new})
    return [(key, before, after) for key, before, after in values if before != after]
