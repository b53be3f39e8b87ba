"""Files of configs/preset: how other code does a method, put after the method's file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hpccl.config.curvature import SiCurvature
from hpccl.config.load import load
from hpccl.config.run import RunConfig

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs" / "preset").glob("*/*.yaml"))
NAMES = {
    "authors": "ewc fromp gdumb icarl lwf mas online_ewc",
    "avalanche": "bic der der++ er ewc lwf mas online_ewc si",
    "mammoth": "bic der der++ er ewc gdumb icarl lwf si",
}
AFTER = ("mas", "mas_local", "si", "bic", "der", "er", "finetune", "gdumb")
RENAMED = {"avalanche/mas": "online_mas"}  # its moving average is one


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def method_of(path: Path) -> Path:
    return ROOT / "configs" / "method" / path.name


def with_preset(path: Path) -> RunConfig:
    return load([ROOT / "configs" / "quickstart.yaml", method_of(path), path], [])


def test_all_presets_are_there() -> None:
    expected = [f"{source}/{method}" for source, methods in NAMES.items() for method in methods.split()]
    assert sorted(map(named, PRESETS)) == sorted(expected)


@pytest.mark.parametrize("path", PRESETS, ids=named)
def test_a_preset_is_the_method_and_changes_something(path: Path) -> None:
    without = load([ROOT / "configs" / "quickstart.yaml", method_of(path)], [])
    assert with_preset(path).method == RENAMED.get(named(path), path.stem)
    assert with_preset(path).identity() != without.identity()


@pytest.mark.parametrize("path", PRESETS, ids=named)
def test_a_preset_says_what_differs_and_what_it_goes_after(path: Path) -> None:
    first, *_ = path.read_text(encoding="utf-8").split("\nmemory:")
    comment = " ".join(line.removeprefix("# ") for line in first.splitlines() if line.startswith("#"))
    assert f"configs/method/{path.name}" in comment
    assert "Differs from hpccl" in comment
    assert f"`{named(path)}`" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), (
        "the table of presets lacks it"
    )


def test_a_preset_leaves_nothing_behind_that_a_method_says() -> None:
    """Another method after it is that method; the curvature of a plain quadratic is the user's."""
    for preset, other in itertools.product(
        PRESETS, ["mas", "mas_local", "si", "bic", "der", "er", "finetune", "gdumb"]
    ):
        files = [ROOT / "configs" / "quickstart.yaml", method_of(preset), preset]
        found = load([*files, ROOT / "configs" / "method" / f"{other}.yaml"], [])
        assert found.method == other, named(preset)


def test_weights_are_twice_and_half_of_theirs() -> None:
    """Their penalties without a half, or with one too many, for a lambda of 1 (EWC 10 in Mammoth, SI 0.1)."""
    weights = {named(path): with_preset(path).prior.quadratic.weight for path in PRESETS}
    assert {name: weight for name, weight in weights.items() if weight > 0} == {
        "authors/ewc": 1.0,  # (lambda / 2) F
        "authors/online_ewc": 1.0,
        "authors/mas": 1.0,  # lambda Omega, and hpccl's curvature is 2 Omega
        "avalanche/ewc": 2.0,  # lambda F
        "avalanche/online_ewc": 2.0,
        "avalanche/mas": 0.5,  # (1 - alpha) lambda Omega
        "avalanche/si": 0.5,  # (lambda / 2) Omega
        "mammoth/ewc": 20.0,
        "mammoth/si": 0.1,
    }


def test_what_si_credits_a_step_with() -> None:
    """The task's loss alone in Mammoth (since it no longer adds lr g^2), with the penalty in Avalanche."""
    gradients = {}
    for path in PRESETS:
        curvature = with_preset(path).curvature
        if isinstance(curvature, SiCurvature):
            gradients[named(path)] = curvature.gradient
    assert gradients == {"avalanche/si": "total", "mammoth/si": "task"}
