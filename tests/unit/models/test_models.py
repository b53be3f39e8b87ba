"""Networks: published sizes, seeded, clear errors; dropout that belongs to the example."""

from typing import Any

import pytest
import torch
from torch import nn

from hpccl.config.model import MlpModel, PaperModel, TimmModel
from hpccl.errors import ConfigError
from hpccl.models import build
from hpccl.models.build import build_model, refuse_sizes
from hpccl.models.dropout import KeyedDropout, replace_dropout, set_noise


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_paper_sizes() -> None:
    cifarnet = build_model(PaperModel(kind="cifarnet"), image_shape=(3, 32, 32), num_classes=60, seed=0)
    vgg = build_model(PaperModel(kind="vgg_small"), image_shape=(3, 64, 64), num_classes=200, seed=0)
    assert (size(cifarnet), size(vgg)) == (1_276_508, 3_608_328)


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first = build_model(MlpModel(), image_shape=(1, 8, 8), num_classes=10, seed=4).state_dict()
    second = build_model(MlpModel(), image_shape=(1, 8, 8), num_classes=10, seed=4).state_dict()
    other = build_model(MlpModel(), image_shape=(1, 8, 8), num_classes=10, seed=5).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_too_small_images_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"at least 12 pixels, the stream has 8x8.*model.kind=mlp"):
        build_model(PaperModel(kind="cifarnet"), image_shape=(1, 8, 8), num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ("resnet81", "similar: resnet18, "),
        ("ResNt50", "similar: resnet50, "),
        ("efficientnetb0", "similar: efficientnet_b0, "),
        ("vit_smal_patch16_224", "similar: vit_small_patch16_224, "),
        ("deit-small", "similar: deit_small_"),
        ("vit_small", "similar: vit_small_"),
        ("qqq", r"timm.list_models\(\) lists all"),
    ],
)
def test_unknown_timm_model_suggests(wrong: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name '{wrong}' is not a timm model; {advice}"):
        build_model(TimmModel(name=wrong), image_shape=(3, 32, 32), num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet18", {"nonsense": 1}, "TypeError: .*unexpected keyword argument 'nonsense'"),
        ("resnet18", {"block": "x"}, "AttributeError"),
        ("resnet18", {"output_stride": 7}, "AssertionError"),
        ("resnet18", {"act_layer": "nothing"}, "KeyError"),
        ("vit_tiny_patch16_224", {"global_pool": "nothing"}, "AssertionError"),
        ("resnet18", {"pretrained_cfg": "nothing"}, "RuntimeError"),
    ],
)
def test_options_that_do_not_suit_are_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.options .*{next(iter(options))}.* is invalid for '{name}': {words}"
    ):
        build_model(TimmModel(name=name, options=options), image_shape=(3, 32, 32), num_classes=10, seed=0)


@pytest.mark.parametrize("key", ["num_classes", "in_chans", "pretrained"])
def test_options_that_the_stream_gives_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.options\.{key} = 7: .*omit it"):
        build_model(TimmModel(name="resnet18", options={key: 7}), image_shape=(3, 32, 32), num_classes=10, seed=0)


def test_a_network_for_images_of_another_size_says_what_to_set() -> None:
    vit = "vit_tiny_patch16_224"
    size: dict[str, Any] = {"image_shape": (3, 32, 32), "num_classes": 4, "sides": ()}
    with pytest.raises(ConfigError, match=r"does not accept the stream's images of 32x32 pixels .*\{img_size: 32\}"):
        refuse_sizes(TimmModel(name=vit), **size)
    refuse_sizes(TimmModel(name=vit, options={"img_size": 32}), **size)
    refuse_sizes(TimmModel(name="resnet18"), **size)
    with pytest.raises(ConfigError, match=r"options {'drop_rate': 'much'} does not accept .*could not convert string"):
        refuse_sizes(TimmModel(name="resnet18", options={"drop_rate": "much"}), **size)


def test_dropout_noise_belongs_to_the_example() -> None:
    layer = KeyedDropout(0.25, layer=1)
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    values = torch.ones(64, 8, 5, 5)
    layer.keys = keys
    whole = layer(values)
    layer.keys = keys[10:20]
    assert torch.equal(layer(values[10:20]), whole[10:20])
    layer.keys = keys.flip(0)
    assert torch.equal(layer(values).flip(0), whole)


def test_dropout_of_every_kind_of_network_belongs_to_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a kind that somebody adds."""
    own = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))
    monkeypatch.setattr(build, "mlp", lambda *_, **__: own)
    model = build_model(MlpModel(), image_shape=(3, 2, 2), num_classes=3, seed=0)
    assert any(isinstance(layer, KeyedDropout) for layer in model.modules())


def test_dropout_noise_does_not_depend_on_the_layout_in_memory() -> None:
    layer = KeyedDropout(0.5)
    layer.keys = torch.arange(6)
    values = torch.ones(6, 4, 5, 7)
    other = layer(values.contiguous(memory_format=torch.channels_last))
    assert torch.equal(other, layer(values))
    assert other.is_contiguous(memory_format=torch.channels_last)


def test_dropout_of_all_leaves_nothing() -> None:
    layer = KeyedDropout(0.9985)
    layer.keys, values = torch.arange(3), torch.ones(3, 4, requires_grad=True)
    layer(values).sum().backward()
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.1])
def test_dropout_rate_and_expectation(rate: float) -> None:
    layer = KeyedDropout(rate)
    layer.keys = torch.arange(1000)
    out = layer(torch.ones(1000, 333))
    dropped = (out == 0).float()
    assert float(dropped.mean()) == pytest.approx(rate, abs=0.003)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    assert float(dropped.mean(0).std()) < 0.02
    assert float(dropped.mean(1).std()) < 0.04
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


def test_layers_and_neighbouring_keys_are_independent() -> None:
    first, second = KeyedDropout(0.5, layer=0), KeyedDropout(0.5, layer=1)
    first.keys = second.keys = torch.arange(200)
    a, b = (layer(torch.ones(200, 1000)) > 0 for layer in (first, second))
    assert abs(float((a == b).float().mean()) - 0.5) < 0.01
    assert abs(float((a[1:] == a[:-1]).float().mean()) - 0.5) < 0.01
    assert abs(float((a[:, 1:] == a[:, :-1]).float().mean()) - 0.5) < 0.01


def test_timm_dropout_is_replaced() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3))
    replace_dropout(model)
    set_noise(model, torch.arange(5))
    assert isinstance(model[1], KeyedDropout)
    assert model[1].rate == 0.3
    with pytest.raises(RuntimeError, match="set_noise"):
        model(torch.ones(4, 4))


def test_first_weights_come_by_the_key_that_says_so() -> None:
    """An export that was made elsewhere would name a file here, too."""
    config = TimmModel(name="test_resnet", options={"checkpoint_path": "somewhere.pth"})
    with pytest.raises(ConfigError, match=r"model\.checkpoint"):
        build_model(config, image_shape=(3, 32, 32), num_classes=5, seed=0)


def test_fused_attention_asks_a_replaced_dropout_for_its_rate() -> None:
    options = {"img_size": 32, "patch_size": 8, "attn_drop_rate": 0.25}
    config = TimmModel(name="test_vit", options=options)
    model = build_model(config, image_shape=(3, 32, 32), num_classes=5, seed=0).train()
    set_noise(model, torch.arange(2))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_stochastic_depth_belongs_to_the_example() -> None:
    layer = KeyedDropout(0.25, layer=3, whole=True)
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    values = torch.rand(64, 4, 3, 3) + 1
    layer.keys = keys
    out = layer(values)
    kept = out.flatten(1).ne(0)
    assert torch.equal(kept.all(1), kept.any(1))
    assert 0 < int(kept.all(1).sum()) < 64
    torch.testing.assert_close(out[kept.all(1)], values[kept.all(1)] / 0.75)
    layer.keys = keys[10:20]
    assert torch.equal(layer(values[10:20]), out[10:20])
    layer.keys = keys.flip(0)
    assert torch.equal(layer(values.flip(0)).flip(0), out)
    assert torch.equal(layer.eval()(values), values)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_stochastic_depth_keeps_the_expectation(rate: float) -> None:
    layer = KeyedDropout(rate, whole=True)
    layer.keys = torch.arange(20_000)
    out = layer(torch.ones(20_000, 2))
    assert float((out == 0).float().mean()) == pytest.approx(rate, abs=0.01)
    assert float(out.mean()) == pytest.approx(1, abs=0.02)


def test_stochastic_depth_is_replaced_and_belongs_to_the_example() -> None:
    """In a network of timm: an example's logits in training do not depend on its batch."""
    config = TimmModel(name="test_vit", options={"img_size": 32, "patch_size": 8, "drop_path_rate": 0.5})
    model = build_model(config, image_shape=(3, 32, 32), num_classes=5, seed=0).train()
    kinds = {type(module).__name__ for module in model.modules()}
    assert "DropPath" not in kinds
    assert any(isinstance(module, KeyedDropout) and module.whole for module in model.modules())
    pixels, keys = torch.rand(6, 3, 32, 32), torch.arange(6)
    set_noise(model, keys)
    together = model(pixels)
    for part in (slice(0, 1), slice(1, 6)):
        set_noise(model, keys[part])
        torch.testing.assert_close(model(pixels[part]), together[part])
    set_noise(model, keys + 1)
    assert not torch.allclose(model(pixels), together)
    set_noise(model, keys)
    assert not torch.allclose(model.eval()(pixels), together)


@pytest.mark.parametrize(("rate", "fused"), [(0.0, True), (0.25, False)])
def test_attention_that_drops_is_not_fused_and_belongs_to_the_example(rate: float, fused: bool) -> None:
    config = TimmModel(name="test_vit", options={"img_size": 32, "patch_size": 8, "attn_drop_rate": rate})
    model = build_model(config, image_shape=(3, 32, 32), num_classes=5, seed=0).train()
    found = {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    assert found == {fused}
    pixels, keys = torch.rand(4, 3, 32, 32), torch.arange(4)
    set_noise(model, keys)
    first = model(pixels)
    assert torch.equal(model(pixels), first)
    set_noise(model, keys[2:])
    torch.testing.assert_close(model(pixels[2:]), first[2:])
