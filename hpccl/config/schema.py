"""What a configuration may contain: sections by kind, allowed values in words, and suggestions for wrong keys."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from hpccl.config.base import Section

__all__ = ["Choice", "allowed", "choice", "keys", "suggest"]


@dataclass(frozen=True)
class Choice:
    """A key that holds a section.

    sections: by kind; a section without kinds has the key "".
    default: the kind that is used when none is given.
    tagged: whether there are several classes, distinguished by kind (pydantic then has the kind in an error's path).
    """

    sections: Mapping[str, type[Section]]
    default: str
    tagged: bool

    def pick(self, kind: str | None) -> type[Section] | None:
        """The section of a kind (None: the default kind), or None for an unknown kind."""
        return self.sections.get(self.default if kind is None else kind)


@functools.cache
def choice(section: type[Section], key: str) -> Choice | None:
    """The sections that `key` of `section` (or each item of its list) may hold, or None if it holds other values."""
    field = section.model_fields.get(key)
    if field is None:
        return None
    classes = list(_sections(field.annotation))
    by_kind = {kind: cls for cls in classes for kind in _kinds(cls)}
    if not by_kind:
        return None
    default = getattr(field.default, "kind", next(iter(by_kind)))
    return Choice(by_kind, default, tagged=len(classes) > 1)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        for argument in get_args(annotation):
            yield from _sections(argument)


def _kinds(section: type[Section]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return tuple(get_args(field.annotation)) if field else ("",)


def keys(root: type[Section], prefix: str = "", kind: str = "") -> Iterator[tuple[str, str, type[Section], str]]:
    """(dotted path, `where.kind=name` it belongs to or "", section, key) of every key under `root`, in order.

    Items of a list are written `parts.0.path`.
    """
    for name, field in root.model_fields.items():
        path = f"{prefix}{name}"
        yield path, kind, root, name
        held = choice(root, name)
        if held is None:
            continue
        below = f"{path}.0." if get_origin(field.annotation) is tuple else f"{path}."
        for section in dict.fromkeys(held.sections.values()):
            kinds = [each for each, cls in held.sections.items() if cls is section and each]
            yield from keys(section, below, f"{path}.kind={'|'.join(kinds)}" if kinds else kind)


def allowed(section: type[Section], key: str) -> str:
    """The values that a key may have, in words."""
    schema = _json_schema(section)
    return _words(schema["properties"][key], schema.get("$defs", {}))


@functools.cache
def _json_schema(section: type[Section]) -> dict[str, Any]:
    return section.model_json_schema()


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "discriminator" in schema:
        return f"a mapping with a kind: {', '.join(schema['discriminator']['mapping'])}"
    if "anyOf" in schema:
        return " or ".join(_words(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    return _typed(schema, definitions)


def _typed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "words" in schema:
        return str(schema["words"])
    match schema.get("type"):
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "boolean":
            return "true or false"
        case "string":
            return "text" + (f" matching {schema['pattern']}" if "pattern" in schema else "")
        case "null":
            return "null"
        case "array":
            item = _words(schema.get("items", {}), definitions)
            return (
                f"{item}, or a list with one for each task" if schema.get("per_task") else f"a list (each item: {item})"
            )
        case _:
            properties = ", ".join(schema.get("properties", ()))
            return f"a mapping of {properties}" if properties else "a mapping"


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    parts = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {' and '.join(parts)}" if parts else ""


def suggest(root: type[Section], path: Sequence[str], here: type[Section] | None) -> str:
    """A hint at what to write instead of an unknown key.

    Args:
        root: the outermost section.
        path: the unknown key.
        here: the section in which it was looked for, if known.
    """
    prefix, wrong = list(path[:-1]), path[-1]
    siblings = list(here.model_fields) if here else []
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.7)
    if near:
        return f"did you mean '{'.'.join([*prefix, near[0]])}'?"
    everywhere = _owners(root)
    dotted = ".".join(path)
    if everywhere.get(dotted):
        return f"it belongs to {everywhere[dotted]}"
    found = _nearest(dotted, wrong, list(everywhere))
    if found:
        kind = everywhere[found]
        return f"did you mean '{found}'{f' (of {kind})' if kind else ''}?"
    return f"allowed: {', '.join(siblings)}" if siblings else "see docs/configuration.md"


def _owners(root: type[Section]) -> dict[str, str]:
    """By dotted path, `where.kind=name|name` of the kinds that have it; "" if all have it."""
    found: dict[str, list[str]] = {}
    all_kinds: dict[str, set[str]] = {}
    for path, owner, _, _ in keys(root):
        where, _, kinds = owner.partition("=")
        found.setdefault(path, [where]).extend(kinds.split("|"))
        all_kinds.setdefault(where, set()).update(kinds.split("|"))
    return {
        path: "" if set(kinds) == all_kinds[where] else f"{where}={'|'.join(dict.fromkeys(kinds))}"
        for path, (where, *kinds) in found.items()
    }


def _nearest(dotted: str, wrong: str, paths: list[str]) -> str | None:
    """The path whose last part is `wrong`, or that resembles `dotted`, or whose last part resembles `wrong`."""
    leaves = {path.rpartition(".")[2]: path for path in reversed(paths)}
    if wrong in leaves:
        return leaves[wrong]
    match = difflib.get_close_matches(dotted, paths, n=1, cutoff=0.75)
    if match:
        return match[0]
    match = difflib.get_close_matches(wrong, leaves, n=1, cutoff=0.75)
    return leaves[match[0]] if match else None
