from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hpccl.config.docs import meaning, page
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.config.schema import keys

ROOT = Path(__file__).parents[3]
METHODS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
NAMES = (
    "finetune joint separate ewc replay fr fr+replay ewc+fr ewc+replay ewc+fr+replay ewc+both "
    "kpriors fromp lwf lwf.mc feature_extraction finetune_head er er_ace der der++ gdumb icarl bic mas mas_local si "
    "online_ewc topic prototypes"
)


def test_all_methods_are_there() -> None:
    assert sorted(path.stem for path in METHODS) == sorted(NAMES.split())


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_is_what_its_file_is_called(path: Path) -> None:
    assert load([path], []).method == path.stem
    assert load([ROOT / "configs" / "quickstart.yaml", path], []).method == path.stem


def test_a_method_can_be_put_over_another() -> None:
    for first, second in itertools.pairwise([*METHODS, METHODS[0]]):
        assert load([first, second], []).method == _put_over(first, second)


@pytest.mark.slow
def test_a_method_can_be_put_over_any_other() -> None:
    for first, second in itertools.product(METHODS, METHODS):
        assert load([first, second], []).method == _put_over(first, second)


def _put_over(first: Path, second: Path) -> str:
    """Name of the second method over the first: the curvature is the user's, whatever the method."""
    kept = first.stem in ("mas", "mas_local", "si")
    return second.stem.replace("ewc", first.stem) if kept else second.stem


def test_a_method_without_memory_forgets_the_settings_of_memory(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("memory: {size: 5, mix: {kind: stratified}}\nprior: {temperature: 2.0, view: teacher, weight: 3}\n")
    for path in METHODS:
        assert load([base, path], []).method == path.stem


def test_a_file_after_a_method_sets_the_size_of_memory(tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("memory: {size: 5}\n")
    method = ROOT / "configs" / "method" / "fr.yaml"
    assert load([method], []).memory.size == 1000
    assert load([method, small], []).memory.size == 5


def test_the_page_of_keys_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run `python -m hpccl.config.docs docs/configuration.md`"


def test_every_key_has_a_meaning() -> None:
    without = [path for path, _, section, name in keys(RunConfig) if name != "kind" and not meaning(section, name)]
    assert without == []


ENGINES = sorted((ROOT / "configs" / "engine").glob("*.yaml"))


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_an_engine_goes_after_any_method_and_any_other_engine(path: Path) -> None:
    alone = load([path], []).engine
    for before in (*METHODS, *ENGINES):
        assert load([ROOT / "configs" / "quickstart.yaml", before, path], []).engine == alone


def test_the_four_engines_are_there() -> None:
    kinds = {path.stem: load([path], []).engine.kind for path in ENGINES}
    assert kinds == {"ddp": "ddp", "fsdp2": "fsdp2", "hsdp": "fsdp2", "zero3": "deepspeed"}
