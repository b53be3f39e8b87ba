"""From files and `key=value` arguments to a RunConfig, or one error with every mistake and its source."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from hpccl.config.base import Section
from hpccl.config.clash import Clash, ClashError
from hpccl.config.run import RunConfig
from hpccl.config.schema import Choice, allowed, choice, suggest
from hpccl.config.tree import Items, Leaf, Node, Table, locate, nested, plain, read_file, read_value, without
from hpccl.errors import ConfigError

__all__ = ["dump", "is_override", "load", "load_recorded", "points", "sweep"]

_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.[\w-]+)*)=(.*)", re.DOTALL)
_SLURM_LISTS = re.compile(r"cluster\.(partition|constraint|exclude|extra\..*)")  # a comma is SLURM's, and no sweep's
_LONGEST = 200  # bytes of a folder's name; file systems allow 255
_DEEPEST = 20  # dots in a key; sections are nested far less deeply
_ROOT = Choice({"": RunConfig}, "", tagged=False)


def is_override(argument: str) -> bool:
    """Whether a command-line argument is `dotted.key=value`; otherwise it is a file (`./a=b.yaml` is a file)."""
    return _OVERRIDE.fullmatch(argument) is not None


def load(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """Merge files from left to right, then `dotted.key=value` arguments, and validate.

    Raises:
        ConfigError: one line per mistake: key, value, what is allowed, and its source (file and line, or argument).
    """
    axes = [(key, text) for key, text in _split(overrides) if len(_alternatives(key, text)) > 1]
    if axes:
        lines = [
            f"{key}={text} is a sweep, but one run is expected here (a list is written [{text}])" for key, text in axes
        ]
        raise ConfigError("\n".join(lines))
    return _load(files, overrides)


def load_recorded(path: Path) -> RunConfig:
    """A run's config.yaml, as `dump` wrote it.

    Raises:
        ConfigError: the file is damaged, or this version cannot read it.
    """
    config = load([path], [])
    *_, last = RunConfig.model_fields
    if last not in config.model_fields_set:  # it has every key; a part of it would be a run with other settings
        raise ConfigError(
            f"'{path}' is empty or cut off (it should have every key, but '{last}' is missing); restore it from a copy"
        )
    return config


def sweep(files: Sequence[Path], overrides: Sequence[str]) -> list[RunConfig]:
    """One configuration for each combination of `key=a,b` axes; `key=[a,b]` is one list.

    With axes, the folder of each is `runs/<name>/<key=value of each axis>`.

    Raises:
        ConfigError: as `load`, with the mistakes of all combinations.
    """
    runs = points(overrides)
    if runs == [{}]:
        return [_load(files, overrides)]
    fixed = [f"{key}={text}" for key, text in _split(overrides) if key not in runs[0]]
    configs: list[RunConfig] = []
    mistakes: dict[str, None] = {}
    for point in runs:
        try:
            config = _load(files, [*fixed, *(f"{key}={value}" for key, value in point.items())])
        except ConfigError as error:
            mistakes.update(dict.fromkeys(str(error).splitlines()))
            continue
        configs.append(_in_own_folder(config, point))
    if mistakes:
        advice = [
            f"commas make a sweep; for one list write {key}=[{','.join(point[key] for point in runs)}]"
            for key in runs[0]
            if len(runs) > 1 and any(each.startswith(f"{key} = ") and "expected a list" in each for each in mistakes)
        ]
        raise ConfigError("\n".join([*mistakes, *advice]))
    _refuse_shared_folders(configs)
    return configs


def points(overrides: Sequence[str]) -> list[dict[str, str]]:
    """For each run of a sweep, the value of every `key=a,b` axis; one empty mapping if there is no axis.

    Raises:
        ConfigError: an argument is not `key=value`, or a value is given twice.
    """
    axes = {key: _alternatives(key, text) for key, text in _split(overrides)}
    axes = {key: values for key, values in axes.items() if len(values) > 1}
    repeated = [key for key, values in axes.items() if len(set(values)) < len(values)]
    if repeated:
        raise ConfigError(
            "\n".join(
                f"{key}: commas make a sweep, and a value is given twice in {','.join(axes[key])}; leave one out, or "
                f"write {key}=[{','.join(axes[key])}] for one list"
                for key in repeated
            )
        )
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _in_own_folder(config: RunConfig, point: dict[str, str]) -> RunConfig:
    parts = [f"{key}={value}" for key, value in point.items() if key not in ("name", "folder")]
    if not parts:
        return config
    label = re.sub(r"[^\w.,+=-]", "-", ",".join(parts))
    if len(label.encode()) > _LONGEST:
        digest = hashlib.sha256(label.encode()).hexdigest()[:12]
        label = f"{label.encode()[: _LONGEST - 13].decode(errors='ignore')}-{digest}"
    return config.model_copy(update={"folder": f"{config.path}/{label}"})


def _refuse_shared_folders(configs: Sequence[RunConfig]) -> None:
    paths = [config.path for config in configs]
    shared = sorted({path for path in paths if paths.count(path) > 1})
    if shared:
        raise ConfigError(f"several runs of the sweep would share a folder ({', '.join(shared)}); use other values")


def dump(config: RunConfig) -> str:
    """YAML with every key, which loads as an equal configuration."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 10_000
    yaml.representer.add_representer(type(None), _represent_null)
    out = io.StringIO()
    yaml.dump(_in_flow(config.model_dump(mode="json")), out)
    return out.getvalue()


def _represent_null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _in_flow(value: Any) -> Any:
    """Lists of scalars on one line; text with line breaks and the like with escapes, which every reader keeps."""
    if isinstance(value, dict):
        return {_in_flow(key): _in_flow(item) for key, item in value.items()}
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    if not isinstance(value, list):
        return value
    items = CommentedSeq([_in_flow(item) for item in value])
    if not any(isinstance(item, (dict, list)) for item in value):
        items.fa.set_flow_style()
    return items


# ---------------------------------------------------------------- reading arguments


def _split(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text) of each argument; if a key is given twice, the last one counts."""
    matches = [(text, _OVERRIDE.fullmatch(text)) for text in overrides]
    wrong = [text for text, match in matches if match is None]
    if wrong:
        raise ConfigError("\n".join(f"'{text}' is not dotted.key=value" for text in wrong))
    return list({match[1]: match[2] for _, match in matches if match}.items())


def _alternatives(key: str, text: str) -> list[str]:
    """`a,b` split at commas outside brackets and quotes; the whole text for keys whose values are SLURM's lists."""
    if _SLURM_LISTS.fullmatch(key):
        return [text]
    parts, depth, quote, start = [], 0, "", 0
    before = ","  # the last character that is not a space: a quote opens only at the start of a value
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in ",[{:":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
        before = before if char.isspace() else char
    return [*parts, text[start:].strip()]


# ---------------------------------------------------------------- merging


def _load(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    tree, mistakes = _read(files, overrides)
    if "name" not in tree.entries and files:
        tree = Table({"name": Leaf(_joined_name(files), "the files' names"), **tree.entries}, tree.source)
    config, wrong = _validate(tree)
    if mistakes or wrong or config is None:
        raise ConfigError("\n".join([*mistakes, *wrong]))
    return config


def _joined_name(files: Sequence[Path]) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", "-".join(path.stem for path in files)).lstrip("._+=-") or "run"


def _read(files: Sequence[Path], overrides: Sequence[str]) -> tuple[Table, list[str]]:
    """One tree, and the mistakes that do not hide others. Raises ConfigError for those that do."""
    tables: list[Table] = []
    fatal: list[str] = []
    mistakes: list[str] = []
    for path in files:
        try:
            tables.append(read_file(path))
        except ConfigError as error:
            fatal.append(str(error))
    arguments = _split(overrides)
    # A kind first: `model.name=resnet18 model.kind=timm` means the same in either order, as does `model=...`.
    above = {key for key, _ in arguments if any(other.startswith(f"{key}.") for other, _ in arguments)}
    first = {key: key.count(".") + (key in above) for key, _ in arguments if key.endswith(".kind") or key in above}
    arguments.sort(key=lambda item: (item[0] not in first, first.get(item[0], 0)))
    for key, text in arguments:
        if key.count(".") > _DEEPEST:
            fatal.append(f"'{key[:60]}...' has {key.count('.') + 1} parts; no key has more than {_DEEPEST + 1}")
            continue
        try:
            value, doubled = read_value(text, f"argument '{key}={text}'")
            mistakes += doubled
            tables.append(nested(key.split("."), value, value.source))
        except ConfigError as error:
            fatal.append(str(error))
    if fatal:
        raise ConfigError("\n".join(fatal))
    tree: Node = Table({}, "defaults")
    for table in tables:
        mistakes += table.mistakes
        tree = _merge(tree, table, _ROOT, mistakes)
    return _as_table(tree), mistakes


def _as_table(node: Node) -> Table:
    if not isinstance(node, Table):
        raise ConfigError(f"expected a mapping ({node.source})")
    return node


def _merge(old: Node | None, new: Node, held: Choice | None, mistakes: list[str]) -> Node:
    """`new` over `old`; `held`: the sections that are allowed here."""
    if isinstance(old, Items) and isinstance(new, Table) and new.entries and all(map(str.isdecimal, new.entries)):
        return _merge_items(old, new, held, mistakes)
    if held and held.tagged and isinstance(new, Leaf) and new.value in held.sections:
        new = Table({"kind": new}, new.source)  # `selector: gini` for `selector: {kind: gini}`
    if not isinstance(new, Table):
        return new
    below = old if isinstance(old, Table) else Table({}, new.source)
    section = held.pick(_kind(new) or _kind(below)) if held else None
    entries = dict(below.entries)
    if held and _kind(new) and _kind(new) != (_kind(below) or held.default):  # another kind drops the old one's keys
        entries = {key: node for key, node in entries.items() if section and key in section.lasting}
    for key, value in new.entries.items():
        entries[key] = _merge(entries.get(key), value, choice(section, key) if section else None, mistakes)
    return Table(entries, new.source)


def _merge_items(old: Items, new: Table, held: Choice | None, mistakes: list[str]) -> Node:
    """`parts.0.path=x`: change items of a list."""
    entries = list(old.entries)
    for key, value in new.entries.items():
        if int(key) < len(entries):
            entries[int(key)] = _merge(entries[int(key)], value, held, mistakes)
        else:
            mistakes.append(f"item {key}: the list has {len(entries)} items, counted from 0 ({new.source})")
    return Items(tuple(entries), new.source)


def _kind(table: Table) -> str | None:
    node = table.entries.get("kind")
    return str(node.value) if isinstance(node, Leaf) else None


def _with_kinds(node: Node, held: Choice | None) -> Node:
    """Fill in the default kind where none is given."""
    if isinstance(node, Items):
        return Items(tuple(_with_kinds(item, held) for item in node.entries), node.source)
    if not isinstance(node, Table) or held is None:
        return node
    section = held.pick(_kind(node))
    if section is None:
        return node
    entries = {key: _with_kinds(value, choice(section, key)) for key, value in node.entries.items()}
    if held.default and "kind" not in entries:
        entries = {"kind": Leaf(held.default, "default"), **entries}
    return Table(entries, node.source)


# ---------------------------------------------------------------- validating


@dataclass(frozen=True)
class _Wrong:
    """One of pydantic's errors: the path of keys, the section of the last key, and the error's type and message."""

    path: tuple[str, ...]
    section: type[Section] | None
    type: str
    message: str


def _validate(tree: Table) -> tuple[RunConfig | None, list[str]]:
    """The configuration, and a line for each mistake.

    Rules between sections are checked without the wrong keys, so that mistakes of both kinds are reported at once.
    """
    lines: list[str] = []
    broken: list[tuple[str, ...]] = []
    config = None
    for _ in range(4):
        filled = _with_kinds(tree, _ROOT)
        try:
            config = RunConfig.model_validate(plain(filled))
            break
        except ValidationError as error:
            found = _clashes(error)
            if found:
                lines += [_clash_line(clash, filled) for clash in found if not _touches(clash, broken)]
                break
            wrong = [each for each in _wrongs(error) if not _left_out(each, broken)]
            lines += [_line(each, filled) for each in wrong]
        if not wrong:  # keys are missing only because they were wrong: leave out all above them
            tree = Table({key: node for key, node in tree.entries.items() if key not in {p[0] for p in broken}}, "")
        for each in wrong:
            path = each.path[:-1] if each.type == "missing" else each.path
            broken += [each.path, path]
            tree = without(tree, path) if path else tree
    return config, list(dict.fromkeys(lines))


def _left_out(wrong: _Wrong, broken: Sequence[tuple[str, ...]]) -> bool:
    """Whether a key is missing only because it was wrong."""
    return wrong.type == "missing" and any(path[: len(wrong.path)] == wrong.path for path in broken)


def _clashes(error: ValidationError) -> tuple[Clash, ...]:
    causes = [each.get("ctx", {}).get("error") for each in error.errors(include_url=False)]
    return tuple(clash for cause in causes if isinstance(cause, ClashError) for clash in cause.found)


def _touches(clash: Clash, broken: Sequence[tuple[str, ...]]) -> bool:
    """Whether a clash is about a key that was left out, or about one above or below it."""
    keys = [tuple(key.split(".")) for key in clash.keys]
    return any(key[: len(path)] == path[: len(key)] for key in keys for path in broken)


def _wrongs(error: ValidationError) -> Iterator[_Wrong]:
    found = [(*_untagged(each["loc"]), each) for each in error.errors(include_url=False)]
    paths = [path for path, _, _ in found]
    for path, section, each in found:
        # A list with wrong items also counts as too short: report the cause only.
        if not any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            yield _Wrong(path, section, each["type"], each["msg"])


def _untagged(loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[Section] | None]:
    """The path without the kinds that pydantic adds, and the section of its last key."""
    path: list[str] = []
    held: Choice | None = _ROOT
    section: type[Section] | None = RunConfig
    inside: type[Section] | None = RunConfig
    at = 0
    while at < len(loc):
        name = str(loc[at])
        path.append(name)
        at += 1
        if isinstance(loc[at - 1], int):
            continue
        section = inside
        held = choice(section, name) if section else None
        inside = held.pick(None) if held else None
        if held and held.tagged and at < len(loc):
            inside = held.pick(str(loc[at]))
            at += 1
        if held is None and section is not None and _of_types(section, name):
            break  # the rest is the type that was tried
    return tuple(path), section


def _of_types(section: type[Section], key: str) -> bool:
    """Whether a value may be of several types, such as a number or a word."""
    field = section.model_fields.get(key)
    types = get_args(field.annotation) if field and get_origin(field.annotation) in (Union, UnionType) else ()
    return len([each for each in types if each is not NoneType]) > 1


def _line(wrong: _Wrong, tree: Node) -> str:
    shown, node = locate(tree, wrong.path)
    key = ".".join(wrong.path)
    if wrong.type == "missing":
        hint = f"expected {allowed(wrong.section, wrong.path[-1])}" if wrong.section else ""
        return f"{key} is missing; {hint} ({node.source})"
    if wrong.type == "extra_forbidden":
        hint = suggest(RunConfig, wrong.path, wrong.section)
        return f"{key} = {_short(node)}: no such key; {hint} ({node.source})"
    if wrong.type in ("union_tag_invalid", "literal_error"):
        return _kind_line(wrong, node, shown)
    return _value_line(wrong, node, shown)


def _kind_line(wrong: _Wrong, node: Node, shown: tuple[str, ...]) -> str:
    kind = node.entries.get("kind") if isinstance(node, Table) else None
    if kind is not None and wrong.section is not None:
        held = choice(wrong.section, wrong.path[-1])
        kinds = ", ".join(held.sections) if held else ""
        return f"{'.'.join(shown)}.kind = {_short(kind)}: no such kind; kinds: {kinds} ({kind.source})"
    if wrong.path[-1] == "kind" and wrong.section is not None:
        kinds = ", ".join(get_args(wrong.section.model_fields["kind"].annotation))
        return f"{'.'.join(shown)} = {_short(node)}: no such kind; kinds: {kinds} ({node.source})"
    return _value_line(wrong, node, shown)


def _value_line(wrong: _Wrong, node: Node, shown: tuple[str, ...]) -> str:
    field = _field(wrong)
    hint = f"expected {allowed(*field)}" if field else wrong.message
    return f"{'.'.join(shown)} = {_short(node)}: not allowed; {hint} ({node.source})"


def _field(wrong: _Wrong) -> tuple[type[Section], str] | None:
    """The section and key of an error: the last part of its path that is not a position in a list."""
    names = [part for part in wrong.path if not part.isdecimal()]
    for name in reversed(names):
        if wrong.section is not None and name in wrong.section.model_fields:
            return wrong.section, name
    return None


def _clash_line(clash: Clash, tree: Node) -> str:
    sources, values = [], []
    for key in clash.keys:
        shown, node = locate(tree, key.split("."))
        exact = ".".join(shown) == key
        values.append(_short(node if exact else _default(key, tree)))
        sources += [node.source] if exact and node.source != "default" else []
    where = ", ".join(dict.fromkeys(sources)) or "default"
    others = "".join(f" with {key} = {value}" for key, value in zip(clash.keys[1:], values[1:], strict=True))
    return f"{clash.keys[0]} = {values[0]}{others}: {clash.problem} ({where})"


def _default(key: str, tree: Node) -> Leaf:
    """The default of `key`, in a section of the kind that the tree has."""
    held: Choice | None = _ROOT
    node: Node | None = tree
    value: Any = "default"
    for name in key.split("."):
        section = held.pick(_kind(node) if isinstance(node, Table) else None) if held else None
        if section is None or name not in section.model_fields:
            return Leaf("default", "default")
        value, held = section.model_fields[name].get_default(call_default_factory=True), choice(section, name)
        node = node.entries.get(name) if isinstance(node, Table) else None
    return Leaf(value, "default")


def _short(node: Node) -> str:
    """The value as it is written in a file, shortened if long."""
    text = _written(plain(node))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w./+-]*", value) else f"'{value}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
