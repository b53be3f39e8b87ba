"""What the documentation names or links to exists: files, functions, classes and their members, and tests.

`curvature/spectrum.py: Spectrum, gathered`       a file of hpccl/, tests/ or the repository, and names in it
`Posterior.solve`                                a class of hpccl/ and a member of it
`test_logit_variance`                            a test
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "slurm").rglob("*.md")])
FOLDERS = ("hpccl", "tests", "launch", "benchmarks", "slurm")
_FILE = re.compile(r"([\w/]+\.py)(?:: ?([\w., ]+))?")
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
_MEMBER = re.compile(r"[A-Z]\w*[a-z]\w*\.[a-z_]\w*")


@cache
def names_in(path: Path) -> dict[str, set[str]]:
    """What a module defines at its top, with the members of classes."""
    return dict(_defined(ast.parse(path.read_text(encoding="utf-8")).body))


def _defined(body: list[ast.stmt]) -> list[tuple[str, set[str]]]:
    found: list[tuple[str, set[str]]] = []
    for node in body:
        match node:
            case ast.ClassDef():
                found.append((node.name, {name for name, _ in _defined(node.body)} | _fields_set(node)))
            case ast.FunctionDef():
                found.append((node.name, set()))
            case ast.Assign():
                found += [(each.id, set()) for each in node.targets if isinstance(each, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.append((name, set()))
            case ast.If():
                found += _defined([*node.body, *node.orelse])
            case _:
                pass
    return found


def _fields_set(node: ast.ClassDef) -> set[str]:
    """self.name = ..."""
    targets = [each for part in ast.walk(node) if isinstance(part, ast.Assign) for each in part.targets]
    return {each.attr for each in targets if isinstance(each, ast.Attribute)}


@cache
def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def classes() -> dict[str, set[str]]:
    """Members of every class of hpccl, of equal names together, with those that they inherit by name."""
    found: dict[str, set[str]] = {}
    for path in files("hpccl"):
        for name, members in names_in(path).items():
            found.setdefault(name, set()).update(members)
    return found


@cache
def known_tests() -> set[str]:
    return {name for path in files("tests") for name in names_in(path)}


def _is_member(name: str) -> bool:
    """Such as a key of the configuration."""
    return any(name in members for members in classes().values())


def complaints(text: str) -> list[str]:
    """Of every name that does not exist, where a page says it."""
    found = []
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if named := _FILE.fullmatch(span):
            found += _in_file(span, named[1], named[2] or "")
        elif _MEMBER.fullmatch(span):
            name, member = span.split(".")
            if name in classes() and member not in classes()[name]:
                found.append(f"`{span}`: class {name} has no '{member}'")
        elif re.fullmatch(r"test_\w+", span) and span not in known_tests() and not _is_member(span):
            found.append(f"`{span}`: no such test")
    return found


def _has(module: dict[str, set[str]], name: str) -> bool:
    """A name at its top, one of a class by its own name, or `Class.member`."""
    holder, _, member = name.partition(".")
    if member:
        return member in module.get(holder, set())
    return name in module or any(name in members for members in module.values())


def _in_file(span: str, file: str, names: str) -> list[str]:
    paths = [path for folder in ("", "hpccl", "tests") if (path := ROOT / folder / file).is_file()]
    paths = paths or [path for folder in FOLDERS for path in files(folder) if path.name == file]
    if not paths:
        return [f"`{span}`: no file '{file}'"]
    wanted = [name for each in names.split(",") if (name := each.strip())]
    missing = [name for name in wanted if not any(_has(names_in(path), name) for path in paths)]
    return [f"`{span}`: '{name}' is not in {file}" for name in missing]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert complaints(page.read_text(encoding="utf-8")) == []


def dead_links(page: Path, text: str) -> list[str]:
    """What a page links to, or shows, within the repository and that is not there; anchors are not looked for."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = [target.split("#")[0] for target in _LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
    return [target for target in targets if target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_links_to_exists(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_dead_links_are_found() -> None:
    text = "![a picture](none.png) [a page](data.md) [a part](no.md#part) [here](#part) [there](https://a.b/c) `[x](y)`"
    assert dead_links(ROOT / "docs" / "plan.md", text) == ["none.png", "no.md"]


def test_every_method_has_its_place_in_the_theory() -> None:
    section = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8").split("## 9. Every method")[1].split("\n## ")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)}
    assert told - {"configs/method/"} == {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}


# Sections of docs/methods.md that are not about one method.
_OF_ALL = {"Distillation beside other methods", "Why do your numbers differ", "Measured on Split-CIFAR"}


def sections(page: str) -> dict[str, str]:
    """By heading of the second level."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


METHODS = sections("methods.md")


@pytest.mark.parametrize("heading", [each for each in METHODS if each not in _OF_ALL])
def test_a_method_has_state_cost_communication_and_source(heading: str) -> None:
    missing = [
        word for word in ("State", "Cost", "Communication", "Source") if not re.search(rf"\b{word}\b", METHODS[heading])
    ]
    assert missing == []


def test_sections_that_are_of_no_method_exist() -> None:
    assert METHODS.keys() > _OF_ALL


def test_every_file_of_a_method_is_named() -> None:
    spans = re.findall(r"`(?:configs/method/)?([^`/\n]+)\.yaml`", "".join(METHODS.values()))
    assert {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")} - set(spans) == set()


def test_the_code_of_a_method_is_the_repositorys() -> None:
    code = [path.read_text(encoding="utf-8") for folder in ("hpccl", "tests") for path in files(folder)]
    blocks = re.findall(r"```python\n(.*?)```", sections("extending.md")["A method: Synaptic Intelligence"], re.DOTALL)
    assert len(blocks) > 5
    assert [block for block in blocks if not any(block in text for text in code)] == []


def test_names_that_do_not_exist_are_found() -> None:
    text = (
        "`curvature/spectrum.py: Spectrum, gathered` `Posterior.solve` `train/step.py` `unit/test_docs.py: _has` "
        "`posterior.py: Posterior.solve, sample` `test_what_a_page_names_exists` `optim.kind` `Unknown.thing`"
    )
    assert complaints(text) == []
    wrong = "`no/such.py: x` `curvature/posterior.py: solved` `Posterior.solved` `test_nothing_of_the_kind` `a.py`"
    assert [each.split("`")[1] for each in complaints(wrong)] == [
        "no/such.py: x",
        "curvature/posterior.py: solved",
        "Posterior.solved",
        "test_nothing_of_the_kind",
        "a.py",
    ]
