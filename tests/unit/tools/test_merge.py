"""Merging runs and exports of runs, against the same sums in memory with whole matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.checkpoint.streamed import writing
from hpccl.checkpoint.tree import read_tree
from hpccl.cli import app
from hpccl.compat import import_timm
from hpccl.config.load import dump
from hpccl.errors import ConfigError, DataError, DivergedError, FolderError
from hpccl.models.exported import load_exported
from hpccl.tools.evaluate_run import evaluate_run
from hpccl.tools.export import export
from hpccl.tools.merge import Method, merge
from hpccl.train.consolidate import consolidate
from hpccl.train.fit import fit
from tests.run.method import make_world, merged

Trained = Callable[..., Path]
SMALL: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 5},
    "model": {"kind": "mlp", "hidden": [3]},
    "train": {"epochs": 6, "batch_size": 32},
    "prior": {"quadratic": {"weight": 1.0}},
}
KINDS: dict[str, Any] = {
    "kronecker": {"kind": "kronecker"},
    "ekfac": {"kind": "ekfac"},
    "diagonal": {"kind": "diagonal"},
    "dense": {"kind": "dense"},
    "si": {"kind": "si"},
    "none": {"kind": "kronecker"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Makes runs, each once: of some tasks alone, beginning with another run's network."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, *tasks: int, base: Path | None = None, **changes: Any) -> Path:
        key = (kind, tasks, base, json.dumps(changes, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            start = {} if base is None else {"checkpoint": str(base / "model.safetensors")}
            config = merged(
                {**SMALL, "curvature": KINDS[kind], "prior": {"quadratic": {"weight": float(kind != "none")}}},
                {"model": {**changes.get("model", SMALL["model"]), **start}},
                {name: value for name, value in changes.items() if name != "model"},
            )
            state, world = make_world(config, folder)
            for number in tasks:
                task = world.stream.tasks[number]
                state.mark = Mark.at(number, "fit", 0)
                assert fit(task, state, world)
                consolidate(task, state, world)
                world.save(state, Mark.at(number, "done", 2))
            (folder / "config.yaml").write_text(dump(config))
            made[key] = folder
        return made[key]

    return make


def weights_in(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def whole_curvature(folder: Path, names: list[str]) -> Tensor:
    """The matrix over all weights, of the files of an export, one unit vector at a time."""
    from hpccl.curvature.build import precision_from_state
    from hpccl.dist.comm import Comm

    _, tree = read_tree(folder, stem="curvature")
    shards = {key.removeprefix("layer "): value for key, value in tree.items() if key != "precision"}
    precision = precision_from_state(tree["precision"], lambda wanted: shards, Comm.solo())
    like = weights_in(folder)
    sizes = [like[name].numel() for name in names]
    rows = []
    for unit in torch.eye(sum(sizes)):
        vector = {n: part.view(like[n].shape) for n, part in zip(names, unit.split(sizes), strict=True)}
        zero = {name: torch.zeros_like(value) for name, value in vector.items()}
        found = dict(zero)
        for piece in precision.pieces(Comm.solo(), vector):
            found[piece.name] = piece.add(found[piece.name], vector, zero, 1.0, 0.0)
        rows.append(torch.cat([found[name].flatten() for name in names]).double())
    return torch.stack(rows)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["kronecker", pytest.param("ekfac", marks=SLOW), "diagonal", pytest.param("dense", marks=SLOW)]
)
def test_runs_and_their_exports_are_merged_as_the_equation_says(kind: str, trained: Trained, tmp_path: Path) -> None:
    base = trained(kind, 0)
    export(base, tmp_path / "base", curvature=True)
    runs = [trained(kind, task, base=tmp_path / "base") for task in (1, 2)]
    exports = [tmp_path / "one", tmp_path / "two"]
    for run, out in zip(runs, exports, strict=True):
        export(run, out, curvature=True)
    done = merge(runs, tmp_path / "merged", base=base, weights=[1.0, 0.5], prior_precision=0.1)
    again = merge(exports, tmp_path / "again", base=tmp_path / "base", weights=[1.0, 0.5], prior_precision=0.1)
    assert done.num_measured == again.num_measured == done.num_weights == 64 * 3 + 3 + 3 * 10 + 10
    for name, value in weights_in(tmp_path / "merged").items():
        assert torch.equal(value, weights_in(tmp_path / "again")[name])
    names = sorted(weights_in(tmp_path / "base"))
    begin = flat(weights_in(tmp_path / "base"))
    prior = whole_curvature(tmp_path / "base", names) + 0.1 * torch.eye(len(begin), dtype=torch.float64)
    total, right = prior.clone(), torch.zeros_like(begin)
    for out, scale in zip(exports, (1.0, 0.5), strict=True):
        own = whole_curvature(out, names)
        total += scale * own
        right += scale * (prior + own) @ (flat(weights_in(out)) - begin)
    expected = begin + torch.linalg.solve(total, right)
    torch.testing.assert_close(flat(weights_in(tmp_path / "merged")), expected, atol=2e-4, rtol=1e-4)


def test_the_merged_network_knows_both_tasks_and_can_be_evaluated(trained: Trained, tmp_path: Path) -> None:
    wide = {"model": {"kind": "mlp", "hidden": [16]}}
    base = trained("kronecker", 0, **wide)
    export(base, tmp_path / "base", curvature=True)
    runs = [trained("kronecker", task, base=tmp_path / "base", **wide) for task in (1, 2)]
    merge(runs, tmp_path / "merged", base=base)
    merge([base, *runs], tmp_path / "mean", method="average")
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert [task["name"] for task in said["hpccl"]["tasks"]] == ["digits[1/5]", "digits[2/5]", "digits[3/5]"]
    assert said["hpccl"]["merged"]["method"] == "matching"
    with torch.no_grad():
        assert load_exported(tmp_path / "merged")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    found = evaluate_run(base, weights=tmp_path / "merged")
    tasks = [result["task_incremental"] for result in found["tasks"][:3]]
    mean = [result["task_incremental"] for result in evaluate_run(base, weights=tmp_path / "mean")["tasks"][:3]]
    assert min(task["accuracy"] for task in tasks) > 0.85, (tasks, mean)
    assert sum(task["nll"] for task in tasks) < sum(task["nll"] for task in mean), (tasks, mean)
    command = ["evaluate", str(base), "--weights", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, command)
    assert json.loads(result.output)["tasks"] == found["tasks"]
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"--weights '.*notes\.md' is neither a folder nor a \.safetensors file"):
        evaluate_run(base, weights=tmp_path / "notes.md")
    with pytest.raises(ConfigError, match=r"is of another network: .* differ in name or shape"):
        evaluate_run(trained("none", 0, model={"kind": "mlp", "hidden": [12]}), weights=tmp_path / "merged")


def test_a_network_minus_what_it_learned_is_its_beginning(trained: Trained, tmp_path: Path) -> None:
    """a = 1 and -1 of one network: H = H0 and nothing is added."""
    base = trained("kronecker", 0)
    export(base, tmp_path / "base", curvature=True)
    run = trained("kronecker", 1, base=tmp_path / "base")
    merge([run, run], tmp_path / "out", base=base, weights=[1, -1])
    for name, value in weights_in(tmp_path / "base").items():
        torch.testing.assert_close(weights_in(tmp_path / "out")[name], value, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"merged precision of '[13]' is not positive"):
        merge([run], tmp_path / "more", base=base, weights=[-1000])
    assert not (tmp_path / "more").exists()


def test_the_simple_methods(trained: Trained, tmp_path: Path) -> None:
    base = trained("none", 0)
    export(base, tmp_path / "base")
    runs = [trained("none", task, base=tmp_path / "base") for task in (1, 2)]
    for number, run in enumerate(runs):
        export(run, tmp_path / str(number))
    begin, one, two = (weights_in(tmp_path / name) for name in ("base", "0", "1"))
    merge(runs, tmp_path / "mean", method="average", weights=[1, 3])
    file = tmp_path / "base" / "model.safetensors"
    merge(runs, tmp_path / "sum", method="arithmetic", base=file, weights=[0.5, -1])
    for name, value in weights_in(tmp_path / "mean").items():
        torch.testing.assert_close(value, (one[name] + 3 * two[name]) / 4)
        expected = begin[name] + 0.5 * (one[name] - begin[name]) - (two[name] - begin[name])
        torch.testing.assert_close(weights_in(tmp_path / "sum")[name], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"has no curvature, which --method matching.*--method arithmetic"):
        merge(runs, tmp_path / "none", base=base)
    with pytest.raises(ConfigError, match=r"has no curvature, which --method fisher.*--method average"):
        merge(runs, tmp_path / "none", method="fisher")
    with pytest.raises(FolderError, match="has no curvature in checkpoint"):
        export(runs[0], tmp_path / "none", curvature=True)


def test_networks_of_timm_are_merged_for_timm(trained: Trained, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"kind": "timm", "name": "test_resnet"}, "data": {"image_size": 32}}
    changes |= {"train": {"epochs": 1, "batch_size": 256}}
    runs = [trained("diagonal", task, **changes) for task in (0, 1)]
    done = merge(runs, tmp_path / "out", method="fisher")
    assert any("running_mean" in name for name in done.averaged)
    timm, said = import_timm(), json.loads((tmp_path / "out" / "config.json").read_text())
    model = timm.create_model(
        said["architecture"],
        num_classes=said["num_classes"],
        checkpoint_path=str(tmp_path / "out" / "model.safetensors"),
        **said["model_args"],
    ).eval()
    pixels = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels), load_exported(tmp_path / "out")(pixels))
    for run, name in zip(runs, ("a", "b"), strict=True):
        export(run, tmp_path / name)
    mean = "bn1.running_mean"
    expected = (weights_in(tmp_path / "a")[mean] + weights_in(tmp_path / "b")[mean]) / 2
    torch.testing.assert_close(weights_in(tmp_path / "out")[mean], expected)
    assert "running statistics" in (tmp_path / "out" / "README.md").read_text()
    # Where a network is only taken away, its statistics are not what is left.
    merge(runs[:1], tmp_path / "less", base=runs[1], method="arithmetic", weights=[-0.5])
    assert torch.equal(weights_in(tmp_path / "less")[mean], weights_in(tmp_path / "b")[mean])
    left, base = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("less", "b"))
    assert left["hpccl"]["tasks"] == base["hpccl"]["tasks"]


def test_what_does_not_go_together_is_told(trained: Trained, tmp_path: Path) -> None:
    run = trained("none", 0)
    wide = trained("none", 0, model={"kind": "mlp", "hidden": [12]})
    export(run, tmp_path / "plain")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"models": [run, wide]}, r"'1.weight' is 12x64 and 3x64 \(3 of 4 weights differ\)"),
        ({"models": [run], "weights": [1, 2]}, "2 numbers for 1 networks"),
        ({"models": [run], "base": run}, "--method average takes no --base"),
        ({"models": [run], "method": "matching"}, "--method matching needs --base"),
        ({"models": [run], "weights": [-1]}, "--method average; allowed: numbers above 0"),
        ({"models": [run], "prior_precision": 0.0}, "--prior-precision 0.0; allowed: a finite number above 0"),
        ({"models": []}, "nothing to merge"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=message):
            merge(**{"out": tmp_path / "out", "method": "average", **arguments})
    turned = trained("none", 0, stream={"kind": "digits", "tasks": 5, "order": "random"})
    with pytest.raises(ConfigError, match=r"the classes differ .number 0 is "):
        merge([run, turned], tmp_path / "out", method="average")
    with pytest.raises(FolderError, match=r"is neither a run folder .* nor an export \(it has no config\.json\)"):
        merge([tmp_path], tmp_path / "out", method="average")
    ours = json.loads((tmp_path / "plain" / "config.json").read_text())
    for lost in ("architecture", "tasks"):
        older = {key: value for key, value in ours.items() if key != lost}
        older["hpccl"] = {key: value for key, value in ours["hpccl"].items() if key != lost}
        (tmp_path / "plain" / "config.json").write_text(json.dumps(older))
        with pytest.raises(DataError, match=f"is not an export by hpccl: .*{lost}"):
            merge([tmp_path / "plain", run], tmp_path / "out", method="average")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(ours))
    (tmp_path / "torn.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="cannot be read"):
        merge([run], tmp_path / "out", method="arithmetic", base=tmp_path / "torn.safetensors")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain", "torn.safetensors"]
    with pytest.raises(FolderError, match="exists"):
        merge([run], tmp_path / "plain", method="average")
    for base in (tmp_path / "plain", tmp_path / "plain" / "model.safetensors"):
        with pytest.raises(FolderError, match="is one of the networks to merge"):
            merge([run], tmp_path / "plain", method="arithmetic", base=base, force=True)
    evaluate_run(run, weights=tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"has other classes than the run, .*number 0 is"):
        evaluate_run(turned, weights=tmp_path / "plain")


@pytest.mark.parametrize("method", ["average", "arithmetic"])
def test_a_network_that_has_diverged_is_not_merged(trained: Trained, tmp_path: Path, method: Method) -> None:
    run = trained("none", 0)
    export(run, tmp_path / "wrong")
    weights = weights_in(tmp_path / "wrong")
    weights["1.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(weights, tmp_path / "wrong" / "model.safetensors")
    base = run if method == "arithmetic" else None
    with pytest.raises(DivergedError, match=r"weights or curvature of '1\.weight' are not finite"):
        merge([run, tmp_path / "wrong"], tmp_path / "out", method=method, base=base)
    assert not (tmp_path / "out").exists()


def test_an_importance_weighs_no_networks(trained: Trained, tmp_path: Path) -> None:
    run = trained("si", 0)
    with pytest.raises(ConfigError, match="has no curvature, which --method fisher needs"):
        merge([run], tmp_path / "out", method="fisher")
    with pytest.raises(ConfigError, match=r"curvature\.kind=si, an importance"):
        export(run, tmp_path / "out", curvature=True)
    merge([run], tmp_path / "out", method="average")


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    run = trained("kronecker", 0)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--curvature"])
    assert done.exit_code == 0, done.output
    arguments = ["merge", str(tmp_path / "out"), str(run), "--method", "fisher", "--weights", "1,2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "two")])
    assert result.exit_code == 0, result.output
    assert "2 networks by fisher, 235 weights, 100.0 % by curvature" in result.output
    for name, value in weights_in(tmp_path / "out").items():
        torch.testing.assert_close(weights_in(tmp_path / "two")[name], value, atol=1e-5, rtol=1e-4)
    wrong = CliRunner().invoke(app, [*arguments[:-1], "1,x", "--out", str(tmp_path / "three")])
    assert isinstance(wrong.exception, ConfigError)


# ---------------------------------------------------------------- memory

_PEAK = """
import resource, sys
from pathlib import Path
from hpccl.tools.merge import merge
import scipy.sparse.linalg
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge([folder / "a", folder / "b"], folder / "out", base=folder / "base")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_layer_however_many_there_are(tmp_path: Path) -> None:
    """Three networks of 16 layers with their curvature are 101 MB, a layer of all of them 6 MB."""
    side, layers = 512, 16
    config = {
        "architecture": "hpccl.mlp",
        "label_names": [str(number) for number in range(side)],
        "hpccl": {
            "model": {"kind": "mlp", "hidden": [side] * (layers - 1)},
            "image_shape": [1, 1, side],
            "num_classes": side,
            "tasks": [],
        },
    }
    tensor = torch.rand(side, side)
    bias = torch.rand(side)
    names = [str(1 + 2 * number) for number in range(layers)]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{n}.weight": (torch.float32, (side, side)) for n in names
    }
    shapes |= {f"{n}.bias": (torch.float32, (side,)) for n in names}
    for which in ("base", "a", "b"):
        folder = tmp_path / which
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        with writing(folder / "model.safetensors", shapes, metadata={"format": "pt"}) as weights:
            for name in shapes:
                weights.write(name, tensor if name.endswith("weight") else bias)
        values = {name: f"/precision/values/{name}" for name in shapes}
        described = {
            "kind": "diagonal",
            "num_examples": 1.0,
            "values": {n: {"__tensor__": k} for n, k in values.items()},
        }
        (folder / "curvature.json").write_text(json.dumps({"format": 1, "tree": {"precision": described}}))
        spec = {values[name]: kind for name, kind in shapes.items()}
        with writing(folder / "curvature.safetensors", spec, metadata={"format": "pt"}) as curvature:
            for name in shapes:
                curvature.write(values[name], tensor if name.endswith("weight") else bias)
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    kib = int(said.stdout)
    assert kib < 40_000, f"{kib} KiB"
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(stored["1.weight"], tensor)
    assert len(stored) == 2 * layers
