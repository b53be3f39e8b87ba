"""Learning rates are functions of the step; the optimiser comes from timm's factory."""

import pytest
import torch

from hpccl.config.optim import TimmOptim
from hpccl.engine.optim import build_optimizer, learning_rate
from hpccl.errors import ConfigError


def rates(config: TimmOptim, task: int = 0, num_steps: int = 100) -> list[float]:
    return [learning_rate(config, task=task, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_onecycle_rises_from_a_25th_and_falls_to_nothing() -> None:
    found = rates(TimmOptim(lr=(0.1,), schedule="onecycle", warmup=0.3))
    assert found[0] == pytest.approx(0.1 * (1 / 25 + 24 / 25 / 31))
    assert max(found) == pytest.approx(0.1, rel=0.01)
    assert 28 <= found.index(max(found)) <= 31
    assert found[-1] < 1e-3 * 0.1


def test_cosine_ends_at_the_final_share() -> None:
    found = rates(TimmOptim(lr=(1.0,), schedule="cosine", final_lr=0.1))
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_lr_is_constant_and_may_change_with_the_task() -> None:
    config = TimmOptim(lr=(1.0, 0.5), schedule="constant")
    assert set(rates(config)) == {1.0}
    assert set(rates(config, task=1)) == set(rates(config, task=7)) == {0.5}


def test_weight_decay_spares_biases() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = build_optimizer(TimmOptim(name="adamw", weight_decay=0.1), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.1
    assert {decays[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)} == {0.0}


@pytest.mark.parametrize("changes", [{"name": "adamwv"}, {"name": "sgd", "options": {"colour": 1}}])
def test_wrong_optimiser_is_a_clear_error(changes: dict[str, object]) -> None:
    with pytest.raises(
        ConfigError, match=r"optim.name '(adamwv' was refused: .*similar: adamw,|sgd' with options .* was refused)"
    ):
        build_optimizer(TimmOptim(**changes), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
