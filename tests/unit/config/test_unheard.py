"""Settings on the command line that say nothing are told of; those in files are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpccl.cli import app
from hpccl.config.load import sweep
from hpccl.config.unheard import unheard


def told(*overrides: str, files: tuple[Path, ...] = ()) -> list[str]:
    return unheard(sweep(files, overrides), overrides)


@pytest.mark.parametrize(
    ("override", "switch", "why"),
    [
        ("prior.quadratic.damping=0.01", "prior.quadratic.weight=1", "prior.quadratic.weight is 0"),
        ("prior.quadratic.anchor=each", "prior.quadratic.weight=1", "prior.quadratic.weight is 0"),
        ("prior.distill.temperature=3", "prior.distill.weight=1", "prior.distill.weight is 0"),
        ("prior.correct.penalty=1", "", "prior.correct.share is 0"),
        ("prior.fromp.jitter=1e-4", "", "prior.fromp.weight is 0"),
        ("prior.topology.margin=1", "prior.topology.nodes=4", "prior.topology.nodes is 0"),
        ("curvature.fisher=empirical", "prior.quadratic.weight=1", "no term of training uses a curvature"),
        ("curvature.kind=diagonal", "prior.quadratic.weight=1", "no term of training uses a curvature"),
        ("memory.selector.kind=leverage", "memory.size=3", "there is no memory"),
        ("prior.scale_to_task=true", "memory.size=3", "there is no memory"),
    ],
)
def test_what_a_term_that_is_off_would_read(override: str, switch: str, why: str) -> None:
    (line,) = told(override)
    assert line.startswith(f"{override} has no effect here: {why}")
    if switch:
        assert told(override, switch) == []


def test_the_precision_of_products_that_a_diagonal_does_not_make() -> None:
    common = ("prior.quadratic.weight=1", "prior.quadratic.products=bf16")
    assert told(*common) == []
    assert told(*common, "curvature.kind=ekfac") == []
    (line,) = told(*common, "curvature.kind=diagonal")
    assert line.startswith("prior.quadratic.products=bf16 has no effect here: only curvature.kind=kronecker")


def test_dropout_of_a_network_that_has_none() -> None:
    assert told("model.kind=cifarnet", "model.dropout=false") == []
    (line,) = told("model.kind=vgg_small", "model.dropout=false")
    assert line == "model.dropout=false has no effect here: vgg_small has no dropout"


def test_a_share_of_too_few_examples() -> None:
    (line,) = told("memory.size=9", "prior.replay=0.1")
    assert line.endswith("in such a small memory, this share gives no example its true label")
    assert told("memory.size=10", "prior.replay=0.1") == told("memory.size=9", "prior.replay=0") == []


def test_a_sampler_that_balances_by_itself() -> None:
    gdumb = (
        "train.data=memory",
        "train.restart=true",
        "memory.total=20",
        "prior.replay=1",
        "memory.selector.kind=greedy",
    )
    (line,) = told(*gdumb, "memory.balanced=false")
    assert line.endswith("memory.selector.kind=greedy keeps classes balanced")


def test_switches_and_files_are_not_told_of(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prior: {quadratic: {products: bf16}}\n")
    assert told("prior.quadratic.weight=0", "prior.distill.weight=0", files=(recipe,)) == []


def test_a_sweep_in_which_one_run_hears_it() -> None:
    assert told("prior.quadratic.weight=0,1", "prior.quadratic.damping=0.01") == []


def test_it_is_said_beside_the_output() -> None:
    result = CliRunner().invoke(app, ["check", "prior.quadratic.damping=0.01"])
    assert result.exit_code == 0
    bare, unheard = result.stderr.splitlines()
    assert bare == "note: no configuration file (such as configs/quickstart.yaml) is given; the defaults apply"
    assert unheard == "note: prior.quadratic.damping=0.01 has no effect here: prior.quadratic.weight is 0"
    assert "note:" not in result.stdout
