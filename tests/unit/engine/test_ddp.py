"""The engine in a world of one: accumulation, clipping, hooks, averages, exact state."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpccl.checkpoint.tree import read_tree, write_tree
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.ddp import DdpEngine
from hpccl.engine.optim import averaging
from hpccl.engine.protocols import GradientHook, Weights
from hpccl.errors import ConfigError
from hpccl.models.small import cifarnet, mlp


def engine(**sections: object) -> DdpEngine:
    torch.manual_seed(0)
    model = mlp((1, 4, 4), 5, hidden=(8,))
    config = RunConfig.model_validate({"optim": {"name": "sgd", "lr": 0.1, "schedule": "constant"}, **sections})
    made = DdpEngine(model, config, Comm.solo())
    made.start(num_steps=10, task=0)
    return made


def batch(seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 4, 4, generator=generator), torch.arange(rows)


def loss(made: DdpEngine, pixels: Tensor, noise: Tensor, *, last: bool = True) -> Tensor:
    return made.forward(pixels, noise, last=last).logsumexp(1).sum() / 6


def weights(made: DdpEngine) -> Tensor:
    return torch.cat([value.flatten() for value in wholes(made.gather()).values()])


def test_accumulated_micro_batches_equal_one_batch() -> None:
    whole, split = engine(), engine()
    pixels, noise = batch()
    whole.backward(loss(whole, pixels, noise))
    for part in (slice(0, 2), slice(2, 6)):
        split.backward(loss(split, pixels[part], noise[part], last=part.stop == 6))
    torch.testing.assert_close(whole.step(), split.step())
    torch.testing.assert_close(weights(whole), weights(split))


def test_a_prior_that_does_not_reach_a_gradient_is_refused() -> None:
    """A mistake of the network, which no other start of the job mends."""
    made = engine()
    *_, last = [name for name, _ in made.module.named_parameters() if name.endswith("weight")]
    made.on_gradient([(last, GradientHook((last,), lambda gradient, _: gradient))])
    made.forward(*batch(), last=True)
    made.backward(made.module.get_parameter("1.weight").sum())
    with pytest.raises(ConfigError, match=f"the prior did not reach the gradient of '{last}'"):
        made.step()


def test_clipping_limits_the_update_and_reports_the_norm_before() -> None:
    made = engine(
        train={"clip_norm": 0.01}, optim={"name": "momentum", "lr": 1.0, "momentum": 0.0, "schedule": "constant"}
    )
    before = weights(made)
    made.backward(loss(made, *batch()))
    norm = made.step()
    assert float(norm) > 0.1
    assert abs(float((weights(made) - before).norm()) - 0.01) < 1e-5


def test_hook_fires_once_a_step_on_the_last_micro_batch() -> None:
    made = engine()
    calls = []

    def hook(gradient: Tensor, weights: Weights) -> Tensor:
        calls.append((gradient.shape, {name: weight.requires_grad for name, weight in weights.items()}))
        return gradient + 1

    remove = made.on_gradient([("1.weight", GradientHook(("1.weight", "1.bias"), hook))])
    pixels, noise = batch()
    made.backward(loss(made, pixels, noise, last=False))
    plain = dict(made.module.named_parameters())["1.weight"].grad
    assert plain is not None
    plain = plain.clone()
    made.backward(loss(made, pixels, noise))
    parameter = dict(made.module.named_parameters())["1.weight"]
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, 2 * plain + 1)
    assert calls == [(parameter.shape, {"1.weight": False, "1.bias": False})]
    remove()
    made.backward(loss(made, pixels, noise))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["sgdc", "lookahead_sgdc"])
def test_corrected_weight_decay_is_relative_to_the_largest_rate_of_the_task(name: str) -> None:
    """It is weight_decay * rate^2 / largest rate, with a rate for each task."""
    optim = {"name": name, "lr": [1.0, 0.1], "weight_decay": 0.5, "schedule": "constant"}
    made = engine(optim=optim, stream={"kind": "digits", "tasks": 2})
    made.start(num_steps=10, task=1)
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    parameters = dict(made.module.named_parameters())
    before = parameters["1.weight"].detach().clone()
    made.backward(loss(made, *batch()) * 0)
    made.step()
    torch.testing.assert_close(parameters["1.weight"].detach(), before * (1 - 0.1 * 0.5))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    made = engine()
    before = weights(made)
    made.backward(loss(made, *batch()) * float("nan"))
    assert not bool(torch.isfinite(made.step()))
    assert torch.equal(weights(made), before)


def test_average_becomes_the_weights_at_the_end() -> None:
    """After two steps of w_0, w_1, w_2: what is left of the average is 1/10, then 2/11."""
    made = engine(train={"ema": 0.5})
    w = [weights(made)]
    for _ in range(2):
        made.backward(loss(made, *batch()))
        made.step()
        w.append(weights(made))
    made.finish()
    torch.testing.assert_close(weights(made), 2 / 11 * (w[0] / 10 + 9 / 10 * w[1]) + 9 / 11 * w[2])


def test_an_average_of_few_steps_is_not_what_it_began_with() -> None:
    decays = [averaging(0.999, step) for step in range(100)]
    left = math.prod(decays)  # of the first weights, after 100 steps: a plain decay would leave 90 %
    assert left < 1e-9
    assert decays == sorted(decays)
    assert averaging(0.9, 10_000) == 0.9


def test_reset_and_frozen_copy() -> None:
    made = engine(train={"batch_size": 4, "epochs": 1, "restart": True})
    initial = made.gather()
    pixels, noise = batch()
    teacher = made.frozen(initial)
    expected = made.predict(pixels)
    made.backward(loss(made, pixels, noise))
    made.step()
    assert not torch.equal(made.predict(pixels), expected)
    assert torch.equal(teacher(pixels), expected)
    made.reset()
    assert torch.equal(made.predict(pixels), expected)


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "sgd", "lamb", "lookahead_adamw", "adafactorbv", "novograd", "nadam", "laprop"]
)
def test_state_from_a_file_continues_bit_for_bit_in_channels_last(name: str, tmp_path: Path) -> None:
    """Files hold contiguous tensors; a moment in another memory order would be paired with the wrong weight."""
    config = RunConfig.model_validate(
        {
            "optim": {"name": name, "lr": 0.01, "schedule": "constant"},
            "engine": {"kind": "ddp", "channels_last": True},
            "train": {"ema": 0.9},
        }
    )
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        made = DdpEngine(cifarnet((3, 16, 16), 5), config, Comm.solo())
        made.start(num_steps=10, task=0)
        engines.append(made)
    one, two = engines
    for seed in range(8):
        pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            write_tree(tmp_path, one.state_dict(), header={})
            two.load_state_dict(read_tree(tmp_path)[1])
        for made in engines if seed >= 2 else [one]:
            made.backward(loss(made, pixels, torch.arange(6)))
            made.step()
    assert torch.equal(weights(one), weights(two))
    one.finish()
    two.finish()
    assert torch.equal(weights(one), weights(two))


def test_state_continues_bit_for_bit() -> None:
    one = engine(optim={"name": "adamw", "lr": 0.1, "schedule": "cosine"}, train={"ema": 0.9})
    two = engine(optim={"name": "adamw", "lr": 0.1, "schedule": "cosine"}, train={"ema": 0.9})
    for seed in range(4):
        one.backward(loss(one, *batch(seed)))
        one.step()
        if seed == 1:
            two.load_state_dict(copy.deepcopy(one.state_dict()))
        if seed >= 2:
            two.backward(loss(two, *batch(seed)))
            two.step()
    assert torch.equal(weights(one), weights(two))
    one.finish()
    two.finish()
    assert torch.equal(weights(one), weights(two))


def test_bf16_keeps_weights_and_logits_in_fp32() -> None:
    made = engine(engine={"kind": "ddp", "precision": "bf16", "channels_last": True})
    pixels, noise = batch()
    assert made.forward(pixels, noise).dtype == torch.float32
    assert made.predict(pixels).dtype == torch.float32
    made.backward(loss(made, pixels, noise))
    made.step()
    assert {value.dtype for value in wholes(made.gather()).values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_engine_agrees() -> None:
    plain, compiled = engine(), engine(engine={"kind": "ddp", "compile": True})
    pixels, noise = batch()
    for made in (plain, compiled):
        made.backward(loss(made, pixels, noise))
        made.step()
    torch.testing.assert_close(weights(plain), weights(compiled))
