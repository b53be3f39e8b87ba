"""First weights from a file: of the same network, whatever its head; nothing is unpickled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from hpccl.config.model import MlpModel, ModelConfig, PaperModel, TimmModel
from hpccl.errors import ConfigError, DataError
from hpccl.models.build import build_model
from hpccl.models.pretrained import start_from

RESNET, VIT = TimmModel(name="test_resnet"), TimmModel(name="test_vit", options={"img_size": 32})
NETWORKS = [RESNET, VIT, PaperModel(kind="cifarnet"), MlpModel(hidden=(6,))]


def built(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    return build_model(config, image_shape=(3, 32, 32), num_classes=num_classes, seed=seed)


def saved(model: nn.Module, path: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: getattr(config, "name", config.kind))
def test_everything_is_taken_but_a_head_of_other_classes(config: ModelConfig, tmp_path: Path) -> None:
    source = built(config, num_classes=7, seed=1)
    path = saved(source, tmp_path / "weights.safetensors")
    theirs = source.state_dict()

    same = built(config, num_classes=7, seed=2)
    assert start_from(same, path).fresh == ()
    assert all(torch.equal(value, theirs[name]) for name, value in same.state_dict().items())

    other, untouched = (built(config, num_classes=10, seed=2) for _ in range(2))
    start = start_from(other, path)
    assert start.path == str(path)
    assert [untouched.state_dict()[name].shape[0] for name in start.fresh] == [10, 10]
    for name, value in other.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name] if name in start.fresh else theirs[name]), name


def test_a_file_without_a_head(tmp_path: Path) -> None:
    backbone = built(RESNET, num_classes=0, seed=1)
    assert "fc.weight" not in backbone.state_dict()
    model = built(RESNET, num_classes=10, seed=2)
    assert start_from(model, saved(backbone, tmp_path / "weights.safetensors")).fresh == ("fc.weight", "fc.bias")
    assert torch.equal(model.state_dict()["conv1.0.weight"], backbone.state_dict()["conv1.0.weight"])


def test_a_file_may_lack_the_counters_of_batch_norm(tmp_path: Path) -> None:
    """As torchvision's older files do; timm and torch accept these, too."""
    source = built(RESNET, num_classes=10, seed=1).state_dict()
    weights = {name: value for name, value in source.items() if not name.endswith("num_batches_tracked")}
    assert 0 < len(weights) < len(source)
    safetensors.torch.save_file(weights, tmp_path / "old.safetensors")
    model = built(RESNET, num_classes=10, seed=2)
    assert start_from(model, tmp_path / "old.safetensors").fresh == ()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_transformer_for_images_of_another_size_is_told_how(tmp_path: Path) -> None:
    small = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = TimmModel(kind="timm", name="vit_tiny_patch16_224", options={"img_size": 32, **small})
    path = saved(built(config, num_classes=10, seed=1), tmp_path / "weights.safetensors")
    other = config.model_copy(update={"options": {"img_size": 16, **small}})
    with pytest.raises(DataError, match=r"pos_embed .*model.options=\{dynamic_img_size: true\}"):
        start_from(build_model(other, image_shape=(3, 16, 16), num_classes=10, seed=2), path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda weights: weights.pop("1.weight"), "missing: 1.weight; unexpected: none; of another shape: none"),
        (lambda weights: weights.update(gate=torch.ones(1)), "missing: none; unexpected: gate; "),
        (
            lambda weights: weights.update({"1.weight": torch.ones(6, 5)}),
            r"of another shape: 1.weight \(6x5 there, 6x3072 here\)",
        ),
    ],
)
def test_another_network_is_refused_and_nothing_changes(changed: Any, problem: str, tmp_path: Path) -> None:
    model = built(MlpModel(hidden=(6,)), num_classes=10, seed=2)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    changed(weights)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=rf"is of another network: .*{problem}"):
        start_from(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    path = saved(built(RESNET, num_classes=7, seed=1), tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"missing: [^,;]+, [^,;]+, [^,;]+ and \d+ more; unexpected: .* and \d+ more"):
        start_from(built(VIT, num_classes=7, seed=1), path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
def test_files_of_torch(ending: str, wrapper: str | None, tmp_path: Path) -> None:
    source = built(RESNET, num_classes=10, seed=1)
    weights: dict[str, Any] = {f"module.{name}": value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{ending}"
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, path)
    model = built(RESNET, num_classes=10, seed=2)
    start_from(model, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    source, averaged = (built(RESNET, num_classes=10, seed=seed) for seed in (1, 2))
    torch.save({"state_dict": source.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "both.pth")
    start_from(source, tmp_path / "both.pth")
    assert all(torch.equal(value, averaged.state_dict()[name]) for name, value in source.state_dict().items())


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    model = built(RESNET, num_classes=10, seed=1)
    with pytest.raises(DataError, match=r"cannot be read: .*No such file"):
        start_from(model, tmp_path / "nowhere.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match=r"torn\.safetensors' cannot be read"):
        start_from(model, tmp_path / "torn.safetensors")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"torn\.pth' cannot be read"):
        start_from(model, tmp_path / "torn.pth")
    for content in (b"hello, this is text\n", b"\x80\x02garbage", b"", bytes(range(256))):
        (tmp_path / "text.pth").write_bytes(content)
        with pytest.raises(DataError, match=r"text\.pth' (cannot be read|is damaged)"):
            start_from(model, tmp_path / "text.pth")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "more.pth")
    with pytest.raises(DataError, match=r"contains more than weights.*save only its weights"):
        start_from(model, tmp_path / "more.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="contains no named weights"):
        start_from(model, tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"unknown suffix; allowed: .safetensors, .pth"):
        start_from(model, tmp_path / "weights.npz")
