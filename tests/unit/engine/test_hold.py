"""What is held stays to the last bit, has no gradient, and leaves the rest as if it were not there."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import wholes
from hpccl.engine.ddp import DdpEngine
from hpccl.engine.protocols import GradientHook, Weights


def engine(optim: dict[str, Any]) -> DdpEngine:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    made = DdpEngine(
        net, RunConfig.model_validate({"optim": {"lr": 0.1, "schedule": "constant", **optim}}), Comm.solo()
    )
    made.start(num_steps=10, task=0)
    return made


def steps(made: DdpEngine, number: int = 3) -> torch.Tensor:
    norm = torch.zeros(())
    for seed in range(number):
        pixels = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        logits = made.forward(pixels, torch.zeros(6, dtype=torch.int64))
        made.backward(torch.nn.functional.cross_entropy(logits, torch.arange(6) % 5))
        norm = made.step()
    return norm


ROWS = torch.tensor([True, False, True, True, False])  # of the last layer; 1 and 4 learn
HELD = {
    "0.weight": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    "0.bias": torch.ones(1, dtype=torch.bool),
    "1.weight": torch.ones(1, dtype=torch.bool),
    "4.weight": ROWS[:, None],
    "4.bias": ROWS,
}


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "momentum", "weight_decay": 0.1},
        {"name": "adamw", "weight_decay": 0.1},
        {"name": "lion", "weight_decay": 0.1},
    ],
    ids=lambda optim: str(optim["name"]),
)
def test_held_weights_and_statistics_stay(optim: dict[str, Any]) -> None:
    made = engine(optim)
    steps(made)  # moments that would move weights on
    before = wholes(made.gather())
    made.hold(HELD, frozenset({"1"}))
    steps(made)
    after = wholes(made.gather())
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[name], before[name]), name
    for name in ("4.weight", "4.bias"):
        assert torch.equal(after[name][ROWS], before[name][ROWS])
        assert not torch.equal(after[name][~ROWS], before[name][~ROWS])
    assert not torch.equal(after["1.bias"], before["1.bias"])  # not held
    made.hold({}, frozenset())
    steps(made)
    released = wholes(made.gather())
    # A bias before a normalisation has no influence.
    assert [name for name in released if torch.equal(released[name], after[name])] in ([], ["0.bias"])


def test_the_norm_is_that_of_what_learns() -> None:
    made = engine({"name": "momentum"})
    made.hold(HELD, frozenset({"1"}))
    before = wholes(made.gather())
    norm = steps(made, 1)
    moved = [value - before[name] for name, value in wholes(made.gather()).items() if value.is_floating_point()]
    assert float(norm) == pytest.approx(float(torch.cat([part.flatten() for part in moved]).norm() / 0.1), rel=1e-4)


def test_a_prior_does_not_move_what_is_held() -> None:
    made = engine({"name": "sgd"})
    remove = made.on_gradient([("0.weight", GradientHook(("0.weight",), lambda g, w: g + 9.0))])
    made.hold({"0.weight": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, frozenset())
    before = wholes(made.gather())["0.weight"]
    steps(made, 1)
    remove()
    assert torch.equal(wholes(made.gather())["0.weight"], before)


def test_no_pull_is_computed_on_what_is_held_whole() -> None:
    made, called = engine({"name": "sgd"}), Counter[str]()

    def pull(name: str) -> tuple[str, GradientHook]:
        def call(gradient: torch.Tensor, weights: Weights) -> torch.Tensor:
            called[name] += 1
            return gradient + 1.0

        return name, GradientHook((name,), call)

    remove = made.on_gradient([pull("0.weight"), pull("4.weight")])
    made.hold(HELD, frozenset({"1"}))
    steps(made, 2)  # which would tell of a hook that is not reached
    assert called == {"4.weight": 2}  # some of its rows learn
    made.hold({}, frozenset())
    steps(made, 1)
    remove()
    assert called == {"4.weight": 3, "0.weight": 1}
