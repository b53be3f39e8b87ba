"""Kinds of optimisers in files and arguments, and what cannot be meant together."""

from pathlib import Path

import pytest

from hpccl.config.load import dump, load
from hpccl.config.optim import AdditiveGroup, IvonOptim, LieOptim, TimmOptim
from hpccl.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_a_file_without_a_kind_is_timm_and_an_argument_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("optim: {name: sgd, lr: 0.5, momentum: 0.8}\n")
    assert load([path], []).optim == TimmOptim(name="sgd", lr=(0.5,), momentum=0.8)
    changed = load([path], ["optim.lr=0.1", "optim.kind=ivon"])
    assert changed.optim == IvonOptim(lr=(0.1,))
    assert load([], ["optim=sam"]).optim.kind == "sam"
    found = load([], ["optim.kind=lie", "optim.group.kind=additive", "optim.group.noise=0.5"])
    assert found.optim == LieOptim(group=AdditiveGroup(noise=0.5))
    written = tmp_path / "dumped.yaml"
    written.write_text(dump(changed))
    assert load([written], []) == changed


FILES = [(base, path) for base in ("optim", "cifar10") for path in sorted((ROOT / "configs" / base).glob("*.yaml"))]


@pytest.mark.parametrize(("base", "path"), FILES, ids=[f"{base}/{path.stem}" for base, path in FILES])
def test_a_file_for_an_optimiser_is_called_as_its_kind(base: str, path: Path) -> None:
    under = ROOT / "configs" / ("quickstart.yaml" if base == "optim" else "cifar10.yaml")
    optim = load([under, path], []).optim
    assert path.stem == (optim.name if isinstance(optim, TimmOptim) else optim.kind)


FROMP = ("prior.fromp.weight=1", "memory.size=10")
LEARNED = ("curvature.kind=optimizer", "prior.quadratic.weight=1", "optim={kind: ivon, weight_decay: 0.0}")


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([], list(arguments))
    return str(caught.value)


def test_unknown_keys_and_kinds_are_explained() -> None:
    assert "no such kind; kinds: timm, ivon, sam, bsam, vogn, soba, lie" in refusal("optim.kind=ivvon")
    assert "optim.name = sgd: no such key" in refusal("optim.kind=ivon", "optim.name=sgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.kind=vogn", "engine.compile=true"], "compiled code does not show"),
        (["optim.kind=vogn", "engine.kind=fsdp2", "engine.compile=true"], "compiled code does not show"),
        (["optim.kind=vogn", "engine.recompute=true"], "calls layers twice in a pass"),
        (["optim.kind=vogn", *FROMP], "couples examples"),
        (["optim.kind=vogn", "prior.topology.nodes=5"], "couples examples"),
        (["optim.kind=bsam", "prior.normal.precision=1"], "optim.prior_precision"),
        ([*FROMP, "curvature.kind=optimizer"], "is learned without passes"),
        ([*LEARNED, "prior.normal.precision=1"], "the optimiser learns from the normal prior, too"),
        ([*LEARNED, "prior.topology.nodes=5"], "the optimiser learns from the topology, too"),
        (["optim.kind=sam", "curvature=optimizer", "prior.quadratic.weight=1"], "this optimiser learns no curvature"),
        (["optim.name=sgd", "curvature=optimizer", "prior.quadratic.weight=1"], "this optimiser learns no curvature"),
        (["curvature=optimizer", "prior.quadratic.weight=1", "memory.size=3"], "learns from the memory's examples"),
        (["curvature=optimizer", "prior.quadratic.weight=1", "prior.distill.weight=1"], "learns from distillation"),
        (["curvature=optimizer", "curvature.fraction=0.5"], "is about a pass over the task"),
        (["curvature=optimizer", "prior.quadratic.weight=1", "train.first_task_from=x"], "is in another run"),
    ],
)
def test_clashes(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.kind=sam", "engine.kind=deepspeed", "engine.stage=0", "train.clip_norm=1"],
        ["optim.kind=ivon", "engine.kind=deepspeed", "engine.stage=3"],
        ["optim.kind=bsam", "engine.kind=fsdp2", "train.clip_norm=1"],
        ["optim.kind=vogn", "curvature=optimizer", "prior.quadratic.weight=1"],
        ["optim.name=AdamW", "curvature=optimizer", "prior.quadratic.weight=1"],
    ],
)
def test_what_goes_together(arguments: list[str]) -> None:
    load([], arguments)
