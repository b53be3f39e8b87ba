"""Random choices of one run are told apart by the word that is hashed for each purpose."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Handed on by a name of its own before it is hashed with a seed.
OTHERS = {("hpccl.tools.memory_map.build", "_SUBSAMPLE"), ("hpccl.tools.memory_map.build", "_CURVATURE")}


def after_a_seed(source: str) -> Iterator[str]:
    """Constants that come right after a seed, among arguments or in a tuple."""
    for node in ast.walk(ast.parse(source)):
        words = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        for before, word in itertools.pairwise(words):
            if ast.unparse(before).endswith("seed") and isinstance(word, ast.Name) and re.fullmatch("[A-Z_]+", word.id):
                yield word.id


def purposes() -> dict[tuple[str, str], int]:
    """The word of each (module, constant)."""
    found = set(OTHERS)
    for path in sorted((ROOT / "hpccl").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found |= {(module, name) for name in after_a_seed(path.read_text(encoding="utf-8"))}
    return {each: getattr(importlib.import_module(each[0]), each[1]) for each in sorted(found)}


def test_no_two_purposes_have_one_word() -> None:
    """Or a uniform sample of the examples would be the ones that were held out by the same hash."""
    words = purposes()
    known = {("hpccl.data.order", "_VIEW"), ("hpccl.train.kept", "_HELD"), ("hpccl.train.task_pass", "_GROUP")}
    assert known | {("hpccl.gp.inducing", "_GUMBEL"), ("hpccl.train.consolidate", "_REPLAY")} <= words.keys()
    shared = {each: word for each, word in words.items() if list(words.values()).count(word) > 1}
    assert not shared


@pytest.mark.parametrize("line", ["mix(config.seed, _A, task)", "permutation(n, seed, _A)", "words = (self.seed, _A)"])
def test_words_are_found_wherever_they_are_hashed(line: str) -> None:
    assert list(after_a_seed(line)) == ["_A"]
