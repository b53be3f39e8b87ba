"""Exported networks give the same bits as the run, in timm's own hands where they are timm's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from hpccl.checkpoint.store import Mark
from hpccl.cli import app
from hpccl.compat import import_timm
from hpccl.config.data import DataConfig
from hpccl.config.load import dump
from hpccl.config.run import RunConfig
from hpccl.config.stream import DigitsStream, Part, ShardStream
from hpccl.data.build import open_stream, outline
from hpccl.data.rows import Request
from hpccl.errors import CheckpointError, ConfigError, DataError, FolderError
from hpccl.models.exported import load_exported
from hpccl.tools.export import export
from hpccl.tools.merge import merge
from hpccl.train.fit import fit
from hpccl.train.state import RunState
from tests.run.method import make_world, merged

SHORT: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 256}, "stream": {"kind": "digits", "tasks": 5}}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"model": {"kind": "timm", "name": "test_resnet"}, "data": {"image_size": 32}},
    "vit": {
        "model": {"kind": "timm", "name": "test_vit", "options": {"img_size": 32, "patch_size": 8, "drop_rate": 0.1}},
        "data": {"image_size": 32, "mean": [0.4], "crop_pct": 0.9},
    },
    "cifarnet": {"model": {"kind": "cifarnet"}, "data": {"image_size": 12}},
    "mlp": {"model": {"kind": "mlp", "hidden": [12]}},
    "separate": {"train": {"epochs": 1, "restart": True}},
    "permuted": {"stream": {"kind": "digits", "tasks": 2, "scenario": {"kind": "permuted"}}},
}

Run = Callable[..., tuple[Path, RunState, torch.Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes runs of two tasks, each once: (folder, its state, some test images)."""
    made: dict[str, tuple[Path, RunState, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, RunState, torch.Tensor]:
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            changes = {"model": {"kind": "mlp"}, **NETWORKS[name], "folder": str(folder)}
            config = RunConfig.model_validate({**merged(SHORT).model_dump(), **changes})
            state, world = make_world(config, folder)
            for task in world.stream.tasks[:2]:
                state.mark = Mark.at(task.index, "fit", 0)
                assert fit(task, state, world)
                world.save(state, Mark.at(task.index, "done", 2))
            world.folder.config.write_text(dump(config))
            request = Request(np.arange(40), np.zeros(40, dtype=np.uint64))
            (images,) = world.stream.load(iter([request]), "test")
            # In the memory order that the engine brings them to: convolutions round otherwise in another one.
            made[name] = folder, state, images.pixels.clone(memory_format=torch.contiguous_format)
        return made[name]

    return make


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_timm_loads_the_file_and_gives_the_same_bits(run: Run, name: str, tmp_path: Path) -> None:
    folder, state, pixels = run(name)
    done = export(folder, tmp_path / "out")
    assert done.checkpoint == "task-001-done-00000002"
    timm, said = import_timm(), json.loads((tmp_path / "out" / "config.json").read_text())
    model = timm.create_model(
        said["architecture"],
        num_classes=said["num_classes"],
        checkpoint_path=str(tmp_path / "out" / "model.safetensors"),
        **said["model_args"],
    ).eval()
    ours = state.engine.predict(pixels)
    with torch.no_grad():
        assert torch.equal(model(pixels), ours)
        assert torch.equal(load_exported(tmp_path / "out")(pixels), ours)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert done.num_bytes == sum(value.nbytes for value in stored.values())


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_timm_reads_the_settings_of_the_folder(run: Run, name: str, tmp_path: Path) -> None:
    """As it reads a folder of its hub: labels, input and arguments of the network."""
    folder, state, pixels = run(name)
    export(folder, tmp_path / "out")
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels), state.engine.predict(pixels))
    from timm.data import resolve_data_config

    given = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    assert tuple(given["input_size"]) == (1, 32, 32)
    assert given["crop_pct"] == (0.9 if name == "vit" else 0.875)
    assert (list(given["mean"]), list(given["std"])) == ([0.4 if name == "vit" else 0.5], [0.5])
    assert given["interpolation"] == "bicubic"
    assert list(model.pretrained_cfg["label_names"]) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("name", ["cifarnet", "mlp"])
def test_other_networks_are_loaded_by_hpccl(run: Run, name: str, tmp_path: Path) -> None:
    folder, state, pixels = run(name)
    export(folder, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "out")(pixels), state.engine.predict(pixels))
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architecture"] == f"hpccl.{name}"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "is not a timm model; load it with hpccl" in readme
    assert f'load_exported("{tmp_path / "out"}")' in readme


def test_the_readme_loads_the_network_and_explains_its_outputs(run: Run, tmp_path: Path) -> None:
    folder, state, pixels = run("vit")
    export(folder, tmp_path / "out", task=0)
    readme = (tmp_path / "out" / "README.md").read_text()
    names: dict[str, Any] = {}
    import_timm()
    exec(readme.split("```python\n")[1].split("```")[0], names)
    assert not torch.equal(names["model"](pixels), state.engine.predict(pixels))  # of the first task
    assert "| 1 | digits[1/5] | 0 to 1 |" in readme
    assert "digits[2/5]" not in readme
    assert "The other 8 outputs were not trained" in readme
    assert "task-incremental" in readme
    assert "floor(32 / 0.9)" in readme


def test_images_that_tasks_change_are_told_of(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("permuted")
    export(folder, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Each task but the first was trained and tested with its own permutation of the pixels" in readme
    assert "(kind permuted, seed 0)" in readme


def test_what_has_its_size_already_is_not_cropped(tmp_path: Path) -> None:
    assert outline(DigitsStream(), DataConfig()).as_stored
    assert outline(DigitsStream(), DataConfig(image_size=8)).as_stored
    assert not outline(DigitsStream(), DataConfig(image_size=16)).as_stored


def test_an_outline_is_that_of_the_stream() -> None:
    stream, data = DigitsStream(tasks=2, order="random"), DataConfig(image_size=12)
    opened, drawn = open_stream(stream, data), outline(stream, data)
    assert (drawn.layout.tasks, drawn.layout.class_names) == (opened.tasks, opened.class_names)
    assert drawn.image_shape == opened.image_shape
    with pytest.raises(DataError, match="nowhere"):
        outline(ShardStream(parts=(Part(path="nowhere"),)), data)


def test_others_may_read_what_the_umask_lets_them(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("mlp")
    former = os.umask(0o027)
    try:
        export(folder, tmp_path / "out")
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_every_task_has_a_network_of_its_own(run: Run, tmp_path: Path) -> None:
    folder, state, pixels = run("separate")
    with pytest.raises(ConfigError, match=r"separate network for each task.*--task N, 0 to 1"):
        export(folder, tmp_path / "out")
    export(folder, tmp_path / "out", task=1)
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "out")(pixels), state.engine.predict(pixels))
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "digits[2/5]" in readme
    assert "digits[1/5]" not in readme


def test_what_is_there_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("mlp")
    out = tmp_path / "out"
    export(folder, out, task=0)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(FolderError, match=r"exists; choose another folder, or replace an earlier export with --force"):
        export(folder, out)
    assert (out / "model.safetensors").read_bytes() == first
    export(folder, out, force=True)
    assert (out / "model.safetensors").read_bytes() != first
    (out / "thesis.tex").write_text("years")
    with pytest.raises(FolderError, match=r"files that are not part of an export \(thesis.tex\)"):
        export(folder, out, force=True)
    assert (out / "thesis.tex").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_files_of_another_library_are_not_replaced(run: Run, tmp_path: Path) -> None:
    """Their names are the same."""
    folder, _, _ = run("mlp")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"architecture": "resnet18"}')
    (out / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(
        FolderError, match=r"is not an export by hpccl \(no matching config.json\), so --force does not replace it"
    ):
        export(folder, out, force=True)
    assert (out / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(FolderError, match="is one of the networks to merge"):
        merge([folder], folder, method="average", force=True)


def test_what_cannot_be_exported_is_told(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("mlp")
    with pytest.raises(FolderError, match="is not a run folder"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(FolderError, match=r"no state after task 7; finished tasks, counted from 0: 0, 1"):
        export(folder, tmp_path / "out", task=7)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((folder / "config.yaml").read_text())
    with pytest.raises(FolderError, match="has not finished a task yet"):
        export(tmp_path / "begun", tmp_path / "out")
    with pytest.raises(DataError, match="is not an export by hpccl"):
        load_exported(tmp_path / "begun")
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be written: Not a directory"):
        export(folder, tmp_path / "file" / "out")


def test_a_checkpoint_of_another_network_is_refused(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("mlp")
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "checkpoints").symlink_to(folder / "checkpoints")
    (copied / "config.yaml").write_text((folder / "config.yaml").read_text().replace("[12]", "[12, 12]"))
    with pytest.raises(CheckpointError, match=r"not of the network in config.yaml \(5.bias, 5.weight differ\)"):
        export(copied, tmp_path / "out")


def test_the_command(run: Run, tmp_path: Path) -> None:
    folder, _, _ = run("mlp")
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out"), "--task", "0"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{tmp_path / 'out'}: task-000-done-00000002, 910 weights, ")
