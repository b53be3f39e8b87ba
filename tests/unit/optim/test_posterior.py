"""Posterior variances: what draws have, what the rule's paper prints, and formulae of optimisers that draw nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hpccl.config.optim import (
    AdditiveGroup,
    AffineGroup,
    BsamOptim,
    IvonOptim,
    LieOptim,
    MultiplicativeGroup,
    OptimConfig,
    SamOptim,
    SobaOptim,
    TimmOptim,
    VognOptim,
)
from hpccl.engine.optim import build_optimizer
from hpccl.optim.perturbing import Perturbing
from hpccl.optim.posterior import curvature, curvature_key, variance
from tests.unit.optim.rig import drawing, take

DRAWING: dict[str, OptimConfig] = {
    "ivon": IvonOptim(weight_decay=0.2, curvature_decay=0.9),
    "ivon with a size": IvonOptim(effective_size=7.0),
    "bsam": BsamOptim(prior_precision=2.0, augmentation=3.0, radius=1e-9),
    "vogn": VognOptim(prior_precision=2.0, augmentation=3.0, temperature=0.5, damping=0.1),
    "soba": SobaOptim(),
    "additive": LieOptim(group=AdditiveGroup(noise=0.3)),
    "affine": LieOptim(group=AffineGroup(noise=0.3, scale_lr=0.1, scale_momentum=0.5)),
    "multiplicative": LieOptim(group=MultiplicativeGroup(offset=0.2), lr=(0.01,)),
}


@pytest.mark.parametrize("name", DRAWING)
def test_it_is_the_variance_of_draws(name: str) -> None:
    config = DRAWING[name]
    layer = torch.nn.Linear(20_000, 1, bias=False)
    optimizer = build_optimizer(config, layer)
    assert isinstance(optimizer, Perturbing)
    optimizer.begin(num_train=40)
    w = layer.weight
    with torch.no_grad():
        w.fill_(0.5)
    optimizer.param_groups[0]["lr"] = 0.0  # all weights have one posterior
    if name == "vogn":
        optimizer.state[w]["curvature"] = torch.full_like(w, 1.7, requires_grad=False)
    else:
        take(optimizer, w, lambda at: at * 0.0, drawing(0))
    found = variance(config, optimizer.state[w], num_train=40)
    assert found is not None
    (trial,) = optimizer.trial(0, [w], drawing(1)) or []
    expected = (trial - w).detach().var()
    assert float(found.mean()) == pytest.approx(float(expected), rel=0.05)


def test_vogn_of_the_worked_example() -> None:
    config = VognOptim(prior_precision=50.0, augmentation=5.0, damping=1e-3)
    state = {"curvature": torch.tensor([0.02056], dtype=torch.float64)}
    found = variance(config, state, num_train=1000)
    assert found is not None
    assert float(found) == pytest.approx(0.006337135614702154, rel=1e-12)


@pytest.mark.parametrize(("name", "key"), [("adamw", "exp_avg_sq"), ("adam", "exp_avg_sq"), ("rmsprop", "square_avg")])
def test_of_timms_it_is_the_root_of_their_squares(name: str, key: str) -> None:
    """By a state that torch has made: key and meaning are its own."""
    layer = torch.nn.Linear(3, 2, bias=False)
    config = TimmOptim(name=name)
    optimizer = build_optimizer(config, layer)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 4.0]])
    squares = torch.zeros(2, 3)
    for step in range(3):
        layer.weight.grad = gradient * (step + 1)
        optimizer.step()
    state: dict[str, Tensor] = optimizer.state[layer.weight]
    assert curvature_key(config) == key
    decay = float(optimizer.param_groups[0].get("alpha", 0.999))
    for step in range(3):
        squares = decay * squares + (1 - decay) * (gradient * (step + 1)).square()
    torch.testing.assert_close(curvature(config, state[key], num_train=10, steps=3), 10 * squares.sqrt())
    found = variance(config, state, num_train=10, prior_precision=2.0)
    torch.testing.assert_close(found, 1 / (10 * squares.sqrt() + 2))


@pytest.mark.parametrize("config", [SamOptim(), TimmOptim(name="sgd")])
def test_some_have_none(config: Any) -> None:
    assert curvature_key(config) is None
    assert variance(config, {}, num_train=1) is None
