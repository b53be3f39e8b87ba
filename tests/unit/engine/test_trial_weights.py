"""Around a step's passes: where gradients are taken, what is put back, what hooks and BatchNorm see, exact state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpccl.checkpoint.tree import read_tree, write_tree
from hpccl.config.run import RunConfig
from hpccl.curvature.online import watch_squares
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.ddp import DdpEngine
from hpccl.engine.protocols import GradientHook, Weights, trainable
from hpccl.errors import CoverageError
from hpccl.optim.noise import Run, normal

KINDS: dict[str, dict[str, Any]] = {
    "ivon": {"kind": "ivon", "initial_curvature": 0.1, "curvature_decay": 0.9, "samples": 2},
    "sam": {"kind": "sam", "radius": 0.1},
    "bsam": {"kind": "bsam"},
    "vogn": {"kind": "vogn"},
    "soba": {"kind": "soba"},
    "affine": {"kind": "lie"},
    "multiplicative": {"kind": "lie", "group": {"kind": "multiplicative"}},
}


class Net(nn.Module):
    """One of each layer whose squares have a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.relu_(self.batch(self.conv(pixels)))
        x = self.group(x).mean(1).flatten(1)
        logits: Tensor = self.linear(self.layer(x))
        return logits


def engine(kind: str, **sections: Any) -> DdpEngine:
    torch.manual_seed(0)
    optim = {"lr": 0.01, "schedule": "constant", **KINDS[kind]}
    made = DdpEngine(Net(), RunConfig.model_validate({"optim": optim, **sections}), Comm.solo())
    made.start(num_steps=10, task=0, num_train=50)
    return made


def batch(seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(rows)


def loss(made: DdpEngine, seed: int = 0) -> Tensor:
    pixels, noise = batch(seed)
    return (made.forward(pixels, noise).logsumexp(1) - made.forward(pixels, noise)[:, 0]).sum() / len(pixels)


def weights(made: DdpEngine) -> dict[str, Tensor]:
    return {name: value for name, value in wholes(made.gather()).items() if name in made.like}


def learn(made: DdpEngine, seeds: range) -> None:
    stop = watch_squares(made.module, made.add_squares) if made.passes == 1 else lambda: None
    for seed in seeds:
        for number in range(made.passes):
            with made.perturbed(number, num_rows=6):
                pixels, noise = batch(seed)
                logits = made.forward(pixels, noise)
                made.backward((logits.logsumexp(1) - logits[:, 0]).sum() / len(pixels))
        made.step()
    stop()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vogn"])
def test_passes_are_elsewhere_and_weights_come_back_to_the_last_bit(kind: str) -> None:
    made = engine(kind)
    learn(made, range(2))
    before, moved = weights(made), []
    for number in range(made.passes):
        with made.perturbed(number, num_rows=6):
            moved.append(not torch.equal(weights(made)["conv.weight"], before["conv.weight"]))
            made.backward(loss(made))
        assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert moved == ([False, True] if kind == "sam" else [True] * made.passes)


def test_weights_come_back_also_when_a_pass_fails() -> None:
    made = engine("ivon")
    before = weights(made)
    with pytest.raises(KeyError), made.perturbed(0, num_rows=6):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_not_drawn(kind: str) -> None:
    """Else what learns would learn beside weights that are never there."""
    made = engine(kind, engine={"kind": "ddp", "channels_last": True})
    learn(made, range(1))  # VOGN draws nothing in its first step
    rows = torch.tensor([True, False, True, True, False])
    held = {"conv.weight": torch.ones(1, 1, 1, 1, dtype=torch.bool), "linear.weight": rows[:, None]}
    made.hold(held, frozenset())
    before, moved = weights(made), []
    stop = watch_squares(made.module, made.add_squares)
    for number in range(made.passes):
        with made.perturbed(number, num_rows=6):
            now = weights(made)
            assert torch.equal(now["conv.weight"], before["conv.weight"])
            assert torch.equal(now["linear.weight"][rows], before["linear.weight"][rows])
            moved.append(not torch.equal(now["linear.weight"][~rows], before["linear.weight"][~rows]))
            pixels, noise = batch(1)
            made.backward(made.forward(pixels, noise).logsumexp(1).sum())
    stop()
    assert moved == ([False, True] if kind == "sam" else [True] * made.passes)
    made.step()
    after = weights(made)
    assert torch.equal(after["conv.weight"], before["conv.weight"])
    assert torch.equal(after["linear.weight"][rows], before["linear.weight"][rows])
    assert not torch.equal(after["linear.weight"][~rows], before["linear.weight"][~rows])


def test_draws_are_functions_of_seed_task_step_pass_and_place() -> None:
    made = engine("ivon", seed=4)
    learn(made, range(1))
    before = weights(made)["linear.weight"]
    with made.perturbed(0, num_rows=6):
        moved = weights(made)["linear.weight"] - before
    assert made._optimizer is not None
    (curvature,) = (made._optimizer.state[p]["curvature"] for p in made.module.parameters() if p.shape == (5, 16))
    expected = normal(80, [Run("linear.weight", 0, 80)], (4, 0, 1, 0), torch.device("cpu")).view(5, 16)
    torch.testing.assert_close(moved, expected / (50 * (curvature + 1e-4)).sqrt(), rtol=1e-4, atol=1e-6)


def test_hooks_see_the_weights_that_the_gradient_is_taken_at() -> None:
    """So the prior's share of the objective is averaged over draws as the data's is."""
    made = engine("ivon")
    seen: list[Tensor] = []

    def hook(gradient: Tensor, values: Weights) -> Tensor:
        seen.append(values["linear.bias"].clone())
        return gradient.clone()

    made.on_gradient([("linear.bias", GradientHook(("linear.bias",), hook))])
    shown = []
    for number in range(made.passes):
        with made.perturbed(number, num_rows=6):
            shown.append(weights(made)["linear.bias"])
            pixels, noise = batch()
            made.backward(made.forward(pixels, noise).sum())
    assert len(seen) == 2
    assert all(torch.equal(one, other) for one, other in zip(seen, shown, strict=True))
    made.step()


def test_a_batch_counts_once_in_the_statistics_of_a_norm() -> None:
    plain, made = engine("vogn"), engine("sam")
    for one in (plain, made):
        for number in range(one.passes):
            with one.perturbed(number, num_rows=6):
                one.forward(*batch()).sum().backward()
    first, second = (each.module.get_buffer("batch.running_mean") for each in (plain, made))
    assert torch.equal(first, second)


def test_clipping_is_of_the_update_and_not_of_the_curvature() -> None:
    free, clipped = engine("ivon"), engine("ivon", train={"clip_norm": 1e-3})
    learn(free, range(1))
    learn(clipped, range(1))
    for one, other in zip(_states(free), _states(clipped), strict=True):
        assert torch.equal(one["curvature"], other["curvature"])
        assert not torch.equal(one["momentum"], other["momentum"])


def _states(made: DdpEngine) -> list[dict[str, Any]]:
    assert made._optimizer is not None
    return list(made._optimizer.state.values())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    made = engine("ivon")
    learn(made, range(1))
    before, kept = weights(made), [{k: v.clone() for k, v in s.items() if k != "step"} for s in _states(made)]
    for number in range(made.passes):
        with made.perturbed(number, num_rows=6):
            made.backward(loss(made) * float("nan"))
    made.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert all(torch.equal(now[k], then[k]) for now, then in zip(_states(made), kept, strict=True) for k in then)


@pytest.mark.parametrize("kind", KINDS)
def test_state_from_a_file_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    sections = {"engine": {"kind": "ddp", "channels_last": True}, "train": {"ema": 0.9}}
    one, two = engine(kind, **sections), engine(kind, **sections)
    learn(one, range(3))
    write_tree(tmp_path, one.state_dict(), header={})
    two.load_state_dict(read_tree(tmp_path)[1])
    for made in (one, two):
        learn(made, range(3, 6))
        made.finish()
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_squares_of_a_step_are_those_of_every_example_alone() -> None:
    """Behind a BatchNorm in training mode: by autograd of one example after the other, its statistics the batch's."""
    made = engine("vogn")
    pixels, noise = batch()
    found: dict[str, Tensor] = {}
    stop = watch_squares(made.module, found.update)
    made.backward((made.forward(pixels, noise).logsumexp(1) * torch.arange(1.0, 7.0)).sum() / 6)
    stop()
    expected = {name: torch.zeros_like(value) for name, value in trainable(made.module).items()}
    with torch.no_grad():
        x = made.module.get_submodule("conv")(pixels)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    for number in range(6):
        inside = made.module.get_submodule("conv")(pixels[number : number + 1])
        for name, gradient in _gradients(made.module, inside, mean, variance, weight=(number + 1) / 6).items():
            expected[name] += gradient.square()
    for name, value in expected.items():
        if not name.startswith("conv"):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8, msg=name)


def _gradients(net: nn.Module, inside: Tensor, mean: Tensor, variance: Tensor, *, weight: float) -> dict[str, Tensor]:
    """Of one example's weighted nats, with BatchNorm an affine map."""
    view = (1, 4, 1, 1)
    normed = (inside - mean.view(view)) / (variance.view(view) + 1e-5).sqrt()
    x = torch.relu(normed * net.get_parameter("batch.weight").view(view) + net.get_parameter("batch.bias").view(view))
    x = net.get_submodule("group")(x).mean(1).flatten(1)
    nats = net.get_submodule("linear")(net.get_submodule("layer")(x)).logsumexp(1) * weight
    named = trainable(net)
    return dict(zip(named, torch.autograd.grad(nats.sum(), list(named.values())), strict=True))


def test_squares_without_batch_norm_are_exact_for_every_layer() -> None:
    made = engine("vogn")
    net = made.module
    net.batch = nn.Identity()
    pixels, _ = batch()
    found: dict[str, Tensor] = {}
    stop = watch_squares(net, found.update)
    net(pixels).logsumexp(1).sum().backward()
    stop()
    for name in trainable(net):
        total = torch.zeros_like(net.get_parameter(name))
        for example in pixels:
            (gradient,) = torch.autograd.grad(net(example[None]).logsumexp(1).sum(), net.get_parameter(name))
            total += gradient.square()
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-8, msg=name)


def test_squares_are_linear_in_the_weight_of_an_image() -> None:
    """As in every other curvature: two of an image count what one of weight 2 does."""
    made = engine("vogn")
    net = made.module
    net.batch = nn.Identity()
    pixels, noise = batch()
    counts = torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0, 1.9])
    found: dict[str, Tensor] = {}
    stop = watch_squares(net, found.update, lambda: made.image_weights)
    made.weigh(lambda: counts)
    made.backward((made.forward(pixels, noise).logsumexp(1) * counts).sum())
    assert made.image_weights is None, "the next pass has other images"
    stop()
    for name in trainable(net):
        total = torch.zeros_like(net.get_parameter(name))
        for example, count in zip(pixels, counts, strict=True):
            (gradient,) = torch.autograd.grad(net(example[None]).logsumexp(1).sum(), net.get_parameter(name))
            total += count * gradient.square()
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-8, msg=name)


def test_a_step_of_vogn_learns_the_mean_square() -> None:
    made = engine("vogn")
    net = made.module
    stop = watch_squares(net, made.add_squares)
    pixels, noise = batch()
    with made.perturbed(0, num_rows=6):
        for part in (slice(0, 2), slice(2, 6)):
            made.backward(made.forward(pixels[part], noise[part], last=part.stop == 6).logsumexp(1).sum() / 6)
    stop()
    assert made._optimizer is not None
    made.step()
    state = made._optimizer.state[net.get_parameter("linear.bias")]
    torch.manual_seed(0)
    fresh = Net().train()
    gradients = torch.cat([fresh(pixels[part]).softmax(1).detach() for part in (slice(0, 2), slice(2, 6))])
    torch.testing.assert_close(state["curvature"], gradients.square().mean(0), rtol=1e-4, atol=1e-7)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        twice: Tensor = self.linear(self.linear(pixels))
        return twice


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))


def test_what_has_no_squares_is_refused_by_name() -> None:
    with pytest.raises(CoverageError, match=r"does not support Loose \(parameter 'token'\)"):
        watch_squares(Loose(), lambda squares: None)
    twice = Twice()
    watch_squares(twice, lambda squares: None)
    with pytest.raises(CoverageError, match="layer 'linear' is called twice"):
        twice(torch.ones(2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_keeps_weights_and_state_in_fp32(kind: str) -> None:
    made = engine(kind, engine={"kind": "ddp", "precision": "bf16"})
    learn(made, range(2))
    held = [value for state in _states(made) for name, value in state.items() if name != "step"]
    tensors = [value for value in held if isinstance(value, Tensor)]
    assert tensors
    assert {value.dtype for value in (*tensors, *weights(made).values())} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in tensors)
