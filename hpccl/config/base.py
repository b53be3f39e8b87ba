"""The base class of all sections of a configuration, and the types of their values. Neither this module nor the
sections import torch, so that a login node can check a file quickly.

Units: weights multiply nats; sizes are numbers of examples; lengths are optimiser steps unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

__all__ = [
    "FloatPerTask",
    "Floats",
    "Fraction",
    "IntPerTask",
    "Line",
    "Memory",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveFloatPerTask",
    "PositiveInt",
    "Section",
    "Seed",
    "SharePerTask",
    "TimeLimit",
    "Variable",
    "Word",
    "per_task",
]


Value = TypeVar("Value")


def _as_tuple(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,)


def per_task(values: tuple[Value, ...], task: int) -> Value:
    """The value for task `task` (from 0); the last one repeats."""
    return values[min(task, len(values) - 1)]


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]  # an unsigned 64-bit word of a hash
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# One value, or one per task (the last repeats); always stored as a tuple.
_PER_TASK = Field(min_length=1, json_schema_extra={"per_task": True})
IntPerTask = Annotated[tuple[PositiveInt, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
FloatPerTask = Annotated[tuple[NonNegativeFloat, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
PositiveFloatPerTask = Annotated[tuple[PositiveFloat, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
SharePerTask = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK
]
Floats = Annotated[tuple[float, ...], Strict(False)]
# Text that is written into a script, where a line break would begin another command.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"words": "text of one line"})]
Word = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f]+$", json_schema_extra={"words": "text without spaces"})]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Memory = Annotated[
    str,
    BeforeValidator(lambda value: "0" if type(value) is int and value == 0 else value),
    Field(
        pattern=r"^(0|[1-9][0-9]*[KMGT]?)$",
        json_schema_extra={"words": "0, or a size such as 64G (in quotes if a number)"},
    ),
]
TimeLimit = Annotated[
    str,
    Field(
        pattern=r"^([1-9][0-9]*|[0-9]+:[0-5][0-9]:[0-5][0-9]|[0-9]+-[0-9]{1,2}:[0-5][0-9]:[0-5][0-9])$",
        json_schema_extra={"words": "a time such as 4:00:00, 2-12:00:00, or '90' for minutes"},
    ),
]


class Section(BaseModel):
    """A part of a configuration: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )
    lasting: ClassVar[frozenset[str]] = frozenset()  # keys that stay when another kind is chosen; others are dropped
