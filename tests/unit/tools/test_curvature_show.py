"""What `hpccl curvature show` says of tiny runs, against dense float64 matrices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.checkpoint.tree import write_tree
from hpccl.cli import app
from hpccl.config.load import dump
from hpccl.curvature.dense import DensePrecision
from hpccl.curvature.kronecker import Kronecker
from hpccl.curvature.protocols import Precision
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, FolderError
from hpccl.kron.eigen import Eigen
from hpccl.kron.merge import refit
from hpccl.kron.pair import Pair
from hpccl.tools.curvature_show import read_curvature
from tests.run.method import learn, make_world, merged

TINY = {"train": {"epochs": 1}, "model": {"kind": "mlp", "hidden": [6]}}
KINDS: dict[str, dict[str, Any]] = {
    "pair": {"kind": "kronecker"},
    "low rank": {"kind": "kronecker", "keep_trace": 0.6},
    "eigen": {"kind": "ekfac"},
    "diagonal": {"kind": "diagonal"},
    "dense": {"kind": "dense"},
    "mixed": {"kind": "kronecker", "diagonal": ["1"]},
}

Run = Callable[..., tuple[Path, Precision]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes runs of the first tasks, each once: (folder, its curvature)."""
    made: dict[tuple[str, int], tuple[Path, Precision]] = {}

    def make(kind: str, tasks: int = 1) -> tuple[Path, Precision]:
        if (kind, tasks) not in made:
            folder = tmp_path_factory.mktemp("run")
            config = merged(TINY, {"curvature": KINDS[kind], "prior": {"quadratic": {"weight": 2.0}}})
            state, world = make_world(config, folder)
            learn(state, world, tasks)
            world.save(state, Mark.at(tasks - 1, "done", 5))
            world.folder.config.write_text(dump(config))
            assert state.prior.quadratic is not None
            made[kind, tasks] = folder, state.prior.quadratic.precision
        return made[kind, tasks]

    return make


def dense(term: Pair | Eigen) -> torch.Tensor:
    if isinstance(term, Eigen):
        basis = torch.kron(term.qb[0].double(), term.qa[0].double())
        return basis * term.values.double().flatten() @ basis.T
    return torch.kron(term.b.dense()[0].double(), term.a.dense()[0].double())


def rank_for(values: torch.Tensor, share: float = 0.99) -> int:
    found, kept = 0, 0.0
    for value in sorted(values.tolist(), reverse=True):
        if kept >= share * float(values.sum()):
            break
        found, kept = found + 1, kept + value
    return found


@pytest.mark.parametrize(("kind", "tasks"), [("pair", 1), ("pair", 2), ("low rank", 1), ("eigen", 2)])
def test_layers_of_kronecker_curvature(run: Run, kind: str, tasks: int) -> None:
    folder, precision = run(kind, tasks)
    assert isinstance(precision, Kronecker)
    shown = read_curvature(folder)
    assert [layer.name for layer in shown.layers] == ["1", "3"]
    assert [layer.shape for layer in shown.layers] == [(1, 6, 65), (1, 10, 7)]
    assert sum(layer.share for layer in shown.layers) == pytest.approx(1)
    assert (shown.kind, shown.weight, shown.task, shown.diagonal) == ("kronecker", 2.0, tasks - 1, ())
    assert shown.totals == precision.totals(Comm.solo())
    for layer, block in zip(shown.layers, precision.blocks, strict=True):
        assert layer.kind == kind if kind != "low rank" else "low rank" in {each.kind for each in shown.layers}
        exact = torch.stack([dense(term) for term in block.terms]).sum(0)
        values = torch.linalg.eigvalsh(exact)
        assert layer.terms == len(block.terms) == (2 if kind == "pair" and tasks == 2 else 1)
        assert layer.trace == pytest.approx(float(exact.trace()), rel=1e-4)
        assert (layer.bytes, layer.error) == (block.num_bytes, block.error())
        assert layer.largest is not None
        assert layer.smallest is not None
        if layer.terms == 1:
            assert layer.largest == pytest.approx(float(values[-1]), rel=1e-4)
            assert layer.smallest == pytest.approx(max(0.0, float(values[0])), abs=1e-6 * float(values[-1]))
        else:
            basis = refit(block.terms)
            assert layer.largest == pytest.approx(float(basis.values.max()))
            assert 0.5 * float(values[-1]) < layer.largest < float(values[-1]) * (1 + 1e-4)
        assert (layer.condition is None) == (layer.smallest == 0)
    (term,) = run("pair", 1)[1].blocks[1].terms  # type: ignore[attr-defined]
    if (kind, tasks) == ("pair", 1):
        assert shown.layers[1].rank_a == rank_for(torch.linalg.eigvalsh(term.a.dense()[0].double()))
        assert shown.layers[1].rank_b == rank_for(torch.linalg.eigvalsh(term.b.dense()[0].double()))


def test_layers_of_other_curvature(run: Run) -> None:
    _, precision = run("dense")
    assert isinstance(precision, DensePrecision)
    by_diagonal, by_matrix = (read_curvature(run(kind)[0]) for kind in ("diagonal", "dense"))
    assert by_diagonal.diagonal == ("1.weight", "1.bias", "3.weight", "3.bias")
    assert [layer.weights for layer in by_diagonal.layers] == [layer.weights for layer in by_matrix.layers] == [390, 70]
    for one, other in zip(by_diagonal.layers, by_matrix.layers, strict=True):
        assert one.trace == pytest.approx(other.trace, rel=1e-3)
    assert sum(layer.bytes for layer in by_matrix.layers) == 4 * 460**2
    places = [
        name.startswith("3") for name, shape in precision.shapes.items() for _ in range(torch.Size(shape).numel())
    ]
    square = precision.matrix[torch.tensor(places)][:, torch.tensor(places)].double()
    assert by_matrix.layers[1].largest == pytest.approx(float(torch.linalg.eigvalsh(square)[-1]), rel=1e-4)
    assert by_matrix.layers[1].smallest == 0  # one class more than the softmax has freedom


def test_what_is_left_to_the_diagonal_is_named(run: Run) -> None:
    shown = read_curvature(run("mixed")[0])
    assert [(layer.name, layer.kind) for layer in shown.layers] == [("3", "pair"), ("1", "diagonal")]
    assert shown.diagonal == ("1.weight", "1.bias")
    assert sum(layer.share for layer in shown.layers) == pytest.approx(1)
    text = CliRunner().invoke(app, ["curvature", "show", str(run("mixed")[0])]).output
    assert "diagonal curvature only: 1.weight, 1.bias" in text


def test_spectra_only_where_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = run("pair")
    assert all(layer.largest is None and layer.rank_a is None for layer in read_curvature(folder, spectra=False).layers)
    monkeypatch.setattr("hpccl.tools.curvature_show.FAST", 10)
    assert [layer.largest is None for layer in read_curvature(folder).layers] == [True, False]
    assert [layer.largest is None for layer in read_curvature(folder, spectra=True).layers] == [False, False]
    assert "–: not computed; --spectra" in CliRunner().invoke(app, ["curvature", "show", str(folder)]).output


def test_the_table_and_json(run: Run) -> None:
    folder, _ = run("pair", 2)
    text = CliRunner().invoke(app, ["curvature", "show", str(folder), "--task", "1"]).output
    assert "1 × 6 × 65" in text
    assert "tasks: list" in text
    assert "in the basis of the nearest single term" in text
    found = CliRunner().invoke(app, ["curvature", "show", str(folder), "--json", "--no-spectra"])
    expected = read_curvature(folder, spectra=False).as_dict()
    assert json.loads(found.output) == json.loads(json.dumps(expected, allow_nan=False))
    assert found.output.startswith("{")


@pytest.mark.parametrize("kind", ["pair", "eigen"])
def test_any_number_of_ranks_may_have_written(run: Run, kind: str, tmp_path: Path) -> None:
    folder, precision = run(kind)
    assert isinstance(precision, Kronecker)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (checkpoint,) = (copy / "checkpoints").glob("task-*-done-*")
    for file in checkpoint.glob("curvature-*"):
        file.unlink()

    def reader(wanted: Callable[[str], bool]) -> dict[str, Any]:
        return {name: states for name, states in precision.shard_dict().items() if wanted(name)}

    header = json.loads((checkpoint / "state.json").read_text())
    mark = {
        key: value for key, value in header.items() if key != "tree"
    }  # by which files know that they belong together
    for rank in range(3):
        share = Kronecker.from_state_dict(precision.state_dict(), reader, Comm(rank, 3, torch.device("cpu")))
        write_tree(checkpoint, share.shard_dict(), header=mark, stem=f"curvature-{rank:05d}-of-00003")
    (checkpoint / "state.json").write_text(json.dumps({**header, "shards": 3}))
    assert read_curvature(copy).layers == read_curvature(folder).layers
    next(checkpoint.glob("curvature-00001*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_curvature(copy)


# ---------------------------------------------------------------- errors


def test_what_cannot_be_shown(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="not a run folder"):
        read_curvature(tmp_path / "nowhere")
    folder, _ = run("pair")
    with pytest.raises(FolderError, match="no checkpoint of task 3"):
        read_curvature(folder, task=3)
    for weight, why in ((0.0, "weight=0, which measures none"), (1.0, "no task had ended")):
        config = merged(TINY, {"prior": {"quadratic": {"weight": weight}}})
        state, world = make_world(config, tmp_path / str(weight))
        world.save(state, Mark.at(0, "fit", 1))
        world.folder.config.write_text(dump(config))
        with pytest.raises(FolderError, match=why):
            read_curvature(tmp_path / str(weight))


@pytest.mark.parametrize("damage", ["tensors", "tree", "kind"])
def test_damaged_files(run: Run, tmp_path: Path, damage: str) -> None:
    folder, _ = run("pair")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (checkpoint,) = (copy / "checkpoints").glob("task-*-done-*")
    if damage == "tensors":
        (file,) = checkpoint.glob("curvature-*.safetensors")
        file.write_bytes(file.read_bytes()[:-9])
    else:
        state = json.loads((checkpoint / "state.json").read_text())
        quadratic = state["tree"]["prior"]["quadratic"]
        if damage == "tree":
            del quadratic["weight"]
        else:
            quadratic["precision"]["kind"] = "unheard of"
        (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"task-000-done|unheard of"):
        read_curvature(copy)
