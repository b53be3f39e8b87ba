"""The page that lists every key, written from the sections and the comments beside their keys."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

from hpccl.config.base import Section
from hpccl.config.load import dump
from hpccl.config.run import RunConfig
from hpccl.config.schema import Choice, allowed, choice
from hpccl.folder import replacing

__all__ = ["meaning", "page", "table"]

_HEAD = """# Configuration

A run is described by YAML files, merged from left to right, and `key=value` arguments after them:

```
hpccl train configs/quickstart.yaml configs/method/ewc+fr.yaml train.epochs=3 seed=1,2,3
```

- `key=a,b` is a sweep: one run for each value (of several sweeps: for each combination), one after the other, in
  `runs/<name>/<key=value>`. `key=[a,b]` is one list.
- Files are YAML 1.2: `no` is text, `12:30:00` is text, `1e-3` is a number. Anchors, tags and includes are not read.
- A mapping whose `kind` changes starts afresh: `model.kind=timm` forgets the keys of `model.kind=mlp`. Where no kind is
  given, the one marked *default* holds.
- `stream.parts.0.path=...` changes one item of a list.
- A key that takes one value for each task takes a single value too; the last of a list repeats.
- `hpccl check FILES... key=value` prints the whole configuration that results, or every mistake in it; it runs nothing.
- `name`, `folder`, `checkpoint`, `log`, `cluster`, `data.cache`, `data.shard_cache`, `data.shard_gib`, `data.retries`,
  `data.workers`, `data.timeout`, `memory.keep` and `engine` (but for `engine.precision`) may change when a run is
  resumed, and the limits `curvature.batch_size`, `curvature.max_factor` and `curvature.max_parameters`. Everything
  else decides the result and may not.

This page is written by `python -m hpccl.config.docs docs/configuration.md`.
"""


def page() -> str:
    """The whole page, with the defaults at its end."""
    return f"{_HEAD}\n{table()}\n## All defaults\n\n```yaml\n{dump(RunConfig())}```\n"


def table() -> str:
    """Every key with its default, what is allowed and what it means: one Markdown table a section."""
    return "\n".join(_section(RunConfig, "", 2))


def _section(section: type[Section], prefix: str, level: int) -> Iterator[str]:
    """The table of a section's own keys, then the sections inside it."""
    names = [name for name in section.model_fields if name != "kind"]
    if names:
        yield "| key | default | allowed | meaning |"
        yield "|---|---|---|---|"
    for name in names:
        held = choice(section, name)
        words = "see below" if held else _cell(allowed(section, name))
        yield f"| `{prefix}{name}` | {_default(section, name)} | {words} | {_cell(meaning(section, name))} |"
    if names:
        yield ""
    for name, field in section.model_fields.items():
        held = choice(section, name)
        if held is not None:
            below = f"{prefix}{name}.0." if get_origin(field.annotation) is tuple else f"{prefix}{name}."
            yield from _choice(held, f"{prefix}{name}", below, level)


def _choice(held: Choice, path: str, below: str, level: int) -> Iterator[str]:
    marks = "#" * level
    if "" not in held.sections:
        yield f"{marks} {path}"
        yield ""
        kinds = [f"`{kind}`" + (" (default)" * (kind == held.default)) for kind in held.sections]
        yield f"`{path}.kind` is {', '.join(kinds)}."
        yield ""
    for section in dict.fromkeys(held.sections.values()):
        kinds = [kind for kind, cls in held.sections.items() if cls is section and kind]
        yield f"{marks}# {path}.kind={'|'.join(kinds)}" if kinds else f"{marks} {path}"
        yield ""
        yield inspect.getdoc(section) or ""
        yield ""
        yield from _section(section, below, level + (2 if kinds else 1))


def _default(section: type[Section], name: str) -> str:
    field = section.model_fields[name]
    if field.is_required():
        return "*required*"
    held = choice(section, name)
    if held is not None:
        return f"kind `{held.default}`" if held.default else ""
    value = field.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def meaning(section: type[Section], name: str) -> str:
    """The comment above or beside a key, in its section or in one that this inherits from, as one line."""
    families = (kind for kind in section.__mro__ if issubclass(kind, Section) and name in kind.__annotations__)
    return next((_comments(kind).get(name, "") for kind in families), "")


@functools.cache
def _comments(section: type[Section]) -> dict[str, str]:
    """By key. A comment on the lines above a key, and the one beside it, belong to it."""
    source = inspect.getsource(section)
    lines = iter(source.splitlines(keepends=True))
    remarks = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(lambda: next(lines, ""))
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    found: dict[str, str] = {}
    for node in getattr(body, "body", ()):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in remarks and source.splitlines()[first - 2].lstrip().startswith("#"):
            first -= 1
        last = node.end_lineno or first
        found[node.target.id] = " ".join(remarks[at] for at in range(first, last + 1) if at in remarks)
    return found


def _main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m hpccl.config.docs FILE\n")
        return 2
    with replacing(Path(arguments[0])) as beside:
        beside.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
