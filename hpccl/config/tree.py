"""YAML 1.2 as a tree in which every node has its source: the file and line, or the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from hpccl.errors import ConfigError
from hpccl.folder import similar

__all__ = ["Items", "Leaf", "Node", "Table", "locate", "nested", "plain", "read_file", "read_value", "without"]


@dataclass(frozen=True)
class Leaf:
    """A scalar."""

    value: Any
    source: str


@dataclass(frozen=True)
class Items:
    """A list."""

    entries: tuple[Node, ...]
    source: str


@dataclass(frozen=True)
class Table:
    """A mapping. `mistakes`: those found while reading it (a key given twice)."""

    entries: Mapping[str, Node]
    source: str
    mistakes: tuple[str, ...] = field(default=(), compare=False)


Node = Leaf | Items | Table

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")}


def read_file(path: Path) -> Table:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_unreadable(path, error)) from error
    reader = _Reader(str(path))
    node = reader.read(text)
    if node is None or (isinstance(node, Leaf) and node.value is None):
        return Table({}, str(path))
    if not isinstance(node, Table):
        kind = "a list" if isinstance(node, Items) else f"the value {node.value!r}"
        raise ConfigError(f"'{path}' holds {kind}; expected a mapping of keys such as `train: {{epochs: 3}}`")
    return Table(node.entries, node.source, tuple(reader.mistakes))


def read_value(text: str, source: str) -> tuple[Node, tuple[str, ...]]:
    """The value in `key=value`, read as YAML 1.2, and the mistakes in it (a key given twice).

    Raises:
        ConfigError: it is not YAML.
    """
    reader = _Reader(source, lines=False)
    node = reader.read(text)
    return (Leaf(None, source) if node is None else node), tuple(reader.mistakes)


class _Reader:
    """Reads one text. `lines`: whether the source is a file, so that line numbers are given."""

    def __init__(self, source: str, *, lines: bool = True) -> None:
        self.source, self.lines = source, lines
        self.mistakes: list[str] = []
        self._yaml = YAML(typ="safe", pure=True)

    def read(self, text: str) -> Node | None:
        """The tree of a text; raises ConfigError if it is not YAML."""
        try:
            node = self._yaml.compose(text)
            return None if node is None else self._convert(node, "")
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.source}:{mark.line + 1}" if mark and self.lines else self.source
            raise ConfigError(f"{error.problem or error.context}: not valid YAML ({where})") from error
        except RecursionError as error:
            raise ConfigError(f"nested too deeply to be read; no setting needs that ({self.source})") from error
        except (YAMLError, ValueError) as error:
            raise ConfigError(f"{' '.join(str(error).split())}: not valid YAML ({self.source})") from error

    def _where(self, node: YamlNode) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source

    def _convert(self, node: YamlNode, path: str) -> Node:
        where = self._where(node)
        if node.anchor:  # also keeps out a mapping that holds itself
            raise ConfigError(f"&{node.anchor}: anchors and aliases are not supported; write the value out ({where})")
        if node.tag not in _PLAIN_TAGS:
            raise ConfigError(
                f"{str(node.tag).removeprefix(_TAG)}: tags are not supported; write the plain value ({where})"
            )
        if isinstance(node, MappingNode):
            return self._table(node, path, where)
        if isinstance(node, SequenceNode):
            return Items(tuple(self._convert(item, f"{path}{i}.") for i, item in enumerate(node.value)), where)
        return Leaf(self._scalar(node), where)  # the only other kind of node

    def _table(self, node: MappingNode, path: str, where: str) -> Table:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise ConfigError(f"a key must be text, not a list or mapping ({self._where(key)})")
            if key.value in entries:
                self.mistakes.append(f"{path}{key.value}: given twice; keep one ({self._where(key)})")
            converted = self._convert(value, f"{path}{key.value}.")
            # A mapping begins on the line after its key; report the line of the key.
            entries[key.value] = _moved(converted, self._where(key))
        return Table(entries, where)

    def _scalar(self, node: YamlNode) -> Any:
        if node.tag == _TAG + "timestamp":  # 2026-01-31 is text: no key of a configuration is a date
            return node.value
        return self._yaml.constructor.construct_object(node, deep=True)


def _moved(node: Node, source: str) -> Node:
    if isinstance(node, Table):
        return Table(node.entries, source)
    return Items(node.entries, source) if isinstance(node, Items) else node


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"'{path}' is not UTF-8 text (byte {error.start}); is it a configuration file?"
    if isinstance(error, FileNotFoundError):
        near = similar(path, (found.name for found in path.parent.glob("*.y*ml")))
        hint = f"did you mean '{near}'?" if near else "a setting is written key=value"
        return f"'{path}': no such file; {hint}"
    return f"'{path}' cannot be read: {error.strerror}"


def nested(path: Sequence[str], value: Node, source: str) -> Table:
    """{a: {b: value}} for path (a, b)."""
    for key in reversed(path):
        value = Table({key: value}, source)
    if not isinstance(value, Table):
        raise ValueError("a path has at least one key")
    return value


def plain(node: Node) -> Any:
    """Dicts, lists and scalars, without sources."""
    if isinstance(node, Table):
        return {key: plain(value) for key, value in node.entries.items()}
    return [plain(value) for value in node.entries] if isinstance(node, Items) else node.value


def locate(root: Node, path: Sequence[str]) -> tuple[tuple[str, ...], Node]:
    """The part of `path` that exists, and the node at its end."""
    node = root
    for depth, key in enumerate(path):
        child = _child(node, key)
        if child is None:
            return tuple(path[:depth]), node
        node = child
    return tuple(path), node


def _child(node: Node, key: str) -> Node | None:
    if isinstance(node, Table):
        return node.entries.get(key)
    if isinstance(node, Items) and key.isdecimal() and int(key) < len(node.entries):
        return node.entries[int(key)]
    return None


def without(table: Table, path: Sequence[str]) -> Table:
    """The table without the key at `path` (without a whole list, if the path leads into one)."""
    key, *rest = path
    child = table.entries.get(key)
    others = {name: value for name, value in table.entries.items() if name != key}
    if rest and isinstance(child, Table):
        others[key] = without(child, rest)
    return Table(others, table.source)
